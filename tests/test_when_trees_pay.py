"""The exact map: the gradient that it knows, and the estimators that it marks."""

import math
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tree_grpo import Node

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import learning
import when_trees_pay as pay


def test_tables_follow_from_the_runs():
    pytest.importorskip("scipy", reason="scipy is not installed (pip install scipy)")
    page = (ROOT / "benchmarks" / "results" / "when_trees_pay.md").read_text(encoding="utf-8")
    assert all(table in page for table in pay.tables().split("\n\n"))


def test_the_true_gradient_by_hand():
    # one decisive step of two, p = 0.4: dJ / dlogit is p (1 - p) for action 0 and -p (0.6 / 3) for each of the others
    found = pay.true_gradient(pay.policy([0.4, 0.4]), (1,))
    assert found[0].tolist() == pytest.approx([0.0] * 4)
    assert found[1].tolist() == pytest.approx([0.24, -0.08, -0.08, -0.08])


def test_the_gradient_of_one_leaf_by_hand():
    # A = 2 for a path of 2 steps, actions 0 and 3, p = 0.4: each step has the factor 2 / 2 times weight 0.5, of 1 - pi
    probs = pay.policy([0.4, 0.4])
    steps, actions = torch.tensor([[0, 1]]), torch.tensor([[0, 3]])
    one = torch.ones(1, dtype=torch.float64)
    found = pay.gradients(probs, steps, actions, 2 * one, 0.5 * one, torch.tensor([0]))
    assert found.shape == (1, 2, 4)
    assert found[0, 0].tolist() == pytest.approx([0.5 * 0.6, -0.1, -0.1, -0.1])
    assert found[0, 1].tolist() == pytest.approx([-0.2, -0.1, -0.1, 0.5 * 0.8])


def test_signal_to_noise_by_hand():
    # two values of equal weight, 1 and 3 along u and +-1 across: mean 2, variance 1 + 1; at a cost of 5: 4 / 2 / 5
    g = torch.tensor([[1.0, 1.0], [3.0, -1.0], [1.0, -1.0], [3.0, 1.0]] * 10, dtype=torch.float64)
    value, error, cosine = pay.marks(g, torch.tensor([7.0, 0.0], dtype=torch.float64), 5.0).values()
    assert value == pytest.approx(math.log(4 / 2 / 5)) and 0 <= error < 1 and cosine == pytest.approx(1)


@pytest.fixture(scope="module")
def last_of_four():
    rows = pay.trees_job(4, (4,), 0.5, 1000)
    return {(row["shape"], row["terms"]): row for row in rows}


def test_rloo_on_chains_is_unbiased(last_of_four):
    assert 0.3 < last_of_four[pay.CHAINS, "rloo"]["off"] < 2  # root mean square of standard errors: near 1


def test_estimators_point_along_the_gradient(last_of_four):
    assert all(row["cosine"] > 0.98 for row in last_of_four.values())


def test_a_tree_pays_for_the_last_decision_and_not_for_the_first(last_of_four):
    def gain(rows):
        return math.exp(rows[pay.TREE, "both"]["log"] - rows[pay.CHAINS, "inter"]["log"])

    first = {(row["shape"], row["terms"]): row for row in pay.trees_job(4, (1,), 0.2, 1000)}
    assert gain(last_of_four) > 1.6 and gain(first) < 0.9


def test_steps_are_counted(last_of_four):
    chains = last_of_four[pay.CHAINS, "inter"]
    assert (chains["drawn"], chains["read"]) == (
        16,
        12,
    )  # 4 chains of 4 steps, between which 3 observations are read
    # two trunks and four forks of (4 + 3 + 2 + 1) / 4 steps, before whose last one nothing is read
    tree = last_of_four[pay.TREE, "both"]
    assert tree["drawn"] == pytest.approx(8 + 4 * 2.5, rel=0.02)
    assert tree["read"] == pytest.approx(6 + 4 * 1.5, rel=0.02)
    more = pay.per_forwarded({"log": 1.0, "drawn": 10.0, "read": 5.0}, 4)
    assert more["log"] == pytest.approx(1 + math.log(10 / 30))


def test_token_credits_and_segments():
    rows = {row["arm"]: row for row in pay.tokens_job("tokens 3, 8, 14, unsure everywhere", 100)}
    assert rows["18 chains, RLOO"]["drawn"] == 18 * pay.TOKENS and rows["18 chains, RLOO"]["off"] < 2.5
    assert rows["6, 2, 1, 2"]["drawn"] > 6 * pay.TOKENS and rows["6, 2, 1, 2"]["cosine"] > 0.8


def test_the_gradient_of_success_in_a_world():
    leads, probs = pay.make_world(0.8, 3)
    found, J = pay.success_gradient(leads, probs)
    assert pay.SUCCESS_RATE == pytest.approx(J, abs=1e-6)
    moved = probs.log()
    moved[2, 1] += 1e-5  # softmax normalises
    assert (pay.success_gradient(leads, moved.softmax(-1))[1] - J) / 1e-5 == pytest.approx(found[2, 1].item(), abs=1e-5)
    rng, won = random.Random(0), 0
    for _ in range(3000):
        state = 0
        for _ in range(pay.HORIZON):
            state = leads[state][rng.choices(range(pay.ACTIONS), probs[state].tolist())[0]]
            if state in (-1, pay.STATES):
                break
        won += state == pay.STATES
    assert won / 3000 == pytest.approx(J, abs=0.03)


def small_tree():
    """Below the root s, below s the leaves a and b; b and the trunk's end a differ in reward."""
    root = Node()
    s = Node(root, [1])
    a, b = Node(s, [2]), Node(s, [3])
    a.reward, b.reward = 1.0, 0.0
    return root, s


def test_mixed_and_few_look_at_the_leaves():
    root, s = small_tree()
    c = Node(root, [4])
    d = Node(c, [5])
    d.reward = 1.0
    assert pay.Mixed(0).weights([root, s, c]) == [
        0,
        1,
        0,
    ]  # the deepest node with leaves that differ
    assert pay.Few(0).weights([root, s, c]) == pytest.approx([1 / 3, 1 / 2, 1])
    s.children[1].reward = 1.0
    assert pay.Mixed(0).weights([root, s, c]) == [1, 1, 1]  # nothing is known: uniform


def test_learned_forks_go_where_rewards_differ():
    rule = pay.Learned(0)
    root, s = small_tree()
    assert rule.weights([root, s]) == pytest.approx([0.9 / 3 + 0.05, 0.9 * 2 / 3 + 0.05])  # by the steps left, 2 and 1
    for _ in range(100):
        rule.observe(root)
    # one leaf of two is right at both depths, so that both variances are 1/2
    assert rule.squares == {0: pytest.approx(50), 1: pytest.approx(50)} and rule.freedom == {
        0: 100,
        1: 100,
    }
    s.children[1].reward = 1.0  # now the leaves below s agree, and those below the root do not
    Node(root, [4]).reward = 0.0
    rule = pay.Learned(0)
    for _ in range(1000):
        rule.observe(root)
    assert rule.weights([root, s]) == pytest.approx([0.95, 0.05], abs=0.01)


def test_learned_forks_make_as_many_leaves():
    def play(starts):
        for _, node, tree in starts:
            for _ in range(len(node.path()) - 1, 3):
                node = Node(node, [0], tree=tree)
            node.reward = random.random()

    learned, root = learning.learned_search(), Node()
    learned(play, [("a question", root)], 2, 2, 1, random.Random(0))
    assert len(root.leaves()) == 6 and Counter(leaf.tree for leaf in root.leaves()) == {0: 3, 1: 3}
