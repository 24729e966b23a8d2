"""TreeRL: where a tree is forked, its search, and the exactness of what a fork inside a segment leaves."""

import functools
import itertools
import math
import random
from collections import Counter

import naive
import pytest
import torch
from conftest import (
    assert_each_token_is_forwarded_once,
    assert_exact_on_cuda,
    assert_stored_logps,
    chi_square,
    tiny_qwen,
)

import treerl
from treerl import (
    Args,
    Node,
    Packed,
    Problem,
    Sample,
    Solver,
    eptree,
    fork_candidates,
    fork_points,
    grpo_loss,
    length,
    packed_logps,
    sample,
    split,
    step_rewards,
)


# ----------------------------------------------------------------------------------------------------- where to fork
def branch(parent, logps, tree=0, tokens=None):
    node = Node(parent, tree=tree)
    node.add(tokens or [10 + i for i in range(len(logps))], True, logps)
    node.kv = torch.randn(2, 2, 1, len(logps), 3)
    return node


def test_candidates_follow_the_rules():
    root = Node(tokens=[1, 2])
    root.sampled, root.logps = [False, False], [0.0, 0.0]
    trunk, other = branch(root, [-1.0, -5, -2, -3, -4]), branch(root, [-8.0, -8], tree=1)
    places, logps, allowed = fork_candidates(root, 0, lambda leaf: 4)
    assert places == [(trunk, i) for i in range(5)] and logps.tolist() == [-1, -5, -2, -3, -4]
    assert allowed.tolist() == [True, True, True, True, False]  # a trunk's first token may be; the answer is from 4 on
    assert fork_candidates(root, 1, lambda leaf: 9)[0] == [(other, 0), (other, 1)]  # each tree for itself
    # A fork at token 2 of the trunk: token 2 is not forked again, nor the first token of what starts there.
    rest = split(trunk, 2)
    side = branch(trunk, [-6.0, -7])
    lengths = {rest: 4, side: 3}
    places, logps, allowed = fork_candidates(root, 0, lambda leaf: lengths[leaf])
    assert places == [(trunk, 0), (trunk, 1), (rest, 0), (rest, 1), (rest, 2), (side, 0), (side, 1)]
    assert logps.tolist() == [-1, -5, -2, -3, -4, -6, -7]
    # rest: 0 is the fork, 1 may be, 2 is the answer; side: 0 begins a side branch, 1 is the answer, which is from 3 on
    assert allowed.tolist() == [True, True, False, True, False, False, False]
    # A fork at the trunk's first token hangs from the root; from then on no branch of this tree is forked at its start.
    assert split(trunk, 0) is trunk and trunk.parent is root
    branch(root, [-9.0, -9])
    allowed = fork_candidates(root, 0, lambda leaf: 9)[2]
    assert allowed.tolist() == [False, True, False, True, True, False, True, False, True]
    assert fork_candidates(root, 1, lambda leaf: 9)[2].tolist() == [True, True]  # that was the other tree's


def test_a_play_of_ones_own_needs_no_kv():
    """As with another sampler: nodes with tokens and log-probs only."""
    root = Node(tokens=[1])

    def play(starts):
        for _, node, tree in starts:
            Node(node, tree=tree).add([7, 8, 9, 7], True, [-0.1, -0.4, -0.2, -0.3])

    eptree(play, [(None, root)], 2, 2, 1, 2, lambda problem, leaf: 4)
    assert len(root.leaves()) == 2 * (1 + 2 * 2)


def test_split_keeps_everything():
    root = Node(tokens=[1])
    node = branch(root, [-1.0, -2, -3, -4])
    node.tree = 3
    below = [branch(node, [-1.0, -1]), branch(node, [-1.0, -1])]
    kv = node.kv
    rest = split(node, 1)
    assert node.children == [rest]
    assert (node.tokens, rest.tokens) == ([10], [11, 12, 13]) and (node.logps, rest.logps) == ([-1], [-2, -3, -4])
    assert node.sampled + rest.sampled == [True] * 4 and (node.tree, rest.tree) == (3, 3)
    assert rest.children == below and all(child.parent is rest for child in below)
    assert rest.parent is node and node.parent is root and root.children == [node]
    assert torch.equal(torch.cat([node.kv, rest.kv], -2), kv)
    assert (node.cached, rest.cached) == (1, 3)
    leaf = below[0]
    leaf.reward = 1.0
    assert split(leaf, 1).reward == 1.0 and leaf.reward is None and leaf.children[0].cached == 1
    assert len(root.leaves()) == 2  # splitting adds none


