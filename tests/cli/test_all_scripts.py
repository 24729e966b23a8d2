"""What the three scripts have in common, as their user sees it: the files and columns of a run,
stopping and resuming it, models, and what is refused."""

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from cli.outside import (
    ENVIRONMENT,
    README,
    ROOT,
    SCRIPTS,
    TEMPLATE,
    assert_same_run,
    equal_weights,
    metrics,
    refusal,
    snapshot,
    timeless,
    weights,
)

TABLE = README.partition("| column |")[2].partition("\n\n")[0]
FIRST_CELLS = " ".join(re.findall(r"^\|([^|]*)\|", TABLE, re.MULTILINE))
COLUMNS = {"event", "step", *re.findall(r"`(\w+)`", FIRST_CELLS)}
STEP = """event step reward success generated_tokens forwarded_tokens entropy loss kl clip_fraction
grad_norm sampler_gap lr seconds seconds_sampling peak_gb"""


def start(script, folder, line):
    """A process of its own."""
    command = [sys.executable, str(script.path), *line.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **pipes)


# ------------------------------------------------------------------------------------------- a run
def test_a_run_leaves_its_metrics(script, whole):
    rows = metrics(whole)
    first, *steps, last = rows
    assert [row["event"] for row in rows] == ["eval", *["train"] * 5, "eval"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 5]
    for row in steps:
        assert row.keys() == {*STEP.split(), *script.columns.split()}
        assert 0 < row["seconds_sampling"] < row["seconds"]
        assert row["peak_gb"] == 0  # there is no GPU
        assert all(math.isfinite(row[k]) for k in row.keys() - {"event"})
        assert 0 <= row["success"] <= 1
        assert row["sampler_gap"] < 1e-5
    for row in (first, last):
        assert 0 <= row["success"] <= 1
        assert 0 <= row["greedy_success"] <= 1
    assert set().union(*rows) <= COLUMNS  # README explains them
    lr = steps[-1]["lr"]
    assert [row["lr"] for row in steps] == pytest.approx([lr / 2, *[lr] * 4])  # --warmup 2
    # What the tests of resuming stand on: the weights did move, and differently at each step.
    assert all(row["grad_norm"] > 0 and row["kl"] > 0 for row in steps[1:])
    assert len({row["loss"] for row in steps[1:]}) == 4


