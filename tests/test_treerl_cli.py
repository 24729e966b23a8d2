"""treerl.py seen from outside: the command line, kill and resume."""

import json
import re
import shutil

import pytest
import torch
from outside import (
    BAD_ARGUMENTS,
    BAD_FOLDERS,
    MACHINE,
    NASTY,
    Script,
    assert_bfloat16,
    assert_chains,
    assert_limits,
    assert_loads_as_qwen3,
    assert_same_first_step,
    assert_small_run,
    assert_stopped_before_breaking,
    assert_summary,
    assert_trained_model,
    draw_tree,
    lines,
    metrics,
    snapshot,
)
from test_tasks import gsm8k, hotpot, math500, math_record

import treerl
from treerl import Args, Problem, Solver

SCRIPT = Script(treerl)

@pytest.fixture
def math_verify():
    """For the tests in which answers in LaTeX are compared, or files that have such answers are read."""
    return pytest.importorskip("math_verify")


# -------------------------------------------------------------------------------------------------------- command line
KEYS = {"event", "step", "reward", "success", "pass_rate", "generated_tokens", "forwarded_tokens", "loss", "kl",
        "entropy", "grad_norm", "lr", "sampler_gap", *MACHINE}
# Just enough supervised steps that some leaves earn more than others: without that all advantages and gradients are 0.
SMALL = ["--sft-steps", "32", "--ops", "5", "--prompts", "3", "--eval-prompts", "4", "--M", "2", "--max-tokens", "32",
         "--save-every", "1"]
FIVE = ["--steps", "5", "--epochs", "2", "--lr", "0.0005", "--warmup", "2", "--kl-coef", "0.01"]

def draw(out):
    """draw_tree, after a check that all nodes but the prompt have an R(s) or A, and exactly the leaves an outcome."""
    labels, edges, leaves = draw_tree(out)
    for node, label in labels.items():
        note = re.search(r"<br>(?:R\(s\)|A) = [+-]\d+\.\d\d(, right|, wrong)?(, not kept)?$", label)
        assert bool(note) == (node != 0), label
        assert not note or bool(note[1]) == (node in leaves) and (not note[2] or node in leaves), label
    return labels, edges, leaves

