"""GraphGPO's mathematics on hand-worked and random graphs, the house, and the exactness of what rollouts that share
prompts leave to the sampler and to training."""

import copy
import itertools
import math
import pickle
import random
import statistics
import subprocess
import sys
from collections import Counter, deque
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import assert_exact_on_cuda, assert_stored_logps, chi_square
from naive import path_logps
from outside import make_qwen3

import graph_gpo
from graph_gpo import (
    LIDDED,
    PLACES,
    ROOMS,
    SUCCESS,
    THINGS,
    Args,
    BadInput,
    Group,
    House,
    Node,
    Packed,
    Player,
    Transition,
    encode,
    episode_advantages,
    gigpo_advantages,
    goal_distances,
    graph_advantages,
    graph_mermaid,
    load_model,
    merge_states,
    micro_batches,
    packed_logps,
    save_tiny_model,
    update,
)


def walks(*paths, cost: float = 1.0) -> list[Transition]:
    """Transitions of rollouts, each given by its states; "G" is success. The action is named after where it leads."""
    def state(s):
        return SUCCESS if s == "G" else s

    return [Transition(state(a), f"to {b}", state(b), i, cost)
            for i, path in enumerate(paths) for a, b in itertools.pairwise(path)]


def edges(*given) -> list[Transition]:
    """(state, next state, cost) each; a rollout per transition."""
    return [Transition(a, f"to {b}", SUCCESS if b == "G" else b, i, c) for i, (a, b, c) in enumerate(given)]


def zs(values: list[float]) -> list[float]:
    if len(values) < 2 or max(values) == min(values):
        return [0.0] * len(values)
    mean, std = statistics.mean(values), statistics.stdev(values)
    return [(x - mean) / std for x in values]


# -------------------------------------------------------------------------------------------------- A_G, by hand
def test_a_failed_rollout_is_paid_for_its_step_toward_the_goal():
    #   s - m - G (won)       d(G) = 0, d(m) = 1, d(s) = 2; x has no way to G: d = 2 + 1 = 3
    #   s - m     (failed)    at s: R(to m) = 10 0.1^(1 + 1) = 0.1 twice, R(to x) = 10 0.1^(3 + 1) = 0.001
    #   s - x     (failed)    mean 0.067, distances 0.033, 0.033, -0.066, std = sqrt((2 + 4) / 2) 0.033 = 0.033 sqrt 3
    #                         A = 1 / sqrt 3, 1 / sqrt 3, -2 / sqrt 3; m to G is alone at m: 0
    transitions = walks("smG", "sm", "sx")
    assert goal_distances(transitions) == {SUCCESS: 0, "m": 1, "s": 2, "x": 3}
    A = graph_advantages(transitions)
    assert A.dtype == torch.float64 and A.shape == (4,)
    assert A.tolist() == pytest.approx([1 / math.sqrt(3), 0, 1 / math.sqrt(3), -2 / math.sqrt(3)])
    assert A[2] > 0 > episode_advantages(torch.tensor([1.0, 0, 0]))[1]  # all that its own rollout would give it


def test_a_loop_in_a_successful_rollout_is_not_paid():
    # s - x - s - G: d(s) = 1, d(x) = 2; at s: R(to x) = 10 0.1^3 = 0.01, R(to G) = 10 0.1 = 1; two values are always
    # half their distance from their mean, and their std is that times sqrt 2: A = -1 / sqrt 2 and 1 / sqrt 2
    assert graph_advantages(walks("sxsG")).tolist() == pytest.approx([-1 / math.sqrt(2), 0, 1 / math.sqrt(2)])
    # a step that stays where it is: R = 10 0.1^2 = 0.1 against 1; and twice against once: -1, -1, 2 over sqrt 3
    assert graph_advantages(walks("ssG")).tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])
    expected = [-1 / math.sqrt(3), -1 / math.sqrt(3), 2 / math.sqrt(3)]
    assert graph_advantages(walks("sssG")).tolist() == pytest.approx(expected)


def test_unreachable_states_are_one_beyond_the_furthest():
    #   c - b - a - G      d = 3, 2, 1, 0;  a - u - v - u and w - v never get there: d(u) = d(v) = d(w) = 3 + 1
    transitions = walks("cbaG", "auvu", "wv")
    assert goal_distances(transitions) == {SUCCESS: 0, "a": 1, "b": 2, "c": 3, "u": 4, "v": 4, "w": 4}
    # from a to G 10 0.1 = 1, from a to u 10 0.1^5; all others are alone or, at u and w, lead to the same distance
    expected = [0, 0, 1 / math.sqrt(2), -1 / math.sqrt(2), 0, 0, 0]
    assert graph_advantages(transitions).tolist() == pytest.approx(expected)
    # costs: the furthest is 2.5 from G, so that u is at 3.5
    assert goal_distances(edges(("a", "G", 2.5), ("b", "G", 1.0), ("b", "u", 9.0)))["u"] == 3.5


def test_unequal_costs():
    #   s - G costs 3; s - m and m - G cost 1 each: d(m) = 1, d(s) = 2; s - u costs 1, d(u) = 3
    #   R = 10 0.1^3 = 0.01, 10 0.1^(1 + 1) = 0.1, 10 0.1^(3 + 1) = 0.001; mean 0.037, from it -0.027, 0.063, -0.036
    #   variance = (0.000729 + 0.003969 + 0.001296) / 2 = 0.002997
    transitions = edges(("s", "G", 3.0), ("s", "m", 1.0), ("m", "G", 1.0), ("s", "u", 1.0))
    assert goal_distances(transitions) == {SUCCESS: 0, "m": 1, "s": 2, "u": 3}
    std = math.sqrt(0.002997)
    assert graph_advantages(transitions).tolist() == pytest.approx([-0.027 / std, 0.063 / std, 0, -0.036 / std])
    # omega = 1/2, up to a factor: 1/8, 1/4, 1/16; times 16: 2, 4, 1, mean 7/3, from it -1/3, 5/3, -4/3, variance 42/18
    std = math.sqrt(42 / 18)
    expected = [-1 / 3 / std, 5 / 3 / std, 0, -4 / 3 / std]
    assert graph_advantages(transitions, 0.5).tolist() == pytest.approx(expected)


def test_ways_of_equal_cost_are_a_tie_whatever_rounding_says():
    ways = edges(("s", "a", 0.1), ("a", "b", 0.2), ("b", "G", 0.3), ("s", "c", 0.3), ("c", "d", 0.2), ("d", "G", 0.1))
    d = goal_distances(ways)
    assert 0.1 + d["a"] != 0.3 + d["c"]  # what it is about
    assert graph_advantages(ways).tolist() == [0.0] * 6
    # with a better third, R = r, r, r': A = -1, -1, 2 over sqrt 3, and no difference between the first two
    A = graph_advantages([*ways, Transition("s", "", SUCCESS, 9, 0.1)])
    assert A[0].item() == pytest.approx(A[3].item(), rel=1e-12)
    assert A[[0, 3, 6]].tolist() == pytest.approx([-1 / math.sqrt(3), -1 / math.sqrt(3), 2 / math.sqrt(3)])


def test_no_success_no_credit():
    transitions = walks("sas", "sb", "asas")
    assert goal_distances(transitions) == {SUCCESS: 0, "s": 1, "a": 1, "b": 1}
    assert graph_advantages(transitions).tolist() == [0.0] * len(transitions)
    unequal = [t._replace(cost=1.0 + i) for i, t in enumerate(transitions)]
    assert graph_advantages(unequal).tolist() == [0.0] * len(transitions)