# ----------------------------------------------------------------------------------------------------------- the search
def scripted(rng, lengths, end=99):
    """play() without a model: branches of random lengths and log-probs, their KV only as long as it should be."""
    calls = []

    def play(starts):
        calls.append([node for _, node, _ in starts])
        for _, node, tree in starts:
            new = branch(node, [-rng.random() for _ in range(rng.choice(lengths))], tree)
            new.reward = float(rng.random() < 0.5)

    return play, calls


@pytest.mark.parametrize(("M", "N", "L", "T"), [
    (6, 2, 1, 2), (2, 1, 2, 2), (2, 2, 2, 2), (1, 4, 3, 1), (3, 1, 1, 5), (4, 0, 1, 2), (4, 2, 0, 2), (1, 0, 0, 1)])
def test_number_of_leaves_and_of_generations(M, N, L, T):
    groups = [(None, Node(tokens=[1])) for _ in range(3)]
    play, calls = scripted(random.Random(0), [12, 20, 30])
    eptree(play, groups, M, N, L, T, lambda problem, leaf: 10**9)
    for _, root in groups:
        assert len(root.leaves()) == M * (1 + N * L * T)
        for tree in range(M):
            assert sum(leaf.tree == tree for leaf in root.leaves()) == 1 + N * L * T
        for node in root.below():
            assert node.parent is None or node in node.parent.children
            assert all(child.tree == node.tree for child in node.children if node is not root)
            # where something was forked, the old branch goes on and T new ones begin, in each tree
            assert len(node.children) in ((0, T + 1) if node is not root else range(M, M * (T + 1) + 1))
    assert len(calls) == 1 + (L if N else 0)
    assert len(calls[0]) == 3 * M and all(len(call) == 3 * M * N * T for call in calls[1:])


def test_fewer_leaves_where_places_run_out():
    # Trunks of three tokens, of which the last is the answer: two places. Side branches have none of their own: of one
    # token if they start at place 1 or 0 ... so after two forks per tree there is no place left for the third round.
    root = Node(tokens=[1])
    trunks, short = scripted(random.Random(0), [3])[0], scripted(random.Random(1), [1])[0]
    eptree(lambda starts: (short if root.children else trunks)(starts), [(None, root)], 2, 9, 3, 2,
           lambda problem, leaf: 2)
    assert len(root.leaves()) == 2 * (1 + 2 * 2)
    root = Node(tokens=[1])
    eptree(scripted(random.Random(0), [3])[0], [(None, root)], 2, 9, 3, 2, lambda problem, leaf: 0)
    assert len(root.leaves()) == 2  # an answer from the first token on: nowhere to fork


def test_each_tree_forks_at_its_own_most_uncertain_tokens():
    root, expected, found = Node(tokens=[1]), [], []
    play, calls = scripted(random.Random(3), [15])

    def watched(starts):
        if calls:  # the forks: how many tokens of its tree lie above each
            found.extend(sorted((tree, length(node.path()) - 1) for _, node, tree in starts))
            return
        play(starts)
        for trunk in root.children:
            ranked = sorted(range(12), key=lambda t, trunk=trunk: trunk.logps[t])  # the answer is from token 12 on
            expected.extend((trunk.tree, t) for t in sorted(ranked[:3]) for _ in range(2))

    eptree(watched, [(None, root)], 4, 3, 1, 2, lambda problem, leaf: 12)
    assert found == expected and len(found) == 24


