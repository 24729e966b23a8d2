"""What left the scripts for benchmarks/released.py: merged states, penalties before the z-scores,
tasks that are drawn again, forks at random places."""

import itertools
import math
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import graph_gpo
import treerl
from graph_gpo import SUCCESS, Node, Step, Task, Transition, goal_distances

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import released

HALF = 1 / math.sqrt(2)  # z-scores of two values are this and minus this


def z(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    std = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
    return [(x - mean) / std for x in values]


def task_of(rollouts: list[list[str]], invalid: tuple = ()) -> Task:
    """A task whose rollouts are lists of states; "G" is success, which returns 1. invalid: the
    numbers of steps whose action was none."""
    steps, won = [], [states[-1] == "G" for states in rollouts]
    for k, states in enumerate(rollouts):
        for state, after in itertools.pairwise(states):
            end = SUCCESS if after == "G" else after
            transition, valid = Transition(state, after, end, k), len(steps) not in invalid
            steps.append(Step(transition, Node(), float(after == "G"), valid))
    return Task("a task", Node(), list(map(float, won)), won, steps)


# --------------------------------------------------------------------------------------- penalties
PATHS = [list("smG"), list("sm"), list("sx")]


@pytest.mark.parametrize("method", ["graph_gpo", "gigpo", "grpo"])
def test_penalties_before_the_z_scores(method):
    # Invalid: the failed step to m, and that to x. R at s: 0.1, 0.1 - 0.2, 0.001 - 0.2; GiGPO's
    # returns at s: 1/2, -0.2, -0.2; and A_E is a z-score over the four steps' returns.
    step = {"graph_gpo": z([0.1, -0.1, -0.199]), "gigpo": z([0.5, -0.2, -0.2]), "grpo": [0] * 3}
    first, *others = step[method]
    episode = z([1, 1, -0.2, -0.2])
    expected = [0.7 * a + 1.3 * e for a, e in zip([first, 0, *others], episode)]
    args = graph_gpo.Args(method=method, beta_graph=0.7, beta_episode=1.3, invalid_penalty=0.2, gamma=0.5)
    found = released.advantages(task_of(PATHS, (2, 3)), args, penalty_in_return=True)
    assert found.tolist() == pytest.approx(expected)


def test_penalties_before_the_z_scores_without_any_success():
    # d = 1 everywhere, R = 10 0.1^2 = 0.1 at s, twice, and 0.1 - 0.2
    task, args = task_of([["s", "m"], ["s", "m"], ["s", "x"]], (2,)), graph_gpo.Args()
    args.invalid_penalty = 0.2
    found = released.advantages(task, args, penalty_in_return=True)
    assert found.tolist() == pytest.approx([2 / math.sqrt(3)] * 2 + [-4 / math.sqrt(3)])


@pytest.mark.parametrize("method", ["graph_gpo", "gigpo", "grpo"])
def test_without_an_option_it_is_what_the_script_computes(method):
    rng, args = random.Random(0), graph_gpo.Args(method=method, omega=0.5, invalid_penalty=0.3)
    for _ in range(50):
        rollouts = [["s", *rng.choices("stuvw", k=rng.randint(1, 6))] for _ in range(4)]
        for states in rollouts:
            states += ["G"] * (rng.random() < 0.5)
        task = task_of(rollouts, tuple(rng.sample(range(12), 3)))
        expected = graph_gpo.advantages(task, args)
        assert torch.allclose(released.advantages(task, args), expected, atol=1e-12)


# ----------------------------------------------------------------------------------- merged states
def test_nearly_equal_texts_become_one():
    # 40 characters of which one differs: the ratio is 2 39 / 80 = 0.975
    one, other = (
        "the mug is on the table, the door is ope",
        "the mug is on the table, the door is opx",
    )
    transitions = [
        Transition(one, "a", other, 0, 2.5),
        Transition(other, "b", SUCCESS, 7),
        Transition("elsewhere", "c", other, 1),
    ]
    merged = released.merge_states(transitions, 0.95)
    assert merged == [
        Transition(one, "a", one, 0, 2.5),
        Transition(one, "b", SUCCESS, 7),
        Transition("elsewhere", "c", one, 1),
    ]
    assert merged[1].next_state is SUCCESS
    assert released.merge_states(transitions, 0.975)[0].next_state == one  # at least so alike
    assert released.merge_states(transitions, 0.9751) == transitions
    assert released.merge_states([], 0.5) == []


def test_the_first_like_state_is_taken():
    # 20 characters: c is one away from b, ratio 0.95, and two from a, 0.9; a and b differ by three
    a, b, c = "abcdefghijklmnopqrst", "abcdefghijklmnopqXYZ", "abcdefghijklmnopqrYZ"
    transitions = [Transition(a, "", b, 0), Transition(c, "", c, 0)]

    def states(transitions):
        return [t[0:3:2] for t in released.merge_states(transitions, 0.88)]

    assert states(transitions) == [(a, b), (a, a)]  # b is more like c, but a came first
    assert states(transitions[::-1]) == [(c, c), (c, c)]
    # c becomes a, and is gone: b has nothing to be like
    assert states([Transition(a, "", c, 0), Transition(b, "", b, 0)]) == [(a, a), (b, b)]


def test_success_is_not_merged():
    for text in ("SUCCESS", str(SUCCESS)):
        transitions = [Transition(text, "", SUCCESS, 0), Transition("x", "", text, 1)]
        merged = released.merge_states(transitions, 0.5)
        assert goal_distances(merged) == {SUCCESS: 0, text: 1, "x": 2}


ONE = "you are in the kitchen at the door. ...."
OTHER = "you are in the kitchen at the door. ...!"  # 0.975 alike


def merged_advantages(rollouts, similarity: float, method: str = "graph_gpo") -> list[float]:
    args = graph_gpo.Args(method=method, beta_episode=0.0)
    return released.advantages(task_of(rollouts), args, similarity=similarity).tolist()


@pytest.mark.parametrize(("similarity", "expected"), [(1.0, HALF), (0.98, HALF), (0.95, 0)])
def test_like_states_are_at_the_same_distance(similarity, expected):
    # From s to ONE and on to success: 2, 1; OTHER, which is left for x, is at d_max + 1 = 3, unless
    # it is ONE. Then the steps from s lead equally near, and there is nothing to choose.
    found = merged_advantages([["s", ONE, "G"], ["s", OTHER, "x"]], similarity)
    assert found == pytest.approx([expected, 0, -expected, 0])


def test_like_states_do_not_share_a_comparison_in_graph_gpo():
    assert merged_advantages([[ONE, "G"], [OTHER, "x"]], 0.95) == [0, 0]  # both were left once
    found = merged_advantages([[ONE, "G"], [OTHER, "x"], [OTHER, "G"]], 0.95)
    assert found == pytest.approx([0, -HALF, HALF])


@pytest.mark.parametrize(("similarity", "expected"), [(1.0, 0), (0.98, 0), (0.95, HALF)])
def test_like_states_share_a_comparison_in_gigpo(similarity, expected):
    found = merged_advantages([[ONE, "G"], [OTHER, "x"]], similarity, "gigpo")
    assert found == pytest.approx([expected, -expected])


def test_only_states_that_are_left_are_merged_in_gigpo():
    # The end of the first rollout, like ONE, does not take it away from OTHER.
    rollouts = [["s", "Y" + ONE[1:]], [ONE, "G"], [OTHER, "x"]]
    assert merged_advantages(rollouts, 0.97, "gigpo") == pytest.approx([0, HALF, -HALF])


# -------------------------------------------------------------------------------- dynamic sampling
def rolled(results: list, times: int, generator, held_out: bool = False):
    """Returns of the tasks that come of three seeds, and how many seeds were played at each call,
    where tasks get these results, in turn."""
    results, calls = iter(results), []

    def play(player, seeds, K, generator, temperature, counts, held_out=False):
        calls.append(list(seeds))
        return [Task("", Node(), next(results), [False] * K) for _ in seeds]

    again = released.dynamic_sampling(times, play)
    tasks = again(None, [1, 2, 3], 2, generator, 1.0, Counter(), held_out=held_out)
    return [task.returns for task in tasks], calls


def test_tasks_whose_returns_are_equal_are_replaced_so_many_times():
    same, mixed, draws = [0.0, 0.0], [1.0, 0.0], torch.Generator()
    results = [same, mixed, same, [1.0, 1.0], mixed, same, same, mixed]

    def found(times):
        tasks, calls = rolled(results, times, draws)
        return tasks, [len(seeds) for seeds in calls]

    assert found(0) == ([same, mixed, same], [3])
    assert found(1) == ([mixed, [1.0, 1.0], mixed], [3, 2])
    assert found(2) == ([mixed, mixed, same], [3, 2, 1])  # the last ones stay as they are
    assert found(9) == ([mixed] * 3, [3, 2, 1, 1, 1])  # no call for nothing
    seeds = [seed for call in rolled(results, 9, draws)[1] for seed in call]
    assert len(set(seeds)) == len(seeds) == 8


def test_evaluation_and_demonstrations_are_as_they_come():
    same = [[0.0, 0.0]] * 9
    assert len(rolled(same, 3, torch.Generator(), held_out=True)[1]) == 1
    assert len(rolled(same, 3, None)[1]) == 1


# ------------------------------------------------------------------------------------- other forks
def test_random_forks_are_anywhere_allowed():
    choose, seen = released.random_forks(random.Random(0)), Counter()
    allowed = torch.tensor([True] * 6 + [False] * 4)
    for _ in range(600):
        seen.update(choose(torch.zeros(10), 1, allowed))
    assert sorted(seen) == [0, 1, 2, 3, 4, 5]
    assert min(seen.values()) > 60  # 100 are expected; the seed is fixed
    assert sorted(choose(torch.zeros(10), 9, allowed)) == [0, 1, 2, 3, 4, 5]


def test_random_forks_replace_those_of_the_script(monkeypatch):
    def play(starts, keep):
        for _, above, tree in starts:
            depth = sum(len(node.tokens) for node in above.path()[1:])
            Node = treerl.Node
            leaf = Node(above, [1] * (10 - depth), [-1.0 - t for t in range(depth, 10)], tree=tree)
            leaf.reward = 0.0

    forks = set()
    monkeypatch.setattr(treerl, "fork_points", released.random_forks(random.Random(1)))
    for _ in range(60):
        root = treerl.Node(tokens=[1])
        treerl.eptree(play, [(None, root)], 1, 1, 1, 1, lambda problem, leaf: 6)
        forks.add(len(root.children[0].tokens) if len(root.children) == 1 else 0)
    assert forks == {0, 1, 2, 3, 4, 5}  # of the script's the most uncertain, 5, alone