def test_duplicated_transitions_count_as_often_as_they_are_there():
    #   s - G twice, s - m (d = 1) once, s - x (d = 1 + 1 = 2) once: R = 1, 1, 0.1, 10 0.1^3 = 0.01, mean 0.5275
    #   from it 0.4725, 0.4725, -0.4275, -0.5175; squares 0.22325625 twice, 0.18275625, 0.26780625; variance 0.299025
    transitions = walks("sG", "sG", "smG", "sx")
    std = math.sqrt(0.299025)
    expected = [0.4725 / std, 0.4725 / std, -0.4275 / std, 0, -0.5175 / std]
    assert graph_advantages(transitions).tolist() == pytest.approx(expected)
    # counted once: R = 1, 0.1, 0.01, mean 0.37, another credit
    assert graph_advantages(transitions[1:])[0] != pytest.approx(0.4725 / std, rel=0.01)


@pytest.mark.parametrize("n", [1, 10, 60, 400])
def test_far_from_the_goal_credit_is_as_large_as_near_it(n):
    # 0 - 1 - ... - n = G; at 0 one stays twice and one goes on: A = 2 / sqrt 3 for going on, -1 / sqrt 3 for staying
    chain = [(i, "G" if i + 1 == n else i + 1, 1.0) for i in range(n)]
    transitions = edges((0, 0, 1.0), (0, 0, 1.0), *chain)
    A = graph_advantages(transitions)
    assert A[:3].tolist() == pytest.approx([-1 / math.sqrt(3), -1 / math.sqrt(3), 2 / math.sqrt(3)])
    assert goal_distances(transitions)[0] == n
    # with an epsilon beside the std: 10 0.1^n and 10 0.1^(n + 1), std of 10^-n (8.2, 8.2, 1.6 ...) against 1e-6
    R = torch.tensor([10 * 0.1 ** (n + 1.0), 10 * 0.1 ** (n + 1.0), 10 * 0.1**n], dtype=torch.float64)
    naive = (R - R.mean()) / (R.std() + 1e-6)
    assert naive[2].item() == pytest.approx(2 / math.sqrt(3), abs=1e-5) if n == 1 else abs(naive[2]) < 1e-3


def test_lone_transitions_and_one_step():
    assert graph_advantages(walks("sG")).tolist() == [0]
    assert graph_advantages(walks("abcdG")).tolist() == [0] * 4
    assert graph_advantages(walks("sG", "sG")).tolist() == [0, 0]  # both as good
    assert graph_advantages(walks("ss")).tolist() == [0]
    assert graph_advantages(walks("sG", "sx")).tolist() == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)])


def test_rollouts_may_be_interleaved():
    one, other, third = walks("sabG"), walks("sxsaG"), walks("bxx")
    apart = [*one, *(t._replace(trajectory=1) for t in other), *(t._replace(trajectory=2) for t in third)]
    order = [0, 3, 7, 1, 4, 8, 5, 2, 6]
    mixed = [apart[i] for i in order]
    assert torch.allclose(graph_advantages(mixed), graph_advantages(apart)[order], atol=1e-14, rtol=0)
    rewards = torch.arange(9.0)
    assert torch.allclose(gigpo_advantages(mixed, rewards[order]), gigpo_advantages(apart, rewards)[order], atol=1e-14)


def test_states_are_whatever_can_be_hashed():
    # (0, "x") - 1 - "1" - "SUCCESS" - None - the goal: five states before it, all different
    states = [(0, "x"), 1, "1", "SUCCESS", None, SUCCESS]
    transitions = [Transition(a, "", b, 0) for a, b in itertools.pairwise(states)]
    assert goal_distances(transitions) == {state: 5 - i for i, state in enumerate(states)}
    assert goal_distances(transitions[:3])["SUCCESS"] == 1  # text is no success
    transitions += [Transition("SUCCESS", "", "SUCCESS", 1), Transition(frozenset(), "", "SUCCESS", 1)]
    assert graph_advantages(transitions).tolist() == pytest.approx([0] * 3 + [2**-0.5, 0, -(2**-0.5), 0])


# ------------------------------------------------------------------------------------- against slow ones of one's own
def random_graph(rng, costs, states=8) -> list[Transition]:
    """Random walks, some of them to success; interleaved."""
    n, found = rng.randint(1, states), []
    at = [rng.randrange(n) for _ in range(rng.randint(1, 6))]
    live = list(range(len(at)))
    for _ in range(rng.randint(1, 40)):
        if live:
            k = rng.choice(live)
            after = SUCCESS if rng.random() < 0.12 else rng.randrange(n)
            found.append(Transition(at[k], str(rng.randrange(2)), after, k, costs(rng)))
            at[k] = after
            live = [k for k in live if at[k] is not SUCCESS]
    return found


COSTS = {"one": lambda rng: 1.0, "whole": lambda rng: rng.randint(1, 5), "eighths": lambda rng: rng.randint(1, 40) / 8,
         "float": lambda rng: rng.random() * 3 + 1e-3}


def slow_distances(transitions, number=float) -> dict:
    """Bellman and Ford."""
    d = {s: math.inf for t in transitions for s in (t.state, t.next_state)} | {SUCCESS: number(0)}
    for _ in d:
        for t in transitions:
            d[t.state] = min(d[t.state], d[t.next_state] + number(t.cost)) if d[t.next_state] < math.inf else d[t.state]
    beyond = max(x for x in d.values() if x < math.inf) + 1
    return {s: beyond if x == math.inf else x for s, x in d.items()}


@pytest.mark.parametrize("costs", COSTS)
def test_distances_against_bellman_ford(costs):
    rng, won = random.Random(0), Counter()
    for _ in range(300):
        transitions = random_graph(rng, COSTS[costs])
        found, expected = goal_distances(transitions), slow_distances(transitions)
        assert found.keys() == expected.keys()
        assert all(found[s] == pytest.approx(expected[s], rel=1e-12) for s in found)
        won[any(t.next_state is SUCCESS for t in transitions)] += 1
    assert min(won[True], won[False]) > 30


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


@pytest.mark.parametrize("omega", ["0.1", "0.5", "0.9"])
@pytest.mark.parametrize("costs", ["one", "whole", "eighths"])  # their sums are exact, so that equals are
def test_advantages_against_the_definition(costs, omega):
    rng, some = random.Random(1), 0
    for _ in range(100):
        transitions = random_graph(rng, COSTS[costs])
        expected = slow_advantages(transitions, omega)
        assert graph_advantages(transitions, float(omega)).tolist() == pytest.approx(expected, abs=1e-8)
        some += any(expected)
    assert some > 40


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


@pytest.mark.parametrize("gamma", [0, 0.5, 1])  # powers of two, so that equals are
def test_gigpo_against_the_definition(gamma):
    rng = random.Random(3)
    for _ in range(200):
        transitions = random_graph(rng, COSTS["whole"], 4)
        rewards = [rng.choice([0.0, 0.0, 1.0, -2.0]) for _ in transitions]
        found = gigpo_advantages(transitions, torch.tensor(rewards), gamma)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(slow_gigpo(transitions, rewards, gamma), abs=1e-9)


def test_gigpo_by_hand():
    # two interleaved rollouts, s - a - s and s - s, rewards 0, 0, 1 and 0, 2, gamma 1/2: returns 1/4, 1/2, 1 and 1, 2
    # at s: 1/4, 1, 1, 2, mean 17/16, from it -13, -1, -1, 15 sixteenths, variance (169 + 1 + 1 + 225) / 3 / 256
    s = [Transition("s", "", "a", 0), Transition("s", "", "s", 1), Transition("a", "", "s", 0),
         Transition("s", "", "s", 1), Transition("s", "", "x", 0)]
    std = math.sqrt(396 / 3)
    expected = [-13 / std, -1 / std, 0, 15 / std, -1 / std]
    assert gigpo_advantages(s, [0, 0, 0, 2, 1], 0.5).tolist() == pytest.approx(expected)
    assert gigpo_advantages(s[:1], [3]).tolist() == [0]


