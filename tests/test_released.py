"""What the authors' released code has beside the papers, and other options that leave the scripts: merged states,
penalties before the z-scores, dynamic sampling, forks at random places. To be moved to the benchmarks."""

import math
import random
from collections import Counter
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from conftest import chi_square
from test_advantages import COSTS, random_graph, slow_distances
from test_advantages import plain_z as zs
from test_graph_gpo import group_of, stub
from test_treerl import scripted, solver_of

from graph_gpo import SUCCESS, Transition, gigpo_advantages, goal_distances, graph_advantages, merge_states
from treerl import Node

PATHS = ("smG", "sm", "sx")


# ---------------------------------------------------------------------------------------------------------- penalties
def slow_advantages(transitions, omega: str, penalties=None) -> list[float]:
    """In exact distances and numbers of 60 digits, a state at a time."""
    if penalties is None and not any(t.next_state is SUCCESS for t in transitions):
        return [0.0] * len(transitions)
    d, found = slow_distances(transitions, Fraction), [0.0] * len(transitions)
    with localcontext() as context:
        context.prec = 60
        R = []
        for i, t in enumerate(transitions):
            x = d[t.next_state] + Fraction(t.cost)
            R.append(10 * Decimal(omega) ** (Decimal(x.numerator) / x.denominator))
            R[i] -= Decimal(penalties[i]) if penalties is not None else 0
        for state in {t.state for t in transitions}:
            own = [i for i, t in enumerate(transitions) if t.state == state]
            mean = sum(R[i] for i in own) / len(own)
            square = sum((R[i] - mean) ** 2 for i in own)
            for i in own if square > Decimal("1e-100") else ():
                found[i] = float((R[i] - mean) / (square / (len(own) - 1)).sqrt())
    return found


def slow_gigpo(transitions, rewards, gamma, penalties=None) -> list[float]:
    n, found = len(transitions), [0.0] * len(transitions)
    returns = []
    for i, t in enumerate(transitions):
        rest = [r for u, r in zip(transitions[i:], rewards[i:]) if u.trajectory == t.trajectory]
        returns.append(sum(gamma**k * r for k, r in enumerate(rest)) - (penalties[i] if penalties else 0))
    for state in {t.state for t in transitions}:
        own = [i for i in range(n) if transitions[i].state == state]
        for i, z in zip(own, zs([returns[i] for i in own])):
            found[i] = z
    return found


def test_advantages_with_penalties_against_the_definition():
    rng = random.Random(2)
    for _ in range(200):
        transitions = random_graph(rng, COSTS["one"], 3)
        penalties = [rng.choice([0.0, 0.5]) for _ in transitions]
        found = graph_advantages(transitions, 0.5, torch.tensor(penalties, dtype=torch.float64))
        assert found.tolist() == pytest.approx(slow_advantages(transitions, "0.5", penalties), abs=1e-7)
        rewards = [rng.choice([0.0, 1.0]) for _ in transitions]
        found = gigpo_advantages(transitions, rewards, 1.0, torch.tensor(penalties, dtype=torch.float64))
        expected = slow_gigpo(transitions, rewards, 1.0, penalties)
        assert found.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("method", ["graph_gpo", "gigpo", "grpo"])
def test_penalties_before_the_z_scores(method):
    # invalid: the failed step to m, and that to x. R at s: 0.1, 0.1 - 0.2, 0.001 - 0.2; gigpo's returns at s: 1/2,
    # -0.2, -0.2; and A_E is a z-score over the four steps' returns, 1, 1, 0 - 0.2, 0 - 0.2
    player = stub(method=method, beta_graph=0.7, beta_episode=1.3, invalid_penalty=0.2, gamma=0.5,
                  penalty_in_return=True)
    step = {"graph_gpo": zs([0.1, -0.1, -0.199]), "gigpo": zs([0.5, -0.2, -0.2]), "grpo": [0, 0, 0]}[method]
    expected = [0.7 * a + 1.3 * e for a, e in zip([step[0], 0, *step[1:]], zs([1, 1, -0.2, -0.2]))]
    assert player.advantages(group_of(PATHS, invalid=(2, 3))).tolist() == pytest.approx(expected)