def replayed(M, N, L, T, rng, lengths):
    """One search whose tokens are all different numbers, and the same from the rules, on explicit paths without nodes:
    (what was forked after in each round, the paths at the end) of both."""
    logps, answers, calls, root = {}, {}, [], Node(tokens=[-1])

    def play(starts):
        calls.append([])
        for _, node, tree in starts:
            prefix = [t for above in node.path()[1:] for t in above.tokens]
            tokens = [len(logps) + i for i in range(min(rng.choice(lengths), 25 - len(prefix)))]
            logps.update((t, -rng.random()) for t in tokens)
            branch(node, [logps[t] for t in tokens], tree, tokens).reward = 0.0
            answers[tokens[-1]] = len(prefix) + len(tokens) - rng.choice([0, 0, 1, 2, 5])  # by a path's last token
            calls[-1].append((tree, prefix, tokens))

    eptree(play, [(None, root)], M, N, L, T, lambda problem, leaf: answers[leaf.tokens[-1]])
    paths = [(tree, tokens) for tree, _, tokens in calls[0]]  # the rules begin with the trunks
    barred, rounds = set(), []  # side branches' first tokens, and where a tree was forked
    for call in calls[1:]:
        rounds.append([])
        for tree in range(M):
            seen = {}  # token -> (what comes before it, may it be forked); the path that was there first decides
            for path in (path for t, path in paths if t == tree):
                for i, token in enumerate(path):
                    seen.setdefault(token, (path[:i], i < answers[path[-1]] and token not in barred))
            chosen = sorted((t for t, (_, allowed) in seen.items() if allowed), key=logps.get)[:N]
            rounds[-1] += [(tree, seen[t][0]) for t in chosen for _ in range(T)]
            barred.update(chosen)
        paths += [(tree, prefix + tokens) for tree, prefix, tokens in call]
        barred.update(tokens[0] for _, _, tokens in call)
    found = [(leaf.tree, [t for node in leaf.path()[1:] for t in node.tokens]) for leaf in root.leaves()]
    return ([sorted((tree, prefix) for tree, prefix, _ in call) for call in calls[1:]], sorted(found)), (
        [sorted(forks) for forks in rounds], sorted(paths)), root, logps


def test_search_against_the_rules_on_random_trees():
    rng = random.Random(5)
    for _ in range(300):
        M, N, L, T = rng.randint(1, 3), rng.randint(0, 4), rng.randint(0, 3), rng.randint(1, 3)
        ours, rules, root, logps = replayed(M, N, L, T, rng, rng.choice([[1], [1, 2], [1, 2, 3], [3, 8], [12, 20]]))
        assert ours == rules
        for node in root.below()[1:]:
            assert node.logps == [logps[t] for t in node.tokens] and (node.reward is None) == bool(node.children)


