"""What only treerl.py has, as its user sees it: its trees, which leaves are kept, data files."""

import re

import pytest
import torch
from problems import Problem, Problems
from sums import Sums

import treerl
from cli.outside import are_chains, draw_tree, metrics
from treerl import Args, Solver

SCRIPT = "treerl"


def draw(out):
    """draw_tree, after a check that all nodes but the prompt have an R(s) or A, and exactly the
    leaves an outcome."""
    labels, edges, leaves = draw_tree(out)
    for node, label in labels.items():
        note = r"(^|<br>)(R\(s\)|A) = [+-]\d+\.\d\d"
        note += "(, right|, wrong)(, not kept)?$" if node in leaves else "$"
        assert bool(re.search(note, label)) == (node != 0), label
    return labels, edges, leaves


def test_the_run(whole):
    labels, edges, leaves = draw(whole)
    assert re.fullmatch(r"Modulo 11, from \d+:( [-+*]\d){5}", labels[0])
    assert 2 < len(leaves) <= 2 * (1 + 2 * 1 * 2)  # M (1 + N L T)
    assert [parent for parent, _ in edges].count(0) >= 2
    for row in metrics(whole, "train"):
        assert 0 <= row["reward"] == row["success"] <= row["pass_rate"] <= 1
        # Three prompts of 9 tokens and all sampled tokens, less one per prompt, go through.
        assert 0 < row["forwarded_tokens"] <= 3 * 9 + row["generated_tokens"] - 3


# fmt: off
SIZES = [  # at most M (1 + N L T) leaves
    ("--N 3 --L 2 --T 1 --keep 3", 2 * (1 + 3 * 2 * 1)), ("--N 0 --L 2", 2),
    ("--method chainrl --M 6", 6),
]
# fmt: on


@pytest.mark.parametrize("line, most", SIZES)
def test_the_sizes_of_trees(script, run, whole, out, line, most):
    run.well(f"{script.small} {line} --steps 1 --model {whole / 'start'} --out out")
    labels, edges, leaves = draw(out)
    if "keep" in line:
        assert 3 < len(leaves) <= most
        assert len([leaf for leaf in leaves if "not kept" not in labels[leaf]]) == 3
    else:
        assert are_chains(edges, leaves, most)


def test_limits_of_a_model_that_is_given(run, whole, out):
    run.well(f"--steps 0 --eval-prompts 2 --model {whole / 'start'} --out out")
    args = torch.load(out / "checkpoint-000000" / "state.pt", weights_only=True)["args"]
    assert (args["lr"], args["max_tokens"]) == (1.5e-6, 8192)


@pytest.mark.parametrize("name", ["gsm8k.jsonl", "math500.jsonl", "math.json"])
def test_data_files(run, files, out, name):
    if "math" in name:
        pytest.importorskip("math_verify")
    line = f"--model {files / 'chat'} --data {files / name} --steps 1 --prompts 2 --M 3"
    result = run.well(f"{line} --max-tokens 16 --out out")
    assert "4 problems, 2 held out" in result.stdout
    (step,) = metrics(out, "train")
    # No solution is longer than --max-tokens.
    assert 0 < step["generated_tokens"] <= 2 * 3 * (1 + 2 * 1 * 2) * 16
    assert "wrote" in draw(out)[0][0]


def test_the_prompt(files, whole):
    problem = Problem("What is 2 + 2?\n", "4")

    def prompt(folder, data=None):
        model, tokenizer = treerl.load_model(str(folder), torch.device("cpu"))
        args = Args(data=str(files / data), eval_prompts=1) if data else Args(eval_prompts=1)
        solver = Solver(model, tokenizer, args, Problems(args) if data else Sums(args))
        return tokenizer.decode(solver.root(problem).tokens)

    asked = prompt(files / "chat")
    assert asked.startswith("<|im_start|>user\n")
    assert asked.endswith(f"{problem.text}<|im_end|>\n<|im_start|>assistant\n")
    assert "\\boxed{}" in asked
    assert prompt(files / "chat", data="gsm8k.jsonl") == asked
    # Without a chat template: a problem of a file with the request, a built-in one, as in the warm
    # start, bare.
    plain = prompt(whole / "start", data="gsm8k.jsonl")
    assert "\\boxed{}" in plain
    assert plain.endswith(problem.text)
    assert prompt(whole / "start") == problem.text