def test_a_run_says_what_it_does_and_leaves_a_model(script, whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first, before, after, last = (whole.parent / "stdout").read_text().splitlines()
    assert re.fullmatch(r"[45]\d\d,\d{3} parameters, cpu, float32; .*4 held out", first)
    for line, row in zip((before, after), metrics(whole, "eval")):
        shares = f"{row['success']:.3f} sampled, {row['greedy_success']:.3f} greedy"
        assert line == f"step {row['step']}: held-out success {shares}"
    assert last == "model in out/final"
    errors = (whole.parent / "stderr").read_text()
    assert "warm start" in errors
    assert "training" in errors
    assert "Traceback" not in errors

    written = {"metrics.jsonl", script.drawing, "episode.md", "start", "final", "checkpoint-000005"}
    assert {path.name for path in whole.iterdir()} == written
    model = AutoModelForCausalLM.from_pretrained(whole / "final")
    tokenizer = AutoTokenizer.from_pretrained(whole / "final")
    assert model.dtype == torch.float32
    ids = tokenizer(script.prompt, return_tensors="pt")
    assert len(ids["input_ids"][0]) <= 30  # the task's own words are whole tokens
    assert model(**ids).logits.isfinite().all()
    assert not equal_weights(whole / "start", whole / "final")


def test_an_evaluation_leaves_an_episode(script, whole):
    text = (whole / "episode.md").read_text()
    head, words = text.split("~~~~text\n")
    reward = float(re.search(r"Reward ([-\d.]+)\.", head)[1])
    assert reward in (0, 0.1, 0.2, 0.8, 1)
    (last,) = (row for row in metrics(whole, "eval") if row["step"] == 5)
    if last["greedy_success"] in (0, 1):
        assert (reward > 0.5) == last["greedy_success"]
    prompt = {
        "tree_grpo": r"(Who|Where) is the .* of \w+\?",
        "treerl": r"Modulo 11, from \d+: .*\n",
    }
    prompt["graph_gpo"] = r"^You are in the .*\n> \w+"
    assert re.search(prompt[script.name], words)
    assert words.endswith("\n~~~~\n")
    assert script.name != "graph_gpo" or ": put a " in head


def test_a_folder_as_model_and_recomputed_activations_change_nothing(script, run, whole, out):
    # The model of `whole` takes the same first step, up to rounding; and activations that are
    # computed again in the backward pass are the same activations.
    line = f"{script.small} {script.five} --steps 1 --model {whole / 'start'}"
    run.well(f"{line} --grad-checkpointing --out out")
    assert not (out / "start").exists()  # nothing was warm-started
    (before, step, _), (was_before, was, *_) = timeless(out), timeless(whole)
    assert before == was_before
    assert step.keys() == was.keys()
    for name in step.keys() - {"event"}:
        assert step[name] == pytest.approx(was[name], rel=1e-4, abs=1e-7), name


def test_evaluations_on_the_way_and_the_seed(script, run, whole, tmp_path):
    line = f"{script.small} {script.five} --steps 3 --model {whole / 'start'}"
    run.well(f"{line} --eval-every 2 --out same")
    run.well(f"{line} --seed 1 --out other")
    rows, expected = timeless(tmp_path / "same"), timeless(whole)
    events = [("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3)]
    assert [(row["event"], row["step"]) for row in rows] == events
    assert [*rows[:3], rows[4]] == expected[:4]  # an evaluation changes no step
    rows = timeless(tmp_path / "other")
    assert rows[0] == expected[0]  # held-out tasks, and the draws in them, are always the same
    assert all(row["entropy"] != was["entropy"] for row, was in zip(rows[1:4], expected[1:4]))


def test_bfloat16_without_a_reference(script, run, whole, tmp_path):
    line = f"{script.small} --dtype bfloat16 --kl-coef 0 --steps 2 --model {whole / 'start'}"
    run.well(f"{line} --micro-tokens 1")
    (out,) = (tmp_path / "runs").iterdir()  # where a run goes without --out
    assert out.name.startswith(f"{script.name}-")
    steps = metrics(out, "train")
    assert [row["kl"] for row in steps] == [None, None]
    assert any(row["grad_norm"] > 0 for row in steps)
    assert max(row["sampler_gap"] or 0 for row in steps) > 1e-5  # in float32 it is below
    assert all(tensor.dtype == torch.float32 for tensor in weights(out / "final").values())


def test_a_model_with_a_chat_template(script, run, files, out):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    few = {"tree_grpo": "--prompts 2 --max-turns 2 --turn-tokens 8"}
    few["treerl"] = "--prompts 2 --M 3 --max-tokens 16"
    few["graph_gpo"] = "--tasks 2 --eval-tasks 2 --K 2 --max-steps 3 --max-tokens 8"
    line = script.data.format(files=files)
    run.well(f"{line} {few[script.name]} --steps 1 --out out")
    (step,) = metrics(out, "train")
    assert step["generated_tokens"] > 0
    default = 1.5e-6 if script.name == "treerl" else 1e-6
    assert step["lr"] == pytest.approx(default / 10)  # in 10 steps
    assert [row["step"] for row in metrics(out, "eval")] == [0, 1]
    assert AutoTokenizer.from_pretrained(out / "final").chat_template == TEMPLATE
    assert AutoModelForCausalLM.from_pretrained(out / "final").num_parameters() > 0


def test_two_runs_at_once_have_folders_of_their_own(script, run, whole, tmp_path):
    line = f"{script.small} --steps 0 --model {whole / 'start'}".split()
    both = [start(script, tmp_path, " ".join(line)) for _ in range(2)]
    assert [process.communicate(timeout=90) and process.returncode for process in both] == [0, 0]
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 2 and all(name.startswith(f"{script.name}-") for name in names)
    assert all((tmp_path / "runs" / name / "final").exists() for name in names)


def test_rows_arrive_at_a_tracker(script, run, whole, out, tmp_path):
    line = f"{script.small} --steps 1 --model {whole / 'start'} --log trackio --out out"
    run.well(line)
    told = [json.loads(line) for line in (tmp_path / "trackio.jsonl").read_text().splitlines()]
    (kind, about), *rows = told
    assert (kind, about["project"], about["name"]) == ("init", script.name, "out")
    assert about["config"]["steps"] == 1
    assert rows == [["log", row, row["step"]] for row in metrics(out)]


# After a first step of this size no number is finite: with the first rate not the gradients of the
# second step, with the second rate not even the probabilities to draw from.
@pytest.mark.parametrize("lr", ["1e3", "1e10"])
def test_a_run_that_breaks_its_weights_stops_and_says_so(script, run, whole, out, lr):
    line = f"{script.small} --steps 5 --warmup 0 --lr {lr} --kl-coef 0.01 --model {whole / 'start'}"
    result = run(f"{line} --out out")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert re.search(
        r"stopped: [^\n]*; go on with --resume[^\n]* lower --lr\b[^\n]*\n$", result.stderr
    )
    assert [row["step"] for row in metrics(out)] == [0, 1]
    assert (out / "checkpoint-000001" / "state.pt").exists()
    assert not (out / "final").exists()


# --------------------------------------------------------------------------- kill, stop and resume
def test_a_run_stopped_and_killed_and_resumed_equals_one_that_was_not(
    script, run, whole, out, tmp_path
):
    # It would save at every hundredth step, so what it has saved is the signals' doing.
    line = f"{script.small} {script.five} --save-every 100 --log trackio --out out"
    for step, number in enumerate((signal.SIGINT, signal.SIGTERM), 1):
        (tmp_path / "signal").write_text(f"{int(number)} {step}")
        result = run(line)
        assert result.returncode == 130
        last = result.stderr.splitlines()[-1]
        assert last == f"stopped after step {step}; go on with --resume out"
        assert "Traceback" not in result.stderr
        assert [path.name for path in out.glob("checkpoint*")] == [f"checkpoint-{step:06d}"]
        assert not (out / "final").exists()
        line = "--resume out --save-every 1"

    (tmp_path / "signal").write_text(f"{int(signal.SIGKILL)} 4")
    assert run(line).returncode == -signal.SIGKILL
    # It may also die while it writes: half a line of metrics, half a checkpoint.
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "step": 5, "rew')
    (out / "checkpoint.tmp").mkdir()
    (out / "checkpoint.tmp" / "state.pt").write_bytes(b"half")

    (tmp_path / "signal").unlink()
    result = run.well("--resume out")
    assert "warm start" not in result.stderr
    assert_same_run(out, whole)


def test_a_run_killed_before_its_first_checkpoint(script, run, whole, out, tmp_path):
    (tmp_path / "signal").write_text(f"{int(signal.SIGKILL)} 2")
    line = f"{script.small} {script.five} --model {whole / 'start'} --save-every 100 --log trackio"
    assert run(f"{line} --out out").returncode == -signal.SIGKILL
    (tmp_path / "signal").unlink()
    run.well("--resume out")
    assert_same_run(out, whole)


# What is written is counted, and from one on the disk is full: what is raised then, as seen on one.
FULL = """
import safetensors, torch, transformers
written = 0
def full(write):
    def counted(*how, **more):
        global written
        written += 1
        if written >= {first}:
            raise {error}
        return write(*how, **more)
    return counted
{what} = full({what})
"""
MODEL = "transformers.PreTrainedModel.save_pretrained"
MODEL_ERROR = 'safetensors.SafetensorError("I/O error: No space left on device (os error 28)")'
STATE_ERROR = (
    'RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")'
)
OTHER_ERROR = 'OSError(28, "No space left on device")'


# In the middle of a checkpoint, at its end, and when all is done: there are six checkpoints.
@pytest.mark.parametrize(
    ("what", "first", "error"),
    [
        (MODEL, 3, MODEL_ERROR),
        ("torch.save", 3, STATE_ERROR),
        ("torch.save", 2, OTHER_ERROR),
        (MODEL, 7, MODEL_ERROR),
    ],
    ids=["a model", "a state", "a folder", "the last model"],
)
def test_a_full_disk(script, run, whole, out, tmp_path, what, first, error):
    (tmp_path / "patch.py").write_text(FULL.format(what=what, first=first, error=error))
    line = f"{script.small} {script.five} --model {whole / 'start'} --log trackio --out out"
    result = run(line)
    assert result.returncode in (1, 2)
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert "--resume" in last and ("disk" in last or "No space left" in last)
    newest = f"checkpoint-{min(first - 2, 5):06d}"
    assert [path.name for path in out.glob("checkpoint-*")] == [newest]
    (tmp_path / "patch.py").unlink()  # there is room again
    run.well("--resume out")
    assert_same_run(out, whole)


WATCHED = """
import torch
save = torch.save
def watched(*how, **more):
    save(*how, **more)
    note("saving", sorted(name for name in os.listdir("out") if name.startswith("checkpoint")))
torch.save = watched
"""


def test_there_are_two_checkpoints_at_most(script, run, whole, out, tmp_path):
    (tmp_path / "patch.py").write_text(WATCHED)
    line = f"{script.small} --steps 2 --model {whole / 'start'} --log trackio --out out"
    run.well(line)
    told = [json.loads(line) for line in (tmp_path / "trackio.jsonl").read_text().splitlines()]
    old = [["checkpoint-000000"], ["checkpoint-000001"]]
    saving = [["checkpoint.tmp"], *([*name, "checkpoint.tmp"] for name in old)]
    assert [names for kind, names, *_ in told if kind == "saving"] == saving
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-000002"]


def test_a_finished_run_can_be_given_more_steps_and_another_rate(script, run, whole, out):
    shutil.copytree(whole, out)
    run.well("--resume out")
    assert_same_run(out, whole)
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    run.well("--resume out --steps 7 --lr 0.0125 --kl-coef 0.5 --save-every 3 --device cpu")
    rows = metrics(out)
    assert rows[:7] == metrics(whole)
    assert [(row["event"], row["step"]) for row in rows[7:]] == [
        ("train", 6),
        ("train", 7),
        ("eval", 7),
    ]
    assert [row["lr"] for row in rows[7:9]] == [0.0125, 0.0125]
    run.well("--resume out --steps 8 --kl-coef 0")
    rows = metrics(out, "train")
    assert [row["kl"] is None for row in rows] == [*[False] * 7, True]
    assert rows[7]["lr"] == 0.0125  # what was changed stays so


def test_a_resumed_run_takes_what_is_given_and_keeps_the_rest(script, run, whole, out, tmp_path):
    # The number of rollouts, and how often it saves: killed at step 8, it has saved step 6.
    shutil.copytree(whole, out)
    shutil.copytree(whole, tmp_path / "usual")
    own = "--K 1" if script.name == "graph_gpo" else "--M 3"
    (tmp_path / "signal").write_text(f"{int(signal.SIGKILL)} 8")
    line = f"--steps 9 --save-every 3 --log trackio {own}"
    assert run(f"--resume out {line}").returncode == -signal.SIGKILL
    (checkpoint,) = out.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-000006"
    found, was = (
        torch.load(next(folder.glob("checkpoint-*/state.pt")), weights_only=True)["args"]
        for folder in (out, whole)
    )
    given = {"resume": "out", "steps": 9, "save_every": 3, "log": "trackio"}
    given |= {own.split()[0][2:]: int(own.split()[1])}
    assert found == {**was, **given}
    run.well("--resume usual --steps 6")
    (other,) = metrics(tmp_path / "usual", "train")[5:]
    row = metrics(out, "train")[5]
    if script.name == "graph_gpo":
        assert row["env_steps"] <= 3 * 1 * 6 < other["env_steps"]
    else:
        assert row["generated_tokens"] > 1.2 * other["generated_tokens"]
        assert "|tree 3|" in (out / script.drawing).read_text()
        assert "|tree 3|" not in (tmp_path / "usual" / script.drawing).read_text()


def test_a_warm_start_that_is_killed_leaves_an_empty_folder(script, run, whole, out, tmp_path):
    process = start(script, tmp_path, "--sft-steps 100000 --out out")
    while not out.exists() and process.poll() is None:
        pass
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(out.iterdir()) == []
    run.well(f"{script.small} --steps 0 --model {whole / 'start'} --out out")
    assert [(row["event"], row["step"]) for row in metrics(out)] == [("eval", 0)]
    assert (out / "final" / "model.safetensors").exists()


def test_ctrl_c_in_a_warm_start(tmp_path):
    process = start(SCRIPTS["tree_grpo"], tmp_path, "--sft-steps 100 --out out")
    while "warm start" not in (text := process.stderr.read(20)):  # "" at its end
        assert text, "it ended before"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped before the first step"
    assert "Traceback" not in errors


# -------------------------------------------------------------------------------- what is refused
BAD = """
--dtype float16 | --device tpu | --device cuda | --device cuda:7 | --device meta
--M 0 | --M 1.5 | --M two | --N -1 | --L -1 | --steps -1 | --prompts 0 | --epochs 0
--eval-prompts 0 | --save-every 0 | --micro-tokens 0 | --seed -1 | --clip-low -0.1 | --clip-high nan
--top-p 0 | --top-p 1.5 | --top-p nan | --temperature 0 | --temperature -1 | --kl-coef -1
--kl-coef inf | --lr abc | --lr nan | --lr inf | --lr -0.001 | --lr | --learning-rate 1 | --step 3
--grad-checkpointing=yes | --resume missing | --data missing.json --model {files}/chat
--eval-every -1 | --sft-steps -1 | --warmup -1 | --log tensorboard | --eval-only | --method ppo
--out {files} | --out {files}/empty.json | --out {files}/empty.json/below
--model {files}/no-weights | --model {files}/missing | --model {files}
--model {files}/no-tokenizer | --model {files}/empty.json | --model {files}/gpt2
--model Qwen/Qwen2.5-of-nobody
--model {files}/one-missing
--env | --env House | --env missing.py:World | --env missing.py | --env :World | --env .py:World
--env . | --env {envs}/records.py:json
--template-kwargs {{ --model {files}/chat | --template-kwargs [1] --model {files}/chat
--template-kwargs yes --model {files}/chat | --system brief --model {files}/raising
--resume {runs}/nothing | --resume {runs}/no-state | --resume {runs}/missing
--resume {runs}/no-run | --resume {runs}/other-script | --resume {runs}/cut-state.pt
--resume {runs}/cut-model.safetensors
--device tpu --resume {runs}/good | --method ppo --resume {runs}/good
"""
OWN = {
    "tree_grpo": """
--advantage none | --hard late | --keep -1 | --K 2 | --max-turns 0 | --turn-tokens -1 | --topk -1
--env {envs}/facts.py:Facts:1 | --env {envs}/facts.py:Facts:5 | --env {envs}/facts.py:Facts:x
--search-url http://127.0.0.1:8000/retrieve | --advantage intra --method grpo
--advantage intra --L 0 | --advantage intra --keep 1 | --at-once 0 | --info-tokens 0
--data {files}/empty.json --model {files}/chat | --data {files} --model {files}/chat
--data {files}/cut.json --model {files}/chat | --data {files}/gsm8k.jsonl --model {files}/chat
--data {files}/hotpot.json | --model {files}/short --data {files}/hotpot.json
--model {files}/short
""",
    "treerl": """
--method random | --method TreeRL | --T 0 | --T -1 | --T 1.5 | --keep 0 | --keep all
--env {envs}/sums.py:Sums:4 | --env {envs}/sums.py:Sums:x
--max-tokens -1 | --K 2 | --max-turns 3 | --search-url http://127.0.0.1:8000 | --at-once 0
--data {files}/empty.json --model {files}/chat | --data {files} --model {files}/chat
--data {files}/cut.jsonl --model {files}/chat | --data {files}/hotpot.json --model {files}/chat
--data {files}/gsm8k.jsonl | --model {files}/short --data {files}/gsm8k.jsonl
--model {files}/short
""",
    "graph_gpo": """
--K 0 | --K -1 | --K 1.5 | --K all | --omega 0 | --omega 1 | --omega -0.1 | --omega nan
--gamma 1.1 | --gamma -0.1 | --gamma nan | --beta-graph -1 | --beta-graph inf | --beta-episode -1
--beta-episode nan | --invalid-penalty -0.1 | --invalid-penalty nan | --penalty 1
--merge-similarity 0.5 | --dynamic-sampling 1 | --penalty-in-return | --max-steps 0 | --history -1
--history all | --tasks 0 | --tasks 1.5 | --eval-tasks 0 | --max-tokens -1 | --kept-tokens -1
--model {files}/short | --model {files}/chat --max-tokens 2048
--omega 1 --resume {runs}/good
""",
}


def test_what_is_refused(script, run, files, runs, tmp_path):
    """In one line that names the flag, with status 2, and nothing is written."""
    kept = snapshot(files, runs)
    wrong = []
    for line in re.split(r"[|\n]\s*", (BAD + OWN[script.name]).strip()):
        if (line := line.strip()) == "":
            continue
        result = run(line.format(files=files, runs=runs, envs=ROOT / "envs"))
        flag = re.split("[ =]", line)[0]
        shown = re.fullmatch(rf"{script.name}\.py: [^\n]*{flag}\b[^\n]*\n", result.stderr)
        said = re.sub(".* left out, .*\n", "", result.stdout)  # of prompts
        if not shown or result.returncode != 2 or said or snapshot(tmp_path):
            wrong.append((line, result.returncode, result.stderr[-200:]))
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
    assert wrong == []
    assert snapshot(files, runs) == kept


def test_a_tracker_that_is_not_there(run):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    assert "--log wandb: pip install wandb" in refusal(run("--log wandb"))


def test_a_process_of_its_own_is_as_quiet_and_quick(script, files, tmp_path):
    # The cases above run in copies of one process, where all imports are done; so once without that
    # help, and without the slow imports that a wrong argument does not need.
    code = (
        f"import runpy, sys\nsys.argv[:] = [{str(script.path)!r}, '--method', 'ppo']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    print('transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == "False\n"
    assert result.stderr.count("\n") == 1
    if script.name == "treerl":  # one that needs them
        process = start(script, tmp_path, f"--model {files / 'no-weights'}")
        stdout, stderr = process.communicate()
        result = subprocess.CompletedProcess([], process.returncode, stdout, stderr)
        assert "--model" in refusal(result)
        assert os.listdir(tmp_path) == []
