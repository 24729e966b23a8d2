"""The three searches and their credit: what is started where, and against the rules on explicit paths
or by brute force; that a search runs each token once; that forks are drawn from the policy."""

import copy
import functools
import itertools
import math
import pickle
import random
import threading
from collections import Counter
from types import SimpleNamespace

import pictures
import pytest
import tiny
import torch
from conftest import (
    Letters,
    Ring,
    assert_stored_logps,
    chi_square,
    grow,
    nodes_of,
    p_value,
    player_in,
    roots_of,
    tiny_qwen,
)
from house import House
from problems import Problem
from sums import Sums
from test_advantages import plain_z, walks
from tiny import tiny_model

import graph_gpo
import tree_grpo
import treerl
from graph_gpo import SUCCESS, Player, Step, Task, Transition
from treerl import Solver, eptree, length, split


# ------------------------------------------------------------------------------------- all searches
def count_at_the_embedding(model) -> Counter:
    """How often each token is run from now on. A pad is 0, which the policy never draws."""
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(50))
    model.lm_head.bias.data[0] = -1e4
    seen = Counter()
    model.model.embed_tokens.register_forward_hook(
        lambda module, ids, out: seen.update(ids[0].flatten().tolist())
    )
    return seen


def test_each_token_is_forwarded_once(script, architecture):
    # But the last of a node once for each branch below it: not at all for a leaf's.
    model, plain = tiny_qwen(architecture)
    seen = count_at_the_embedding(model)
    groups, counts = grow(script, model)
    nodes = nodes_of(groups)
    assert all(0 not in node.tokens for node in nodes)
    expected = Counter(token for node in nodes for token in node.tokens[:-1])
    expected.update(node.parent.tokens[-1] for node in nodes if node.parent)
    del seen[0]
    assert seen == expected and counts["forwarded_tokens"] == expected.total()
    # All in all these are as many as there are tokens, less one per root.
    assert expected.total() == sum(len(node.tokens) for node in nodes) - len(roots_of(groups))
    assert counts["generated_tokens"] == sum(len(node.logps) for node in nodes)
    plain.lm_head.bias = model.lm_head.bias
    assert_stored_logps(plain, [node for node in nodes if node.logps], 1e-4)  # the bias counts


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_what_a_fork_draws_follows_the_policy(temperature, top_p):
    # 4,000 branches each, below a prompt, a turn with its observation, a segment cut in two, and a
    # prompt below another: their first tokens against the policy's distribution by a plain forward.
    # Under 1e-4 would be bad luck of one in ten thousand.
    model, plain = tiny_qwen("qwen2", vocab_size=20)
    generator = torch.Generator().manual_seed(1)

    def below(parent, n, limit):
        nodes = [treerl.Node(parent) for _ in range(n)]
        draws = generator, temperature, top_p, Counter()
        treerl.sample(model, nodes, [limit] * n, lambda tokens: False, set(), *draws)
        return nodes

    root = treerl.Node(tokens=[2, 3, 4, 5, 6])
    (turn,) = below(root, 1, 6)
    turn.tokens += [8, 9, 10]
    (segment,) = below(root, 1, 6)
    split(segment, 4)
    prompt = treerl.Node(root, [7, 11, 12])
    treerl.compute(model, [prompt])
    for parent in (root, turn, segment, prompt):
        tokens = [token for node in parent.path() for token in node.tokens]
        with torch.no_grad():
            logits = plain(torch.tensor([tokens])).logits[0, -1].double()
        ranked, order = (logits / temperature).softmax(-1).sort(descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        probs = torch.zeros_like(ranked).scatter(0, order, ranked / ranked.sum())
        drawn = Counter(node.tokens[0] for node in below(parent, 4000, 1))
        counts = [drawn[token] for token in range(20)]
        assert chi_square(counts, probs)[1] > 0 and p_value(counts, probs) > 1e-4
        flatter = probs**0.7 / (probs**0.7).sum()
        assert p_value(counts, flatter) < 1e-4  # the test can tell another distribution


@pytest.mark.parametrize("script", [tree_grpo, treerl])
def test_held_out_tasks_are_played_so_many_at_once(script, tmp_path):
    # Rewards at temperature 1 and greedily: more than 0.5 is success, or more than --success.
    rewards = {"right": (1.0, 0.75), "wrong": (0.5, 0.51), "bad": (-1.0, 0.0)}
    played = []

    def play(draws, starts):
        played.append((draws[1], len(starts)))
        for task, root, _ in starts:
            script.Node(root, [5, 6], [-1.0] * 2).reward = rewards[task][draws[1] == 0]

    for most, sizes in ((2, [2, 2, 1]), (5, [5]), (128, [5])):
        actor = SimpleNamespace(
            model=SimpleNamespace(device="cpu"),
            tokenizer=Letters(),
            args=SimpleNamespace(at_once=most, success=0.5, out=tmp_path),
            task=SimpleNamespace(held_out=["right", "wrong", "bad", "wrong", "right"]),
            root=lambda task: script.Node(tokens=[3, 4]),
            play=play,
        )
        played.clear()
        assert script.evaluate(actor) == {"success": 2 / 5, "greedy_success": 4 / 5}
        assert played == [(temperature, size) for temperature in (1.0, 0.0) for size in sizes]
    # The last one, greedy: its tokens 3 to 6 and its reward.
    episode = (tmp_path / "episode.md").read_text()
    assert "abcd" in episode and "eward 0.75" in episode
    actor.args.success = -0.5
    assert script.evaluate(actor) == {"success": 4 / 5, "greedy_success": 1}
    actor.args.success = 0.75
    assert script.evaluate(actor) == {"success": 2 / 5, "greedy_success": 0}


# ---------------------------------------------------------------------------------------- Tree-GRPO
def chains(rng, lengths):
    """A play() for tree_search without a model: each branch is a chain of so many steps."""
    started = []

    def play(starts):
        started.append([(node, tree) for _, node, tree in starts])
        for _, node, tree in starts:
            for _ in range(rng.choice(lengths)):
                node = tree_grpo.Node(node, tree=tree)
            node.reward = rng.choice([0.0, 0.1, 0.2, 1.0])

    return play, started


@pytest.mark.parametrize(
    ("M", "N", "L"), [(2, 2, 1), (1, 3, 2), (3, 1, 2), (4, 0, 1), (4, 2, 0), (1, 0, 0)]
)
def test_leaves_of_a_tree_search(M, N, L):
    rng = random.Random(0)
    play, started = chains(rng, [1, 2, 3, 4])
    prompts = [(f"question {i}", tree_grpo.Node()) for i in range(5)]
    tree_grpo.tree_search(play, prompts, M, N, L, rng)
    rounds = L if N else 0  # all prompts and trees together
    assert [len(starts) for starts in started] == [5 * M] + [5 * M * N] * rounds
    for _, root in prompts:
        trees = Counter(leaf.tree for leaf in root.leaves())
        assert trees == dict.fromkeys(range(M), 1 + N * L)
        assert all(node.reward is None for node in root.below() if node.children)
        for node in root.below()[1:]:  # a branch stays in the tree of the node it starts from
            assert node.parent is root or node.parent.tree == node.tree


def test_expanded_nodes_are_drawn_uniformly_and_are_no_leaves():
    # A trunk of 4 steps: the root and 3 inner steps are drawn with 1/4 each; the leaf never is.
    counts, pairs = Counter(), Counter()
    for seed in range(4000):
        play, started = chains(random.Random(seed), [4])
        tree_grpo.tree_search(play, [("", tree_grpo.Node())], 2, 2, 1, random.Random(seed))
        for tree in range(2):
            chosen = [node for node, of in started[1] if of == tree]
            assert all(node.parent is None or node.tree == tree for node in chosen)
            depths = [len(node.path()) - 1 for node in chosen]
            counts.update(depths)
            pairs[depths[0] == depths[1]] += 1
    assert set(counts) == {0, 1, 2, 3}
    assert p_value([counts[i] for i in range(4)], torch.full((4,), 0.25)) > 1e-5
    # With replacement: the same node twice in a quarter of the draws.
    assert p_value([pairs[True], pairs[False]], torch.tensor([0.25, 0.75])) > 1e-5


def test_a_second_round_may_expand_what_the_first_added():
    rng, depths = random.Random(1), Counter()
    for _ in range(50):
        play, started = chains(rng, [3])
        tree_grpo.tree_search(play, [("", tree_grpo.Node())], 1, 2, 2, rng)
        depths.update(len(node.path()) - 1 for node, _ in started[2])
    assert max(depths) > 2  # deeper than any inner step of a trunk


@pytest.mark.parametrize("keep", [0, 1, 2, 9])
@pytest.mark.parametrize("terms", ["both", "intra", "inter"])
def test_credit_of_a_tree_search_by_brute_force(keep, terms):
    rng = random.Random(keep)
    seen = Counter()
    for _ in range(100):  # 3 leaves in each of 3 trees
        root = tree_grpo.Node()
        tree_grpo.tree_search(chains(rng, [1, 2, 3])[0], [("", root)], 3, 2, 1, rng)
        args = tree_grpo.Args(M=3, keep=keep, advantage=terms)
        leaves, found = tree_grpo.credit(root, args, rng)
        kept = Counter(leaf.tree for leaf in leaves)
        assert len(set(leaves)) == len(leaves) and kept == dict.fromkeys(range(3), keep % 9 or 3)
        every = plain_z([leaf.reward for leaf in leaves], 1e-6)
        for leaf, A, inter in zip(leaves, found.tolist(), every):
            own = [other for other in leaves if other.tree == leaf.tree]
            intra = plain_z([other.reward for other in own], 1e-6)[own.index(leaf)]
            expected = {"both": intra + inter, "intra": intra, "inter": inter}[terms]
            assert A == pytest.approx(expected, abs=1e-4)
        seen.update(root.leaves().index(leaf) for leaf in leaves)
    assert len(seen) == 9  # each of them is kept at times


# ------------------------------------------------------------------------------------------- TreeRL
def branch(parent, logps, tree=0, tokens=None):
    node = treerl.Node(parent, tokens or [10 + i for i in range(len(logps))], logps, tree=tree)
    node.kv = torch.randn(2, 2, 1, len(logps), 3)
    return node


def scripted(rng, lengths):
    """A play() for eptree without a model: branches of random lengths and log-probs."""
    calls = []

    def play(starts, keep):
        calls.append((len(starts), keep))
        for _, node, tree in starts:
            new = branch(node, [-rng.random() for _ in range(rng.choice(lengths))], tree)
            new.reward = float(rng.random() < 0.5)

    return play, calls


@pytest.mark.parametrize(
    ("M", "N", "L", "T"),
    [(6, 2, 1, 2), (2, 1, 2, 2), (1, 4, 3, 1), (3, 1, 1, 5), (4, 0, 1, 2), (4, 2, 0, 2)],
)
def test_leaves_and_generations_of_an_eptree(M, N, L, T):
    prompts = [(None, treerl.Node(tokens=[1])) for _ in range(3)]
    play, calls = scripted(random.Random(0), [12, 20, 30])
    eptree(play, prompts, M, N, L, T, lambda problem, leaf: 10**9)
    rounds = L if N else 0
    assert [n for n, _ in calls] == [3 * M] + [3 * M * N * T] * rounds
    assert [keep for _, keep in calls] == [True] * rounds + [False]  # the last is never forked
    for _, root in prompts:
        trees = Counter(leaf.tree for leaf in root.leaves())
        assert trees == dict.fromkeys(range(M), 1 + N * L * T)
        for node in root.below()[1:]:  # where a tree is forked, the old goes on and T begin
            assert len(node.children) in (0, T + 1)
            assert all(child.tree == node.tree for child in node.children)


def by_rules(M, N, L, T, rng, lengths):
    """One search whose tokens are all different numbers, and the same from the rules, on explicit
    paths without nodes: what was forked after in each round, and the paths at the end, of both."""
    logps, answers, calls, root = {}, {}, [], treerl.Node(tokens=[-1])

    def play(starts, keep):
        calls.append([])
        for _, node, tree in starts:
            prefix = [token for above in node.path()[1:] for token in above.tokens]
            n = min(rng.choice(lengths), 25 - len(prefix))
            tokens = range(len(logps), len(logps) + n)
            logps.update((token, -rng.random()) for token in tokens)
            branch(node, [logps[token] for token in tokens], tree, [*tokens]).reward = 0.0
            # Where the answer of a path begins, by the path's last token.
            answers[tokens[-1]] = len(prefix) + n - rng.choice([0, 0, 1, 2, 5])
            calls[-1].append((tree, prefix, [*tokens]))

    eptree(play, [(None, root)], M, N, L, T, lambda problem, leaf: answers[leaf.tokens[-1]])
    paths = [(tree, tokens) for tree, _, tokens in calls[0]]  # the rules begin with the trunks
    barred, rounds = set(), []  # first tokens of side branches, and where a tree was forked
    for call in calls[1:]:
        rounds.append([])
        for tree in range(M):
            seen = {}  # token -> what comes before it, and may it be forked, by its first path
            for path in (path for own, path in paths if own == tree):
                for i, token in enumerate(path):
                    may = i < answers[path[-1]] and token not in barred
                    seen.setdefault(token, (path[:i], may))
            chosen = sorted((token for token in seen if seen[token][1]), key=logps.get)[:N]
            rounds[-1] += [(tree, seen[token][0]) for token in chosen for _ in range(T)]
            barred.update(chosen)
        paths += [(tree, prefix + tokens) for tree, prefix, tokens in call]
        barred.update(tokens[0] for _, _, tokens in call)
    forked = [sorted((tree, prefix) for tree, prefix, _ in call) for call in calls[1:]]
    solution = [[t for node in leaf.path()[1:] for t in node.tokens] for leaf in root.leaves()]
    found = sorted(zip((leaf.tree for leaf in root.leaves()), solution))
    return (forked, found), ([sorted(forks) for forks in rounds], sorted(paths)), root, logps


def test_an_eptree_by_the_rules():
    rng = random.Random(5)
    for _ in range(300):
        M, N, L, T = rng.randint(1, 3), rng.randint(0, 4), rng.randint(0, 3), rng.randint(1, 3)
        lengths = rng.choice([[1], [1, 2], [1, 2, 3], [3, 8], [12, 20]])
        ours, rules, root, logps = by_rules(M, N, L, T, rng, lengths)
        assert ours == rules
        for node in root.below()[1:]:
            assert node.logps == [logps[token] for token in node.tokens]
            assert (node.reward is None) == bool(node.children)


def solved(rng, shape=(3, 2, 1, 2), rewards=None) -> treerl.Node:
    """A tree of scripted branches."""
    root = treerl.Node(tokens=[1])
    eptree(scripted(rng, [5, 12])[0], [(None, root)], *shape, lambda problem, leaf: 10**9)
    for leaf, reward in zip(root.leaves(), rewards or []):
        leaf.reward = reward
    return root


def test_credit_of_an_eptree_by_brute_force():
    # Of each token of a segment s: R(s), by V(s), the mean reward of the leaves below it.
    rng = random.Random(1)
    args = treerl.Args(keep=99)
    for _ in range(50):
        root = solved(rng, (2, 2, 2, 1))
        leaves, found = treerl.credit(root, args, rng)
        V, L = {}, {}
        for node in root.below():
            rewards = [leaf.reward for leaf in leaves if node in leaf.path()]
            V[node], L[node] = sum(rewards) / len(rewards), len(rewards)
        assert {*leaves} == {*root.leaves()} and len(leaves) == L[root] == 10
        paid = Counter()
        for leaf, A in zip(leaves, found.tolist()):
            expected = []
            for node in leaf.path()[1:]:
                gain = V[node] - V[root] + V[node] - V[node.parent]
                paid[node] += A[len(expected)]
                expected += [gain / math.sqrt(L[node])] * len(node.tokens)
            assert A == pytest.approx(expected + [0.0] * (len(A) - len(expected)), abs=1e-6)
        for node, total in paid.items():  # a segment's weight grows with the root of its leaves
            gain = V[node] - V[root] + V[node] - V[node.parent]
            assert total == pytest.approx(math.sqrt(L[node]) * gain, abs=1e-5)


def test_kept_leaves_hold_a_right_one_if_there_is_one():
    rng = random.Random(2)
    root, seen = solved(rng, rewards=[0.0] * 14 + [1.0]), Counter()
    (right,) = (leaf for leaf in root.leaves() if leaf.reward)
    for _ in range(300):
        leaves, A = treerl.credit(root, treerl.Args(keep=3), rng)
        assert len(set(leaves)) == len(A) == 3 and right in leaves
        seen.update(leaves)
    assert len(seen) == 15 and min(seen.values()) > 15  # the others are at random
    leaves, A = treerl.credit(solved(rng, rewards=[0.0] * 15), treerl.Args(keep=3), rng)
    assert len(leaves) == 3 and not A.any()  # there is none, so nothing to compare


def test_chainrl_is_leave_one_out():
    root = solved(random.Random(0), (4, 0, 0, 1), [1.0, 0.0, 0.0, 1.0])
    leaves, found = treerl.credit(root, treerl.Args(method="chainrl", keep=9), random.Random(0))
    for leaf, A in zip(leaves, found.tolist()):
        n = len(leaf.tokens)
        assert A[:n] == pytest.approx([2 / 3 if leaf.reward else -2 / 3] * n) and not any(A[n:])


def solver_of(model, tokenizer=None, **how) -> Solver:
    args = treerl.Args(**{"eval_prompts": 1, **how})
    return Solver(model, tokenizer or Letters(), args, Sums(args))


@pytest.mark.parametrize("before", ["", "a", "é", "1 🙂 2\n", "🙂🙂 漢字 ∑ ", "# #### 7 and "])
@pytest.mark.parametrize(
    ("answer", "latex"),
    [("#### 7 🙂", False), ("\\boxed{7} 🙂", True), ("\\fbox{7}", False), ("", True)],
)
def test_where_the_final_answer_begins(before, answer, latex):
    # A token for each byte, so an emoji is four of them and decodes to marks until the last.
    model, tokenizer = tiny_model([" 7", " and"], torch.device("cpu"), 0)
    solver = solver_of(model, tokenizer)
    above, tokens = (treerl.encode(tokenizer, text) for text in (before, answer))
    tokens = [*above, *tokens, tokenizer.eos_token_id]
    for cut in {0, len(tokens) // 2}:  # the path may be cut anywhere
        root = treerl.Node(tokens=[2])
        upper = treerl.Node(root, tokens[:cut], [0.0] * cut) if cut else root
        leaf = treerl.Node(upper, tokens[cut:], [0.0] * (len(tokens) - cut))
        # Without an answer it is the end, which is no text.
        assert solver.answer_at(Problem("", "7", latex), leaf) == len(above) + (not answer)


def test_an_answer_that_begins_inside_a_token():
    model, tokenizer = tiny_model(["x##", "##"], torch.device("cpu"), 0)
    tokens = tokenizer.convert_tokens_to_ids(["a", "x##", "##", "7"])
    leaf = treerl.Node(treerl.Node(tokens=[2]), tokens, [0.0] * 4)
    assert solver_of(model, tokenizer).answer_at(Problem("", "7"), leaf) == 1


def test_reward_needs_an_end_within_the_limits_and_the_right_answer():
    model, _ = tiny_qwen("qwen2")
    solver = solver_of(model, max_tokens=12)

    def text(tokens):  # 2, 5, 8 ... are answers, the others letters
        return "".join(f"#### {t // 3}\n" if t % 3 == 2 else "abc"[t % 3] for t in tokens if t > 1)

    solver.text = text
    roots = [treerl.Node(tokens=[3, 4, 5]) for _ in range(200)]
    starts = [(Problem("", "4"), root, 0) for root in roots]
    solver.play((torch.Generator().manual_seed(0), 1.0, 1.0, Counter()), starts)
    rewards = Counter()
    for root in roots:
        (leaf,) = root.children
        answers = [token // 3 for token in leaf.tokens if token % 3 == 2]
        ended, right = leaf.tokens[-1] == 1, answers[-1:] == [4]
        assert leaf.reward == float(ended and right) and (ended or len(leaf.tokens) == 12)
        assert leaf.kv is None  # unless it is to be forked
        rewards[ended, right] += 1
    assert len(rewards) == 4  # all four cases have been seen


def test_a_path_is_limited_as_a_whole():
    model, _ = tiny_qwen("qwen2")
    solver, root = solver_of(model, max_tokens=10), treerl.Node(tokens=[3, 4, 5])
    solver.eos = set()
    draws, problem = (None, 1.0, 1.0, Counter()), Problem("", "4")
    solver.play(draws, [(problem, root, 0)], keep=True)
    solver.play(draws, [(problem, split(root.children[0], 7).parent, 0)] * 3)
    assert [length(leaf.path()[1:]) for leaf in root.leaves()] == [10] * 4  # without the prompt
    model.config.max_position_embeddings = 11
    solver.play(draws, [(problem, root, 0)])
    assert length(root.leaves()[-1].path()) == 11  # the context is the other limit


# ----------------------------------------------------------------------------------------- GraphGPO
def played(player, seeds=(0, 1, 2), K=4, seed=0, temperature=1.0):
    counts, generator = Counter(), torch.Generator().manual_seed(seed)
    return player.play([*seeds], K, generator, temperature, counts), counts


def rollout(task, k: int) -> list[Step]:
    return [step for step in task.steps if step.transition.trajectory == k]


def waves(tasks) -> list[list[Step]]:
    """The steps of all tasks by their place in their rollouts."""
    own = [rollout(task, k) for task in tasks for k in range(len(task.won))]
    return [[step for step in wave if step] for wave in itertools.zip_longest(*own)]


@pytest.mark.parametrize("kept", [0, 60])
def test_prompts_that_are_not_kept_are_computed_in_each_wave(architecture, kept):
    # With --kept-tokens 0 once in a wave of steps; with a few, in some waves.
    model, plain = tiny_qwen(architecture)
    seen = count_at_the_embedding(model)
    tasks, counts = played(player_in(Ring, model, kept_tokens=kept))
    steps = [step.node for task in tasks for step in task.steps]
    once = [prompt for task in tasks for prompt in task.root.children]
    each = [prompt for wave in waves(tasks) for prompt in {step.node.parent for step in wave}]
    assert len(once) < len(each) < len(steps)  # rollouts share prompts, in a wave and over waves
    del seen[0]
    assert seen.total() == counts["forwarded_tokens"]
    if kept == 0:
        below = [*each, *steps]
        expected = Counter(t for n in [*below, *roots_of(tasks)] for t in n.tokens[:-1])
        expected.update(node.parent.tokens[-1] for node in below)
        assert seen == expected
        new = length([*each, *roots_of(tasks)])
        assert counts["prompt_tokens_sampling"] == new
    assert counts["prompt_tokens_sampling"] > length([*once, *roots_of(tasks)])
    assert counts["prompt_tokens"] == sum(length(node.path()[:-1]) for node in steps)
    assert counts["env_steps"] == len(steps) == len({*steps})
    assert counts["generated_tokens"] == length(steps)
    plain.lm_head.bias = model.lm_head.bias
    assert_stored_logps(plain, steps, 1e-4)


def test_keys_and_values_of_actions_are_let_go_after_each_wave():
    player = player_in(Ring, tiny_qwen("qwen2")[0])
    earlier, read = [], player.action

    def action(node):
        assert all(node.kv is None for node in earlier) and node.kv is None
        assert node.parent.kv is not None  # what may be met again stays
        earlier.append(node)
        return read(node)

    player.action = action
    tasks, _ = played(player)
    assert len(earlier) > 20
    assert all(node.kv is None for task in tasks for node in task.root.below())


def test_rollouts_are_what_the_world_says(architecture):
    player = player_in(Ring, tiny_qwen(architecture)[0])
    tasks, _ = played(player, K=6)
    for seed, task in enumerate(tasks):
        world = Ring()
        assert task.text == world.reset(seed)[1]["task"]
        for k in range(6):
            mine = rollout(task, k)
            at, _ = world.reset(seed)
            for i, step in enumerate(mine):
                t = step.transition
                assert (t.state, t.action, t.cost) == (at, player.action(step.node), 1)
                at, paid, over, _, info = world.step(t.action)
                assert (step.reward, step.valid) == (paid, info["valid"])
                assert t.next_state is SUCCESS if over else t.next_state == at
                assert over == (i + 1 < 5 and i + 1 == len(mine)) or i + 1 == 5
            assert task.won[k] == over and task.returns[k] == float(over)
        assert len({tuple(p.tokens) for p in task.root.children}) == len(task.root.children)
        assert {*task.root.leaves()} == {step.node for step in task.steps}
    assert 0 < sum(sum(task.won) for task in tasks) < 18
    assert {step.valid for task in tasks for step in task.steps} == {True, False}


@pytest.mark.parametrize("h", [0, 1, 3])
@pytest.mark.parametrize("room", [500, 20])
def test_a_prompt_tells_of_the_last_steps_and_is_cut_from_the_left(h, room):
    model, plain = tiny_qwen("qwen2")
    player = player_in(Ring, model, history=h, max_steps=6)
    player.after = "ok\n"
    tail = "\nok\n"
    root = len(f"Task: {Ring().reset(2)[1]['task']}\n")
    model.config.max_position_embeddings = root + room + len(tail) + 3  # 3 are --max-tokens
    (task,), _ = played(player, seeds=(2,), K=6)
    assert player.tokenizer.decode(task.root.tokens) == f"Task: {task.text}\n"
    lengths = set()
    for k in range(6):
        told = []
        for step in rollout(task, k):
            text = "".join([*told[max(0, len(told) - h) :], step.transition.state])
            told.append(f"{step.transition.state}\n> {step.transition.action}\n")
            assert player.tokenizer.decode(step.node.parent.tokens) == text[-room:] + tail
            lengths.add(len(text) > room)
    assert lengths == ({False} if room == 500 else {False, True} if h == 0 else lengths)
    assert_stored_logps(plain, [step.node for step in task.steps], 1e-4)
    model.config.max_position_embeddings = root + len(tail) + 3
    with pytest.raises(graph_gpo.BadInput, match="--model"):
        played(player, seeds=(2,))


def test_instruction_and_chat_template_are_around_every_prompt():
    model, tokenizer = tiny_model(["<user>"], torch.device("cpu"), 0)
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}"
    player = player_in(Ring, model, tokenizer)
    (task,) = player.begin([6], 2, False)  # at 1 + 6 mod 5
    prompt = player.prompt(task, 0)
    text = tokenizer.decode(task.root.tokens + prompt.tokens)
    assert text == "<user>Walk round the ring.\nTask: go from 2 to 0.\nplace 2 and on and on\n<end>"
    assert player.prompt(task, 1) is prompt  # met again


def test_credit_of_rollouts_by_brute_force(architecture):
    # Each step is a sequence of its own, equal actions in equal places are one node, and a task's
    # steps count as much as another's.
    player = player_in(Ring, tiny_qwen(architecture)[0], max_tokens=1, invalid_penalty=0.7)
    tasks, _ = played(player, K=40)
    shared = 0
    for task in tasks:
        A = graph_gpo.advantages(task, player.args).tolist()
        groups = graph_gpo.credit(task, len(tasks), player.args)
        found = Counter()
        for group in groups:
            assert group.root is task.root and len({leaf.parent for leaf in group.leaves}) == 1
            assert group.weight == 1 / len(task.steps) / 3
            pairs = zip(group.leaves, group.advantages, strict=True)
            found.update((leaf.parent, *leaf.tokens, float(a)) for leaf, a in pairs)
            distinct = {*group.leaves}
            assert len(distinct) == len({tuple(leaf.tokens) for leaf in distinct})
            shared += len(group.leaves) - len(distinct)
        steps = zip(task.steps, A)
        expected = Counter((s.node.parent, *s.node.tokens, a) for s, a in steps)
        assert found == expected
        assert len(groups) == len({step.node.parent for step in task.steps})
    assert shared > 20


def task_of(paths, rewards=None, invalid=(), text="task") -> Task:
    """Rollouts by their states, as in walks(); the last step of a won one pays 1, or `rewards` are
    those of the last steps."""
    task = Task(text, graph_gpo.Node(tokens=[1]), [], [path[-1] == "G" for path in paths])
    paid = rewards or [float(won) for won in task.won]
    ends = [sum(len(path) - 1 for path in paths[: k + 1]) - 1 for k in range(len(paths))]
    for number, t in enumerate(walks(*paths)):
        node = graph_gpo.Node(graph_gpo.Node(task.root, [5]), [6], [0.0])
        reward = paid[t.trajectory] if number in ends else 0.0
        task.steps.append(Step(t, node, reward, number not in invalid))
    task.returns += paid
    task.told = [[f"{state}\n> go\n" for state in path[:-1]] + [path[-1]] for path in paths]
    return task


# By hand: at s to m, to m, to x: 1 / sqrt 3, 1 / sqrt 3, -2 / sqrt 3; m to G is alone. Returns 1, 0
# and 0: 2, -1, -1 over sqrt 3. From each step at s with gamma 1/2: 1/2, 0, 0: 2, -1, -1 as well.
PATHS, SQRT3 = ("smG", "sm", "sx"), math.sqrt(3)
A_E = [2 / SQRT3, 2 / SQRT3, -1 / SQRT3, -1 / SQRT3]
STEP_TERMS = {
    "graph_gpo": [1 / SQRT3, 0, 1 / SQRT3, -2 / SQRT3],
    "gigpo": [2 / SQRT3, 0, -1 / SQRT3, -1 / SQRT3],
    "grpo": [0, 0, 0, 0],
}


@pytest.mark.parametrize("method", STEP_TERMS)
def test_an_advantage_has_three_terms(method):
    def found(task, **how):
        args = graph_gpo.Args(method=method, gamma=0.5, **how)
        return graph_gpo.advantages(task, args).tolist()

    how = {"beta_graph": 0.7, "beta_episode": 1.3, "invalid_penalty": 0.2}
    terms = zip(STEP_TERMS[method], A_E, [0, 0.2, 0, 0.2])
    expected = [0.7 * a + 1.3 * e - p for a, e, p in terms]
    assert found(task_of(PATHS, invalid=(1, 3)), **how) == pytest.approx(expected)
    expected = [a + e for a, e in zip(STEP_TERMS[method], A_E)]
    assert found(task_of(PATHS)) == pytest.approx(expected)


def evaluated(out, sampled, greedy, **how):
    player, calls = Player.__new__(Player), []
    player.args, player.model = graph_gpo.Args(K=2, out=out, **how), SimpleNamespace(device="cpu")
    player.tokenizer = Letters()

    def play(seeds, K, generator, temperature, counts, held_out):
        assert held_out and (K, temperature) in ((2, 1.0), (1, 0.0))
        calls.append((K, *seeds))
        return [(sampled if temperature else greedy)[seed] for seed in seeds]

    player.play = play
    return player.evaluate(), calls


def test_evaluation_counts_steps_as_the_papers_figure(tmp_path):
    # s - m - G won, s - x - s - m failed: d(m) = 1, d(s) = 2, d(x) = 3: of the failed one's steps
    # x - s and s - m lead nearer, s - x does not. A won s - s - x - s - G: at d(s) = 1, d(x) = 2
    # only x - s and s - G do: 2 of 4 are waste, with the first rollout's 0 of 2 that is 2 of 6. The
    # second task's failed rollout leads away. A task without success does not count.
    tasks = [task_of(["smG", "sxsm"]), task_of(["ssxsG", "sx"]), task_of(["sms", "s" * 5])]
    greedy = [task_of(["sG"]), task_of(["sa"]), task_of(["sa"])]
    row, calls = evaluated(tmp_path, tasks, greedy, eval_tasks=3)
    assert (row["success"], row["greedy_success"]) == (2 / 6, 1 / 3)
    assert (row["progress_in_failed"], row["waste_in_successful"]) == (2 / 4, 2 / 6)
    assert calls == [(2, 0, 1, 2), (1, 0, 1, 2)]
    episode = (tmp_path / "episode.md").read_text()  # the last greedy one
    assert "task" in episode and "eward 0." in episode and "\ns\n> go\na\n" in episode
    # As many at once as in training.
    row, calls = evaluated(tmp_path, tasks, greedy, eval_tasks=3, tasks=2)
    assert row["success"] == 2 / 6 and calls == [(2, 0, 1), (2, 2), (1, 0, 1), (1, 2)]


def test_evaluation_without_anything_to_count(tmp_path):
    row, _ = evaluated(tmp_path, [task_of(["sa", "sb"])], [task_of(["sa"])], eval_tasks=1)
    assert [*row.values()] == [0, 0, None, None]
    row, _ = evaluated(tmp_path, [task_of(["sG", "sG"])], [task_of(["sG"])], eval_tasks=1)
    assert [*row.values()] == [1, 1, None, 0]


class Acting(Player):
    """A player without a policy: each action is `says`."""

    says = "go"

    def act(self, live, *how):
        prompts = [self.prompt(task, k) for task, k in live]
        return [graph_gpo.Node(prompt, self.encode(self.says)) for prompt in prompts]


def acting_in(world, says="go", **how):
    player = player_in(world, tiny_qwen("qwen2")[0], **how)
    player.__class__, player.says = Acting, says
    return player


class Told:
    """A world that says what it is told to."""

    def reset(self, seed=0, options=None):
        self.options = options
        return "here", {"task": "x"}

    def step(self, action):
        return "there", *self.told, {}


@pytest.mark.parametrize(
    ("reward", "terminated", "truncated", "won"),
    [
        (1.0, True, False, True),
        (0.5, True, False, True),
        (0.0, True, False, False),
        (-1.0, True, False, False),
        (1.0, False, True, False),
        (1.0, False, False, False),
        (1, True, True, True),
    ],
)
def test_success_is_an_end_with_a_reward(reward, terminated, truncated, won):
    Told.told, counts = (reward, terminated, truncated), Counter()
    player = acting_in(Told, max_steps=3)
    (task,) = player.play([0], 2, None, 1.0, counts, held_out=True)
    assert task.won == [won, won] and player.envs[0].options == {"held_out": True}
    n = 1 if terminated or truncated else 3
    assert task.returns == [n * reward] * 2 and len(task.steps) == 2 * n == counts["env_steps"]
    # A failure is a state of its own: another rollout may have gone on from one that looks alike.
    end = SUCCESS if won else "there (failed)" if terminated else "there"
    assert all(step.transition.next_state == end for step in task.steps)
    assert all(step.valid is True for step in task.steps)  # the default
    assert counts["generated_tokens"] == counts["forwarded_tokens"] == 0


class Faulty:
    """The second of these worlds fails at its second step, in the manner of `fails`."""

    worlds = []  # noqa: RUF012

    def __init__(self):
        self.worlds.append(self)

    def reset(self, seed=0, options=None):
        self.n = 0
        return "place", {"task": "x", "state": "s0"}

    def step(self, action):
        self.n += 1
        if self.n == 2 and self is self.worlds[1]:
            return self.fails()
        return f"place {self.n}", 0.25, False, False, {"state": f"s{self.n}"}


FAILS = {
    "it raises": lambda self: 1 / 0,
    "nothing": lambda self: None,
    "four values": lambda self: ("there", 0.5, True, False),
    "no info": lambda self: ("there", 0.5, True, False, None),
    "a reward in words": lambda self: ("there", "much", True, False, {}),
    "no number": lambda self: ("there", float("nan"), True, False, {}),
    "an unhashable state": lambda self: ("there", 0.5, True, False, {"state": ["s2"]}),
}


@pytest.mark.parametrize("how", FAILS)
def test_a_world_that_fails_ends_its_own_rollout(how, monkeypatch, capsys):
    monkeypatch.setattr(Faulty, "worlds", [])
    monkeypatch.setattr(Faulty, "fails", FAILS[how], raising=False)
    player, counts = acting_in(Faulty, max_steps=3), Counter()
    (task,) = player.play([0], 3, None, 1.0, counts)
    assert counts["world_errors"] == 1 and counts["env_steps"] == 3 + 3 + 2
    assert [len(rollout(task, k)) for k in range(3)] == [3, 2, 3]
    assert task.returns == [0.75, 0.25, 0.75] and task.won == [False] * 3
    last = rollout(task, 1)[-1]  # a step that changed nothing
    assert last.transition[:3] == ("s1", "go", "s1") and (last.reward, last.valid) == (0, True)
    assert graph_gpo.advantages(task, player.args).isfinite().all()
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "'go'" in said.err
    # The world that failed is not used again.
    worlds = [*Faulty.worlds]
    (again,) = player.play([0], 3, None, 1.0, Counter())
    assert worlds[1] not in again.envs and set(task.envs) - {worlds[1]} < set(again.envs)


def test_a_reset_that_fails_once_gets_another_world(monkeypatch, capsys):
    monkeypatch.setattr(Faulty, "worlds", [])

    class Breaking(Faulty):
        def reset(self, seed=0, options=None):
            if self is self.worlds[1]:
                raise IndexError("no such game")
            return super().reset(seed)

    player = acting_in(Breaking, max_steps=3)
    (task,) = player.play([0], 3, None, 1.0, Counter())
    assert [len(rollout(task, k)) for k in range(3)] == [3, 3, 3]
    assert Faulty.worlds[1] not in task.envs and len(set(task.envs)) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no such game" in said


def test_worlds_are_asked_side_by_side():
    """Each waits until all four are asked."""

    class Together(Faulty):
        worlds = [None, None]  # noqa: RUF012 (so none fails)
        threads, together = 4, threading.Barrier(4, timeout=30)

        def reset(self, seed=0, options=None):
            self.together.wait()
            return super().reset(seed)

        def step(self, action):
            self.together.wait()
            return super().step(action)

    player = acting_in(Together, max_steps=3)
    tasks = player.play([0, 1], 2, None, 1.0, Counter())
    assert [[len(rollout(task, k)) for k in range(2)] for task in tasks] == [[3, 3], [3, 3]]
    assert [step.transition.trajectory for step in tasks[0].steps] == [0, 1] * 3  # in their order


def test_a_start_that_fails_is_refused():
    class Unseeded(Faulty):
        def reset(self, seed=0, options=None):
            return "place", {"task": f"task {self.worlds.index(self)}"}

    class Raising(Faulty):
        def reset(self, seed=0, options=None):
            if seed == 7:
                raise IndexError("no such game")
            return super().reset(seed)  # and so does the world that it gets instead

    class Listing(Faulty):
        def reset(self, seed=0, options=None):
            return "place", {"task": "x", "state": ["s0"]}

    for world, reason in ((Unseeded, "seed"), (Raising, "no such game"), (Listing, "unhashable")):
        player = acting_in(world)
        with pytest.raises(graph_gpo.BadInput, match=f"^--env.*{reason}") as refused:
            player.play([6, 7], 2, None, 1.0, Counter())
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<action>go hall</action>", "go hall"),
        ("so <action> take\n  mug </action> then", "take mug"),
        ("<action>a</action> no: <action>b</action>", "b"),
        ("<action></action>", ""),
        ("I think.\ngo kitchen</action>", "go kitchen</action>"),
        ("I think\n so: \n go   hall \n\n", "go hall"),
        ("\n \n", ""),
        ("think\n<action>open", "<action>open"),
        ("<action>x</action>\nlast line", "x"),
        ("</action>a<action>", "</action>a<action>"),
    ],
)
def test_what_the_policy_wants_to_do(text, action):
    model, tokenizer = tiny_model([], torch.device("cpu"), 0)
    tokens = graph_gpo.encode(tokenizer, text) + [tokenizer.eos_token_id]
    player = player_in(Ring, model, tokenizer)
    assert player.action(graph_gpo.Node(tokens=tokens)) == action  # the end is no part of it