@pytest.fixture(scope="session")
def files(models, tmp_path_factory):
    """A folder of data files and models, good and bad, that many tests use and none changes."""
    folder = tmp_path_factory.mktemp("data") / "files"
    shutil.copytree(models, folder)
    good = lines([gsm8k(f"{NASTY} {i}", f"#### {i}") for i in range(6)])
    (folder / "gsm8k.jsonl").write_text(good)
    (folder / "math500.jsonl").write_text(lines([math500(f"{NASTY} {i}", f"\\frac{{{i}}}{{2}}") for i in range(6)]))
    (folder / "math.json").write_text(json.dumps([math_record(f"{NASTY} {i}") for i in range(6)], indent=1))
    (folder / "empty.json").write_text("")
    (folder / "cut.jsonl").write_text(good[: len(good) // 2 + 40])
    (folder / "foreign.json").write_text(json.dumps([hotpot()] * 3))
    (folder / "one.jsonl").write_text(lines([gsm8k()]))
    return folder

def test_built_in_run_leaves_its_metrics(whole):
    assert_small_run(metrics(whole[0]), 5, KEYS)
    steps = metrics(whole[0], "train")
    assert all(row["kl"] > 0 for row in steps[1:])  # from the second step on it is not the reference model any more
    assert all(0 <= row["reward"] == row["success"] <= row["pass_rate"] <= 1 for row in steps)
    assert [row["lr"] for row in steps] == pytest.approx([0.00025, *[0.0005] * 4])
    # Three prompts of 9 tokens and all sampled tokens, less one per prompt, go through the model.
    assert all(0 < row["forwarded_tokens"] <= 3 * 9 + row["generated_tokens"] - 3 for row in steps)
    # What the tests of resuming stand on: the weights did move, and differently at each step.
    assert all(row["grad_norm"] > 0 for row in steps[1:]) and any(row["reward"] > 0 for row in steps)
    assert len({row["loss"] for row in steps[1:]}) == 4

def test_built_in_run_draws_a_tree(whole):
    labels, edges, leaves = draw(whole[0])
    assert re.fullmatch(r"Modulo 11, from \d+:( [-+*]\d){5}", labels[0])
    assert len(leaves) <= 2 * (1 + 2 * 1 * 2)  # M (1 + N L T)
    assert [parent for parent, _ in edges].count(0) >= 2 < len(leaves)  # two trees at least, with forks

def test_built_in_run_ends_with_a_summary(whole):
    assert_summary(*whole, ("generated_tokens", "forwarded_tokens"))

def test_built_in_run_leaves_a_model_for_transformers(whole):
    assert_trained_model(whole[0], "Modulo 11, from 3: +4 *2 -1\n 3 +4 = 7\n#### 10", most=16)

def test_a_folder_as_model_and_recomputed_activations_change_nothing(quick_run, whole, tmp_path):
    assert_same_first_step(quick_run, tmp_path, whole[0], *SMALL, *FIVE)

def test_chains_in_bfloat16_without_a_reference(quick_run, whole, tmp_path):
    arguments = [*SMALL, "--method", "chainrl", "--M", "6", "--dtype", "bfloat16", "--prompts", "4", "--steps", "2",
                 "--model", whole[0] / "start"]
    assert quick_run(tmp_path, *arguments).returncode == 0
    (out,) = (tmp_path / "runs").iterdir()  # where a run goes without --out
    assert out.name.startswith("treerl-")
    steps = metrics(out, "train")
    assert [row["kl"] for row in steps] == [None, None] and any(row["grad_norm"] > 0 for row in steps)
    assert_bfloat16(out)
    _, edges, leaves = draw(out)
    assert_chains(edges, leaves, 6)

@pytest.mark.parametrize("method, N, L, T, most", [
    ("treerl", 3, 2, 1, 2 * (1 + 3 * 2 * 1)), ("treerl", 1, 1, 3, 2 * (1 + 1 * 1 * 3)), ("treerl", 2, 0, 2, 2),
    ("treerl", 0, 2, 2, 2), ("random", 2, 1, 2, 2 * (1 + 2 * 1 * 2)), ("random", 3, 2, 1, 2 * (1 + 3 * 2 * 1)),
])
def test_the_sizes_of_trees(quick_run, whole, tmp_path, method, N, L, T, most):
    arguments = [*SMALL, "--method", method, "--N", N, "--L", L, "--T", T, "--steps", "1", "--out", "out"]
    assert quick_run(tmp_path, *arguments, "--model", whole[0] / "start").returncode == 0
    _, edges, leaves = draw(tmp_path / "out")
    if most == 2:
        assert_chains(edges, leaves, 2)
    else:
        assert 2 < len(leaves) <= most

def test_other_places_are_forked_at_random(quick_run, whole, tmp_path):
    # The same model, problems and random numbers for the trunks, so that what differs is the search.
    for method in ("treerl", "random"):
        arguments = [*SMALL, "--method", method, "--steps", "1", "--out", method, "--model", whole[0] / "start"]
        assert quick_run(tmp_path, *arguments).returncode == 0
    assert (tmp_path / "treerl" / "tree.md").read_text() != (tmp_path / "random" / "tree.md").read_text()

def test_some_leaves_are_kept_and_a_right_one_among_them(quick_run, whole, tmp_path):
    seen = 0
    for seed, keep in enumerate([3, 1, 1, 1]):
        arguments = [*SMALL, "--keep", keep, "--steps", "1", "--seed", seed, "--out", seed, "--prompts", "6"]
        assert quick_run(tmp_path, *arguments, "--model", whole[0] / "start").returncode == 0
        labels, _, leaves = draw(tmp_path / str(seed))
        right = {leaf for leaf in leaves if ", right" in labels[leaf]}
        kept = {leaf for leaf in leaves if "not kept" not in labels[leaf]}
        assert len(kept) == keep < len(leaves)
        assert not right or right & kept
        seen += keep == 1 and 0 < len(right) < len(leaves) / 2
    assert seen > 1, "too few right leaves in the runs, so this test has shown nothing"

def test_no_steps(quick_run, whole, tmp_path):
    result = quick_run(tmp_path, *SMALL, "--steps", "0", "--model", whole[0] / "start", "--out", "out")
    assert result.returncode == 0 and "0 steps, 0 generated tokens" in result.stdout
    assert [(row["event"], row["step"]) for row in metrics(tmp_path / "out")] == [("eval", 0)]

def test_limits_of_a_model_that_is_given(quick_run, whole, tmp_path):
    arguments = ["--steps", "0", "--eval-prompts", "2", "--model", whole[0] / "start", "--out", "out"]
    assert_limits(quick_run(tmp_path, *arguments), tmp_path / "out", lr=1.5e-6, max_tokens=8192)

def assert_searched(result, out, problems):
    """A run with --eval-only left one row and printed what is in it, and neither trained nor saved anything."""
    assert result.returncode == 0, result.stderr[-3000:]
    (row,) = metrics(out)
    assert (row["event"], row["step"], row["problems"]) == ("search", 0, problems)
    assert row.keys() == {"event", "step", "problems", "generated_tokens", "pass_rate", "accuracy",
                          "distinct_answers_per_1000_tokens"}
    assert 0 <= row["accuracy"] <= row["pass_rate"] <= 1 and row["generated_tokens"] > 0
    assert row["pass_rate"] * problems == pytest.approx(round(row["pass_rate"] * problems))  # a number of problems
    *lines, last = result.stdout.splitlines()
    assert last == f"metrics in {out.name}/metrics.jsonl" or last.startswith("metrics in runs/treerl-")
    printed = dict(re.fullmatch(r"(.*\S) +(\S+)", line).groups() for line in lines)
    assert printed.keys() == {name.replace("_", " ") for name in row.keys() - {"event", "step"}}
    for name, value in printed.items():
        assert float(value.replace(",", "")) == pytest.approx(row[name.replace(" ", "_")], abs=5e-5)
    assert "training" not in result.stderr and "Traceback" not in result.stderr
    return row

def test_search_only_on_built_in_problems(quick_run, whole, tmp_path):
    arguments = [*SMALL, "--eval-only", "--eval-prompts", "20", "--model", whole[0] / "start", "--out", "out"]
    row = assert_searched(quick_run(tmp_path, *arguments), tmp_path / "out", 20)
    assert row["pass_rate"] > 0 and row["distinct_answers_per_1000_tokens"] > 0
    chains = quick_run(tmp_path, *arguments[:-1], "chains", "--method", "chainrl")
    assert assert_searched(chains, tmp_path / "chains", 20)["generated_tokens"] < row["generated_tokens"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.jsonl"]

def test_search_only_with_a_model_warm_started_for_it(quick_run, tmp_path):
    result = quick_run(tmp_path, *SMALL, "--sft-steps", "2", "--eval-only", "--out", "out")
    assert_searched(result, tmp_path / "out", 4)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.jsonl", "start"}

@pytest.mark.parametrize("wanted, problems", [("200", 6), ("4", 4), ("1", 1)])
def test_search_only_on_all_of_a_file(quick_run, files, tmp_path, wanted, problems):
    arguments = ["--model", files / "qwen3", "--data", files / "gsm8k.jsonl", "--eval-only", "--eval-prompts", wanted]
    result = quick_run(tmp_path, *arguments, "--M", "2", "--max-tokens", "8", "--out", "out")
    assert_searched(result, tmp_path / "out", problems)

def test_a_qwen3_with_a_chat_template_on_gsm8k(quick_run, files, tmp_path):
    arguments = ["--model", files / "qwen3", "--data", files / "gsm8k.jsonl", "--steps", 1, "--prompts", 2, "--M", 3,
                 "--max-tokens", 16, "--out", "out"]
    process = quick_run(tmp_path, *arguments)
    assert process.returncode == 0, process.stderr[-3000:]
    (step,), evals = metrics(tmp_path / "out", "train"), metrics(tmp_path / "out", "eval")
    assert KEYS <= set(step)
    assert 0 < step["generated_tokens"] <= 2 * 3 * (1 + 2 * 1 * 2) * 16  # no solution is longer than --max-tokens
    assert step["lr"] == pytest.approx(1.5e-7)  # 1.5e-6 in 10 steps
    assert [row["step"] for row in evals] == [0, 1] and "held-out success" in process.stdout
    labels, _, leaves = draw(tmp_path / "out")
    assert 3 < len(leaves) <= 3 * (1 + 2 * 1 * 2) and "wrote" in labels[0]
    assert_loads_as_qwen3(tmp_path / "out" / "final")

@pytest.mark.parametrize("name", ["math500.jsonl", "math.json"])
def test_a_qwen3_with_a_chat_template_on_math(math_verify, quick_run, files, tmp_path, name):
    arguments = ["--model", files / "qwen3", "--data", files / name, "--steps", 1, "--prompts", 2, "--M", 2,
                 "--max-tokens", 16]
    result = quick_run(tmp_path, *arguments, "--out", "out")
    assert result.returncode == 0, result.stderr[-3000:]
    assert [row["step"] for row in metrics(tmp_path / "out")] == [0, 1, 1]
    assert "wrote" in draw(tmp_path / "out")[0][0]
    assert_loads_as_qwen3(tmp_path / "out" / "final")
    result = quick_run(tmp_path, *arguments[:4], "--eval-only", "--M", 2, "--max-tokens", 16, "--out", "search")
    assert_searched(result, tmp_path / "search", 6)

def test_a_run_that_breaks_its_weights_stops_and_says_so(quick_run, whole, tmp_path):
    arguments = [*SMALL, *FIVE, "--epochs", "1", "--warmup", "0", "--lr", "1e10", "--prompts", "8",
                 "--model", whole[0] / "start"]
    assert_stopped_before_breaking(quick_run(tmp_path, *arguments, "--out", "out"), tmp_path / "out")

def prompt(folder, problem, **given):
    model, tokenizer = treerl.load_model(str(folder), torch.device("cpu"))
    return tokenizer.decode(Solver(model, tokenizer, Args(**given), [], []).root(problem).tokens)

def test_the_prompt(files, whole):
    problem = Problem("What is 2 + 2?\n", "4")
    asked = prompt(files / "qwen3", problem)
    assert asked.startswith("<|im_start|>user\n") and asked.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "\\boxed{}" in asked and problem.text in asked
    assert prompt(files / "qwen3", problem, data="gsm8k.jsonl") == asked
    # Without a chat template: a problem of a file with the request, a built-in one, as in the warm start, bare.
    plain = prompt(whole[0] / "start", problem, data="gsm8k.jsonl")
    assert "\\boxed{}" in plain and plain.endswith(problem.text)
    assert prompt(whole[0] / "start", problem) == problem.text


# ------------------------------------------------------------------------------------------------ kill, stop and resume
def test_a_killed_run_that_is_resumed_equals_one_that_was_not(quick_run, whole, tmp_path):
    SCRIPT.assert_resumes_after_a_kill(quick_run, tmp_path, whole[0], *SMALL, *FIVE)

def test_a_run_stopped_by_ctrl_c_saves_and_can_be_resumed(quick_run, whole, tmp_path):
    # Its model is the folder that `whole` warm-started, so it is to be the same run.
    SCRIPT.assert_resumes_after_ctrl_c(quick_run, tmp_path, whole[0], *SMALL, *FIVE, "--model", whole[0] / "start")


# ----------------------------------------------------------------------------------------------------------- bad input
OWN_BAD_ARGUMENTS = re.split(r"\||\n\s*", """
    --method grpo|--method TreeRL|--T 0|--T -1|--T 1.5|--keep 0|--keep all|--ops 4|--ops 33|--max-tokens 0
    --sft-steps -1|--K 2|--eval-only=yes|--eval 4|--eval-every -1|--max-turns 3|--search-url http://127.0.0.1:8000
""".strip())

@pytest.mark.parametrize("line", BAD_ARGUMENTS + OWN_BAD_ARGUMENTS)
def test_bad_argument(quick_run, tmp_path, line):
    SCRIPT.assert_refused_and_nothing_written(quick_run, tmp_path, re.split("[ =]", line)[0], line)

@pytest.mark.parametrize("flag, line", [
    ("--data", "--data {files}/missing.json"), ("--data", "--data {files}/empty.json"), ("--data", "--data {files}"),
    ("--data", "--data {files}/cut.jsonl --model {files}/qwen3"), ("--data", "--data {files}/foreign.json"),
    ("--data", "--data {files}/qwen3/model.safetensors"), ("--data", "--data {files}/one.jsonl"),
    ("--data", "--data {files}/gsm8k.jsonl"), ("--data", "--data {files}/gsm8k.jsonl --eval-only"),  # without --model
    ("--data", "--data {files}/one.jsonl --eval-only"), ("--data", "--data {files}/empty.json --eval-only"),
    ("--model", "--model {files}/short --data {files}/gsm8k.jsonl"),
    ("--model", "--model {files}/short --data {files}/gsm8k.jsonl --eval-only"),
    ("--eval-only", "--resume {runs}/good --eval-only"), ("--keep", "--resume {runs}/good --keep 4"),
    ("--method", "--resume {runs}/good --method chainrl"), ("--data", "--resume {runs}/good --data gsm8k.jsonl"),
    *BAD_FOLDERS,
])
def test_bad_file_or_folder(quick_run, files, runs, tmp_path, flag, line):
    line = line.format(files=files, runs=runs)
    SCRIPT.assert_refused_and_nothing_written(quick_run, tmp_path, flag, line, files, runs)

def test_bad_data_is_named_with_its_line(quick_run, files, tmp_path):
    SCRIPT.assert_bad_data_is_named_with_its_line(quick_run, tmp_path, files / "cut.jsonl")

def test_a_process_of_its_own_is_as_quiet(files, tmp_path):
    # The cases above run in copies of one process, where all imports are done; so once without that help.
    SCRIPT.assert_refused(SCRIPT.run(tmp_path, "--data", files / "cut.jsonl"), "--data")
    assert not snapshot(tmp_path)

def test_nothing_slow_is_imported_before_the_arguments_are_right(tmp_path):
    SCRIPT.assert_refused_before_slow_imports(tmp_path, "--method", "grpo")
