"""What the tests of the scripts as seen from outside share: runs of a script as its user runs it, readers of what a
run leaves, models of a few thousand parameters, and checks that every script is to pass."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

# One thread, because this many small runs on few cores wait for each other otherwise; no hub and no GPU, so that what
# the tests see does not depend on the machine.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
NASTY = 'Who wrote "A <b>|C|</b>"; #1 & [x] {y} `z` \\ --> (and\nwhy)?'  # what means something in Mermaid or Markdown
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
NAMED = re.findall(r"^\|([^|]*)\|", README.partition("| column |")[2].partition("\n\n")[0], re.MULTILINE)
COLUMNS = {name for cell in NAMED for name in re.findall(r"`(\w+)`", cell)} | {"event", "step"}  # of metrics.jsonl


# --------------------------------------------------------------------------------------------------- a script, run
class Script:
    """A script that is run in a folder, where what it writes without --out goes to."""
    def __init__(self, module):
        self.module, self.path = module, Path(module.__file__).resolve()

    def begin(self, folder, *arguments):
        return subprocess.Popen([sys.executable, str(self.path), *map(str, arguments)], cwd=folder, env=ENVIRONMENT,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, folder, *arguments):
        command = [sys.executable, str(self.path), *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False,
                              timeout=99)

    def ran(self, folder, *arguments):
        result = self.run(folder, *arguments)
        assert result.returncode == 0, result.stderr[-3000:]
        return result

    def assert_refused(self, result, flag):
        """A finished process said in one line what is wrong with that flag."""
        assert result.returncode == 2, result.stderr[-3000:]
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n"), result.stderr
        assert flag in result.stderr and result.stderr.startswith(f"{self.path.name}: ")

    def assert_refused_and_nothing_written(self, quick_run, folder, flag, line, *kept):
        """That command line is refused in `folder`, which stays empty, and the folders `kept` stay as they are."""
        before = snapshot(*kept)
        self.assert_refused(quick_run(folder, *line.split()), flag)
        assert not snapshot(folder) and snapshot(*kept) == before

    def assert_bad_data_is_named_with_its_line(self, quick_run, folder, path):
        result = quick_run(folder, "--data", path)
        last = path.read_text().count("\n") + 1
        assert f"--data {path}, line {last}: " in result.stderr

    def assert_refused_before_slow_imports(self, folder, flag, value):
        code = (f"import runpy, sys\nsys.argv[:] = [{str(self.path)!r}, {flag!r}, {value!r}]\ntry:\n"
                "    runpy.run_path(sys.argv[0], run_name='__main__')\nfinally:\n"
                "    print('transformers' in sys.modules)")
        process = subprocess.run([sys.executable, "-c", code], cwd=folder, env=ENVIRONMENT, capture_output=True,
                                 text=True, check=False)
        assert process.returncode == 2 and process.stdout == "False\n" and flag in process.stderr

    def assert_resumes_after_a_kill(self, resume, folder, whole, *arguments):
        """A run with these arguments, with which it is as the one in `whole`, is killed; resume(folder, *arguments),
        which is `run` or quick_run, goes on with it."""
        out = folder / "out"
        process = self.begin(folder, *arguments, "--out", "out")
        wait_for_step(process, out, 2)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (out / "final").exists()
        # It may also die while it writes: half a line of metrics, half a checkpoint, half of what replaces the metrics.
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"event": "train", "step": 4, "rew')
        (out / "checkpoint.tmp").mkdir(exist_ok=True)
        (out / "checkpoint.tmp" / "state.pt").write_bytes(b"half")
        (out / "metrics.tmp").write_text('{"event": "ev')
        resumed = resume(folder, "--resume", "out")
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        assert "warm start" not in resumed.stderr
        assert_same_run(out, whole)
        assert not (out / "metrics.tmp").exists()

    def assert_resumes_after_ctrl_c(self, resume, folder, whole, *arguments):
        """A run with these arguments, with which it is as the one in `whole`, is stopped by Ctrl-C; resume(folder,
        *arguments), which is `run` or quick_run, goes on with it."""
        out = folder / "out"
        # It would save at every hundredth step, so what it has saved is Ctrl-C's doing.
        process = self.begin(folder, *arguments, "--save-every", "100", "--out", "out")
        wait_for_step(process, out, 2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in errors
        # what happens, what happened, and what to do next
        last = errors.splitlines()[-1]
        assert "stopping: " in errors and last.startswith("stopped after step") and "--resume out" in last
        (checkpoint,) = out.glob("checkpoint-*")
        steps = [row["step"] for row in metrics(out, "train")]
        assert steps[-1] in (2, 3, 4) and checkpoint.name == f"checkpoint-{steps[-1]:06d}"
        assert not (out / "final").exists()
        assert resume(folder, "--resume", "out").returncode == 0
        assert_same_run(out, whole)

# One process imports torch and transformers, once, and runs a script from its first line in a copy of itself for each
# case, without tearing that down in good order: hundredths of a second, where a new interpreter takes seconds.
FORKING = """
import json, os, runpy, signal, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3ForCausalLM
for line in sys.stdin:
    script, cwd, output, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os.chdir(cwd)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT), number)
        sys.argv = [script, *arguments]
        status = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if not isinstance(end.code, int):
                raise
            status = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