# ----------------------------------------------------------------------------------- exactness where segments are split
def search(model, seed=0, prompts=(3, 17, 30), shape=(3, 2, 2, 2), temperature=1.0, top_p=1.0, choose=fork_points):
    """Trees of TreeRL's search by a tiny model, paths of at most 30 tokens, the last 5 of them "answer"."""
    rng, counts, groups = random.Random(seed), Counter(), []
    generator = torch.Generator(model.device).manual_seed(seed)
    for n in prompts:
        groups.append((None, Node()))
        groups[-1][1].add([rng.randrange(2, 50) for _ in range(n)])

    def play(starts):
        nodes = [Node(node, tree=tree) for _, node, tree in starts]
        limits = [30 - length(node.path()[1:]) for node in nodes]
        sample(model, nodes, limits, lambda tokens: False, {1}, generator, temperature, top_p, counts)
        for node in nodes:
            node.reward = float(sum(node.tokens) % 2)

    eptree(play, groups, *shape, lambda problem, leaf: 25, choose)
    return [root for _, root in groups], counts


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.2, 0.95)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_stored_logps_are_those_of_a_plain_forward(architecture, dtype, tolerance, temperature, top_p):
    model, plain = tiny_qwen(architecture, dtype)
    roots, _ = search(model, temperature=temperature, top_p=top_p)
    leaves = [leaf for root in roots for leaf in root.leaves()]
    assert len(leaves) > 60 and max(len(leaf.path()) for leaf in leaves) > 4  # forks inside forks
    assert_stored_logps(plain, leaves, tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_search_and_packed_training_on_cuda(architecture):
    model, plain = (m.to("cuda") for m in tiny_qwen(architecture))
    roots, _ = search(model)
    samples = [Sample(root, root.leaves(), [], 1.0) for root in roots]
    assert_exact_on_cuda(model, plain, samples, packed_logps, Packed(samples, "cuda"))


def test_branches_change_nothing_of_the_trunk(architecture):
    model, _ = tiny_qwen(architecture)
    trunks, _ = search(model, shape=(3, 0, 0, 1))
    before = [[(leaf.tokens, leaf.logps) for leaf in root.leaves()] for root in trunks]
    grown, _ = search(model, shape=(3, 2, 2, 2))
    for root, old in zip(grown, before):
        found = []
        for tree in range(3):
            path = next(leaf for leaf in root.leaves() if leaf.tree == tree).path()[1:]
            found.append(([t for node in path for t in node.tokens], [x for node in path for x in node.logps]))
        assert found == old  # to the last bit


def test_each_token_is_forwarded_once(architecture):
    model, _ = tiny_qwen(architecture)
    seeds = itertools.count()
    assert_each_token_is_forwarded_once(
        model, lambda: search(model, seed=next(seeds), prompts=(3, 9), shape=(2, 1, 2, 1)))


@pytest.mark.parametrize("at", [0, 4])
def test_what_a_fork_draws_follows_the_policy(at):
    # One trunk, forked at token `at` with 3,000 new branches of one token each: their first tokens against the policy's
    # distribution there, from a plain forward. A p-value under 1e-4 would be bad luck of one in ten thousand.
    model, plain = tiny_qwen("qwen2", torch.float64)
    root = Node()
    root.add([5, 6, 7])
    generator = torch.Generator().manual_seed(0)
    trunk = Node(root)
    sample(model, [trunk], [9], lambda tokens: False, set(), generator, 1.0, 1.0, Counter())
    prefix = root.tokens + trunk.tokens[:at]
    parent = split(trunk, at).parent
    new = [Node(parent) for _ in range(3000)]
    sample(model, new, [1] * len(new), lambda tokens: False, set(), generator, 1.0, 1.0, Counter())
    with torch.no_grad():
        probs = plain(torch.tensor([prefix])).logits[0, -1].softmax(-1)
    seen = Counter(node.tokens[0] for node in new)
    statistic, freedom = chi_square([seen[token] for token in range(50)], probs)
    assert torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)) > 1e-4
    uniform = torch.full((50,), 1 / 50)  # the test can tell another distribution
    assert torch.special.gammaincc(torch.tensor(49 / 2), torch.tensor(chi_square(
        [seen[token] for token in range(50)], uniform)[0] / 2)) < 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_packed_loss_and_gradients_are_those_of_separate_sequences(architecture, dtype, tolerance):
    # Every token of a segment carries R(s), and each kept leaf's path is a sequence of its own.
    model, plain = tiny_qwen(architecture, dtype)
    roots, _ = search(model)
    rng, samples = random.Random(0), []
    for root in roots:
        nodes, leaves = root.below(), root.leaves()
        parents = [nodes.index(node.parent) if node.parent else -1 for node in nodes]
        R = step_rewards(parents, {i: node.reward for i, node in enumerate(nodes) if not node.children})
        kept = rng.sample(leaves, 9)
        advantages = [torch.cat([R[nodes.index(node)].expand(len(node.tokens)) for node in leaf.path()[1:]])
                      for leaf in kept]
        samples.append(Sample(root, kept, advantages, 1 / 9 / len(roots)))
    packed = Packed(samples, "cpu")
    logps, loss = packed_logps(model, packed), 0.0
    for item, (index, mask) in zip(samples, packed.paths):
        A = torch.nn.utils.rnn.pad_sequence(item.advantages, True)
        loss = loss + item.weight * grpo_loss(logps[index], logps[index].detach(), None, A, mask)[0]
    loss.backward()
    separate = naive.loss(plain, samples, torch.Tensor.detach, torch.Tensor.detach, 0.2, 0.2, 0.0)
    separate.backward()
    assert loss.item() == pytest.approx(separate.item(), abs=tolerance)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        assert torch.allclose(ours.grad, theirs.grad, atol=tolerance * theirs.grad.abs().max().item(), rtol=0), name


# ----------------------------------------------------------------------------------------------------------- the solver
class Letters:
    """A tokenizer of one to three characters a token, 1 being the end."""
    pieces = ("?", "", "a", "b ", "####", " 7", "#", "##", " 12", "x##", "\n")

    def decode(self, tokens):
        return "".join(self.pieces[token] for token in tokens)


def solver_of(model=None, **how):
    solver = Solver.__new__(Solver)
    solver.model, solver.text, solver.eos, solver.args = model, Letters().decode, {1}, Args(**how)
    return solver


