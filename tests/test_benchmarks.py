"""What the pages cite is what the benchmarks measured, and the comparison's own arithmetic."""

import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch

import graph_gpo
import tree_grpo
import treerl

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import collapse
import default_run
import graph
import learning
import learning_graph_gpo
import learning_treerl
import search

PAGES = [ROOT / "README.md", ROOT / "tutorial.md", ROOT / "benchmarks" / "README.md"]
# by the first column: tables that are not of measured figures
OTHER_TABLES = ("script", "part", "leaf", "segment", "rollout", "state", "what", "equation", "paper", "column")
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


def anchors(path: Path) -> set[str]:
    """Those that GitHub gives to a page's headings: lower case, no punctuation, a hyphen for each space."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{page.name} links {target}"
            assert not anchor or anchor in anchors(there), f"{page.name} links {target}"


@pytest.mark.parametrize("experiment", learning.EXPERIMENTS)
def test_learning_tables_follow_from_the_runs(experiment):
    pytest.importorskip("scipy")
    assert learning.tables(experiment) in (ROOT / "benchmarks" / "results" / "learning.md").read_text(encoding="utf-8")


def test_the_table_of_collapses_follows_from_the_runs():
    assert collapse.report() in (ROOT / "benchmarks" / "results" / "collapse.md").read_text(encoding="utf-8")


def test_interval():
    pytest.importorskip("scipy")
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


def test_treerl_tables_follow_from_the_runs():
    pytest.importorskip("scipy")
    page = (ROOT / "benchmarks" / "results" / "learning_treerl.md").read_text(encoding="utf-8")
    assert learning_treerl.tables() in page


def test_graph_gpo_tables_follow_from_the_runs():
    pytest.importorskip("scipy")
    page = (ROOT / "benchmarks" / "results" / "learning_graph_gpo.md").read_text(encoding="utf-8")
    assert learning_graph_gpo.tables() in page


def test_search_table_follows_from_the_runs():
    pytest.importorskip("scipy")
    page = (ROOT / "benchmarks" / "results" / "search.md").read_text(encoding="utf-8")
    models = search.read_models(ROOT / "benchmarks" / "results")
    assert {len(model.right) for model in models.values()} == {500}
    assert search.search_table(list(models.values())) in page
    for model in models.values():
        assert f"{model.accuracy():.3f}" in page


def test_search_compares_with_chains_at_its_own_tokens(tmp_path):
    shape = [1, 2, 1, 2]
    rows = [{"seed": 3, "method": "chains", "tokens": 400.0, "right": [4, 0]},  # so a chain has 10 tokens
            {"seed": 3, "method": "EPTree", "budget": shape, "tokens": 20.0, "pass": "10"},
            {"seed": 3, "method": "MCTS", "budget": shape, "tokens": 10.0, "pass": "01"}]
    (tmp_path / "search.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [model] = search.read_models(tmp_path).values()
    two = 1 - 36 / 40 * 35 / 39  # two of 40 chains hold one of the four right ones
    assert model.accuracy() == pytest.approx(4 / 80)
    assert model.passed("chains", tuple(shape)) == pytest.approx([two, 0.0])  # as many tokens as EPTree
    assert model.gaps("EPTree", tuple(shape)) == pytest.approx([1 - two, 0.0])
    assert model.gaps("MCTS", tuple(shape)) == pytest.approx([-0.1, 1.0])


def test_holm():
    # three times the least; twice the next; the largest is not below that one
    assert search.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert search.holm([0.6, 0.7]) == [1.0, 1.0]


def test_chance_of_a_right_chain():
    # 40 chains, 4 right: two drawn at random miss with (36/40) (35/39); half way between one and two is their mean
    assert search.chance(4, 1) == pytest.approx(0.1) and search.chance(0, 7.5) == 0 and search.chance(40, 1) == 1
    assert search.chance(4, 2) == pytest.approx(1 - 36 / 40 * 35 / 39)
    assert search.chance(4, 1.5) == pytest.approx((0.1 + 1 - 36 / 40 * 35 / 39) / 2)
    assert search.chance(4, 40) == 1


def test_mean_over_time():
    row = {"cpu": [0, 2.0, 6.0], "success": [0.0, 0.4, 0.8]}
    # to 2: 0.2 on average; from 2 to 4: 0.5 (0.4 at 2, 0.6 at 4); so (0.2 x 2 + 0.5 x 2) / 4
    assert learning_treerl.mean_until(row, 4.0) == pytest.approx(0.35)
    assert learning_treerl.mean_until(row, 6.0) == pytest.approx((0.2 * 2 + 0.6 * 4) / 6)
    other = {"cpu": [0, 4.0], "success": [0.0, 1.0]}
    assert learning_treerl.at_equal_time(row, other) == pytest.approx((0.35, 0.5))


@pytest.fixture(scope="module")
def calculator(tmp_path_factory):
    args = treerl.Args(sft_steps=30, max_tokens=64, dtype="float32", prompts=4)
    model, tokenizer = treerl.calculator_model(args, torch.device("cpu"), tmp_path_factory.mktemp("calculator"))
    return model, tokenizer, args


def test_treerl_arms_spend_the_budget(calculator, monkeypatch):
    monkeypatch.setattr(learning_treerl.Solver, "budget", 1500)
    model, tokenizer, _ = calculator
    for told, _ in learning_treerl.ARMS.values():
        args, _ = treerl.parse_args(treerl.Args, told.split())
        args.prompts, args.max_tokens = 4, 48
        solver = learning_treerl.Solver(model, tokenizer, args, [], [])
        spent = [solver.rollout(step)[1]["generated_tokens"] for step in range(4)]
        assert abs(sum(spent) / 4 / 1500 - 1) < 0.2  # what is missed in one update is made up in the next


def test_mcts_goes_down_where_rewards_are(calculator):
    model, tokenizer, args = calculator
    solver = treerl.Solver(model, tokenizer, args, [], [])
    problems = [treerl.make_problem(random.Random(i), 8, True) for i in range(3)]
    roots, whole = [], solver.root
    solver.root = lambda problem: roots.append(whole(problem)) or roots[-1]
    found = search.mcts(solver, problems, random.Random(0), [150, 300], 2, 1.0)
    assert [tokens >= budget for (_, tokens), budget in zip(found, (150, 300))] == [True, True]
    total = 0
    for root, passed in zip(roots, found[-1][0]):
        nodes = root.below()[1:]
        total += sum(len(node.tokens) for node in nodes)
        assert passed == max(leaf.reward for leaf in root.leaves())
        assert all(len(node.children) <= 2 for node in [root, *nodes])  # the width
        assert all("\n" not in solver.text(node.tokens[:-1]) for node in nodes)  # a node is a line
        assert max(len(leaf.path()) for leaf in root.leaves()) > 3
    assert total / 3 == pytest.approx(found[-1][1])


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    graph_gpo.save_tiny_model(folder, [*graph_gpo.House.words], 0)
    args = graph_gpo.Args(tasks=3, K=4, max_steps=6, max_tokens=4, dtype="float32", kl_coef=0.0, micro_tokens=400)
    return *graph_gpo.load_model(str(folder), torch.device("cpu")), args


def test_graph_gpo_methods_spend_the_budget(house, monkeypatch):
    monkeypatch.setattr(learning_graph_gpo.Player, "budget", 150)
    model, tokenizer, args = house
    player = learning_graph_gpo.Player(model, tokenizer, graph_gpo.Args(**vars(args)), graph_gpo.House)
    spent = [player.rollout(step)[1]["env_steps"] for step in range(6)]
    assert abs(sum(spent) / 6 / 150 - 1) < 0.15  # what is missed in one update is made up in the next


def test_gigpo_without_the_std():
    # returns 10, 0: A_E = 5, -5; from "a" 9.5, 0: 4.75, -4.75; "b" is alone; the penalty is 0.1
    steps = [(graph_gpo.Transition("a", "x", "b", 0), None, 0.0, True),
             (graph_gpo.Transition("b", "y", graph_gpo.SUCCESS, 0), None, 1.0, True),
             (graph_gpo.Transition("a", "z", "c", 1), None, 0.0, False)]
    group = graph_gpo.Group("task", graph_gpo.Node(), [1.0, 0.0], [True, False], steps)
    player = learning_graph_gpo.Player.__new__(learning_graph_gpo.Player)
    for method, undivided, expected in (
            ("gigpo", True, [9.75, 5, -9.85]), ("gigpo", False, [2**0.5, 0.5**0.5]),
            ("graph_gpo", True, [2**0.5, 0.5**0.5]), ("grpo", True, [0.5**0.5] * 2)):
        player.args, player.undivided = graph_gpo.Args(method=method), undivided
        assert player.advantages(group).tolist()[: len(expected)] == pytest.approx(expected)


def test_starts_of_a_seed_are_one_observation():
    runs = ((0, 1.0), (1, 5.0), (0, 3.0), (1, 6.0))
    pairs = [{"graph_gpo": {"seed": seed, "x": x}} for seed, x in runs]
    assert learning_graph_gpo.by_seed(pairs, lambda pair: pair["graph_gpo"]["x"]) == [2.0, 5.5]


def test_ways_to_handle_prompts_cost_what_they_say(house):
    """One prompt per step costs all prompts in both halves; kept ones cost each distinct prompt of a task once."""
    model, tokenizer, args = house
    rows = {way: graph.iteration(way, model, tokenizer, graph_gpo.Args(**vars(args)), 0) for way in graph.WAYS}
    alone, wave, kept = map(rows.get, graph.WAYS)
    assert graph_gpo.compute.__name__ == "compute"  # put back
    assert alone["sampling"] == alone["training"] > 20 * alone["steps"]
    assert alone["sampling"] > wave["sampling"] > kept["sampling"]
    assert kept["training"] >= kept["sampling"]  # a task that --micro-tokens split has its root twice
    whole = graph_gpo.Args(**{**vars(args), "micro_tokens": 10**6})
    row = graph.iteration("kept", model, tokenizer, whole, 0)
    assert row["training"] == row["sampling"] == kept["sampling"]


def test_grid_is_of_whole_rollouts():
    transitions = graph.grid(1000)
    assert len(transitions) == 1000 and any(t.next_state is graph_gpo.SUCCESS for t in transitions)
    last = {}
    for t in transitions:  # each begins where the one before it in its rollout ended
        assert last.get(t.trajectory, t.state) == t.state
        last[t.trajectory] = t.next_state


def test_shuffled_steps_are_the_same_credits_elsewhere(house):
    model, tokenizer, args = house
    player = graph_gpo.Player(model, tokenizer, args, graph_gpo.House)
    [group] = player.play([3], 4, False, random.Random(0), 1.0, graph_gpo.Counter())
    A = player.advantages(group)
    dealt = default_run.shuffled_steps(graph_gpo.Player.advantages)(player, group)
    assert torch.equal(A.sort().values, dealt.sort().values) and not torch.equal(A, dealt)