# ----------------------------------------------------------------------------------------------- what a run leaves
def metrics(out, event=None):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if event in (None, row["event"])]

def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")

def snapshot(*folders):
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.stat().st_size) for path in paths}

def draw_tree(out):
    """tree.md as (labels by node, edges, leaves), after a check that every line of it is Mermaid."""
    first, second, *body, last = (out / "tree.md").read_text().splitlines()
    assert (first, second, last) == ("```mermaid", "flowchart TD", "```")
    labels, edges, styles = {}, [], []
    for line in body:
        if node := re.fullmatch(r'    n(\d+)\["([^"`<>\[\]{}|]*(<br>[RA][^"`<>\[\]{}|]*)?)"\]', line):
            labels[int(node[1])] = node[2]
        elif edge := re.fullmatch(r"    n(\d+) -->(?:\|tree \d+\|)? n(\d+)", line):
            edges.append((int(edge[1]), int(edge[2])))
        else:
            style = re.fullmatch(r"    style n(\d+) fill:#(?:[0-9a-f]{3}){1,2},color:#000", line)
            assert style, line
            styles.append(int(style[1]))
    # A tree: the prompt is n0, every other node has one parent, and that was drawn before it.
    assert sorted(labels) == sorted(styles) == list(range(len(labels)))
    assert sorted(child for _, child in edges) == list(range(1, len(labels)))
    assert all(parent < child for parent, child in edges)
    return labels, edges, set(labels) - {parent for parent, _ in edges}

def assert_chains(edges, leaves, number):
    """The tree is that many chains, which meet in the prompt and nowhere else."""
    parents = [parent for parent, _ in edges]
    assert len(leaves) == number and parents.count(0) == number
    assert all(parents.count(node) == 1 for node in set(parents) - {0})