def test_episode_advantages():
    # 1, 0, 0, 1: mean 1/2, variance 4 (1/4) / 3, A = (1/2) / sqrt(1/3) = sqrt 3 / 2
    found = episode_advantages(torch.tensor([1.0, 0, 0, 1]))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([x * math.sqrt(3) / 2 for x in (1, -1, -1, 1)])
    assert episode_advantages(torch.tensor([3.0])).tolist() == [0]
    assert episode_advantages([0.1 + 0.2, 0.3, 0.3]).tolist() == [0, 0, 0]  # equal but for rounding
    assert episode_advantages([1e-30, 2e-30]).tolist() == pytest.approx([-(2**-0.5), 2**-0.5])  # no epsilon
    for scale in (1e-300, 1e-200, 1e200, 1.7e308 / 2):  # whose squares are 0 or infinite
        assert episode_advantages([scale, 2 * scale]).tolist() == pytest.approx([-(2**-0.5), 2**-0.5])
    rng = random.Random(0)
    for _ in range(200):
        returns = [rng.choice([0.0, 1.0, rng.gauss(0, 3)]) for _ in range(rng.randint(1, 9))]
        assert episode_advantages(torch.tensor(returns, dtype=torch.float64)).tolist() == pytest.approx(zs(returns))


# ---------------------------------------------------------------------------------------------------------- invariance
def test_order_names_and_what_is_behind_the_goal_change_nothing():
    rng = random.Random(4)
    for _ in range(100):
        transitions = random_graph(rng, COSTS["eighths"])
        A = graph_advantages(transitions, 0.5)
        order = rng.sample(range(len(transitions)), len(transitions))
        found = graph_advantages([transitions[i] for i in order], 0.5)
        assert torch.allclose(found, A[order], atol=1e-9, rtol=0)
        named = [t._replace(state=("state", t.state), next_state=t.next_state if t.next_state is SUCCESS else
                            ("state", t.next_state), trajectory=f"rollout {t.trajectory}") for t in transitions]
        assert torch.equal(graph_advantages(named, 0.5), A)
        # each way to the goal gets a tail of steps that all must take: every distance grows by as much
        tail = rng.randint(1, 30)
        longer = [t._replace(next_state=("tail", 0)) if t.next_state is SUCCESS else t for t in transitions]
        longer += [Transition(("tail", i), "", ("tail", i + 1) if i + 1 < tail else SUCCESS, "tail", 0.5)
                   for i in range(tail)]
        if any(t.next_state is SUCCESS for t in transitions):
            found = graph_advantages(longer, 0.5)[: len(transitions)]
            assert torch.allclose(found, A, atol=1e-9, rtol=0)


# ----------------------------------------------------------------------------------------- the paper's Proposition 4
@pytest.mark.parametrize("omega", [0.1, 0.5, 0.9])
def test_nearer_is_better_among_steps_from_the_same_state(omega):
    rng, pairs = random.Random(5), Counter()
    for _ in range(150):
        transitions = random_graph(rng, lambda rng: rng.choice([1, 1, 1.5]), 5)
        if not any(t.next_state is SUCCESS for t in transitions):
            continue
        A, d = graph_advantages(transitions, omega).tolist(), goal_distances(transitions)
        ahead = [d[t.next_state] + t.cost for t in transitions]
        for i, j in itertools.combinations(range(len(transitions)), 2):
            if transitions[i].state == transitions[j].state:
                pairs[ahead[i] == ahead[j]] += 1
                if ahead[i] == ahead[j]:
                    assert A[i] == pytest.approx(A[j], rel=1e-12, abs=1e-12)  # a power may round in two ways
                else:
                    assert (A[i] > A[j]) == (ahead[i] < ahead[j])
    assert min(pairs.values()) > 500


def test_credit_of_an_edge_does_not_depend_on_the_rollout_it_is_of():
    # Rollouts of a random policy in random worlds in which an action leads to one of two places: A_G given an edge has
    # no variance, what the rollout's outcome gives (GRPO) has.
    rng, edges_seen, larger = random.Random(6), 0, 0
    for _ in range(60):
        leads = {(s, a): [rng.choice([*range(6), SUCCESS]) for _ in range(2)] for s in range(6) for a in "ab"}
        transitions, won = [], []
        for k in range(8):
            at = 0
            for _ in range(12):
                action = rng.choice("ab")
                after = rng.choice(leads[at, action])
                transitions.append(Transition(at, action, after, k))
                if (at := after) is SUCCESS:
                    break
            won.append(float(at is SUCCESS))
        A, A_E = graph_advantages(transitions).tolist(), episode_advantages(torch.tensor(won)).tolist()
        of_edge = {}
        for t, credit in zip(transitions, A):
            of_edge.setdefault((t.state, t.action, t.next_state), []).append((credit, A_E[t.trajectory]))
        for pairs in of_edge.values():
            ours, outcome = zip(*pairs)
            assert max(ours) - min(ours) < 1e-12  # but for rounding no variance
            edges_seen += len(pairs) > 1
            larger += statistics.pvariance(outcome) > 0.01
    assert edges_seen > 500 and larger > 300


# ------------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize("cost", [0, -1, -0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [goal_distances, graph_advantages])
def test_wrong_costs_are_refused(function, cost):
    with pytest.raises(ValueError, match="want"):
        function([*walks("abG"), Transition("a", "", "b", 1, cost)])


@pytest.mark.parametrize("function", [goal_distances, graph_advantages])
def test_nothing_and_what_leaves_success_are_refused(function):
    with pytest.raises(ValueError, match="want"):
        function([])
    with pytest.raises(ValueError, match="SUCCESS"):
        function([*walks("abG"), Transition(SUCCESS, "", "a", 1)])


@pytest.mark.parametrize("omega", [0, 1, -1, 0.0, 1.0, 2, math.nan, math.inf])
def test_wrong_omega_is_refused(omega):
    with pytest.raises(ValueError, match="omega"):
        graph_advantages(walks("abG"), omega)


@pytest.mark.parametrize(("rewards", "gamma"), [
    ([0.0], 0.9), ([0.0] * 3, 0.9), ([[0.0, 0.0]], 0.9), ([0.0, math.nan], 0.9), ([0.0, math.inf], 0.9), ([], 0.9),
    ([0.0, 1.0], -0.1), ([0.0, 1.0], 1.1), ([0.0, 1.0], math.nan)])
def test_wrong_rewards_and_gamma_are_refused(rewards, gamma):
    with pytest.raises(ValueError, match="want"):
        gigpo_advantages(walks("abG"), torch.tensor(rewards), gamma)
    with pytest.raises(ValueError, match="want"):
        gigpo_advantages([], torch.tensor([]), 0.9)
    with pytest.raises(ValueError, match="want"):
        gigpo_advantages(walks("abG"), 1.0)


@pytest.mark.parametrize("returns", [[], [[1.0, 2.0]], [[]], 1.0, [0.0, math.nan], [0.0, -math.inf]])
def test_wrong_returns_are_refused(returns):
    with pytest.raises(ValueError, match="want"):
        episode_advantages(torch.tensor(returns))