def test_the_tiny_models_tokens_are_the_worlds_words(monkeypatch):
    # What it is warm-started on: single steps of the demonstrator, a prompt and an action.
    caught = []
    monkeypatch.setattr(tiny, "imitate", lambda *how: caught.append(how))
    args = graph_gpo.Args(max_steps=20, sft_steps=8, max_tokens=8)
    model, tokenizer = tiny.graph_gpo(graph_gpo, args, House, torch.device("cpu"))
    ((script, trained, leaves, batch, _),) = caught
    assert (script, trained, batch, len(leaves)) == (graph_gpo, model, 128, 8 * 128)
    byte, seen, verbs = 257, set(), set()  # ids below are the end and single bytes
    for leaf in leaves:
        root, prompt, action = leaf.path()
        *tokens, end = action.tokens
        verb, _ = tokenizer.decode(tokens).split()
        verbs.add(verb)
        assert action.logps == [0.0] * 3  # all of it carries loss
        assert len(tokens) == 2 and min(tokens) >= byte and end == tokenizer.eos_token_id
        *told, _, _ = prompt.tokens  # the last two are the full stop and a new line
        assert min(root.tokens + told) >= byte
        seen.update(told)
    assert verbs == {"go", "open", "take", "put", "clean", "heat", "cool"} and len(seen) > 40


def test_the_picture_is_of_the_smallest_task_with_both_outcomes():
    won, large = task_of(["sG", "sG"], text="won"), task_of(["sabG", "sa"], text="large")
    small = task_of(["sG", "sa"], text="small")
    picture = functools.partial(pictures.graph_gpo, graph_gpo, args=graph_gpo.Args())
    text = picture([won, large, small])
    assert "Task: small<br>" in text and "+1.41" in text  # A_G + A_E, both 1 / sqrt 2
    assert "Task: won<br>" in picture([won])


def test_success_survives_copies():
    t = Transition("s", "go", SUCCESS, 0, 2.5)
    for again in (copy.deepcopy(t), copy.copy(t), pickle.loads(pickle.dumps(t))):
        assert again == t and again.next_state is SUCCESS
    assert all(SUCCESS != other for other in ("SUCCESS", str(SUCCESS), 0, None, (), object()))