def wait_for_step(process, out, step):
    """Return as soon as metrics.jsonl has the row of that training step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        text = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
        if re.search(rf'"train".*"step": {step}\b', text):
            return
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"no row of step {step}: {process.communicate()[1][-3000:]}")

MACHINE = dict.fromkeys(("seconds", "seconds_sampling", "seconds_training", "peak_gb"))  # what the same run may differ in

def assert_same_run(out, whole):
    """Everything equal but the time it took: rows, final weights bit for bit, the last tree or graph."""
    rows, expected = ([{**row, **MACHINE} for row in metrics(folder)] for folder in (out, whole))
    assert rows == expected
    ours, theirs = weights(out / "final"), weights(whole / "final")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    (drawn,), (expected,) = out.glob("*.md"), whole.glob("*.md")
    assert (drawn.name, drawn.read_text()) == (expected.name, expected.read_text())
    assert [folder.name for folder in out.glob("checkpoint*")] == [folder.name for folder in whole.glob("checkpoint*")]

def assert_small_run(rows, last, keys):
    """The metrics of a run of `last` steps evaluated before and after, with `keys` in the rows of its steps."""
    evals, steps = ([row for row in rows if row["event"] == event] for event in ("eval", "train"))
    assert [row["step"] for row in steps] == list(range(1, last + 1))
    assert all(keys <= set(row) for row in steps) and set().union(*rows) <= COLUMNS
    assert all(math.isfinite(value) for row in rows for name, value in row.items() if name not in ("event", "peak_gb"))
    assert all(row["seconds"] == pytest.approx(row["seconds_sampling"] + row["seconds_training"]) for row in steps)
    assert all((row["peak_gb"] is None) == (not torch.cuda.is_available()) for row in steps)
    assert [row["step"] for row in evals] == [0, last]
    assert all({"event", "step", "success", "greedy_success"} <= set(row) for row in evals)
    assert all(0 <= row["success"] <= 1 and 0 <= row["greedy_success"] <= 1 for row in evals)
    assert rows[0] == evals[0] and rows[-1] == evals[1]

def assert_summary(out, process, counted):
    """The closing lines of a run: success before and after, the sums of the `counted` columns, where the model is."""
    before, after = metrics(out, "eval")
    first, second, third = process.stdout.splitlines()[-3:]
    assert first == "held-out success " + ", ".join(
        f"{before[name]:.3f} -> {after[name]:.3f} {words}"
        for name, words in (("success", "sampled (T = 1)"), ("greedy_success", "greedy")))
    steps = metrics(out, "train")
    assert second.startswith(f"{len(steps)} steps, ") and re.search(r", \d+ s of training$", second)
    for name in counted:
        assert f", {sum(row[name] for row in steps):,} {name.replace('_', ' ')}, " in second
    assert third == f"model in {Path(out.name) / 'final'}"
    assert "training" in process.stderr and "Traceback" not in process.stderr

def assert_trained_model(out, text, most):
    """The folder's final/ is for transformers, has a tokenizer in which `text` is at most that long, and has moved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (auto.from_pretrained(out / "final") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert 200_000 < model.num_parameters() < 1_000_000 and model.dtype == torch.float32
    ids = tokenizer(text, return_tensors="pt")
    assert len(ids["input_ids"][0]) <= most  # the task's own words are whole tokens
    assert model(**ids).logits.isfinite().all()
    start, final = weights(out / "start"), weights(out / "final")
    assert start.keys() == final.keys() and not all(torch.equal(start[name], final[name]) for name in start)
    assert not (out / "checkpoint.tmp").exists() and len(list(out.glob("checkpoint-*"))) == 1

def assert_same_first_step(quick_run, folder, whole, *arguments):
    """The warm-started model of the run in `whole`, given by --model, takes the same first step, up to rounding; and
    activations that are computed again in the backward pass are the same activations."""
    out = folder / "out"
    told = [*arguments, "--steps", "1", "--model", whole / "start", "--grad-checkpointing", "--out", "out"]
    assert quick_run(folder, *told).returncode == 0
    assert not (out / "start").exists()  # nothing was warm-started
    (before, step, _), (was_before, was, *_) = metrics(out), metrics(whole)
    assert before == was_before
    assert step.keys() == was.keys()
    for name in step.keys() - MACHINE.keys() - {"event"}:
        assert step[name] == pytest.approx(was[name], rel=1e-4, abs=1e-7), name

def assert_limits(result, out, **expected):
    """The run was with these arguments, as its checkpoint says."""
    assert result.returncode == 0, result.stderr[-3000:]
    (state,) = out.glob("checkpoint-*/state.pt")
    args = torch.load(state, weights_only=True)["args"]
    assert {name: args[name] for name in expected} == expected

def assert_bfloat16(out):
    """The run's forward passes were in bfloat16, its weights were not."""
    assert max(row["sampler_gap"] or 0 for row in metrics(out, "train")) > 1e-5  # in float32 it is below
    assert all(tensor.dtype == torch.float32 for tensor in weights(out / "final").values())