# ------------------------------------------------------------------------------------------------------------- SUCCESS
def test_success_survives_copies_and_pickles():
    t = Transition("s", "go", SUCCESS, 0)
    for again in (copy.deepcopy(t), copy.copy(t), *(pickle.loads(pickle.dumps(t, p)) for p in range(2, 6))):
        assert again == t and again.next_state is SUCCESS and goal_distances([again])["s"] == 1
    assert copy.deepcopy(SUCCESS) is pickle.loads(pickle.dumps(SUCCESS)) is SUCCESS
    assert all(SUCCESS != other for other in ("SUCCESS", "<class 'graph_gpo.SUCCESS'>", 0, None, (), object()))


def test_success_survives_another_process():
    code = ("import pickle, sys, graph_gpo as g\nt = pickle.load(sys.stdin.buffer)\n"
            "assert t.next_state is g.SUCCESS and g.graph_advantages([t]).tolist() == [0]\n"
            "sys.stdout.buffer.write(pickle.dumps(t._replace(state=[t.next_state])))")
    sent = pickle.dumps(Transition("s", "go", SUCCESS, 0, 2.5))
    answer = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True,
                            cwd=Path(graph_gpo.__file__).parent).stdout
    t = pickle.loads(answer)
    assert t.next_state is SUCCESS and t.state[0] is SUCCESS and t.cost == 2.5


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


# ----------------------------------------------------------------------------------------------------------- the house
def history(house, seed, actions, **options):
    told = [house.reset(seed, options)]
    return told + [house.step(action) for action in actions]


def deciding(house) -> tuple:
    """All of it that steps change."""
    return house.at, tuple(house.where.items()), tuple(house.how.items()), frozenset(house.open)


def put_back(house, state) -> None:
    house.at, house.where, house.how, house.open = state[0], dict(state[1]), dict(state[2]), set(state[3])


def shortest(house, actions) -> int:
    """Steps of the shortest solution with actions(house), by breadth-first search; or failure."""
    start = deciding(house)
    seen, queue = {start}, deque([(start, 0)])
    while queue:
        state, steps = queue.popleft()
        put_back(house, state)
        for action in actions(house):
            put_back(house, state)
            _, reward, terminated, _, info = house.step(action)
            if terminated:
                assert reward == 1
                put_back(house, start)
                return steps + 1
            if info["valid"] and (after := deciding(house)) not in seen:
                seen.add(after)
                queue.append((after, steps + 1))
    raise AssertionError("no solution")


def all_actions(house) -> list[str]:
    verbs = [f"{verb} {thing}" for verb in ("take", "put", "clean", "heat", "cool") for thing in house.where]
    return [f"go {where}" for where in (*ROOMS, *PLACES)] + [f"open {place}" for place in LIDDED] + verbs


def actions_that_matter(house) -> list[str]:
    """Without other things, other treatments than the task's, and other lids and places to put something than those of
    the thing's place and the goal: they lead to no shorter solution."""
    places = {house.start, house.goal}
    room = PLACES.get(house.at, house.at)
    go = [f"go {where}" for where in (*ROOMS, *ROOMS[room])]
    put = [f"put {house.thing}"] if house.at in places else []
    lids = [f"open {house.at}"] if house.at in places else []
    return [*go, *lids, *put, f"take {house.thing}", *([f"{house.verb} {house.thing}"] if house.verb else [])]


def test_tasks_are_solvable_and_the_demonstrator_wastes_no_step():
    house, seen = House(), Counter()
    for seed in range(100):
        house.reset(seed, {"held_out": seed % 2})
        house.start = house.where[house.thing]
        least = shortest(house, actions_that_matter)
        if least <= 5:  # small enough to try everything
            assert shortest(house, all_actions) == least
        for step in range(1, least + 1):
            _, reward, terminated, truncated, info = house.step(house.demonstrate())
            assert info["valid"] and not truncated and terminated == (step == least) == bool(reward)
        seen[least] += 1
    assert min(seen) >= 4 and max(seen) <= 14 and len(seen) > 6


def test_the_demonstrator_solves_every_task_without_invalid_actions():
    house, steps = House(), Counter()
    for seed in range(500):
        house.reset(seed)
        for n in range(1, 16):
            _, reward, terminated, _, info = house.step(house.demonstrate())
            assert info["valid"]
            if terminated:
                break
        assert terminated and reward == 1
        steps[n] += 1
    assert (min(steps), max(steps)) == (4, 14)  # as House says


def test_the_demonstrator_with_habits_errs_and_is_reproducible():
    house, runs, solved, invalid = House(), [], 0, 0
    for _ in range(2):
        rng, actions = random.Random(0), []
        for seed in range(100):
            house.reset(seed)
            for _ in range(30):
                actions.append(house.demonstrate(rng))
                *_, terminated, _, info = house.step(actions[-1])
                invalid += not info["valid"]
                if terminated:
                    solved += 1
                    break
        runs.append(actions)
    assert runs[0] == runs[1] and solved < 190 and invalid > 400  # of 200 rollouts


def test_the_same_seed_and_actions_give_the_same():
    rng = random.Random(0)
    one, other = House(), House()
    for seed in range(50):
        one.reset(seed, {"held_out": True})
        actions = [rng.choice([one.demonstrate(rng), *all_actions(one)]) for _ in range(20)]
        told = history(one, seed, actions, held_out=seed % 2)
        other.reset(rng.randrange(99))  # whatever was there before
        other.step("go hall")
        assert history(other, seed, actions, held_out=seed % 2) == told == history(House(), seed, actions,
                                                                                  held_out=seed % 2)
        twin = copy.deepcopy(other)
        assert twin.step("go hall") == other.step("go hall")
    assert House().reset(3) == House().reset(3, None) == House().reset(seed=3, options={"held_out": False})
    assert House().reset(3) != House().reset(4)


def test_held_out_tasks_are_others():
    house, seen = House(), {True: set(), False: set()}
    for held_out in (True, False):
        for seed in range(3000):
            _, info = house.reset(seed, {"held_out": held_out})
            where = house.where[house.thing]
            seen[held_out].add((house.verb, house.thing, where, house.goal))
            assert where in PLACES and where != house.goal and house.goal in PLACES and house.thing in THINGS
            assert house.thing in info["task"] and house.goal in info["task"] and house.at in ROOMS
            assert house.held() == "nothing" and not house.open and set(house.how.values()) == {"plain"}
    assert not seen[True] & seen[False]
    # n distinct ones of N equally likely after 3000 draws: n = N (1 - exp(-3000 / N)); about a fifth are held out
    low, high = (next(N for N in range(1, 99_999) if N * (1 - math.exp(-3000 / N)) >= len(seen[x]))
                 for x in (True, False))
    assert 0.17 < low / (low + high) < 0.23
    assert low + high == pytest.approx(4 * len(THINGS) * 18 * 17, rel=0.1)


STRANGE = [
    "", " ", "go", "go ", " kitchen", "take  mug", "go\tkitchen", "\n", "gö küche", "🙂", "go 🙂", "take nothing",
    "put nothing", "clean nothing", "open hall", "go door", "go hand", "take hand", "put", "go go", "x" * 9999, "open",
    "<action>go kitchen</action>", "\ud800", "go kitchen.", "please go kitchen", "take mug egg", "heat",
]


def test_invalid_actions_change_nothing():
    rng, house, invalid = random.Random(1), House(), 0
    for seed in range(60):
        house.reset(seed)
        for action in (rng.choice([*STRANGE, *all_actions(house), house.demonstrate()]) for _ in range(40)):
            before, key, look = deciding(house), house.key(), house.look()
            seen, _, terminated, truncated, info = house.step(action)
            assert info["state"] == house.key() and not truncated
            if not info["valid"]:
                invalid += 1
                assert (deciding(house), house.key(), seen) == (before, key, "Nothing happens. " + look)
            else:
                assert deciding(house) != before and house.key() != key and seen == house.look()
                assert action not in STRANGE
            if terminated:
                break
    assert invalid > 1000


