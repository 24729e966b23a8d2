"""What the tests of the scripts as seen from outside share: the scripts with the arguments of a
small run, readers of what a run leaves, and models of a few thousand parameters."""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from outside import README  # noqa: F401
from tiny import tiny_model

import tree_grpo

ROOT = Path(__file__).parents[2]
# What means something in Mermaid or Markdown.
NASTY = 'Who wrote "A <b>|C|</b>"; #1 & [x] {y} `z` \\ --> (and\nwhy)?'
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# One thread, because many small runs on few cores wait for each other otherwise; no hub and no GPU,
# so that what the tests see does not depend on the machine.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT = {**os.environ, **ENVIRONMENT, "no_proxy": "*"}


# ------------------------------------------------------------------------------------- the scripts
@dataclass
class Script:
    name: str
    small: str  # arguments of a small run
    five: str  # and of one of five steps, in which each step changes the weights
    drawing: str
    columns: str  # of a training step, beside those of all scripts
    prompt: str  # of the built-in task
    data: str = ""  # a good file, with a model in which its prompts fit

    @property
    def path(self) -> Path:
        return ROOT / f"{self.name}.py"


SCRIPTS = {
    script.name: script
    for script in (
        Script(
            "tree_grpo",
            # Just enough supervised steps that some leaves earn more than others: without that all
            # advantages and gradients are 0.
            "--sft-steps 20 --prompts 2 --eval-prompts 4 --turn-tokens 16 --save-every 1",
            "--steps 5 --epochs 2 --lr 0.003 --warmup 2",
            "tree.md",
            "tool_calls leaves",
            "Who is the mayor of the birthplace of Ada?",
            "--data {files}/hotpot.json --model {files}/chat",
        ),
        Script(
            "treerl",
            f"--sft-steps 32 --env {ROOT / 'envs' / 'sums.py'}:Sums:5 --prompts 3 --eval-prompts 4"
            " --M 2 --max-tokens 32 --save-every 1",
            "--steps 5 --epochs 2 --lr 0.0005 --warmup 2 --kl-coef 0.01",
            "tree.md",
            "pass_rate leaves",
            "Modulo 11, from 3: +4 *2 -1\n",
            "--data {files}/gsm8k.jsonl --model {files}/chat",
        ),
        Script(
            "graph_gpo",
            "--sft-steps 12 --K 4 --tasks 3 --max-steps 6 --max-tokens 8 --eval-tasks 4"
            " --save-every 1",
            "--steps 5 --epochs 2 --lr 0.0005 --warmup 2 --kl-coef 0.01",
            "graph.md",
            "env_steps prompt_tokens prompt_tokens_sampling prompt_tokens_training",
            "Task: put a mug into the sink of the kitchen.\nYou are in the hall at the door.",
            "--model {files}/chat",
        ),
    )
}


def refusal(result) -> str:
    """What a finished process says is wrong with its arguments, in one line."""
    assert result.returncode == 2, result.stderr[-3000:]
    assert result.stdout == ""
    assert re.fullmatch(r"\w+\.py: [^\n]+\n", result.stderr), result.stderr
    return result.stderr


# One process imports torch and transformers, once, and runs a script from its first line in a copy
# of itself for each case: hundredths of a second, where a new interpreter takes seconds.
FORKING = """
import json, os, runpy, signal, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3ForCausalLM
for line in sys.stdin:
    script, cwd, output, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(90)
        os.chdir(cwd)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT), number)
        sys.argv = [script, *arguments]
        status = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# A stand-in for trackio: what it is told goes to a file, and the process gets a signal with the row
# of a step, if a file says which and when. So tests stop a run at one certain place. And if there is
# a file patch.py, it is run first: so tests make the disk full.
TRACKIO = """
import json, os
def note(*told):
    with open("trackio.jsonl", "a") as file:
        print(json.dumps(told), file=file)
def init(**run):
    note("init", run)
    if os.path.exists("patch.py"):
        exec(open("patch.py").read(), globals())
def log(row, step):
    note("log", row, step)
    if row["event"] == "train" and os.path.exists("signal"):
        number, when = open("signal").read().split()
        if step == int(when):
            os.kill(os.getpid(), int(number))
