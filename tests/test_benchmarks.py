"""What the pages cite is what the benchmarks measured, and the comparison's own arithmetic."""

import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch

import tree_grpo

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import learning

PAGES = [ROOT / "README.md", ROOT / "tutorial.md", ROOT / "benchmarks" / "README.md"]
OTHER_TABLES = ("script", "part", "leaf", "what", "equation")  # by their first column: not of measured figures
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.md"))


def tables(path: Path) -> dict[str, set[str]]:
    """Head -> rows of a page's Markdown tables, tables with the same head together."""
    found = {}
    for block in re.findall(r"(?:^\|.*\n)+", path.read_text(encoding="utf-8"), re.MULTILINE):
        head, _, *rows = block.splitlines()
        found.setdefault(head, set()).update(rows)
    return found


def test_cited_tables_are_in_the_results():
    measured, cited = {}, 0
    for path in RESULTS:
        for head, rows in tables(path).items():
            measured.setdefault(head, set()).update(rows)
    for page in PAGES:
        for head, rows in tables(page).items():
            if head.split("|")[1].strip() not in OTHER_TABLES:
                assert rows <= measured[head], f"{page.name} cites what no result says: {rows - measured[head]}"
                cited += len(rows)
    assert cited > 20


@pytest.mark.parametrize("experiment", learning.EXPERIMENTS)
def test_learning_tables_follow_from_the_runs(experiment):
    assert learning.tables(experiment) in (ROOT / "benchmarks" / "results" / "learning.md").read_text(encoding="utf-8")


def test_interval():
    # values 1, 2, 3, 4: mean 2.5, variance 5/3, standard error sqrt(5/12); t of 3 degrees of freedom at 97.5 %: 3.182
    assert math.isclose(learning.half_width([1.0, 2.0, 3.0, 4.0]), 3.182 * math.sqrt(5 / 12), rel_tol=1e-3)
    assert learning.interval([0.5, 0.7], "+") == "+0.600 ± 1.271"  # t of one degree of freedom: 12.71


def test_arms_spend_the_budget(tmp_path, monkeypatch):
    tree_grpo.save_tiny_model(tmp_path, [], 0)
    model, tokenizer = tree_grpo.load_model(str(tmp_path), torch.device("cpu"))
    monkeypatch.setattr(learning.Agent, "budget", 300)
    monkeypatch.setattr(learning.Agent, "counted", "generated_tokens")
    for shape in map(learning.shapes(2, 4, 6).get, ("tree", "chains")):
        named = {name[2:]: value for name, value in zip(shape[::2], shape[1::2])}
        args = tree_grpo.Args(**named, prompts=2, turn_tokens=4, max_turns=2, topk=1)
        agent = learning.Agent(model, tokenizer, args, [], [])
        spent = [agent.rollout(step)[1]["generated_tokens"] for step in range(4)]
        assert abs(sum(spent) / len(spent) / 300 - 1) < 0.1


def test_observations_are_repeated(tmp_path, monkeypatch):
    tree_grpo.save_tiny_model(tmp_path, [], 0)
    model, tokenizer = tree_grpo.load_model(str(tmp_path), torch.device("cpu"))
    question = tree_grpo.make_question(random.Random(0), 2, "late", False)
    args = tree_grpo.Args(topk=1)
    agent = learning.Agent(model, tokenizer, args, [], [])
    found = agent.search([(question, f"{question.relations[0]} of {question.start}")])[0]
    monkeypatch.setattr(learning.Agent, "repeat", 3)
    assert tokenizer.decode(agent.observation(found)).count(found) == 3