def test_case_does_not_matter():
    house = House()
    house.reset(next(seed for seed in range(99) if House().reset(seed)[1]["state"].startswith("hall")))
    assert house.step("GO KITCHEN")[-1] == {"state": house.key(), "valid": True} and house.at == "kitchen"


def test_a_key_is_a_state():
    rng, house = random.Random(2), House()
    for seed in range(5):
        house.reset(seed)
        start, of_key, of_state = deciding(house), {}, {}
        for _ in range(30):
            put_back(house, start)
            for _ in range(40):
                house.step(rng.choice([*all_actions(house), house.demonstrate(rng)]))
                assert of_key.setdefault(house.key(), deciding(house)) == deciding(house)
                assert of_state.setdefault(deciding(house), house.key()) == house.key()
        assert len(of_key) > 20
        looks = {}
        for state in of_state:  # the key says at least what one sees
            put_back(house, state)
            assert looks.setdefault(house.key(), house.look()) == house.look()


# -------------------------------------------------------------------------------------------- the policy, in a world
class Ring:
    """Six places in a circle; an action goes on by the sum of its letters, to success at place 0. No keys of states."""
    instruction = "Walk round the ring.\n"

    def reset(self, seed=0, options=None):
        self.at = 1 + seed % 5
        return self.look(), {"task": f"go from {self.at} to 0."}

    def look(self):
        return f"place {self.at}" + " and on" * self.at

    def step(self, action):
        self.at = (self.at + sum(map(ord, action))) % 6
        return self.look(), float(self.at == 0), self.at == 0, False, {"valid": len(action) % 3 > 0}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(model, tokenizer, the same model with transformers' own attention) of a Qwen2 with the tokenizer of the built-in
    world, and of a Qwen3 with a chat template; with sharp random weights."""
    from transformers import AutoModelForCausalLM

    found = {}
    for kind, factor in (("qwen2", 3), ("qwen3", 6)):
        folder = tmp_path_factory.mktemp(kind)
        make_qwen3(folder, 2048) if kind == "qwen3" else save_tiny_model(folder, [*House.words], 0)
        model, tokenizer = load_model(str(folder), torch.device("cpu"))
        for parameter in model.parameters():
            parameter.data *= factor if parameter.dim() > 1 else 1
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        plain.load_state_dict(model.state_dict())
        found[kind] = model, tokenizer, plain
    return found


@pytest.fixture
def make(loaded):
    """make(architecture, ...) -> (player, its model with transformers' own attention)."""
    def make(architecture, dtype=torch.float32, world=Ring, device="cpu", **how):
        model, tokenizer, plain = loaded[architecture]
        args = Args(**{"max_tokens": 3, "max_steps": 5, "dtype": "float32", "K": 4, "tasks": 3, **how})
        model, plain = (copy.deepcopy(m).to(device, dtype) for m in (model, plain))
        return Player(model, tokenizer, args, world), plain

    return make


def played(player, seeds=(0, 1, 2), K=4, seed=0, held_out=False, temperature=1.0):
    counts, generator = Counter(), torch.Generator(player.model.device).manual_seed(seed)
    return player.play([*seeds], K, held_out, generator, temperature, counts), counts


def waves(groups) -> list[list[tuple]]:
    """The steps of all groups by their place in their rollouts."""
    found = []
    for group in groups:
        at = Counter()
        for step in group.steps:
            k = step[0].trajectory
            found += [[]] if at[k] == len(found) else []
            found[at[k]].append((group, *step))
            at[k] += 1
    return found


@pytest.mark.parametrize("kept", [0, 60, 200_000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_stored_logps_are_those_of_a_plain_forward(make, architecture, dtype, tolerance, kept):
    player, plain = make(architecture, dtype, kept_tokens=kept)
    groups, counts = played(player)
    nodes = [node for group in groups for _, node, *_ in group.steps]
    assert len(set(nodes)) == len(nodes) == counts["env_steps"] > 30
    assert_stored_logps(plain, nodes, tolerance)
    for group in groups:
        assert all(prompt.parent is group.root and prompt.children for prompt in group.root.children)
        assert len({tuple(prompt.tokens) for prompt in group.root.children}) == len(group.root.children)
        assert {*group.root.leaves()} == {node for _, node, *_ in group.steps}
        assert not any(any(node.sampled) for node in (group.root, *group.root.children))
        assert all(node.kv is None for node in group.root.below())


def test_kv_of_actions_is_let_go_after_each_step(make):
    player, _ = make("qwen2")
    earlier, read = [], player.action

    def action(node):
        assert all(node.kv is None for node in earlier) and node.kv is None
        assert node.parent.kv is not None  # what may be met again stays
        earlier.append(node)
        return read(node)

    player.action = action
    for seed in range(5):
        played(player, seeds=(seed,), K=1)
        earlier.clear()


@pytest.mark.parametrize("kept", [0, 200_000])
def test_each_prompt_is_forwarded_once(make, architecture, kept):
    """Counted at the embedding, where pads have id 0, in rollouts in which the policy never draws that before an end.
    With --kept-tokens 0 once in a wave of steps, by default once at all; the text above all prompts of a task once.
    What begins below another text runs that one's last token: it comes once for each."""
    player, _ = make(architecture, kept_tokens=kept)
    seen = Counter()
    player.model.model.embed_tokens.register_forward_hook(
        lambda module, ids, out: seen.update(ids[0].flatten().tolist()))
    for seed in range(99):
        seen.clear()
        groups, counts = played(player, seed=seed)
        nodes = [node for group in groups for node in group.root.below()]
        if not any(0 in (node.tokens if node.children else node.tokens[:-1]) for node in nodes):
            break
    else:
        raise AssertionError("no such rollouts")
    expected, new = Counter(), 0
    for group in groups:
        expected.update(group.root.tokens[:-1])
    in_waves = [list(dict.fromkeys(node.parent for _, _, node, *_ in wave)) for wave in waves(groups)]
    for prompt in itertools.chain(*in_waves) if kept == 0 else dict.fromkeys(itertools.chain(*in_waves)):
        expected.update(prompt.parent.tokens[-1:] + prompt.tokens[:-1])
        new += len(prompt.tokens)
    for group in groups:
        for _, node, *_ in group.steps:
            expected.update(node.parent.tokens[-1:] + node.tokens[:-1])
    steps = [node for group in groups for _, node, *_ in group.steps]
    assert len(steps) > sum(map(len, in_waves)) > sum(len(group.root.children) for group in groups)  # both share
    del seen[0]
    assert seen == expected and counts["forwarded_tokens"] == expected.total()
    assert counts["generated_tokens"] == sum(len(node.tokens) for node in steps)
    assert counts["env_steps"] == len(steps)
    assert counts["prompt_tokens"] == sum(len(node.parent.tokens) + len(node.parent.parent.tokens) for node in steps)
    assert counts["prompt_tokens_sampling"] == new + sum(len(group.root.tokens) for group in groups)


def test_rollouts_are_what_the_world_says(make, architecture):
    player, _ = make(architecture)
    groups, _ = played(player, K=6)
    for seed, group in enumerate(groups):
        world = Ring()
        assert group.task == world.reset(seed)[1]["task"]
        for k in range(6):
            mine = [step for step in group.steps if step[0].trajectory == k]
            at, _ = world.reset(seed)
            assert 1 <= len(mine) <= 5
            for i, (t, node, reward, valid) in enumerate(mine):
                assert t.state == at and t.action == player.action(node) and t.cost == 1
                at, paid, over, _, info = world.step(t.action)
                assert (reward, valid) == (paid, info["valid"])
                assert (t.next_state is SUCCESS) if over else t.next_state == at
                assert over or len(mine) == 5 or i + 1 < len(mine)
            assert group.won[k] == over and group.returns[k] == float(over)
    assert 0 < sum(sum(group.won) for group in groups) < 18
    again, _ = played(player, K=6)
    assert [[(t, n.tokens, n.logps) for t, n, *_ in a.steps] for a in again] == [
        [(t, n.tokens, n.logps) for t, n, *_ in b.steps] for b in groups]


def prompt_text(player, told: list[str], actions: list[str], h: int) -> str:
    """The last h observations and actions of a rollout, and where it is now."""
    past = list(zip(told[:-1], actions))[-h:] if h else []
    return "".join(f"{seen}\n> {action}\n" for seen, action in past) + told[-1]


@pytest.mark.parametrize("h", [0, 1, 3])
def test_prompts_with_a_history(make, architecture, h):
    player, plain = make(architecture, history=h, max_steps=6)
    groups, _ = played(player, K=6)
    for group in groups:
        assert player.tokenizer.decode(group.root.tokens) == player.before + group.task + "\n"
        for k in range(6):
            told, actions = [], []
            for t, node, *_ in (step for step in group.steps if step[0].trajectory == k):
                told.append(t.state)
                text = prompt_text(player, told, actions, h)
                assert node.parent.tokens == encode(player.tokenizer, text) + encode(player.tokenizer, player.after)
                actions.append(t.action)
    assert_stored_logps(plain, [node for group in groups for _, node, *_ in group.steps], 1e-4)


def test_a_history_is_shared_by_fewer(make):
    ratios = []
    for h in (0, 1, 3):
        player, _ = make("qwen2", history=h, max_steps=6)
        groups, counts = played(player, K=12)
        ratios.append(sum(len(group.root.children) for group in groups) / counts["env_steps"])
    assert ratios[0] < ratios[1] < ratios[2]


def test_system_text_and_task_are_in_every_prompt(make):
    player, _ = make("qwen3")
    group = player.group("do it", 1)
    text = player.tokenizer.decode(group.root.tokens + player.prompt(group, ["here"]).tokens)
    assert text == "<|im_start|>user\nWalk round the ring.\nTask: do it\nhere\n<|im_end|>\n<|im_start|>assistant\n"
    player, _ = make("qwen2")
    group = player.group("do it", 1)
    assert player.tokenizer.decode(group.root.tokens + player.prompt(group, ["here"]).tokens) == "Task: do it\nhere\n"


def test_a_long_prompt_is_cut_from_the_left(make, architecture):
    player, plain = make(architecture, history=3)
    whole, _ = played(player, seeds=(2,))
    root = len(whole[0].root.tokens)
    tail = player.encode(player.after)
    player.model.config.max_position_embeddings = root + 20 + len(tail) + 3  # 3 are --max-tokens
    groups, _ = played(player, seeds=(2,))
    cut = 0
    for k in range(4):
        told, actions = [], []
        for t, node, *_ in (step for step in groups[0].steps if step[0].trajectory == k):
            told.append(t.state)
            text = player.encode(prompt_text(player, told, actions, 3))
            actions.append(t.action)
            assert node.parent.tokens == text[-20:] + tail
            cut += len(text) > 20
            assert sum(len(above.tokens) for above in node.path()) <= player.model.config.max_position_embeddings
    assert cut > 3
    assert_stored_logps(plain, [node for _, node, *_ in groups[0].steps], 1e-4)
    player.model.config.max_position_embeddings = root + len(tail) + 3
    with pytest.raises(BadInput, match="--model"):
        played(player, seeds=(2,))


# ----------------------------------------------------------------------------------------------------------- training
class Caught:
    """In the place of an optimizer: what it was given."""
    def __init__(self, model):
        self.model, self.param_groups = model, [{}]

    def step(self):
        self.gradients = [p.grad.clone() for p in self.model.parameters()]

    def zero_grad(self):
        self.model.zero_grad()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_update_is_that_of_separate_sequences(make, architecture, dtype, tolerance, kl_coef):
    # Each step is a sequence of its own; its mean over its tokens counts 1 / (steps of the task) / tasks.
    player, plain = make(architecture, dtype, kl_coef=kl_coef, invalid_penalty=0.7)
    groups, _ = played(player, K=6)
    samples = player.credit(0, groups)
    reference, plain_reference = (copy.deepcopy(model) for model in (player.model, plain))
    noise = torch.Generator().manual_seed(0)
    for ours, theirs in zip(reference.parameters(), plain_reference.parameters()):
        theirs.data = ours.data = ours.data * (1 + 0.1 * torch.randn(ours.shape, generator=noise, dtype=dtype))
    loss, tokens, kl_sum = 0.0, 0, 0.0
    for group in groups:
        for (_, node, *_), A in zip(group.steps, player.advantages(group)):
            logps = path_logps(plain, node.path())
            with torch.no_grad():
                gap = path_logps(plain_reference, node.path())
            gap = gap - logps
            kl = gap.exp() - gap - 1
            part = ((logps - logps.detach()).exp() * A - kl_coef * kl).mean()
            loss = loss - part / len(group.steps) / len(groups)
            tokens, kl_sum = tokens + len(logps), kl_sum + float(kl.detach().sum())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    batches = []
    for player.args.micro_tokens in (16384, 150, 1):
        batches.append(len(micro_batches(samples, player.args.micro_tokens)))
        caught = Caught(player.model)
        row = update(player.model, reference if kl_coef else None, caught, samples, player.args)
        assert row["loss"] == pytest.approx(loss.item(), rel=tolerance, abs=tolerance)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=tolerance)
        assert row["kl"] == (pytest.approx(kl_sum / tokens, rel=max(tolerance, 1e-6)) if kl_coef else None)
        assert row["clip_fraction"] == 0 and row["sampler_gap"] < 1e-5
        for (name, p), ours in zip(plain.named_parameters(), caught.gradients):
            most = p.grad.abs().max().item()
            assert torch.allclose(ours, p.grad, atol=tolerance * max(most, 1e-3), rtol=0), name
    assert batches[0] == 1 and batches[1] > 2 and batches[2] == len(samples) > len(groups)


def test_credit_packs_equal_actions_once(make, architecture):
    player, _ = make(architecture, max_tokens=1)
    groups, _ = played(player, K=40)
    samples = player.credit(0, groups)
    assert [item.root for item in samples] == [g.root for g in groups for _ in {s[1].parent for s in g.steps}]
    for group in groups:
        mine = [item for item in samples if item.root is group.root]
        A = player.advantages(group)
        assert sum(len(item.leaves) for item in mine) == len(group.steps)
        assert all(item.weight == 1 / len(group.steps) / 3 for item in mine)
        found = Counter((leaf.parent, *leaf.tokens, float(a)) for item in mine
                        for leaf, a in zip(item.leaves, item.advantages))
        assert found == Counter((node.parent, *node.tokens, float(a)) for (_, node, *_), a in zip(group.steps, A))
        for item in mine:
            assert len({leaf.parent for leaf in item.leaves}) == 1
            assert len({*item.leaves}) == len({tuple(leaf.tokens) for leaf in item.leaves})
    assert any(len({*item.leaves}) < len(item.leaves) for item in samples)
    packed = Packed(samples, "cpu")
    distinct = {(*map(tuple, (n.tokens for n in leaf.path())), id(item.root)) for item in samples
                for leaf in item.leaves}
    prompts = {item.leaves[0].parent for item in samples}
    assert packed.ids.shape[1] == sum(len(group.root.tokens) for group in groups) + sum(
        len(p.tokens) for p in prompts) + sum(len(path[2]) for path in distinct)


def test_a_rollout_of_training_says_what_it_did(make):
    player, _ = make("qwen2", K=4, tasks=3)
    groups, row = player.rollout(5)
    assert len(groups) == 3 and all(len(group.returns) == 4 for group in groups)
    steps = [node for group in groups for _, node, *_ in group.steps]
    assert row["success"] == sum(sum(group.won) for group in groups) / 12
    assert row["reward"] == pytest.approx(sum(sum(group.returns) for group in groups) / 12)
    assert row["env_steps"] == len(steps) and row["generated_tokens"] == sum(len(node.tokens) for node in steps)
    assert row["prompt_tokens_training"] == sum(
        len(node.tokens) for group in groups for node in (group.root, *group.root.children))
    assert 0 < row["entropy"] < math.log(player.model.config.vocab_size)  # a mean over tokens
    again, same = player.rollout(5)
    assert same == row and [g.task for g in again] == [g.task for g in groups]
    other, row = player.rollout(6)
    assert row != same and [[t for t, *_ in g.steps] for g in other] != [[t for t, *_ in g.steps] for g in groups]


def test_the_tiny_models_tokens_are_the_worlds_words(make):
    player, _ = make("qwen2", world=House, max_steps=20, max_tokens=8)
    byte, tokenizer = 257, player.tokenizer  # ids below are the end and single bytes
    groups = player.play(list(range(150)), 1, False, random.Random(0), 1.0, Counter())
    assert sum(len(group.steps) for group in groups) > 1000
    for group in groups:
        assert min(encode(tokenizer, f"Task: {group.task}\n")) >= byte
        for t, node, *_ in group.steps:
            assert min(node.tokens[:-1]) >= byte and node.tokens[-1] == tokenizer.eos_token_id
            assert len(node.tokens) == 1 + len(t.action.split()) == 3 and all(node.sampled)
            assert " ".join(tokenizer.decode(node.tokens[:-1]).split()) == t.action
    house, seen = House(), Counter()
    for seed in range(60):
        rng = random.Random(seed)
        told = [house.reset(seed, {"held_out": True})[0]]
        told += [house.step(rng.choice([house.demonstrate(rng), "x"]))[0] for _ in range(15)]
        for text in told:
            tokens = encode(tokenizer, text + "\n")
            assert min(tokens) >= byte
            seen.update(tokens)
    assert len(seen) > 40


class Scripted:
    """Says what it is told at the only step."""
    instruction, told = "", (0.0, False, False)

    def reset(self, seed=0, options=None):
        self.options = options
        return "here", {"task": "x"}

    def step(self, action):
        return "there", *self.told, {}

    def demonstrate(self, rng):
        return "go"


@pytest.mark.parametrize(("reward", "terminated", "truncated", "won"), [
    (1.0, True, False, True), (0.5, True, False, True), (0.0, True, False, False), (-1.0, True, False, False),
    (1.0, False, True, False), (1.0, False, False, False), (1, True, True, True)])
def test_success_is_an_end_with_a_reward(make, reward, terminated, truncated, won):
    player, _ = make("qwen2", world=Scripted, max_steps=3)
    Scripted.told = (reward, terminated, truncated)
    (group,) = player.play([0], 2, True, random.Random(0), 1.0, counts := Counter())
    assert group.won == [won, won] and player.envs[0].options == {"held_out": True}
    n = 1 if terminated or truncated else 3
    assert group.returns == [n * reward] * 2 and len(group.steps) == 2 * n == counts["env_steps"]
    # A failure is a state of its own: from one that looks the same, another rollout may have gone on to success.
    end = SUCCESS if won else "there (failed)" if terminated else "there"
    assert all(t.next_state == end for t, *_ in group.steps)
    assert all(valid is True for *_, valid in group.steps)  # the default
    assert counts["generated_tokens"] == counts["forwarded_tokens"] == 0


def test_what_is_drawn_follows_the_policy(make):
    # 3,000 rollouts of one step from the same prompt: their first tokens against the policy's distribution there, from
    # a plain forward, and the second tokens after the commonest first one. A p-value under 1e-4 is bad luck of one in
    # ten thousand.
    player, plain = make("qwen2", max_steps=1, max_tokens=2, temperature=1.0)
    player.eos = set()
    (group,), _ = played(player, seeds=(3,), K=3000)
    nodes = [node for _, node, *_ in group.steps]
    assert len({node.parent for node in nodes}) == 1 and len(nodes) == 3000
    prompt, vocabulary = group.root.tokens + nodes[0].parent.tokens, player.model.config.vocab_size
    first = Counter(node.tokens[0] for node in nodes)
    ((common, _),) = first.most_common(1)
    second = Counter(node.tokens[1] for node in nodes if node.tokens[0] == common)
    for above, seen in ((prompt, first), ([*prompt, common], second)):
        with torch.no_grad():
            probs = plain(torch.tensor([above])).logits[0, -1].double().softmax(-1)
        counts = [seen[token] for token in range(vocabulary)]
        statistic, freedom = chi_square(counts, probs)
        assert freedom > 3
        assert torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)) > 1e-4
        statistic, freedom = chi_square(counts, probs**0.7 / (probs**0.7).sum())  # it can tell another distribution
        assert torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)) < 1e-4


