"""Several processes, started by torchrun, here two with gloo on a CPU: together they do what one
would have done with the same rollouts."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graph_gpo
import tree_grpo
import treerl

ROOT = Path(__file__).resolve().parents[1]
RECORD = str(ROOT / "tests" / "record_ranks.py")
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
SMALL = "--device cpu --sft-steps 12 --warmup 2 --save-every 2"
SMALL = {
    tree_grpo: f"{SMALL} --prompts 5 --eval-prompts 5",
    treerl: f"{SMALL} --prompts 5 --eval-prompts 5 --keep 8",
    graph_gpo: f"{SMALL} --tasks 5 --K 4 --eval-tasks 5 --max-steps 8",
}


def run(ranks: int, folder: Path, script, line: str, **environment):
    """The finished process; what its ranks trained on is in folder/record, the run in folder/out."""
    (folder / "record").mkdir(exist_ok=True)
    own = [str(folder / "record"), script.__name__, *line.split()]
    started = ["-m", *TORCHRUN, str(ranks)] if ranks > 1 else []
    command = [sys.executable, *started, RECORD, *own]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    how = {"env": env, "capture_output": True, "text": True, "cwd": folder}
    return subprocess.run(command, check=False, **how)


def train_rows(folder: Path) -> list[dict]:
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == "train"]


def trained_on(folder: Path, step: int) -> list[list]:
    """Of each rank the groups of a step."""
    files = sorted((folder / "record").glob(f"{step}-*.pkl"))
    return [pickle.loads(file.read_bytes()) for file in files]


@pytest.fixture(scope="module", params=SMALL, ids=lambda script: script.__name__)
def two(request, tmp_path_factory):
    """A script, and a folder with five steps of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    result = run(2, folder, request.param, f"{SMALL[request.param]} --steps 5 --out out")
    assert result.returncode == 0, result.stderr[-3000:]
    return request.param, folder, result


def test_two_ranks_update_as_one(two):
    """One process, given what both had sampled, ends at the same weights, to rounding; and says the
    same of each step."""
    script, folder, _ = two
    out, device = folder / "out", torch.device("cpu")
    state = torch.load(max(out.glob("checkpoint-*/state.pt")), weights_only=True)
    args = script.Args(**state["args"])
    model, _ = script.load_model(str(out / "start"), device)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    reference = None
    if args.kl_coef:
        reference = script.load_model(str(out / "start"), device)[0].requires_grad_(False)
    how = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, **how)
    for step, row in enumerate(train_rows(folder)):
        ranks = trained_on(folder, step)
        groups = [group for own in ranks for group in own]
        assert len(ranks) == 2 and all(ranks)
        optimizer.param_groups[0]["lr"] = row["lr"]
        told = script.update(model, reference, optimizer, groups, args)
        for name in ("loss", "kl", "grad_norm", "clip_fraction", "sampler_gap"):
            same = pytest.approx(told[name] or 0, rel=1e-3, abs=1e-6)  # None: not measured
            assert (row[name] or 0) == same, (step, name)
    final, _ = script.load_model(str(out / "final"), device)
    after, alone = final.state_dict(), model.state_dict()
    moved = torch.cat([(after[name] - start[name]).flatten() for name in start]).norm()
    apart = torch.cat([(after[name] - alone[name]).flatten() for name in start]).norm()
    assert moved > 0.01
    assert apart < 1e-4 * moved


def test_prompts_are_dealt_by_step_and_place(two, tmp_path):
    """So a run may go on with another number of ranks: one rank has the prompts, in their order, of
    which two had every other one each."""
    script, folder, _ = two
    result = run(1, tmp_path, script, f"{SMALL[script]} --steps 1 --out out")
    assert result.returncode == 0, result.stderr[-3000:]

    def prompts(groups) -> list:
        """In graph_gpo.py a task has a group for each of its states, all with one root."""
        return list(dict.fromkeys(tuple(group.root.tokens) for group in groups))

    # The warm start was shared out as well, and so were the held-out.
    start, alone = (folder / "out" / "start", tmp_path / "out" / "start")
    weights = [script.load_model(str(path), torch.device("cpu"))[0] for path in (start, alone)]
    for one, other in zip(*(model.parameters() for model in weights)):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    logs = [path.parent.joinpath("metrics.jsonl").read_text() for path in (start, alone)]
    evaluated = [json.loads(log.splitlines()[0]) for log in logs]
    assert evaluated[0]["greedy_success"] == evaluated[1]["greedy_success"]
    first, second = map(prompts, trained_on(folder, 0))
    (both,) = map(prompts, trained_on(tmp_path, 0))
    assert both[0::2] == first
    assert both[1::2] == second


@pytest.mark.parametrize("two", [graph_gpo], indirect=True)
def test_going_on_with_another_number_of_ranks(two, tmp_path):
    script, folder, _ = two
    shutil.copytree(folder / "out", tmp_path / "out")
    result = run(1, tmp_path, script, "--resume out --steps 6")
    assert result.returncode == 0, result.stderr[-3000:]
    assert [row["step"] for row in train_rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_one_rank_writes_and_counts_are_of_all(two):
    """Rows of the held-out and of each step are there once; what was sampled by both is in them."""
    script, folder, result = two
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["eval", *["train"] * 5, "eval"]
    assert result.stdout.count("model in") == 1
    assert result.stdout.count("held-out success") == 2
    for step, row in enumerate(train_rows(folder)):
        nodes = {}
        for groups in trained_on(folder, step):
            nodes |= {id(node): node for group in groups for node in group.root.below()}
        drawn = sum(len(node.logps) for node in nodes.values())
        # An end token in a turn without an action is dropped, and equal actions share a node.
        assert row["generated_tokens"] == drawn or script is not treerl
        assert row["generated_tokens"] >= drawn > row["generated_tokens"] / 2
        if script is not graph_gpo:
            rewards = [node.reward for node in nodes.values() if not node.children]
            won = [reward > 0.5 for reward in rewards]
            assert row["leaves"] == len(rewards)
            assert row["reward"] == pytest.approx(sum(rewards) / len(rewards))
            assert row["success"] == pytest.approx(sum(won) / len(won))


def test_more_ranks_than_tasks(tmp_path):
    line = f"{SMALL[graph_gpo]} --tasks 2 --eval-tasks 1 --steps 1 --out out"
    result = run(3, tmp_path, graph_gpo, line)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [len(groups) > 0 for groups in trained_on(tmp_path, 0)] == [True, True, False]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_the_run_in_a_line(rank, tmp_path):
    line = f"{SMALL[treerl]} --steps 3 --out out"
    result = run(2, tmp_path, treerl, line, FAIL=str(rank))
    assert result.returncode != 0
    said = re.split(r"[\n\r]", result.stderr)
    (why,) = [line for line in said if "says the test" in line]
    assert why.startswith("rank 1: stopped:" if rank else "stopped:")
    ours = result.stderr.partition("Traceback")  # torchrun's own report comes last
    assert "ChildFailedError" in ours[2]
    assert ours[2].count("Traceback") == 0
    assert "[rank" not in result.stderr


def test_bad_input_is_said_once(tmp_path):
    result = run(2, tmp_path, tree_grpo, "--M 0")
    assert result.returncode != 0
    assert result.stderr.count("tree_grpo.py: ") == 1
    assert not (tmp_path / "runs").exists()