"""


# ------------------------------------------------------------------------------- what a run leaves
def metrics(out: Path, event=None) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if event in (None, row["event"])]


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def equal_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def snapshot(*folders: Path) -> dict:
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def timeless(out: Path) -> list[dict]:
    """The metrics without what the same run may differ in."""
    machine = ("seconds", "seconds_sampling", "peak_gb")
    return [{k: v for k, v in row.items() if k not in machine} for row in metrics(out)]


def assert_same_run(out: Path, whole: Path):
    """Everything equal but the time it took: rows, final weights bit for bit, the last picture and
    the last episode."""
    assert timeless(out) == timeless(whole)
    assert equal_weights(out / "final", whole / "final")
    for pattern in ("*.md", "checkpoint*"):
        ours, theirs = (sorted(folder.glob(pattern)) for folder in (out, whole))
        assert [path.name for path in ours] == [path.name for path in theirs]
        if pattern == "*.md":
            assert [path.read_text() for path in ours] == [path.read_text() for path in theirs]


def draw_tree(out: Path):
    """tree.md as (labels by node, edges, leaves), after a check that every line of it is Mermaid
    and that it is a tree, the prompt n0, each other node drawn after its one parent."""
    first, second, *body, last = (out / "tree.md").read_text().splitlines()
    assert (first, second, last) == ("```mermaid", "flowchart TD", "```")
    text = '[^"`<>\\[\\]{}|]*'
    labels, edges = {}, []
    for line in body:
        if node := re.fullmatch(rf'    n(\d+)\["({text}(<br>{text})?)"\]', line):
            labels[int(node[1])] = node[2]
        elif edge := re.fullmatch(r"    n(\d+) -->(?:\|tree \d+\|)? n(\d+)", line):
            edges.append((int(edge[1]), int(edge[2])))
        else:
            assert re.fullmatch(r"    style n\d+ fill:#\w+,color:#000", line), line
    assert sorted(labels) == list(range(len(labels)))
    assert sorted(child for _, child in edges) == list(range(1, len(labels)))
    assert all(parent < child for parent, child in edges)
    return labels, edges, set(labels) - {parent for parent, _ in edges}


def are_chains(edges, leaves, number: int) -> bool:
    """Is it so many chains, which meet in the prompt and nowhere else?"""
    parents = [parent for parent, _ in edges]
    alone = all(parents.count(node) == 1 for node in set(parents) - {0})
    return len(leaves) == number == parents.count(0) and alone


# ----------------------------------------------------------------------------------- files, models
def make_chat_model(folder: Path, context: int):
    """The tiny model with random weights, its tokenizer with a chat template."""
    words = ["<|im_start|>", "<|im_end|>"]
    model, tokenizer = tiny_model(words, torch.device("cpu"), 1)
    model.config.max_position_embeddings = context
    tokenizer.chat_template = TEMPLATE
    tree_grpo.save_model(folder, model, tokenizer)
    return model, tokenizer


def make_files(folder: Path):
    """Data files and models, good and bad, that many tests use and none changes."""
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    model, tokenizer = make_chat_model(folder / "chat", 2048)
    make_chat_model(folder / "short", 32)  # a context too short for anything
    shutil.copytree(folder / "chat", folder / "raising")  # a template without a system's turn
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}"
    tokenizer.chat_template += "{{ raise_exception('no\nsystem') }}{% endif %}" + TEMPLATE
    tokenizer.save_pretrained(folder / "raising")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "no-weights")
    model.config.save_pretrained(folder / "no-weights")
    model.save_pretrained(folder / "no-tokenizer")
    shutil.copytree(folder / "chat", folder / "one-missing")  # it would be random numbers instead
    tensors = weights(folder / "chat")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "one-missing" / "model.safetensors", {"format": "pt"})
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16))
    gpt2.save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    records = {name: [] for name in ("hotpot", "musique", "gsm8k", "math500", "math")}
    for i in range(6):
        asked = f"{NASTY} {i}"
        question, problem = {"question": asked}, {"problem": asked}
        found = {"paragraphs": [{"title": "A", "paragraph_text": "Ann wrote it."}]}
        sentences = {"context": [["A", ["A is a book.", " Ann wrote it."]], ["B", ["A town."]]]}
        records["hotpot"].append({**question, "answer": "Ann", **sentences})
        records["musique"].append({**question, "answer": "Ann", "answer_aliases": [], **found})
        records["gsm8k"].append({**question, "answer": f"It is so.\n#### {i}"})
        records["math500"].append({**problem, "answer": f"\\frac{{{i}}}{{2}}"})
        records["math"].append({**problem, "solution": f"It is $\\boxed{{{i}}}$."})
    texts = {"empty.json": ""}
    for name in ("hotpot", "math"):
        texts[f"{name}.json"] = json.dumps(records[name], indent=1)
    for name in ("musique", "gsm8k", "math500"):
        texts[f"{name}.jsonl"] = "".join(json.dumps(record) + "\n" for record in records[name])
    texts["cut.json"] = texts["hotpot.json"][:900]
    texts["cut.jsonl"] = texts["gsm8k.jsonl"][:-20]
    for name, text in texts.items():
        (folder / name).write_text(text)


def make_bad_runs(folder: Path, whole: Path):
    """Folders for --resume: a good run and several that cannot be continued."""
    shutil.copytree(whole, folder / "good")
    (folder / "nothing").mkdir()
    (checkpoint,) = whole.glob("checkpoint-*")
    (folder / "no-state" / checkpoint.name).mkdir(parents=True)
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    contents = {"other-script": {**state, "script": "other.py"}, "no-run": {"a": torch.ones(2)}}
    for name, content in contents.items():
        (folder / name / checkpoint.name).mkdir(parents=True)
        torch.save(content, folder / name / checkpoint.name / "state.pt")
    for name in ("state.pt", "model.safetensors"):
        shutil.copytree(whole, folder / f"cut-{name}")
        path = folder / f"cut-{name}" / checkpoint.name / name
        path.write_bytes(path.read_bytes()[:1000])
