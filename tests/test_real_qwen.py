"""benchmarks/real_qwen.py: a run ends in time and leaves its rows, and what its tables say is so."""

import argparse
import math
import sys
from pathlib import Path

import pytest
import torch

import tree_grpo

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common
import real_qwen
from tiny import tiny_model

WORDS = [f"w{i}" for i in range(40)]


def options(tmp_path, **more) -> argparse.Namespace:
    usual = {"model": str(tmp_path / "model"), "data": None, "minutes": 60.0, "tokens": math.inf, "seed": 0}
    usual |= {"problems": 2, "batches": 3, "gpu_memory": 0.0, "imitate": 1, "commit": "c", "more": []}
    return argparse.Namespace(rows=tmp_path / "rows.jsonl", **{**usual, **more})


@pytest.fixture
def model(tmp_path):
    made, tokenizer = tiny_model(WORDS, torch.device("cpu"), 0)
    tree_grpo.save_model(tmp_path / "model", made, tokenizer)


SMALL = ["--prompts=2", "--turn-tokens=4", "--eval-prompts=2", "--eval-every=0", "--micro-tokens=4096"]


def test_a_run_ends_after_its_tokens_and_leaves_its_curve(tmp_path, model):
    told = options(tmp_path, item="grpo", tokens=1, more=SMALL)
    real_qwen.train(told)
    rows = common.read_rows(told.rows)
    assert [row["event"] for row in rows] == ["start", "eval", "train", "eval"]
    assert rows[0]["item"] == "grpo" and rows[0]["commit"] == "c" and rows[0]["torch"] == torch.__version__
    assert rows[1]["elapsed"] <= rows[2]["elapsed"] <= rows[3]["elapsed"]
    assert rows[2]["leaves"] == 8  # GRPO's four chains of each question
    [run] = real_qwen.runs_of(rows)
    assert real_qwen.curve(run)[1][1] == rows[2]["generated_tokens"] > 0
    assert "| grpo | 0 |" in real_qwen.training_table([run])


def test_a_run_ends_in_time(tmp_path, model):
    told = options(tmp_path, item="tree_grpo", minutes=0.0, more=SMALL)
    real_qwen.train(told)
    assert [row["event"] for row in common.read_rows(told.rows)] == ["start", "eval", "train", "eval"]


def test_the_house_begins_with_imitation(tmp_path, model):
    more = ["--tasks=1", "--K=2", "--max-steps=2", "--max-tokens=2", "--eval-tasks=1"]
    told = options(tmp_path, item="graph_gpo", minutes=0.0, more=more)
    real_qwen.train(told)
    events = [row["event"] for row in common.read_rows(told.rows)]
    assert events == ["start", "imitation", "eval", "train", "eval"]


def test_search_and_its_table(tmp_path, model, monkeypatch):
    monkeypatch.setattr(real_qwen.search, "CHAINS", 4)
    data = tmp_path / "data.jsonl"
    lines = [f'{{"question": "How much is {i} + 1?", "answer": "#### {i + 1}"}}' for i in range(10)]
    data.write_text("\n".join(lines))
    told = options(tmp_path, item="search", data=data, more=["--max-tokens=3"])
    real_qwen.search_item(told)
    start, part = common.read_rows(told.rows)
    assert start["event"] == "start" and part["problems"] == 2 and len(part["right"]) == 2
    # By hand: of 4 chains of 100 tokens each 1 of the first problem and none of the second is right. As many tokens as
    # the tree has are 2 chains, which find the first with chance 1/2.
    part |= {"chains": 400, "right": [1, 0]}
    part |= {shape: {"tokens": 200, "passed": [1, 0]} for shape in part if "," in shape}
    table = real_qwen.search_table([start, part])
    assert "| (6,2,1,2) | 2 | 200 | 0.250 ± 0.250 | 0.500 ± 0.500 | +0.250 ± 0.250 |" in table


