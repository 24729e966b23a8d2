"""What the pages cite is what the benchmarks measured, and the comparison's own arithmetic."""

import dataclasses
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

import common
import default_run
import learning
import memory
import plot
import search
import speed
from house import House
from sums import make_problem
from tiny import tiny_model

CPU = torch.device("cpu")
PAGES = [ROOT / "README.md", ROOT / "tutorial.md", ROOT / "benchmarks" / "README.md"]
# by the first column: tables that are not of measured figures
OTHER_TABLES = (
    "script",
    "part",
    "leaf",
    "segment",
    "rollout",
    "state",
    "what",
    "equation",
    "paper",
    "column",
)
RESULTS = ROOT / "benchmarks" / "results"
RESULT_PAGES = sorted(RESULTS.glob("*.md"))


def tables(path: Path) -> dict[str, set[str]]:
    """Head -> rows of a page's Markdown tables, tables with the same head together."""
    found = {}
    for block in re.findall(r"(?:^\|.*\n)+", path.read_text(encoding="utf-8"), re.MULTILINE):
        head, _, *rows = block.splitlines()
        found.setdefault(head, set()).update(rows)
    return found


def test_cited_tables_are_in_the_results():
    measured, cited = {}, 0
    for path in RESULT_PAGES:
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


@pytest.mark.parametrize("page", [*PAGES, *RESULT_PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{page.name} links {target}"
            assert not anchor or anchor in anchors(there), f"{page.name} links {target}"


@pytest.mark.parametrize("name", learning.EXPERIMENTS)
def test_learning_results_follow_from_the_runs(name):
    """The pages have other columns, but each mean with its interval is one of theirs."""
    pytest.importorskip("scipy")
    file = RESULTS / learning.FILES[learning.EXPERIMENTS[name].script]
    text = file.with_suffix(".md").read_text(encoding="utf-8")
    report, cells = learning.report(name), 0
    for cell in re.findall(r"[-+]?[0-9]\.[0-9]{3} ± [0-9.]+", report):
        assert cell in text, f"{name}: {cell}"
        cells += 1
    assert cells > 10


def test_the_table_of_collapses_follows_from_the_runs():
    assert default_run.collapse_table() in (RESULTS / "collapse.md").read_text(encoding="utf-8")


def test_interval():
    pytest.importorskip("scipy")
    # Values 1, 2, 3, 4: mean 2.5, variance 5/3, standard error sqrt(5/12); Student's t of three
    # degrees of freedom at 97.5 % is 3.182, of one 12.71.
    expected = 3.182 * math.sqrt(5 / 12)
    assert math.isclose(common.half_width([1.0, 2.0, 3.0, 4.0]), expected, rel_tol=1e-3)
    assert common.interval([0.5, 0.7], "+") == "+0.600 ± 1.271"


def test_rank_test():
    pytest.importorskip("scipy")
    # All of five differences have one sign: two of 32 equally likely signs are so extreme.
    assert common.rank_test([0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx(2 / 32)


# ------------------------------------------------------------------------------ a step outside train
SMALL = {
    tree_grpo: {"prompts": 2, "turn_tokens": 4, "max_turns": 2},
    treerl: {"prompts": 2, "max_tokens": 12, "M": 2, "temperature": 1.0},
    graph_gpo: {"tasks": 2, "K": 3, "max_steps": 4, "max_tokens": 4},
}


@pytest.fixture(scope="module", params=SMALL, ids=lambda script: script.__name__)
def actor(request):
    script = request.param
    args = common.tiny_args(script, sft_steps=2, kl_coef=0.0, **SMALL[script])
    return script, common.actor_of(script, *common.warm_started(script, args), args)


def test_a_step_is_that_of_train(actor, tmp_path, monkeypatch):
    """What rollouts() and credits() give is what train() hands to update()."""
    script, player = actor
    args = dataclasses.replace(player.args, steps=1, out=str(tmp_path))
    seen, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *how: seen.append(how[3]) or update(*how))
    monkeypatch.setattr(script, "catch_signals", list)
    nothing = {"success": 0.0, "greedy_success": 0.0}
    evaluated = graph_gpo.Player if script is graph_gpo else script
    monkeypatch.setattr(evaluated, "evaluate", lambda actor: nothing)
    found, _ = common.rollouts(script, player, 0)
    ours = common.credits(script, found, args, 0)
    script.train(args, player.model, None, player, None)
    assert len(ours) == len(seen[0]) > 1
    for group, other in zip(ours, seen[0]):
        assert group.weight == other.weight and torch.equal(group.advantages, other.advantages)
        for leaf, same in zip(group.leaves, other.leaves, strict=True):
            assert [n.tokens for n in leaf.path()] == [n.tokens for n in same.path()]


def test_a_run_spends_its_budget(actor, tmp_path):
    script, player = actor
    script.save_model(tmp_path / "start", player.model, player.tokenizer)
    told = {**common.TINY[script], **SMALL[script], "model": tmp_path / "start", "steps": 5}
    told |= {"lr": 1e-9, "device": "cpu", "save_every": 9}
    told["eval_tasks" if script is graph_gpo else "eval_prompts"] = 1
    counted = "env_steps" if script is graph_gpo else "generated_tokens"
    train = script.train
    rows = learning.budgeted_run(script, tmp_path / "run", common.flags(told), 300, counted)
    steps = [row for row in rows if row["event"] == "train"]
    # What is missed in one update is made up in the next.
    assert abs(sum(row[counted] for row in steps) / 300 / 5 - 1) < 0.15
    unit = "tasks" if script is graph_gpo else "prompts"
    assert all(row[unit] >= 1 and 0 <= row["signal"] <= 1 for row in steps)
    kept = learning.summary(rows, updates=3)
    assert kept[counted] == sum(row[counted] for row in steps[:3]) and len(kept["success"]) == 2
    assert script.train is train and script.time.__name__ == "time"  # put back


def test_older_and_newer_rows_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    rows = [{"world": "house", "start": 1, "seed": 2, "method": "grpo", "x": 0}]
    rows.append({"experiment": "house", "setting": "", "start": 0, "seed": 2, "arm": "grpo", "x": 1})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "learning_graph_gpo.jsonl").write_text(text)
    (tmp_path / "learning_treerl.jsonl").write_text(json.dumps({"seed": 3, "arm": "random"}) + "\n")
    found = learning.read_runs("house")[""]["grpo"]
    assert {key: row["x"] for key, row in found.items()} == {(1, 2): 0, (0, 2): 1}
    assert set(learning.read_runs("treerl")[""]["random"]) == {(3, 3)}
    assert learning.read_runs("sokoban")[""]["grpo"] == {}


def test_search_table_follows_from_the_runs():
    pytest.importorskip("scipy")
    page = (RESULTS / "search.md").read_text(encoding="utf-8")
    models = search.read_models(RESULTS)
    assert {len(model.right) for model in models.values()} == {500}
    assert search.search_table(list(models.values())) in page
    for model in models.values():
        assert f"{model.accuracy():.3f}" in page


def test_search_compares_with_chains_at_its_own_tokens(tmp_path):
    shape = [1, 2, 1, 2]
    rows = [
        {
            "seed": 3,
            "method": "chains",
            "tokens": 400.0,
            "right": [4, 0],
        },  # so a chain has 10 tokens
        {"seed": 3, "method": "EPTree", "budget": shape, "tokens": 20.0, "pass": "10"},
        {"seed": 3, "method": "MCTS", "budget": shape, "tokens": 10.0, "pass": "01"},
    ]
    (tmp_path / "search.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [model] = search.read_models(tmp_path).values()
    two, shape = 1 - 36 / 40 * 35 / 39, tuple(shape)  # two of 40 chains hold one of the four right ones
    assert model.accuracy() == pytest.approx(4 / 80)
    assert model.tokens["chains", shape] == model.tokens["EPTree", shape] == 20
    assert model.passed["chains", shape] == pytest.approx([two, 0.0])
    assert model.gaps["EPTree", shape] == pytest.approx([1 - two, 0.0])
    assert model.gaps["MCTS", shape] == pytest.approx([-0.1, 1.0])


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
    assert learning.mean_until(row, 4.0) == pytest.approx(0.35)
    assert learning.mean_until(row, 6.0) == pytest.approx((0.2 * 2 + 0.6 * 4) / 6)
    other = {"cpu": [0, 4.0], "success": [0.0, 1.0]}
    assert learning.at_equal_time(row, other) == pytest.approx(0.35 - 0.5)


def test_starts_of_a_seed_are_one_observation():
    runs = ((0, 1.0), (1, 5.0), (0, 3.0), (1, 6.0))
    found = [{"graph_gpo": {"seed": seed, "x": x}} for seed, x in runs]
    assert learning.by_seed(found, lambda arms: arms["graph_gpo"]["x"]) == [2.0, 5.5]


def test_mcts_goes_down_where_rewards_are():
    args = common.tiny_args(treerl, sft_steps=30)
    solver = common.actor_of(treerl, *common.warm_started(treerl, args), args)
    problems = [make_problem(random.Random(i), 8, True) for i in range(3)]
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


def three_steps() -> graph_gpo.Task:
    """Two rollouts: a success by "b", and a step from "a" with an invalid action."""
    steps = [
        graph_gpo.Step(graph_gpo.Transition("a", "x", "b", 0), None, 0.0, True),
        graph_gpo.Step(graph_gpo.Transition("b", "y", graph_gpo.SUCCESS, 0), None, 1.0, True),
        graph_gpo.Step(graph_gpo.Transition("a", "z", "c", 1), None, 0.0, False),
    ]
    return graph_gpo.Task("task", graph_gpo.Node(), [1.0, 0.0], [True, False], steps)


def test_gigpo_without_the_std():
    # Returns 10, 0: A_E = 5, -5; from "a" 9.5, 0: 4.75, -4.75; "b" is alone; the penalty is 0.1.
    task = three_steps()
    for world, method, expected in (
        ("sokoban", "gigpo", [9.75, 5, -9.85]),
        ("house", "gigpo", [2**0.5, 0.5**0.5]),
        ("sokoban", "graph_gpo", [2**0.5, 0.5**0.5]),
        ("sokoban", "grpo", [0.5**0.5] * 2),
    ):
        with learning.arm_of(world, method):
            found = graph_gpo.advantages(task, graph_gpo.Args(method=method)).tolist()
        assert found[: len(expected)] == pytest.approx(expected)


# --------------------------------------------------------------------------------- speed and controls
@pytest.fixture(scope="module")
def house():
    model, tokenizer = tiny_model(House.words, CPU, 0)
    how = {"tasks": 3, "K": 4, "max_steps": 6, "max_tokens": 4, "kl_coef": 0.0}
    return model, tokenizer, common.tiny_args(graph_gpo, micro_tokens=400, **how)


def test_ways_to_handle_prompts_cost_what_they_say(house):
    """One prompt per step costs all prompts in both halves; kept ones cost each distinct prompt of
    a task once."""
    model, tokenizer, args = house

    def cost(way, **changes):
        return speed.iteration(way, model, tokenizer, dataclasses.replace(args, **changes), 0)

    alone, wave, kept = map(cost, speed.WAYS)
    assert alone["sampling"] == alone["training"] > 20 * alone["steps"]
    assert alone["sampling"] > wave["sampling"] > kept["sampling"]
    assert kept["training"] >= kept["sampling"]  # --micro-tokens may split a task, twice its root
    assert cost("kept", micro_tokens=10**6)["training"] == kept["sampling"]


def test_padded_and_packed_give_the_same_gradients():
    """compare_row() asserts so, on a model and trees that fork below the prompt."""
    args = common.tiny_args(tree_grpo, sft_steps=2, prompts=2, turn_tokens=5)
    agent = common.actor_of(tree_grpo, *common.warm_started(tree_grpo, args), args)
    found, _ = common.rollouts(tree_grpo, agent, 0)
    groups = speed.other_advantages(common.credits(tree_grpo, found, args, 0))
    row = speed.compare_row(["trees"], agent.model, groups, 1, CPU)
    paths = [leaf.path() for _, root in found for leaf in root.leaves()]
    unique = sum(tree_grpo.length(root.below()) for _, root in found)
    assert row[1] == f"{sum(map(tree_grpo.length, paths)) / unique:.2f}"


def test_grid_is_of_whole_rollouts():
    transitions = speed.grid(1000)
    assert len(transitions) == 1000
    assert any(t.next_state is graph_gpo.SUCCESS for t in transitions)
    last = {}
    for t in transitions:  # each begins where the one before it in its rollout ended
        assert last.get(t.trajectory, t.state) == t.state
        last[t.trajectory] = t.next_state


def test_shuffled_credits_are_the_same_ones_elsewhere():
    task, args = three_steps(), graph_gpo.Args()
    A = graph_gpo.advantages(task, args)
    dealt = default_run.shuffled_steps(graph_gpo.advantages)(task, args)
    assert torch.equal(A.sort().values, dealt.sort().values) and not torch.equal(A, dealt)

    root, args = tree_grpo.Node(), tree_grpo.Args()
    for i in range(8):
        tree_grpo.Node(root, tree=i % 2, reward=float(i))
    leaves, A = tree_grpo.credit(root, args, random.Random(0))
    shuffled = default_run.shuffled_advantages(tree_grpo.credit)
    same, dealt = shuffled(root, args, random.Random(0))
    assert same == leaves
    assert torch.equal(A.sort().values, dealt.sort().values) and not torch.equal(A, dealt)

    default_run.shuffled_rewards(lambda *how: None)(root, args, random.Random(0))
    dealt = [leaf.reward for leaf in root.leaves()]
    assert sorted(dealt) == list(range(8)) != dealt


def test_memory_grows_when_lanes_are_full():
    """By hand, of the sampling alone: 1,600 lanes."""
    args = common.tiny_args(tree_grpo, kl_coef=0.0, micro_tokens=1)
    model = speed.new_model("tiny", CPU)
    shape = {"prompts": 1, "prompt": 0, "lanes": 1600, "leaves": 0}
    kv = 2 * 4 * 2 * 32 * 4  # keys and values, layers, KV heads, head size, bytes
    found = [memory.memory_needed(model, args, tokens=n, **shape) for n in (65, 66)]
    # There is room for 65 tokens, and then for 64 more; each token more also takes its scores, 16
    # bytes for each of four heads.
    assert found[1] - found[0] == pytest.approx(1600 * (kv * 64 + 16 * 4) / 1e9)


def test_runs_are_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"event": "eval", "step": i, "success": 0.1, "greedy_success": 0.2} for i in (0, 2)]
    rows += [{"event": "train", "step": i, "reward": 0.3} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot.draw([tmp_path], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