def test_penalties_before_the_z_scores_without_any_success():
    # d = 1 everywhere, R = 10 0.1^2 = 0.1 at s, twice, and 0.1 - 0.2
    player = stub(penalty_in_return=True, invalid_penalty=0.2)
    found = player.advantages(group_of(["sm", "sm", "sx"], invalid=(2,)))
    assert found.tolist() == pytest.approx([2 / math.sqrt(3), 2 / math.sqrt(3), -4 / math.sqrt(3)])


# ------------------------------------------------------------------------------------------------------- merged states
def test_nearly_equal_texts_become_one():
    # 40 characters of which one differs: the ratio is 2 39 / 80 = 0.975
    one, other = "the mug is on the table, the door is ope", "the mug is on the table, the door is opx"
    assert len(one) == 40
    transitions = [Transition(one, "a", other, 0, 2.5), Transition(other, "b", SUCCESS, 7),
                   Transition("elsewhere", "c", other, 1)]
    merged = merge_states(transitions, 0.95)
    assert merged == [Transition(one, "a", one, 0, 2.5), Transition(one, "b", SUCCESS, 7),
                      Transition("elsewhere", "c", one, 1)]
    assert merged[1].next_state is SUCCESS
    assert merge_states(transitions, 0.975)[0].next_state == one  # at least so alike
    assert merge_states(transitions, 0.9751) == transitions
    assert merge_states([], 0.5) == []


def test_the_first_like_state_is_taken():
    # 20 characters: c is one away from b, ratio 0.95, and two from a, 0.9; a and b differ by three, 0.85
    a, b, c = "abcdefghijklmnopqrst", "abcdefghijklmnopqXYZ", "abcdefghijklmnopqrYZ"
    transitions = [Transition(a, "", b, 0), Transition(c, "", c, 0)]
    merged = merge_states(transitions, 0.88)
    assert [t[0:3:2] for t in merged] == [(a, b), (a, a)]  # b is more like c, but a came first
    merged = merge_states([*transitions[1:], *transitions[:1]], 0.88)
    assert [t[0:3:2] for t in merged] == [(c, c), (c, c)]
    merged = merge_states([Transition(a, "", c, 0), Transition(b, "", b, 0)], 0.88)
    assert [t[0:3:2] for t in merged] == [(a, a), (b, b)]  # c is gone: b has nothing to be like
    assert merge_states(transitions, 1.0) == transitions


def test_success_is_not_merged():
    for text in ("SUCCESS", str(SUCCESS), repr(SUCCESS)):
        transitions = [Transition(text, "", SUCCESS, 0), Transition("x", "", text, 1)]
        assert merge_states(transitions, 0.0 if text == "x" else 0.5) == transitions
        assert goal_distances(merge_states(transitions, 0.5)) == {SUCCESS: 0, text: 1, "x": 2}


ONE = "you are in the kitchen at the door. ...."
OTHER = "you are in the kitchen at the door. ...!"  # 0.975 alike


def test_like_states_are_at_the_same_distance():
    # from s to ONE and on to success: 2, 1; OTHER, which is left for x, is at d_max + 1 = 3, unless
    # it is ONE; then the steps from s lead equally near, and there is nothing to choose
    transitions = [Transition("s", "a", ONE, 0), Transition(ONE, "b", SUCCESS, 0),
                   Transition("s", "c", OTHER, 1), Transition(OTHER, "d", "x", 1)]
    half = 1 / math.sqrt(2)
    for similarity, expected in ((1.0, half), (0.98, half), (0.95, 0)):
        found = graph_advantages(transitions, similarity=similarity)
        assert found.tolist() == pytest.approx([expected, 0, -expected, 0])
    # with penalties, taken from R = 10 0.1^(d + 1): 0.1 and 0.1 - 0.05 at s; b and d are alone
    found = graph_advantages(transitions, 0.1, torch.tensor([0, 0, 0.05, 0.05]), 0.95)
    assert found.tolist() == pytest.approx([half, 0, -half, 0])


def test_like_states_do_not_share_a_comparison_in_graph_gpo():
    transitions = [Transition(ONE, "b", SUCCESS, 0), Transition(OTHER, "d", "x", 1)]
    assert graph_advantages(transitions, similarity=0.95).tolist() == [0, 0]  # both were left once
    again = [*transitions, Transition(OTHER, "e", SUCCESS, 2)]
    half = 1 / math.sqrt(2)
    assert graph_advantages(again, similarity=0.95).tolist() == pytest.approx([0, -half, half])


