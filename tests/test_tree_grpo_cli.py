"""tree_grpo.py seen from outside: the command line, kill and resume."""

import json
import re
import shutil
import signal
import time

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
    wait_for_step,
)
from test_tasks import gsm8k, hotpot, musique

import tree_grpo
from tree_grpo import Agent, Args, read_questions

SCRIPT = Script(tree_grpo)


# -------------------------------------------------------------------------------------------------------- command line
KEYS = {"event", "step", "reward", "success", "generated_tokens", "forwarded_tokens", "tool_calls", "loss", "kl",
        "entropy", "grad_norm", "lr", "sampler_gap", *MACHINE}
# Just enough supervised steps that some leaves earn more than others: without that all advantages and gradients are 0.
SMALL = ["--sft-steps", "20", "--prompts", "2", "--eval-prompts", "4", "--turn-tokens", "16", "--save-every", "1"]
FIVE = ["--steps", "5", "--epochs", "2", "--lr", "0.003", "--warmup", "2"]

def draw(out):
    """draw_tree, after a check that leaves and no other nodes have a reward."""
    labels, edges, leaves = draw_tree(out)
    assert all(("<br>R = " in label) == (node in leaves) for node, label in labels.items())
    return labels, edges, leaves

@pytest.fixture(scope="session")
def files(models, tmp_path_factory):
    """A folder of data files and models, good and bad, that many tests use and none changes."""
    folder = tmp_path_factory.mktemp("data") / "files"
    shutil.copytree(models, folder)
    good = json.dumps([hotpot(f"{NASTY} {i}") for i in range(6)], indent=1)
    (folder / "hotpot.json").write_text(good)
    (folder / "empty.json").write_text("")
    (folder / "cut.json").write_text(good[: len(good) // 2])
    (folder / "foreign.jsonl").write_text(lines([gsm8k()] * 3))
    (folder / "one.jsonl").write_text(lines([musique()]))
    return folder

def test_built_in_run_leaves_its_metrics(whole):
    assert_small_run(metrics(whole[0]), 5, KEYS)
    steps = metrics(whole[0], "train")
    # What the tests of resuming stand on: the weights did move, and differently at each step.
    assert all(row["grad_norm"] > 0 for row in steps[1:]) and steps[-1]["kl"] > 0
    assert len({row["loss"] for row in steps[1:]}) == 4

def test_built_in_run_draws_a_tree(whole):
    labels, _, leaves = draw(whole[0])
    assert re.match(r"(Who|Where) is the .* of \w+\?$", labels[0])
    assert len(leaves) == 2 * (1 + 2)  # M (1 + N L)
    assert all(re.search(r"<br>R = (0|0\.1|0\.2|0\.8|1), A = [+-]\d\.\d\d$", labels[leaf]) for leaf in leaves)

def test_built_in_run_ends_with_a_summary(whole):
    assert_summary(*whole, ("generated_tokens", "forwarded_tokens", "tool_calls"))

def test_built_in_run_leaves_a_model_for_transformers(whole):
    assert_trained_model(whole[0], "Who is the mayor of the birthplace of Ada?", most=14)

def test_a_folder_as_model_and_recomputed_activations_change_nothing(quick_run, whole, tmp_path):
    assert_same_first_step(quick_run, tmp_path, whole[0], *SMALL, *FIVE)

def test_chains_in_bfloat16_on_the_late_task_without_a_reference(quick_run, tmp_path):
    arguments = [*SMALL, "--prompts", "4", "--method", "grpo", "--M", "3", "--dtype", "bfloat16", "--hard", "late"]
    assert quick_run(tmp_path, *arguments, "--kl-coef", "0", "--steps", "2").returncode == 0
    (out,) = (tmp_path / "runs").iterdir()  # where a run goes without --out
    assert out.name.startswith("tree_grpo-")
    steps = metrics(out, "train")
    assert [row["kl"] for row in steps] == [None, None] and any(row["grad_norm"] > 0 for row in steps)
    assert_bfloat16(out)
    _, edges, leaves = draw(out)
    assert_chains(edges, leaves, 3)

def test_limits_of_a_model_that_is_given(quick_run, whole, tmp_path):
    arguments = ["--steps", "0", "--eval-prompts", "2", "--model", whole[0] / "start", "--out", "out"]
    assert_limits(quick_run(tmp_path, *arguments), tmp_path / "out", lr=1e-6, turn_tokens=500, topk=1)

def test_a_qwen3_with_a_chat_template_on_hotpotqa(files, tmp_path):
    arguments = ["--model", files / "qwen3", "--data", files / "hotpot.json", "--steps", 1, "--prompts", 2,
                 "--eval-prompts", 2, "--max-turns", 2, "--turn-tokens", 8, "--out", "out"]
    process = SCRIPT.ran(tmp_path, *arguments)
    (step,), evals = metrics(tmp_path / "out", "train"), metrics(tmp_path / "out", "eval")
    assert KEYS <= set(step) and step["generated_tokens"] > 0 and step["lr"] == pytest.approx(1e-7)  # 1e-6 in 10 steps
    assert [row["step"] for row in evals] == [0, 1] and "held-out success" in process.stdout
    labels, _, leaves = draw(tmp_path / "out")
    assert len(leaves) == 6 and "wrote" in labels[0]
    assert_loads_as_qwen3(tmp_path / "out" / "final")

@pytest.mark.parametrize("lr", ["1e3", "1e10"])
def test_a_run_that_breaks_its_weights_stops_and_says_so(quick_run, whole, tmp_path, lr):
    # After a first step of this size no number is finite: with the first rate not the gradients of the second step,
    # with the second rate not even the probabilities to draw from.
    arguments = [*SMALL, *FIVE, "--epochs", "1", "--warmup", "0", "--lr", lr, "--model", str(whole[0] / "start")]
    assert_stopped_before_breaking(quick_run(tmp_path, *arguments, "--out", "out"), tmp_path / "out")

def test_the_chat_template_makes_the_prompt(files):
    model, tokenizer = tree_grpo.load_model(str(files / "qwen3"), torch.device("cpu"))
    args = Args(data=str(files / "hotpot.json"), max_turns=3)
    question = read_questions(args.data)[0]
    agent = Agent(model, tokenizer, args, [], [])
    prompt = tokenizer.decode(agent.root(question).tokens)
    assert prompt.startswith("<|im_start|>user\n") and prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert question.text in prompt and "<search>" in prompt and "3 turns" in prompt


# ------------------------------------------------------------------------------------------------ kill, stop and resume
def test_a_killed_run_that_is_resumed_equals_one_that_was_not(whole, tmp_path):
    SCRIPT.assert_resumes_after_a_kill(SCRIPT.run, tmp_path, whole[0], *SMALL, *FIVE)

def test_a_run_stopped_by_ctrl_c_saves_and_can_be_resumed(quick_run, whole, tmp_path):
    SCRIPT.assert_resumes_after_ctrl_c(quick_run, tmp_path, whole[0], *SMALL, *FIVE)

def test_a_run_stopped_in_its_warm_start_says_what_to_do(quick_run, tmp_path):
    process = SCRIPT.begin(tmp_path, *SMALL, "--sft-steps", "5000", "--out", "out")
    while "warm start" not in (text := process.stderr.read(20)):  # "" at its end
        assert text, "it ended before"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    last = errors.splitlines()[-1]
    assert process.returncode == 130 and "Traceback" not in errors
    assert last.startswith("stopped; ") and "another folder" in last
    SCRIPT.assert_refused(quick_run(tmp_path, *SMALL, "--out", "out"), "--out")
    SCRIPT.assert_refused(quick_run(tmp_path, "--resume", "out"), "--resume")

def test_ctrl_c_twice(tmp_path):
    arguments = [*SMALL, "--prompts", "80", "--save-every", "100", "--steps", "9", "--out", "out"]  # no step is short
    process = SCRIPT.begin(tmp_path, *arguments)
    wait_for_step(process, tmp_path / "out", 1)
    time.sleep(0.5)  # the row is written before the step has quite ended; now the next one has begun
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and errors.splitlines()[-1].startswith("stopped; ")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint*")] == ["checkpoint-000000"]


# ----------------------------------------------------------------------------------------------------------- bad input
OWN_BAD_ARGUMENTS = re.split(r"\||\n\s*", """
    --method ppo|--advantage none|--hard never|--K 0|--max-turns 0|--turn-tokens 0|--topk 0|--hops 1|--hops 5
    --search-url http://127.0.0.1:8000/retrieve|--advantage intra --method grpo|--advantage intra --L 0
    --advantage intra --K 1
""".strip())

@pytest.mark.parametrize("line", BAD_ARGUMENTS + OWN_BAD_ARGUMENTS)
def test_bad_argument(quick_run, tmp_path, line):
    SCRIPT.assert_refused_and_nothing_written(quick_run, tmp_path, re.split("[ =]", line)[0], line)

@pytest.mark.parametrize("flag, line", [
    ("--data", "--data {files}/missing.json"), ("--data", "--data {files}/empty.json"), ("--data", "--data {files}"),
    ("--data", "--data {files}/cut.json --model {files}/qwen3"), ("--data", "--data {files}/foreign.jsonl"),
    ("--data", "--data {files}/qwen3/model.safetensors"), ("--data", "--data {files}/one.jsonl"),
    ("--model", "--model {files}/short --data {files}/hotpot.json"), ("--model", "--data {files}/hotpot.json"),
    ("--kl-coef", "--resume {runs}/good --steps 9 --kl-coef 0"), *BAD_FOLDERS,
])
def test_bad_file_or_folder(quick_run, files, runs, tmp_path, flag, line):
    line = line.format(files=files, runs=runs)
    SCRIPT.assert_refused_and_nothing_written(quick_run, tmp_path, flag, line, files, runs)

def test_bad_data_is_named_with_its_line(quick_run, files, tmp_path):
    SCRIPT.assert_bad_data_is_named_with_its_line(quick_run, tmp_path, files / "cut.json")

def test_a_process_of_its_own_is_as_quiet(files, tmp_path):
    # The cases above run in copies of one process, where all imports are done; so once without that help.
    SCRIPT.assert_refused(SCRIPT.run(tmp_path, "--model", files / "no-weights"), "--model")
    assert not snapshot(tmp_path)

def test_nothing_slow_is_imported_before_the_arguments_are_right(tmp_path):
    SCRIPT.assert_refused_before_slow_imports(tmp_path, "--method", "ppo")