def assert_stopped_before_breaking(result, out):
    """A run whose first step left no finite number ended with a line that says so, and with what it had before."""
    assert result.returncode not in (0, 2) and "Traceback" not in result.stderr, result.stderr[-3000:]
    last = result.stderr.splitlines()[-1]
    assert last.startswith("stopped: ") and "What is in the run's folder is kept" in last and "--lr" in last
    assert [row["step"] for row in metrics(out)] == [0, 1]
    assert list(out.glob("checkpoint-*/state.pt")) and not (out / "final").exists()


# ------------------------------------------------------------------------------------------- data files and models
def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)

def make_qwen3(folder, context, template=TEMPLATE):
    """A Qwen3 of a few thousand parameters with random weights, its tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"],
                                  show_progress=False)
    bpe.train_from_iterator([Path(__file__).read_text()], trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]])
    special = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = template
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=context, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer

def make_models(folder):
    """A Qwen3 with a chat template, one with a context too short for anything, and folders that are no such model."""
    model, tokenizer = make_qwen3(folder / "qwen3", 2048)
    make_qwen3(folder / "short", 32)
    tokenizer.save_pretrained(folder / "no-weights")
    model.config.save_pretrained(folder / "no-weights")
    shutil.copytree(folder / "no-weights", folder / "no-tokenizer")
    model.save_pretrained(folder / "no-tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "no-tokenizer" / name).unlink()
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16))
    gpt2.save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")

def assert_loads_as_qwen3(folder):
    """A trained model, for transformers, still with the chat template that it came with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "qwen3"

# Folders and files for --model and --out and runs for --resume that are refused, as (flag, command line): {files} is
# make_models's folder and has one.jsonl too, {runs} is the fixture's.
BAD_FOLDERS = [
    ("--model", "--model {files}/no-weights"), ("--model", "--model {files}/missing"), ("--model", "--model {files}"),
    ("--model", "--model {files}/no-tokenizer"), ("--model", "--model {files}/one.jsonl"),
    ("--model", "--model Qwen/Qwen2.5-of-nobody"), ("--model", "--model {files}/gpt2"),
    ("--out", "--out {files}"), ("--out", "--out {files}/one.jsonl"), ("--out", "--out {files}/one.jsonl/below"),
    ("--resume", "--resume {runs}/nothing"), ("--resume", "--resume {runs}/no-state"),
    ("--resume", "--resume {runs}/missing"), ("--resume", "--resume {runs}/other-script"),
    ("--resume", "--resume {runs}/other-file"), ("--resume", "--resume {runs}/cut-state"),
    ("--resume", "--resume {runs}/cut-weights"), ("--resume", "--resume="),
    ("--lr", "--resume {runs}/good --lr 0.25"), ("--M", "--resume {runs}/good --M 7"),
    ("--seed", "--seed 1 --resume {runs}/good"), ("--kl-coef", "--resume {runs}/good --steps 9 --kl-coef 0.5"),
    ("--out", "--resume {runs}/good --out elsewhere"),
    ("--device", "--resume {runs}/good --device tpu"),
]
# Arguments that every script has and refuses, one command line each.
BAD_ARGUMENTS = re.split(r"\||\n\s*", """
    --dtype float16|--device tpu|--device cuda|--device cuda:7|--device meta
    --M 0|--M 1.5|--M two|--N -1|--L -1|--steps -1|--prompts 0|--epochs 0|--eval-prompts 0|--save-every 0
    --micro-tokens 0|--seed -1|--clip-low -0.1|--clip-high nan
    --top-p 0|--top-p 1.5|--top-p nan|--temperature 0|--temperature -1|--kl-coef -1|--kl-coef inf
    --lr abc|--lr nan|--lr inf|--lr 0|--lr -0.001|--lr|--learning-rate 1|--step 3|--grad-checkpointing=yes
    --resume missing|--data missing.json
""".strip())