def test_like_states_share_a_comparison_in_gigpo():
    transitions = [Transition(ONE, "b", SUCCESS, 0), Transition(OTHER, "d", "x", 1)]
    half = 1 / math.sqrt(2)
    for similarity, expected in ((1.0, 0), (0.98, 0), (0.95, half)):
        found = gigpo_advantages(transitions, [1, 0], similarity=similarity)
        assert found.tolist() == pytest.approx([expected, -expected])
    # only states that are left count: the last of rollout 2, like ONE alone, does not take it away
    ends = [Transition("s", "a", "Y" + ONE[1:], 2), *transitions]
    found = gigpo_advantages(ends, [0, 1, 0], similarity=0.97)
    assert found.tolist() == pytest.approx([0, half, -half])


def test_merging_is_passed_on():
    group = group_of(["sG", "sx"])
    (a, *rest), (b, *others) = group.steps
    group.steps = [(a._replace(state=ONE), *rest), (b._replace(state=OTHER), *others)]
    for similarity, expected in ((1.0, 0), (0.95, 1 / math.sqrt(2))):
        player = stub(method="gigpo", merge_similarity=similarity, beta_episode=0.0)
        assert player.advantages(group).tolist() == pytest.approx([expected, -expected])
    group = group_of(["saG", "sbx"])
    named = {"a": ONE, "b": OTHER}
    group.steps = [(t._replace(state=named.get(t.state, t.state),
                               next_state=named.get(t.next_state, t.next_state)), *rest)
                   for t, *rest in group.steps]
    for similarity, expected in ((1.0, 1 / math.sqrt(2)), (0.95, 0)):
        player = stub(merge_similarity=similarity, beta_episode=0.0)
        assert player.advantages(group).tolist() == pytest.approx([expected, 0, -expected, 0])


# ---------------------------------------------------------------------------------------------------- dynamic sampling
def rolled(results, **how):
    """rollout(0) of a stub whose groups have these returns, in turn; (groups, how many seeds at each call)."""
    player, calls, returns = stub(K=2, **how), [], iter(results)

    def play(seeds, K, held_out, generator, temperature, counts):
        assert (K, held_out, temperature) == (2, False, player.args.temperature)
        calls.append(seeds)
        counts.update(generated_tokens=1, env_steps=len(seeds))
        return [group_of(["sa", "sb"], next(returns)) for _ in seeds]

    player.play = play
    groups, row = player.rollout(0)
    return [group.returns for group in groups], [len(seeds) for seeds in calls], calls, row


def test_tasks_whose_returns_are_equal_are_replaced_so_many_times():
    same, mixed = [0.0, 0.0], [1.0, 0.0]
    results = [same, mixed, same, [1.0, 1.0], mixed, same, same, mixed]
    assert rolled(results, tasks=3)[:2] == ([same, mixed, same], [3])
    assert rolled(results, tasks=3, dynamic_sampling=1)[:2] == ([mixed, [1.0, 1.0], mixed], [3, 2])
    found, calls, seeds, row = rolled(results, tasks=3, dynamic_sampling=2)
    assert (found, calls) == ([mixed, mixed, same], [3, 2, 1])  # the last ones stay as they are
    assert len({seed for call in seeds for seed in call}) == 6 and row["env_steps"] == 6
    assert row["reward"] == pytest.approx(2 / 6) and row["success"] == 0
    assert rolled(results, tasks=3, dynamic_sampling=9)[:2] == ([mixed] * 3, [3, 2, 1, 1, 1])  # no call for nothing


# ------------------------------------------------------------------------------------------------- forks anywhere
def test_random_forks_are_anywhere_allowed():
    # With the same trunks, forks at random places: all places before the answer come about equally often.
    solver, seen = solver_of(method="random", M=1, N=1, L=1, T=1), Counter()
    for seed in range(600):
        root = Node(tokens=[1])
        play, _ = scripted(random.Random(0), [10])
        solver.root = lambda problem, root=root: root
        solver.model = type("Model", (), {"device": "cpu"})
        solver.play = lambda starts, *_, play=play, keep: play(starts)
        solver.answer_at = lambda problem, leaf: 6
        solver.search([None], random.Random(seed), Counter())
        trunk = root.children[0]
        seen[len(trunk.tokens) if trunk.children else 0] += 1
    assert sorted(seen) == [0, 1, 2, 3, 4, 5]
    assert chi_square([seen[i] for i in range(6)], torch.full((6,), 1 / 6))[0] < 26  # p = 1e-4 at 5 degrees of freedom