def test_alignment_and_its_table(tmp_path, model):
    told = options(tmp_path, item="alignment", more=SMALL)
    real_qwen.alignment(told)
    start, *batches = common.read_rows(told.rows)
    assert [row["step"] for row in batches] == [0, 1, 2]
    names = ["chains", "trees, both", "trees, intra", "trees, inter", "reference"]
    assert batches[2]["names"] == names
    assert torch.tensor(batches[2]["inner"]).shape == (5, 3, 5)
    table = real_qwen.alignment_table([start, *batches])
    assert table.startswith("3 batches") and "| reference | " in table


def test_alignment_of_known_gradients():
    # An arm's gradient is the truth, of length 1, and noise of a known length.
    generator = torch.Generator().manual_seed(0)
    n, size, noise = 40, 2000, {"chains": 2.0, "trees": 1.0, "reference": 1.0}
    truth = torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=0)
    drawn = torch.randn(len(noise), n, size, generator=generator) / size**0.5
    gradients = truth + torch.tensor([*noise.values()])[:, None, None] * drawn
    rows = [
        {"names": [*noise], "inner": (gradients[:, : i + 1] @ gradients[:, i].T).tolist()} for i in range(n)
    ]
    found = real_qwen.alignments(rows)
    for arm, length in list(noise.items())[:2]:
        assert found[arm][0] == pytest.approx(1 / math.sqrt(1 + length**2), rel=0.1)
    assert found["trees"][1] == pytest.approx(5 / 2, rel=0.2)
    assert found["reference"][0] == pytest.approx(1 / 2, rel=0.1)
    assert real_qwen.alignments(rows, left_out=3)["trees"][0] != found["trees"][0]


def test_a_sketch_keeps_inner_products(monkeypatch):
    monkeypatch.setattr(real_qwen, "SKETCH", 1024)
    torch.manual_seed(0)
    signs = torch.randint(0, 2, (50_001,), dtype=torch.int8) * 2 - 1
    a, b = torch.randn(2, 50_001)
    b += a
    kept = [real_qwen.sketch(x, signs) for x in (a, b)]
    assert kept[0].shape == (1024,)
    assert kept[0] @ kept[1] == pytest.approx(float(a @ b), rel=0.2)


def test_alignment_without_a_signal_says_nothing():
    rows = [{"names": ["chains", "reference"], "inner": torch.zeros(2, i + 1, 2).tolist()} for i in range(3)]
    assert all(math.isnan(value) for values in real_qwen.alignments(rows).values() for value in values)


def test_a_killed_run_and_runs_side_by_side_are_told_apart(tmp_path):
    told = {key: "x" for key in ("command", "device", "torch", "transformers", "date", "commit")}
    rows = [{"item": item, "seed": 0, "event": "start", **told} for item in ("grpo", "graph_gpo")]
    rows.append({"item": "grpo", "seed": 0, "event": "eval", "step": 0, "success": 0.1})
    rows.append({"item": "graph_gpo", "seed": 0, "event": "imitation", "step": 1})
    rows.append({"item": "grpo", "seed": 1, "event": "eval", "step": 0})  # its beginning is lost
    runs = real_qwen.runs_of(rows)
    assert [[row["event"] for row in run] for run in runs] == [["start", "eval"], ["start", "imitation"]]
    common.write_rows(tmp_path / "rows.jsonl", [row for row in rows if row["item"] == "graph_gpo"])
    real_qwen.report(options(tmp_path))
    assert not (tmp_path / "rows.png").exists()


@pytest.mark.parametrize("arguments", [["report", "--row", "x"], ["grpo", "--model", "x", "--method=grpo"]])
def test_what_is_not_known_is_refused(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["real_qwen.py", *arguments])
    with pytest.raises(SystemExit):
        real_qwen.main()


def test_a_typo_leaves_no_row(tmp_path, model):
    with pytest.raises(tree_grpo.BadInput, match="--prompt="):
        real_qwen.train(options(tmp_path, item="grpo", more=["--prompt=2"]))
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_page_says_what_was_measured():
    runs = real_qwen.runs_of(common.read_rows("real_qwen.jsonl"))
    page = (common.RESULTS / "real_qwen.md").read_text(encoding="utf-8")
    assert real_qwen.training_table(runs) in page
    for run in runs:
        assert run[0]["command"] in page and run[0]["commit"] in page