def test_greedy_is_the_likeliest_token(make):
    player, plain = make("qwen2", max_steps=2)
    groups, _ = played(player, K=2, temperature=0.0)
    for node in (node for group in groups for _, node, *_ in group.steps):
        tokens = [t for above in node.path() for t in above.tokens]
        with torch.no_grad():
            best = plain(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        n = len(node.tokens)
        assert tokens[-n:] == best[-n - 1 : -1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_rollouts_and_packed_training_on_cuda(make, architecture):
    player, plain = make(architecture, device="cuda", history=1)
    groups, _ = played(player)
    assert_stored_logps(plain, [node for group in groups for _, node, *_ in group.steps], 1e-3)
    samples = player.credit(0, groups)
    assert_exact_on_cuda(player.model, plain, samples, packed_logps, Packed(samples, "cuda"))


# --------------------------------------------------------------------------------------- credit of a group of steps
def stub(**how) -> Player:
    player = Player.__new__(Player)
    player.args, player.model = Args(**how), type("Model", (), {"device": "cpu"})
    return player


def group_of(paths, rewards=None, invalid=(), task="task") -> Group:
    """Rollouts by their states, as in walks(); the last step of a won one pays 1, or rewards are given by rollout."""
    won = [path[-1] == "G" for path in paths]
    group, root, number = Group(task, Node(tokens=[1]), [], won), Node(tokens=[1]), -1
    for number, t in enumerate(walks(*paths)):
        last = number + 1 == sum(len(path) - 1 for path in paths[: t.trajectory + 1])
        reward = (rewards[t.trajectory] if rewards else float(won[t.trajectory])) if last else 0.0
        node = Node(Node(root), [5], [True], [0.0])
        group.steps.append((t, node, reward, number not in invalid))
    group.returns = [sum(r for t, _, r, _ in group.steps if t.trajectory == k) for k in range(len(paths))]
    group.root = root
    return group


# by hand: at s to m, to m, to x: 1 / sqrt 3, 1 / sqrt 3, -2 / sqrt 3 as above; m to G is alone
PATHS, A_G = ("smG", "sm", "sx"), [1 / math.sqrt(3), 0, 1 / math.sqrt(3), -2 / math.sqrt(3)]
# returns 1, 0, 0: mean 1/3, from it 2/3, -1/3, -1/3, variance (4 + 1 + 1) / 9 / 2 = 1/3: A_E = 2, -1, -1 over sqrt 3
A_E = [2 / math.sqrt(3), 2 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)]
# returns from each step at s with gamma 1/2: 1/2, 0, 0: 2, -1, -1 over sqrt 3
A_GIGPO = [2 / math.sqrt(3), 0, -1 / math.sqrt(3), -1 / math.sqrt(3)]


@pytest.mark.parametrize(("method", "step"), [("graph_gpo", A_G), ("gigpo", A_GIGPO), ("grpo", [0, 0, 0, 0])])
def test_an_advantage_has_three_terms(method, step):
    player = stub(method=method, beta_graph=0.7, beta_episode=1.3, invalid_penalty=0.2, gamma=0.5)
    expected = [0.7 * a + 1.3 * e - p for a, e, p in zip(step, A_E, [0, 0.2, 0, 0.2])]
    found = player.advantages(group_of(PATHS, invalid=(1, 3)))
    assert found.shape == (4,) and found.tolist() == pytest.approx(expected)
    plain = stub(method=method, gamma=0.5).advantages(group_of(PATHS))
    assert plain.tolist() == pytest.approx([a + e for a, e in zip(step, A_E)])


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


def evaluated(sampled, greedy, **how):
    player, calls = stub(K=2, **how), []

    def play(seeds, K, held_out, generator, temperature, counts):
        assert held_out and (K, temperature) in ((2, 1.0), (1, 0.0))
        calls.append((K, *seeds))
        return [(sampled if temperature else greedy)[seed] for seed in seeds]

    player.play = play
    return player.evaluate(), calls


def test_evaluation_counts_steps_as_the_papers_figure():
    # s - m - G won, s - x - s - m failed: d(m) = 1, d(s) = 2, d(x) = 3: of the failed one's steps x - s and s - m lead
    # nearer, s - x does not: 2 of 3. A won s - s - x - s - G: at d(s) = 1, d(x) = 2 only the steps x - s and s - G do:
    # 2 of 4 are waste; with the first rollout's 0 of 2 that is 2 of 6. A task without success does not count.
    sampled = [group_of(["smG", "sxsm"]), group_of(["ssxsG", "sx"]), group_of(["sms", "s" * 5])]
    greedy = [group_of(["sG"]), group_of(["sa"]), group_of(["sa"])]
    row, calls = evaluated(sampled, greedy, eval_tasks=3)
    assert row == {"success": 2 / 6, "greedy_success": 1 / 3, "progress_in_failed": 2 / 4,
                   "waste_in_successful": 2 / 6}  # the second task's failed rollout has a step, which leads away
    assert sorted(calls) == [(1, 0, 1, 2), (2, 0, 1, 2)]
    row, calls = evaluated(sampled, greedy, eval_tasks=3, tasks=2)  # in batches of as many as in training
    assert row["success"] == 2 / 6 and sorted(calls) == [(1, 0, 1), (1, 2), (2, 0, 1), (2, 2)]


def test_evaluation_without_anything_to_count():
    row, _ = evaluated([group_of(["sa", "sb"])], [group_of(["sa"])], eval_tasks=1)
    assert row == {"success": 0, "greedy_success": 0, "progress_in_failed": None, "waste_in_successful": None}
    row, _ = evaluated([group_of(["sG", "sG"])], [group_of(["sG"])], eval_tasks=1)
    assert row == {"success": 1, "greedy_success": 1, "progress_in_failed": None, "waste_in_successful": 0}


@pytest.mark.parametrize(("text", "action"), [
    ("<action>go hall</action>", "go hall"), ("so <action> take\n  mug </action> then", "take mug"),
    ("<action>a</action> no: <action>b</action>", "b"), ("<action></action>", "<action></action>"),
    ("go hall", "go hall"),
    ("I think\n so: \n go   hall \n\n", "go hall"), ("", ""), ("\n \n", ""), ("<action>open", "<action>open"),
    ("think\n<action>open", "<action>open"), ("<action>x</action>\nlast line", "x"),
    ("</action>a<action>", "</action>a<action>"),
])
def test_what_the_policy_wants_to_do(text, action):
    player = stub()
    player.tokenizer = type("Tokenizer", (), {"decode": lambda self, tokens, skip_special_tokens: text})()
    assert player.action(Node(tokens=[1])) == action


def test_the_end_is_no_part_of_an_action(make):
    player, _ = make("qwen3")
    tokens = player.encode("hm <action>go hall</action>") + [player.tokenizer.eos_token_id]
    assert player.action(Node(tokens=tokens)) == "go hall"
    tokens = player.encode("go hall") + [player.tokenizer.eos_token_id]
    assert player.action(Node(tokens=tokens)) == "go hall"


# ---------------------------------------------------------------------------------------------------------- the picture
def test_graph_as_mermaid():
    # s - m - G, s - m, s - x; x has no way: d = 3. Edges by d(next) + d(state): m - G 1, s - m 3, s - x 5
    transitions = walks("smG", "sm", "sx")
    assert graph_mermaid("do it", transitions, torch.tensor([1.0, 0.0, 0.5, -1.25])).splitlines() == [
        "```mermaid",
        "flowchart TD",
        '    task["Task: do it<br>3 of 3 edges"]',
        '    n0["m<br>d = 1"]',
        "    style n0 fill:#fff,color:#000",
        '    n1["SUCCESS<br>d = 0"]',
        "    style n1 fill:#cfc,color:#000",
        '    n2["s<br>d = 2"]',
        "    style n2 fill:#fff,color:#000",
        '    n3["x<br>d = 3"]',
        "    style n3 fill:#fff,color:#000",
        '    n0 -->|"to G, 1 x, A = +0.00"| n1',
        "    linkStyle 0 stroke:#888",
        '    n2 -->|"to m, 2 x, A = +0.75"| n0',
        "    linkStyle 1 stroke:#2a2",
        '    n2 -->|"to x, 1 x, A = -1.25"| n3',
        "    linkStyle 2 stroke:#c22",
        "```",
    ]
    few = graph_mermaid("do it", transitions, torch.zeros(4), most=2)
    assert "Task: do it<br>2 of 3 edges" in few and '["x' not in few and few.count("-->") == 2


def test_mermaid_of_strange_texts():
    strange = '"A <b>|C|</b>"; #1 & [x] {y} `z` \\ --> (and\n\nwhy)?'
    transitions = [Transition(strange, strange, "SUCCESS", 0), Transition("SUCCESS", "x" * 300, SUCCESS, 0, 0.5)]
    text = graph_mermaid(strange, transitions, torch.zeros(2))
    escaped = ("#34;A #60;b#62;#124;C#124;#60;/b#62;#34;; #35;1 #38; #91;x#93; #123;y#125; #96;z#96; #92; --#62; "
               "(and why)?")
    assert f'["{escaped}<br>d = 1.5"]' in text and f'|"{escaped}, 1 x, A = +0.00"|' in text
    assert text.count('["SUCCESS<br>') == 2 and text.count("#cfc") == 1  # a state of that name is none
    assert f'|"{"x" * 100}, 1 x' in text


def test_the_picture_is_of_the_smallest_task_with_both_outcomes():
    player = stub()
    groups = [group_of(["sG", "sG"], task="won"), group_of(["sabG", "sa"], task="large"),
              group_of(["sG", "sa"], task="small"), group_of(["s"] * 2, task="nothing")][:3]
    name, text = player.picture(groups, [])
    assert name == "graph.md" and "Task: small<br>" in text and "+1.41" in text  # A_G + A_E, both 1 / sqrt 2
    assert "Task: won<br>" in player.picture(groups[:1], [])[1]