@pytest.mark.parametrize(("tokens", "start"), [
    ([2, 3, 4, 5, 1], 2), ([2, 3, 2, 1], 4), ([4, 5, 1], 0), ([4, 5, 10, 2, 4, 8, 1], 4),  # the last one counts
    ([2, 9, 7, 5], 1),  # "x##" + "##": the answer begins inside a token
    ([2, 6, 6, 6, 6, 5], 1), ([2, 3], 2), ([2, 4], 1), ([1], 1),
])
def test_where_the_final_answer_begins(tokens, start):
    root = Node(tokens=[2, 2])
    cut = len(tokens) // 2
    upper = Node(root, tokens[:cut], [True] * cut, [0.0] * cut) if cut else root
    leaf = Node(upper, tokens[cut:], [True] * (len(tokens) - cut), [0.0] * (len(tokens) - cut))
    assert solver_of().answer_at(Problem("", "7"), leaf) == start


def test_where_the_final_answer_begins_after_characters_of_many_tokens(tmp_path):
    # The tiny model's tokenizer has a token for each byte, so an emoji is four of them and decodes to marks until then.
    treerl.save_tiny_model(tmp_path, [" 7"], 0)
    _, tokenizer = treerl.load_model(str(tmp_path), torch.device("cpu"))
    solver = solver_of()
    solver.text = functools.partial(tokenizer.decode, skip_special_tokens=True)
    for before in ("", "a", "é", "1 🙂 2\n", "🙂🙂 漢字 ∑ "):
        for answer, latex in (("#### 7 🙂", False), ("\\boxed{7} 🙂", True), ("\\fbox{7}", False)):
            tokens = [*treerl.encode(tokenizer, before + answer), tokenizer.eos_token_id]
            leaf = Node(Node(tokens=[2]), tokens, [True] * len(tokens), [0.0] * len(tokens))
            assert solver.answer_at(Problem("", "7", latex), leaf) == len(before.encode())


def solved(rewards: list[float], shape=(3, 2, 1, 2)) -> Node:
    """A root with a tree of scripted branches below it, with these leaf rewards."""
    root = Node(tokens=[1])
    eptree(scripted(random.Random(0), [12, 15])[0], [(None, root)], *shape, lambda problem, leaf: 10**9)
    leaves = root.leaves()
    for leaf, reward in zip(leaves, rewards * len(leaves)):
        leaf.reward = reward
    return root


def test_credit_gives_each_token_the_reward_of_its_segment():
    solver, roots = solver_of(keep=99, method="treerl"), [solved([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]), solved([1.0])]
    one, flat = solver.credit(0, [(None, root) for root in roots])
    nodes = roots[0].below()
    R = step_rewards([nodes.index(node.parent) if node.parent else -1 for node in nodes],
                     {i: node.reward for i, node in enumerate(nodes) if not node.children}).tolist()
    assert len(one.leaves) == 15 and one.weight == 1 / 15 / 2
    for leaf, A in zip(one.leaves, one.advantages):
        expected = [R[nodes.index(node)] for node in leaf.path()[1:] for _ in node.tokens]
        assert A.tolist() == pytest.approx(expected) and len(set(expected)) > 1
    assert not any(A.any() for A in flat.advantages)  # nothing to compare


def test_a_segments_weight_grows_with_the_root_of_its_leaves():
    # Sum over the sequences that hold a segment of its tokens' advantage: |L(s)| R(s) = sqrt(|L(s)|) (G_A + L_A).
    root = solved([1.0, 0.0, 0.0, 1.0, 0.0])
    (item,) = solver_of(keep=99).credit(0, [(None, root)])
    V = {node: sum(leaf.reward for leaf in node.leaves()) / len(node.leaves()) for node in root.below()}
    for node in root.below()[1:]:
        above = length(node.path()[1:]) - len(node.tokens)
        paid = sum(float(A[above]) for leaf, A in zip(item.leaves, item.advantages) if node in leaf.path())
        gains = V[node] - V[root] + V[node] - V[node.parent]
        assert paid == pytest.approx(math.sqrt(len(node.leaves())) * gains, abs=1e-6)


def test_kept_leaves_hold_a_right_one_if_there_is_one():
    root = solved([0.0] * 14 + [1.0])
    (right,) = (leaf for leaf in root.leaves() if leaf.reward)
    seen = Counter()
    for step in range(300):
        (item,) = solver_of(keep=3).credit(step, [(None, root)])
        assert len(set(item.leaves)) == 3 and right in item.leaves and item.weight == 1 / 3
        seen.update(item.leaves)
    assert min(seen.values()) > 15 and len(seen) == 15  # the others are at random
    (item,) = solver_of(keep=3).credit(0, [(None, solved([0.0]))])
    assert len(item.leaves) == 3  # there is none


def test_chainrl_is_leave_one_out():
    root = solved([1.0, 0.0, 0.0, 1.0], shape=(4, 0, 0, 1))
    (item,) = solver_of(method="chainrl", keep=9).credit(0, [(None, root)])
    for leaf, A in zip(item.leaves, item.advantages):
        assert A.tolist() == pytest.approx([2 / 3 if leaf.reward else -2 / 3] * len(leaf.tokens))


class Vocabulary(Letters):
    """Token 2 + 3 i is "#### i"; all others are letters."""

    def decode(self, tokens):
        return "".join(f"#### {token // 3}\n" if token % 3 == 2 else "abc"[token % 3] for token in tokens if token != 1)


def test_reward_needs_an_end_within_the_limits_and_the_right_answer():
    model, _ = tiny_qwen("qwen2")
    solver = solver_of(model, max_tokens=12)
    solver.text = Vocabulary().decode
    roots = [Node() for _ in range(200)]
    for root in roots:
        root.add([3, 4, 5])
    problem, generator = Problem("", "4"), torch.Generator().manual_seed(0)
    solver.play([(problem, root, 0) for root in roots], generator, 1.0, 1.0, Counter())
    rewards = Counter()
    for root in roots:
        (leaf,) = root.children
        answers = [token // 3 for token in leaf.tokens if token % 3 == 2]
        ended, right = leaf.tokens[-1] == 1, answers[-1:] == [4]
        assert leaf.reward == float(ended and right) and (ended or len(leaf.tokens) == 12)
        rewards[ended, right] += 1
    assert len(rewards) == 4  # all four cases have been seen


def test_a_path_is_limited_as_a_whole():
    model, _ = tiny_qwen("qwen2")
    solver = solver_of(model, max_tokens=10)
    solver.eos, solver.text, root = set(), Vocabulary().decode, Node()
    root.add([3, 4, 5])
    solver.play([(Problem("", "4"), root, 0)], None, 1.0, 1.0, Counter())
    starts = [(Problem("", "4"), split(root.children[0], 7).parent, 0)] * 3
    solver.play(starts, None, 1.0, 1.0, Counter())
    assert [length(leaf.path()[1:]) for leaf in root.leaves()] == [10] * 4  # without the prompt
    model.config.max_position_embeddings = 11
    solver.play([(Problem("", "4"), root, 0)], None, 1.0, 1.0, Counter())
    assert length(root.leaves()[-1].path()) == 11  # the context is the other limit


def test_prompts_are_searched_so_many_at_once():
    model, _ = tiny_qwen("qwen2")
    widths, solver = [], solver_of(model, M=2, max_tokens=20)
    model.model.embed_tokens.register_forward_hook(lambda module, ids, out: widths.append(ids[0].shape[0]))
    solver.text = Vocabulary().decode
    for solver.args.at_once, lanes in ((9, 5 * 2), (2, 2 * 2)):
        def root(problem):
            node = Node()
            node.add([3, 4, 5])
            return node
        solver.root = root
        widths.clear()
        groups = solver.search([Problem(str(i), "4") for i in range(5)], random.Random(0), Counter())
        assert [problem.text for problem, _ in groups] == list("01234")
        for _, root in groups:
            assert {leaf.tree for leaf in root.leaves()} == {0, 1} and 2 <= len(root.leaves()) <= 10
            assert all(node.kv is None for node in root.below())
        assert widths[0] <= lanes / 2 and max(widths) <= lanes * 4  # prompts; then T N = 4 branches for each trunk


# --------------------------------------------------------------------------------------------------- built-in problems
def test_the_longest_built_in_solution_fits(tmp_path):
    # 4 tokens an operation, 2 for the answer and the end, within the default of 8 an operation
    args = Args(sft_steps=0, dtype="float32", ops=32)
    _, tokenizer = treerl.calculator_model(args, torch.device("cpu"), tmp_path)
    rng = random.Random(0)
    for _ in range(100):
        problem = treerl.make_problem(rng, 32, False)
        n = len(problem.text.split(":")[1].split())
        assert len(treerl.encode(tokenizer, treerl.demonstration(problem, rng))) + 1 == 4 * n + 3 <= 8 * 32
