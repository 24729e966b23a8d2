"""The advantages of the three methods: worked by hand, then compared with their definitions.

Read this beside the papers. Each section begins with an example that is small enough to redo with
a pencil, drawn above the test that has its numbers. Then come properties that hold for any input,
then the definition, written out slowly, on random trees or graphs, and last what is refused.

    Tree-GRPO, Eq. 6 and 7   z_score, tree_advantages
    Tree-GRPO, Eq. 8         grpo_loss
    TreeRL                   step_rewards, leave_one_out, fork_points
    GraphGPO                 goal_distances, z_scores, graph_advantages
    its baselines            gigpo_advantages, episode_advantages

"Variance" and "std" are the unbiased ones throughout: squares are divided by n - 1."""

import itertools
import math
import random
import statistics
from collections import Counter
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch

from graph_gpo import (
    SUCCESS,
    Transition,
    episode_advantages,
    gigpo_advantages,
    goal_distances,
    graph_advantages,
    z_scores,
)
from tree_grpo import grpo_loss, tree_advantages, z_score
from treerl import fork_points, leave_one_out, step_rewards

SQRT2 = math.sqrt(2)
SQRT3 = math.sqrt(3)


def plain_z(values: list[float], eps: float = 0.0) -> list[float]:
    """z-scores in plain Python: 0 for a lone value and among equal ones."""
    n = len(values)
    if n < 2 or max(values) == min(values):
        return [0.0] * n
    mean = math.fsum(values) / n
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    return [(x - mean) / (std + eps) for x in values]


# --------------------------------------------------------------------------- Tree-GRPO, Eq. 6 and 7
def advantages(rewards: list[float], trees: list[int], **how) -> list[float]:
    """tree_advantages of lists, in float64."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return tree_advantages(rewards, torch.tensor(trees), **how).tolist()


def test_two_trees_of_three_leaves():
    # M = 2 trees, each with N = 2 branches in L = 1 round: three leaves a tree.
    #
    #       tree 0               tree 1
    #      /  |  \              /  |  \
    #     1   0   0            1   1   0      rewards
    #
    # A_intra, among the leaves of a tree. Tree 0 has mean 1/3 and deviations 2/3, -1/3, -1/3, so
    # its variance is (4 + 1 + 1) / 9 / 2 = 1/3 and z = 2 / sqrt(3), -1 / sqrt(3), -1 / sqrt(3).
    # Tree 1 is its mirror image: 1 / sqrt(3), 1 / sqrt(3), -2 / sqrt(3).
    # A_inter, among all six: mean 1/2, deviations +-1/2, variance 6/4 / 5 = 0.3.
    rewards = [1, 0, 0, 1, 1, 0]
    trees = [0, 0, 0, 1, 1, 1]
    s = 1 / SQRT3
    e = 0.5 / math.sqrt(0.3)
    intra = [2 * s, -s, -s, s, s, -2 * s]
    inter = [e, -e, -e, e, e, -e]
    both = [2 * s + e, -s - e, -s - e, s + e, s + e, -2 * s - e]
    assert advantages(rewards, trees, terms="intra") == pytest.approx(intra, abs=1e-5)
    assert advantages(rewards, trees, terms="inter") == pytest.approx(inter, abs=1e-5)
    assert advantages(rewards, trees) == pytest.approx(both, abs=1e-5)


def test_two_rounds():
    # M = 1, N = 1, L = 2: 1 + 1 x 2 = 3 leaves of one tree, with rewards 1, 0.2 and 0.
    # Mean 0.4, deviations 0.6, -0.2, -0.4, variance (0.36 + 0.04 + 0.16) / 2 = 0.28.
    # With one tree A_intra and A_inter are the same number, so A is twice it.
    z = [d / math.sqrt(0.28) for d in (0.6, -0.2, -0.4)]
    assert advantages([1, 0.2, 0], [7, 7, 7], terms="intra") == pytest.approx(z, abs=1e-5)
    assert advantages([1, 0.2, 0], [7, 7, 7]) == pytest.approx([2 * x for x in z], abs=1e-5)


def test_flat_tree_still_gets_the_inter_term():
    #     tree 0     tree 1
    #     /   \      /   \
    #    1     1    0     0
    #
    # Within a tree there is nothing to compare, so A_intra is 0; between the trees there is:
    # mean 1/2, variance 4/4 / 3 = 1/3, z = +-sqrt(3) / 2.
    z = SQRT3 / 2
    assert advantages([1, 1, 0, 0], [0, 0, 1, 1], terms="intra") == [0, 0, 0, 0]
    assert advantages([1, 1, 0, 0], [0, 0, 1, 1]) == pytest.approx([z, z, -z, -z], abs=1e-5)


def test_lone_leaves():
    # One leaf in all: nothing to compare.
    assert advantages([5.0], [0]) == [0.0]
    # One leaf a tree: A_intra is 0, and what is left is GRPO. Rewards 1, 0, 0 as in tree 0 above.
    s = 1 / SQRT3
    assert advantages([1, 0, 0], [0, 1, 2], terms="intra") == [0, 0, 0]
    assert advantages([1, 0, 0], [0, 1, 2]) == pytest.approx([2 * s, -s, -s], abs=1e-5)
    # A lone leaf beside a tree of two, rewards 1 | 1 0: A_inter is s, s, -2 s, and the two have
    # +-1 / sqrt(2) between them.
    h = 1 / SQRT2
    assert advantages([1, 1, 0], [0, 1, 1]) == pytest.approx([s, s + h, -2 * s - h], abs=1e-5)


def test_z_score_by_hand():
    # 0 and 4: mean 2, deviations -2, 2, variance (4 + 4) / 1 = 8. Eps is beside the std, not in
    # the root: sqrt(8) + sqrt(8) makes half of it.
    z = z_score(torch.tensor([0, 4]), eps=0.0)
    assert z.dtype == torch.float64
    assert z.tolist() == pytest.approx([-1 / SQRT2, 1 / SQRT2])
    half = z_score(torch.tensor([0, 4]), eps=math.sqrt(8))
    assert half.tolist() == pytest.approx([-0.5 / SQRT2, 0.5 / SQRT2])


def test_all_equal_is_exactly_zero():
    # Seven rewards of 3.7 in float32 have a std above 0 by rounding; divided by it they would not
    # be 0.
    for dtype in (torch.float32, torch.float64):
        rewards = torch.full((7,), 3.7, dtype=dtype)
        trees = torch.tensor([0, 0, 0, 1, 1, 1, 2])
        assert tree_advantages(rewards, trees).tolist() == [0.0] * 7


def test_order_of_the_leaves_does_not_matter():
    straight = advantages([1, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1])
    mixed = advantages([1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0])
    assert mixed == pytest.approx([straight[i] for i in (3, 0, 1, 4, 5, 2)], abs=1e-12)


def test_a_z_score_ignores_scale_and_shift():
    rewards = [1, 0.2, 0.8, 0.1, 0, 1]
    trees = [0, 0, 0, 1, 1, 1]
    scaled = advantages([3 * r - 7 for r in rewards], trees)
    assert scaled == pytest.approx(advantages(rewards, trees), abs=1e-4)  # eps is not scaled


def test_dtypes():
    trees = torch.tensor([0, 0])
    assert tree_advantages(torch.tensor([1, 0]), trees).dtype == torch.get_default_dtype()
    for dtype in (torch.float32, torch.float64):
        assert tree_advantages(torch.tensor([1, 0], dtype=dtype), trees).dtype == dtype


def test_against_plain_python_on_random_trees():
    rng = random.Random(3)
    for _ in range(1000):
        n = rng.randint(1, 12)
        rewards = [rng.choice([0, 0.1, 0.2, 0.8, 1]) for _ in range(n)]
        trees = [rng.randint(0, 3) for _ in range(n)]
        eps = rng.choice([1e-6, 0.1])
        expected = plain_z(rewards, eps)
        for tree in set(trees):
            members = [i for i in range(n) if trees[i] == tree]
            for i, z in zip(members, plain_z([rewards[i] for i in members], eps)):
                expected[i] += z
        assert advantages(rewards, trees, eps=eps) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("rewards", "trees"),
    [
        ([1.0, 2.0], [0]),
        ([], []),
        ([1.0, math.nan], [0, 0]),
        ([math.inf, 0.0], [0, 0]),
        ([[1.0, 2.0]], [[0, 0]]),
    ],
)
def test_wrong_input_is_refused(rewards, trees):
    with pytest.raises(ValueError, match="want (finite )?rewards"):
        tree_advantages(torch.tensor(rewards), torch.tensor(trees))


# --------------------------------------------------------------------------------- Tree-GRPO, Eq. 8
def test_loss_by_hand():
    # Two sequences, of two sampled tokens and of one. The pad holds nonsense that must not be
    # read, forward or backward. Clipping is to 0.8 ... 1.2.
    #
    #      A   old p     p     r   clipped   min(r A, clipped A)
    #      2     0.2   0.3   1.5       1.2   min(3.0, 2.4) = 2.4      the clip takes its gradient
    #      2     0.4   0.2   0.5       0.8   min(1.0, 1.6) = 1.0
    #     -1     0.4   0.2   0.5       0.8   min(-0.5, -0.8) = -0.8   the clip takes its gradient
    #
    # Loss: -(2.4 + 1.0) / 2 + 0.8 = -0.9.
    old = torch.log(torch.tensor([[0.2, 0.4], [0.4, 0.4]]))
    logp = torch.log(torch.tensor([[0.3, 0.2], [0.2, 0.4]]))
    logp[1, 1] = float("nan")
    old[1, 1] = float("inf")
    logp.requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    loss, stats = grpo_loss(logp, old, None, torch.tensor([2.0, -1.0]), mask)
    assert loss.item() == pytest.approx(-0.9, abs=1e-6)
    found = {name: float(value) for name, value in stats.items()}
    assert found == {"tokens": 3, "clipped": 2, "kl": 0}
    # Only the second token has a gradient, -r A / 2 = -0.5 x 2 / 2.
    loss.backward()
    assert torch.allclose(logp.grad, torch.tensor([[0.0, -0.5], [0.0, 0.0]]), atol=1e-6)


def test_clips_are_separate():
    # r = 3, A = 1, clipped to 1 + 0.9: -1.9. r = 0.1, A = -1, clipped to 1 - 0.3: +0.7.
    logp = torch.log(torch.tensor([[3.0], [0.1]]))
    A = torch.tensor([1.0, -1.0])
    loss, _ = grpo_loss(logp, torch.zeros(2, 1), None, A, torch.ones(2, 1), 0.3, 0.9)
    assert loss.item() == pytest.approx(-1.9 + 0.7, abs=1e-6)


def test_kl_by_hand():
    # p = log 0.5, q = log 0.25: exp(q - p) - (q - p) - 1 = 0.5 + log 2 - 1 = log 2 - 0.5.
    # With A = 0 the loss is kl_coef = 0.1 times that, its gradient 0.1 (1 - exp(q - p)) = 0.05.
    logp = torch.log(torch.tensor([[0.5]])).requires_grad_()
    ref = torch.log(torch.tensor([[0.25]]))
    A = torch.zeros(1)
    loss, stats = grpo_loss(logp, logp.detach(), ref, A, torch.ones(1, 1), kl_coef=0.1)
    assert loss.item() == pytest.approx(0.1 * (math.log(2) - 0.5), abs=1e-6)
    assert stats["kl"].item() == pytest.approx(math.log(2) - 0.5, abs=1e-6)
    loss.backward()
    assert logp.grad.item() == pytest.approx(0.05, abs=1e-6)


def test_proposition_3_1_direction():
    # One node with two children, the left one right (reward 1), the right one wrong (0):
    #
    #      p_w /  \ p_l          p_w + p_l = 1
    #         1    0
    #
    # Both seen once, so A_intra = +-1 / sqrt(2), and Eq. 8 pushes along
    #     u = grad log p_w - grad log p_l = (1, -1) on the logits,
    # with weight 1 / sqrt(2). The expected reward p_w pushes along u with weight p_w p_l, and
    # step-level DPO, log sigmoid(log p_w - log p_l), with weight p_l. That is the proposition:
    # all three differ by a factor only.
    logits = torch.tensor([0.3, -0.4], requires_grad=True)
    logps = logits.log_softmax(-1)[:, None]
    A = tree_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), terms="intra")
    loss, _ = grpo_loss(logps, logps.detach(), None, A, torch.ones(2, 1))
    (ours,) = torch.autograd.grad(-loss, logits)
    assert ours.tolist() == pytest.approx([1 / SQRT2, -1 / SQRT2], abs=1e-5)

    p_w, p_l = logits.softmax(-1)
    (policy,) = torch.autograd.grad(p_w, logits, retain_graph=True)
    log_odds = p_w.log() - p_l.log()
    (dpo,) = torch.autograd.grad(torch.nn.functional.logsigmoid(log_odds), logits)
    assert torch.allclose(policy, SQRT2 * (p_w * p_l).detach() * ours, atol=1e-5)
    assert torch.allclose(dpo, SQRT2 * p_l.detach() * ours, atol=1e-5)


def test_advantages_per_sequence_and_per_token():
    torch.manual_seed(0)
    logp = torch.randn(3, 5)
    old = torch.randn(3, 5)
    mask = torch.rand(3, 5) < 0.7
    mask[1] = False  # a sequence without a sampled token contributes 0
    A = torch.tensor([1.0, 2.0, -3.0])
    loss = grpo_loss(logp, old, None, A, mask)[0]
    assert torch.equal(loss, grpo_loss(logp, old, None, A[:, None], mask)[0])
    assert torch.equal(loss, grpo_loss(logp, old, None, A[:, None].expand(3, 5), mask)[0])
    assert torch.equal(loss, grpo_loss(logp, old, None, A, mask.float())[0])
    others = [0, 2]
    assert torch.allclose(
        loss, grpo_loss(logp[others], old[others], None, A[others], mask[others])[0]
    )


def test_a_flat_group_has_no_gradient():
    # Equal rewards, so nothing to learn, however far the policy is from the one that sampled.
    torch.manual_seed(0)
    logp = torch.randn(4, 3, requires_grad=True)
    A = tree_advantages(torch.full((4,), 0.2), torch.tensor([0, 0, 1, 1]))
    loss, stats = grpo_loss(logp, torch.randn(4, 3), None, A, torch.ones(4, 3))
    loss.backward()
    assert loss == 0
    assert not logp.grad.any()
    assert stats["clipped"] == 0


def plain_loss(logp, old, ref, A, mask, clip_low, clip_high, kl_coef):
    """Eq. 8, its sign turned, in plain Python: (loss, tokens, clipped tokens, KL)."""
    loss = tokens = clipped = total_kl = 0.0
    for sequence in range(len(logp)):
        terms = []
        for t in range(len(logp[sequence])):
            if mask[sequence][t]:
                r = math.exp(logp[sequence][t] - old[sequence][t])
                inside = min(max(r, 1 - clip_low), 1 + clip_high)
                gap = ref[sequence][t] - logp[sequence][t]
                kl = math.exp(gap) - gap - 1
                plain = r * A[sequence][t]
                terms.append(min(plain, inside * A[sequence][t]) - kl_coef * kl)
                clipped += inside * A[sequence][t] < plain
                total_kl += kl
        tokens += len(terms)
        if terms:
            loss -= sum(terms) / len(terms)
    return loss, tokens, clipped, total_kl


def test_loss_against_plain_python():
    torch.manual_seed(1)
    seen = 0
    for _ in range(100):
        logp, old, ref, A = (torch.randn(4, 5, dtype=torch.float64) for _ in range(4))
        mask = torch.rand(4, 5) < 0.5
        for clip_low, clip_high, kl_coef in ((0.2, 0.2, 0.0), (0.1, 0.4, 0.3)):
            how = (clip_low, clip_high, kl_coef)
            loss, stats = grpo_loss(logp, old, ref, A, mask, *how)
            found = [loss.item(), *(stats[name].item() for name in ("tokens", "clipped", "kl"))]
            lists = [x.tolist() for x in (logp, old, ref, A, mask)]
            assert found == pytest.approx(plain_loss(*lists, *how), abs=1e-9)
            seen += stats["clipped"].item()
    assert seen > 100


def test_gradient_against_finite_differences():
    torch.manual_seed(2)
    logp, old, ref, A = (torch.randn(3, 4, dtype=torch.float64) for _ in range(4))
    mask = torch.rand(3, 4) < 0.7

    def loss(logp):
        return grpo_loss(logp, old, ref, A, mask, 0.1, 0.3, 0.2)[0]

    assert torch.autograd.gradcheck(loss, logp.requires_grad_())


def test_a_kl_without_a_reference_is_refused():
    logp = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="ref_logp"):
        grpo_loss(logp, logp, None, torch.zeros(1), torch.ones(1, 1), kl_coef=0.1)


# ------------------------------------------------------------------------------------------- TreeRL
# R(s) = (G_A(s) + L_A(s)) / sqrt(|L(s)|), where L(s) are the leaves at or below s, V(s) is the mean
# of their rewards, G_A(s) = V(s) - V(root) and L_A(s) = V(s) - V(parent of s).
def test_two_trunks_one_forked():
    #           0 prompt        leaves 3 (right), 4 (wrong), 2 (right): V(0) = 2/3
    #         /   \
    #        1     2            node 1: L = {3, 4}, V = 1/2, G_A = L_A = -1/6, R = -1/3 / sqrt(2)
    #       / \                 node 2: L = {2}, V = 1, G_A = L_A = 1/3, R = 2/3
    #      3   4                node 3: V = 1, G_A = 1/3, L_A = 1/2, R = 5/6
    #                           node 4: V = 0, G_A = -2/3, L_A = -1/2, R = -7/6
    R = step_rewards([-1, 0, 0, 1, 1], {3: 1.0, 4: 0.0, 2: 1.0})
    assert R.dtype == torch.float64
    assert R.tolist() == pytest.approx([0, -1 / 3 / SQRT2, 2 / 3, 5 / 6, -7 / 6])


def test_a_fork_inside_a_fork():
    # One trunk, forked at two places:
    #
    #   0 - 1 - 2 - 4 (right)   V(2) = 1/2, V(1) = V(0) = 1/3
    #        \   \              R(1) = (0 + 0) / sqrt(3) = 0
    #         \   5 (wrong)     R(2) = (1/6 + 1/6) / sqrt(2) = 1/3 / sqrt(2)
    #          3 (wrong)        R(3) = -1/3 - 1/3 = -2/3
    #                           R(4) = (1 - 1/3) + (1 - 1/2) = 7/6
    #                           R(5) = -1/3 - 1/2 = -5/6
    R = step_rewards([-1, 0, 1, 1, 2, 2], {4: 1, 5: 0, 3: 0})
    assert R.tolist() == pytest.approx([0, 0, 1 / 3 / SQRT2, -2 / 3, 7 / 6, -5 / 6], abs=1e-15)


def test_lone_leaves_and_nodes_with_one_child():
    # Nothing but the prompt, or one leaf below it: nothing to compare.
    assert step_rewards([-1], {0: 5.0}).tolist() == [0]
    assert step_rewards([-1, 0], {1: 5.0}).tolist() == [0, 0]
    #   0 - 1 - 2 (right)       V(0) = 1/2, R(1) = 1/2 + 1/2 = 1
    #    \                      node 2 is alone below node 1: the same L and V, so L_A = 0, R = 1/2
    #     3 (wrong)             R(3) = -1/2 - 1/2 = -1
    assert step_rewards([-1, 0, 1, 0], {2: 1.0, 3: 0.0}).tolist() == [0, 1, 0.5, -1]


def test_the_shape_2_1_2_2():
    # M, N, L, T = 2, 1, 2, 2: two trunks; in each of two rounds one fork per tree with two new
    # branches: 2 (1 + 1 x 2 x 2) = 10 leaves. The first tree is forked twice in its trunk, the
    # second in its trunk and then in a side branch. Right (*) are 3 and 12, so V(0) = 2/10.
    #
    #     0 - 1 - 2 - 3 *           0 - 8 - 10 - 12 *
    #          \   \                     \    \
    #           \   4, 5                  \    13, 14
    #            \                         \
    #             6, 7                      9, 11
    #
    # V(1) = V(8) = 1/5: R = 0.       V(2) = V(10) = 1/3: R = (1/3 - 1/5 + 1/3 - 1/5) / sqrt(3).
    # Below nodes 2 and 10 the right leaf has (1 - 1/5) + (1 - 1/3), the wrong ones -1/5 - 1/3;
    # beside them, below 1 and 8, the wrong ones have -1/5 - 1/5.
    parents = [-1, 0, 1, 2, 2, 2, 1, 1, 0, 8, 8, 8, 10, 10, 10]
    rewards = dict.fromkeys((4, 5, 6, 7, 9, 11, 13, 14), 0.0)
    rewards |= {3: 1.0, 12: 1.0}
    inner = (4 / 15) / SQRT3
    right = 22 / 15
    below = -8 / 15
    beside = -2 / 5
    first = [0, inner, right, below, below, beside, beside]
    second = [0, beside, inner, beside, right, below, below]
    assert step_rewards(parents, rewards).tolist() == pytest.approx([0, *first, *second], abs=1e-15)


def forked_chain(forks: list[int]) -> tuple[list[int], list[int]]:
    """(parents, leaves) of a trunk below node 0 with forks[i] new branches at its i-th cut."""
    parents = [-1, 0]
    leaves = []
    trunk = 1
    for n in forks:
        after = len(parents)
        parents += [trunk] * (1 + n)  # the trunk goes on, and n leaves begin
        leaves += range(after + 1, after + 1 + n)
        trunk = after
    return parents, [*leaves, trunk]


def test_the_papers_shape_6_2_1_2():
    # M, N, L, T = 6, 2, 1, 2: each of 6 trunks is cut at 2 places, with 2 new branches at each, so
    # there are 5 leaves a tree, 30 together:
    #
    #     0 - 1 - 2 - 5         first segment 1: above 5 leaves
    #          \   \            next segment 2: above 3 leaves
    #           \   6, 7        leaves 3 to 7
    #            3, 4
    #
    # All leaves of the first tree are right, all others wrong: V(0) = 1/6.
    # First tree, V = 1: the first segment has G_A = L_A = 5/6, R = 5/3 / sqrt(5); below it L_A = 0:
    # R = 5/6 / sqrt(3) for the next one, 5/6 for leaves. Other trees, V = 0: the same with -1/6.
    own, leaves = forked_chain([2, 2])
    assert (own, leaves) == ([-1, 0, 1, 1, 1, 2, 2, 2], [3, 4, 6, 7, 5])
    parents = [-1]
    rewards = {}
    expected = [0]
    for tree in range(6):
        offset = len(parents) - 1
        parents += [parent + offset if parent else 0 for parent in own[1:]]
        rewards |= {leaf + offset: float(tree == 0) for leaf in leaves}
        gain = -1 / 6 if tree else 5 / 6
        expected += [2 * gain / math.sqrt(5), gain / SQRT3, *[gain] * 5]
    assert len(rewards) == 30
    assert step_rewards(parents, rewards).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.7, -3.1, 1e-9])
def test_equal_rewards_give_exactly_zero(reward):
    parents, leaves = forked_chain([2, 1, 3])
    R = step_rewards(parents, dict.fromkeys(leaves, reward))
    assert R.tolist() == [0.0] * len(parents)


def test_shift_and_scale():
    rng = random.Random(0)
    parents, leaves = forked_chain([2, 2, 1])
    rewards = {leaf: rng.random() for leaf in leaves}
    R = step_rewards(parents, rewards)
    moved = step_rewards(parents, {leaf: 3 * r - 7 for leaf, r in rewards.items()})
    assert torch.allclose(moved, 3 * R, atol=1e-12)


def test_a_long_chain_of_nodes_is_no_recursion():
    # 0 - 1 - ... - 50,000 (right) and 0 - 50,001 (wrong), as the example of four nodes above.
    R = step_rewards([-1, *range(50_000), 0], {50_000: 1.0, 50_001: 0.0})
    assert R[1] == 1
    assert R[50_000] == 0.5
    assert R[50_001] == -1


def slow_step_rewards(parents: list[int], rewards: dict[int, float]) -> list[float]:
    """R(s) by the definition, each L(s) looked up leaf by leaf."""

    def lies_below(leaf: int, s: int) -> bool:
        while leaf > s:
            leaf = parents[leaf]
        return leaf == s

    nodes = range(len(parents))
    L = [[leaf for leaf in rewards if lies_below(leaf, s)] for s in nodes]
    V = [sum(rewards[leaf] for leaf in L[s]) / len(L[s]) for s in nodes]
    gains = [(V[s] - V[0]) + (V[s] - V[parents[s]]) for s in nodes]
    return [0.0, *(gains[s] / math.sqrt(len(L[s])) for s in nodes[1:])]


def test_against_the_definition_on_random_trees():
    rng = random.Random(1)
    for _ in range(200):
        parents = [-1, *(rng.randrange(i) for i in range(1, rng.randint(1, 40)))]
        leaves = [i for i in range(len(parents)) if i not in parents]
        rng.shuffle(leaves)  # rewards may be given in any order
        rewards = {leaf: rng.choice([0.0, 1.0, rng.gauss(0, 2)]) for leaf in leaves}
        expected = slow_step_rewards(parents, rewards)
        assert step_rewards(parents, rewards).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("parents", "rewards"),
    [
        # no tree, or children before their parents
        ([], {}),
        ([0], {0: 1.0}),
        ([-1, -1], {0: 1.0, 1: 1.0}),
        ([-1, 2, 0], {1: 0.0}),
        ([-1, 1], {1: 0.0}),
        ([-1, 0, -2], {1: 0.0, 2: 0.0}),
        ([1, -1], {0: 1.0}),
        ([-2, 0], {1: 1.0}),
        # a leaf without a reward
        ([-1, 0, 0], {1: 0.0}),
        ([-1, 0, 0], {}),
        # a reward of what is no leaf, or no node
        ([-1, 0, 1], {1: 0.0, 2: 0.0}),
        ([-1, 0], {0: 1.0, 1: 1.0}),
        ([-1, 0], {1: 0.0, 2: 0.0}),
        # a reward that is not finite
        ([-1, 0, 0], {1: 0.0, 2: math.nan}),
        ([-1, 0, 0], {1: math.inf, 2: 0.0}),
    ],
)
def test_wrong_trees_are_refused(parents, rewards):
    with pytest.raises(ValueError, match="want"):
        step_rewards(parents, rewards)


# ------------------------------------------------------ TreeRL: ChainRL, and where trees are forked
def test_leave_one_out_by_hand():
    # ChainRL, rewards 1, 0, 0, 1: 1 - (0 + 0 + 1) / 3 = 2/3 and 0 - (1 + 0 + 1) / 3 = -2/3.
    rewards = torch.tensor([1.0, 0, 0, 1])
    A = leave_one_out(rewards)
    assert A.tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert leave_one_out(torch.tensor([0.7, 0.7, 0.7])).tolist() == [0, 0, 0]
    # In float64 six times 0.1 do not add up to 0.6; that must not show.
    assert leave_one_out(torch.full((6,), 0.1, dtype=torch.float64)).tolist() == [0] * 6
    assert leave_one_out(torch.tensor([3.0])).tolist() == [0]
    # R(s) of independent chains is twice a reward's distance from the mean, 2 x 1/2, and that is
    # 2 x 3/4 of what leaving it out of the mean gives: the same but for a factor.
    R = step_rewards([-1, 0, 0, 0, 0], dict(enumerate(rewards.tolist(), 1)))
    assert R[1:].tolist() == pytest.approx([1, -1, -1, 1])
    assert torch.allclose(R[1:], A * 2 * 3 / 4)


def test_fork_points_are_the_least_likely_tokens():
    # Token       0     1     2     3     4     5
    # log-prob  -0.1  -3.0  -0.5  -3.0  -9.0  -0.5     The most uncertain one, 4, is not allowed;
    #            |     |     |     |           |       of equals the earlier comes first.
    # rank       5th   1st   3rd   2nd         4th
    logps = torch.tensor([-0.1, -3.0, -0.5, -3.0, -9.0, -0.5])
    allowed = torch.tensor([True, True, True, True, False, True])
    assert fork_points(logps, 2, allowed) == [1, 3]
    assert fork_points(logps, 3, allowed) == [1, 3, 2]
    assert fork_points(logps, 99, allowed) == [1, 3, 2, 5, 0]  # fewer where fewer are allowed
    assert fork_points(logps, 0, allowed) == []
    assert fork_points(logps, 2, torch.zeros(6, dtype=torch.bool)) == []
    assert fork_points(torch.tensor([]), 2, torch.zeros(0, dtype=torch.bool)) == []
    assert fork_points(torch.zeros(40), 3, torch.ones(40, dtype=torch.bool)) == [0, 1, 2]


# ----------------------------------------------------------------------------------------- GraphGPO
# All transitions of a task's rollouts make one graph, in which d(s) is the distance to success, G.
# A_G is the z-score of R_G = 10 omega^(d(next state) + cost) among all transitions that leave the
# same state, omega being 0.1 where nothing else is said.
def walks(*paths, cost: float = 1.0) -> list[Transition]:
    """Transitions of rollouts, each given by its states, "G" being success. An action is named
    after where it leads."""

    def state(s):
        return SUCCESS if s == "G" else s

    found = []
    for i, path in enumerate(paths):
        for a, b in itertools.pairwise(path):
            found.append(Transition(state(a), f"to {b}", state(b), i, cost))
    return found


def edges(*given) -> list[Transition]:
    """Transitions, each given as (state, next state, cost), each of a rollout of its own."""
    found = []
    for i, (a, b, cost) in enumerate(given):
        found.append(Transition(a, f"to {b}", SUCCESS if b == "G" else b, i, cost))
    return found


def test_a_failed_rollout_is_paid_for_its_step_toward_the_goal():
    #     s - m - G     won         d(G) = 0, d(m) = 1, d(s) = 2; from x there is no way to G, so
    #     s - m         failed      d(x) = 2 + 1 = 3, one beyond the furthest
    #     s - x         failed
    #
    # At s: R(to m) = 10 x 0.1^(1 + 1) = 0.1, twice, and R(to x) = 10 x 0.1^(3 + 1) = 0.001.
    # Mean 0.067, deviations 0.033, 0.033, -0.066, std 0.033 sqrt((1 + 1 + 4) / 2) = 0.033 sqrt(3),
    # so A = 1 / sqrt(3), 1 / sqrt(3), -2 / sqrt(3). The step from m to G is alone at m: 0.
    transitions = walks("smG", "sm", "sx")
    assert goal_distances(transitions) == {SUCCESS: 0, "m": 1, "s": 2, "x": 3}
    A = graph_advantages(transitions)
    assert A.dtype == torch.float64
    assert A.tolist() == pytest.approx([1 / SQRT3, 0, 1 / SQRT3, -2 / SQRT3])
    # All that the failed rollout's outcome would give to its good step is less than nothing.
    assert A[2] > 0 > episode_advantages(torch.tensor([1.0, 0, 0]))[1]


def test_a_loop_in_a_successful_rollout_is_not_paid():
    # s - x - s - G: d(s) = 1, d(x) = 2. At s: R(to x) = 10 x 0.1^3 = 0.01, R(to G) = 1. Two values
    # lie as far from their mean, and their std is that times sqrt(2): A = -+1 / sqrt(2).
    assert graph_advantages(walks("sxsG")).tolist() == pytest.approx([-1 / SQRT2, 0, 1 / SQRT2])
    # A step that stays where it is: R = 10 x 0.1^2 = 0.1 against 1. Twice against once: A is
    # -1, -1, 2 over sqrt(3), as above with its sign turned.
    assert graph_advantages(walks("ssG")).tolist() == pytest.approx([-1 / SQRT2, 1 / SQRT2])
    expected = [-1 / SQRT3, -1 / SQRT3, 2 / SQRT3]
    assert graph_advantages(walks("sssG")).tolist() == pytest.approx(expected)


def test_unreachable_states_are_one_beyond_the_furthest():
    #     c - b - a - G           d = 3, 2, 1, 0
    #              \
    #               u - v - u     no way to G from u, v, w: d = 3 + 1
    #     w - v
    #
    # At a: to G 10 x 0.1^1 against 10 x 0.1^5 to u. All others are alone where they leave, or lead
    # to the same distance.
    transitions = walks("cbaG", "auvu", "wv")
    d = {SUCCESS: 0, "a": 1, "b": 2, "c": 3, "u": 4, "v": 4, "w": 4}
    assert goal_distances(transitions) == d
    expected = [0, 0, 1 / SQRT2, -1 / SQRT2, 0, 0, 0]
    assert graph_advantages(transitions).tolist() == pytest.approx(expected)
    # With costs: the furthest that gets there is 2.5 from G, so u is at 3.5.
    assert goal_distances(edges(("a", "G", 2.5), ("b", "G", 1.0), ("b", "u", 9.0)))["u"] == 3.5


def test_unequal_costs():
    #     s --3-- G               d(m) = 1, d(s) = 2 by way of m, d(u) = 3
    #     s --1-- m --1-- G
    #     s --1-- u
    #
    # At s: R = 10 x 0.1^3 = 0.01, 10 x 0.1^(1 + 1) = 0.1, 10 x 0.1^(3 + 1) = 0.001. Mean 0.037,
    # deviations -0.027, 0.063, -0.036, variance (0.000729 + 0.003969 + 0.001296) / 2 = 0.002997.
    transitions = edges(("s", "G", 3.0), ("s", "m", 1.0), ("m", "G", 1.0), ("s", "u", 1.0))
    assert goal_distances(transitions) == {SUCCESS: 0, "m": 1, "s": 2, "u": 3}
    std = math.sqrt(0.002997)
    expected = [-0.027 / std, 0.063 / std, 0, -0.036 / std]
    assert graph_advantages(transitions).tolist() == pytest.approx(expected)
    # omega = 1/2: up to a factor 1/8, 1/4, 1/16, that is 2, 4, 1. Mean 7/3, deviations -1/3, 5/3,
    # -4/3, variance (1 + 25 + 16) / 9 / 2 = 42/18.
    std = math.sqrt(42 / 18)
    expected = [-1 / 3 / std, 5 / 3 / std, 0, -4 / 3 / std]
    assert graph_advantages(transitions, 0.5).tolist() == pytest.approx(expected)


def test_duplicated_transitions_count_as_often_as_they_are_there():
    #     s - G         twice       R = 10 x 0.1 = 1, twice
    #     s - m - G     once        d(m) = 1: R = 0.1
    #     s - x         once        d(x) = 1 + 1 = 2: R = 10 x 0.1^3 = 0.01
    #
    # Mean 2.11 / 4 = 0.5275, deviations 0.4725, 0.4725, -0.4275, -0.5175, squares 0.22325625
    # twice, 0.18275625, 0.26780625, variance 0.897075 / 3 = 0.299025.
    transitions = walks("sG", "sG", "smG", "sx")
    std = math.sqrt(0.299025)
    expected = [0.4725 / std, 0.4725 / std, -0.4275 / std, 0, -0.5175 / std]
    assert graph_advantages(transitions).tolist() == pytest.approx(expected)
    # Counted once it is another credit: R = 1, 0.1, 0.01, mean 0.37, deviations 0.63, -0.27,
    # -0.36, variance (0.3969 + 0.0729 + 0.1296) / 2 = 0.2997.
    once = graph_advantages(transitions[1:])
    assert once[0].item() == pytest.approx(0.63 / math.sqrt(0.2997))


def test_lone_transitions_and_one_step():
    assert graph_advantages(walks("sG")).tolist() == [0]
    assert graph_advantages(walks("abcdG")).tolist() == [0] * 4
    assert graph_advantages(walks("sG", "sG")).tolist() == [0, 0]  # both are as good
    assert graph_advantages(walks("ss")).tolist() == [0]
    assert graph_advantages(walks("sG", "sx")).tolist() == pytest.approx([1 / SQRT2, -1 / SQRT2])


def test_no_success_no_credit():
    # Nothing leads to G, so the furthest that gets there is G itself, and all are at 0 + 1.
    transitions = walks("sas", "sb", "asas")
    assert goal_distances(transitions) == {SUCCESS: 0, "s": 1, "a": 1, "b": 1}
    assert graph_advantages(transitions).tolist() == [0.0] * len(transitions)
    unequal = [t._replace(cost=1.0 + i) for i, t in enumerate(transitions)]
    assert graph_advantages(unequal).tolist() == [0.0] * len(transitions)


@pytest.mark.parametrize("n", [1, 10, 60, 400])
def test_far_from_the_goal_credit_is_as_large_as_near_it(n):
    # 0 - 1 - ... - n = G; at 0 two steps stay and one goes on: -1, -1, 2 over sqrt(3) as above,
    # for any n. With an epsilon of 1e-6 beside the std all three would be about 0 from n = 10 on,
    # as the R_G are 10 x 0.1^(n + 1) and 10 x 0.1^n; and at n = 400 both are 0 in float64.
    chain = [(i, "G" if i + 1 == n else i + 1, 1.0) for i in range(n)]
    transitions = edges((0, 0, 1.0), (0, 0, 1.0), *chain)
    assert goal_distances(transitions)[0] == n
    A = graph_advantages(transitions)
    assert A[:3].tolist() == pytest.approx([-1 / SQRT3, -1 / SQRT3, 2 / SQRT3])


def test_ways_of_equal_cost_are_a_tie_whatever_rounding_says():
    #     s --0.1-- a --0.2-- b --0.3-- G
    #     s --0.3-- c --0.2-- d --0.1-- G
    first = [("s", "a", 0.1), ("a", "b", 0.2), ("b", "G", 0.3)]
    second = [("s", "c", 0.3), ("c", "d", 0.2), ("d", "G", 0.1)]
    ways = edges(*first, *second)
    d = goal_distances(ways)
    assert 0.1 + d["a"] != 0.3 + d["c"]  # both are 0.6, and float64 adds them up to different sums
    assert graph_advantages(ways).tolist() == [0.0] * 6
    # A third, better way leaves no difference between the two: -1, -1, 2 over sqrt(3).
    A = graph_advantages([*ways, Transition("s", "", SUCCESS, 9, 0.1)])
    assert A[0].item() == pytest.approx(A[3].item(), rel=1e-12)
    assert A[[0, 3, 6]].tolist() == pytest.approx([-1 / SQRT3, -1 / SQRT3, 2 / SQRT3])


def test_states_are_whatever_can_be_hashed():
    # (0, "x") - 1 - "1" - "SUCCESS" - None - G: five states before the goal, all different.
    states = [(0, "x"), 1, "1", "SUCCESS", None, SUCCESS]
    transitions = [Transition(a, "", b, 0) for a, b in itertools.pairwise(states)]
    assert goal_distances(transitions) == {state: 5 - i for i, state in enumerate(states)}
    assert goal_distances(transitions[:3])["SUCCESS"] == 1  # that text is no success
    transitions.append(Transition("SUCCESS", "", "SUCCESS", 1))
    transitions.append(Transition(frozenset(), "", "SUCCESS", 1))
    expected = [0, 0, 0, 1 / SQRT2, 0, -1 / SQRT2, 0]
    assert graph_advantages(transitions).tolist() == pytest.approx(expected)


def test_z_scores_by_hand():
    # Group a: 1, 3. Group b: 2, 5, 5, that is mean 4, deviations -2, 1, 1, variance 6/2 = 3.
    groups = ["a", "b", "a", "b", "b"]
    values = torch.tensor([1.0, 2, 3, 5, 5])
    z = z_scores(values, groups)
    assert z.dtype == torch.float64
    assert z.tolist() == pytest.approx([-1 / SQRT2, -2 / SQRT3, 1 / SQRT2, 1 / SQRT3, 1 / SQRT3])
    # A lone value has nothing beside it.
    assert z_scores(values[:2], ["a", "b"]).tolist() == [0, 0]


def test_z_scores_have_no_epsilon_and_no_limits():
    # Two values are always at -+1 / sqrt(2), also where their squares are 0 or infinite.
    for scale in (1e-300, 1e-200, 1e-30, 1e200, 1.7e308 / 2):
        found = z_scores(torch.tensor([scale, 2 * scale], dtype=torch.float64), [0, 0])
        assert found.tolist() == pytest.approx([-1 / SQRT2, 1 / SQRT2])
    # What differs by rounding only is equal.
    equal = torch.tensor([0.1 + 0.2, 0.3, 0.3], dtype=torch.float64)
    assert len(set(equal.tolist())) == 2
    assert z_scores(equal, [0, 0, 0]).tolist() == [0, 0, 0]


def random_graph(rng, costs, states=8) -> list[Transition]:
    """Random walks of several rollouts in turn, some of them to success."""
    n = rng.randint(1, states)
    at = [rng.randrange(n) for _ in range(rng.randint(1, 6))]
    found = []
    for _ in range(rng.randint(1, 40)):
        live = [k for k in range(len(at)) if at[k] is not SUCCESS]
        if live:
            k = rng.choice(live)
            after = SUCCESS if rng.random() < 0.12 else rng.randrange(n)
            found.append(Transition(at[k], str(rng.randrange(2)), after, k, costs(rng)))
            at[k] = after
    return found


def won(transitions: list[Transition]) -> bool:
    return any(t.next_state is SUCCESS for t in transitions)


COSTS = {
    "one": lambda rng: 1.0,
    "whole": lambda rng: rng.randint(1, 5),
    "eighths": lambda rng: rng.randint(1, 40) / 8,
    "float": lambda rng: rng.random() * 3 + 1e-3,
}


def test_order_names_and_what_is_behind_the_goal_change_nothing():
    rng = random.Random(4)
    tails = 0
    for _ in range(100):
        transitions = random_graph(rng, COSTS["eighths"])
        A = graph_advantages(transitions, 0.5)

        order = rng.sample(range(len(transitions)), len(transitions))
        found = graph_advantages([transitions[i] for i in order], 0.5)
        assert torch.allclose(found, A[order], atol=1e-9, rtol=0)

        named = []
        for t in transitions:
            after = SUCCESS if t.next_state is SUCCESS else ("state", t.next_state)
            named.append(Transition(("state", t.state), "", after, f"run {t.trajectory}", t.cost))
        assert torch.equal(graph_advantages(named, 0.5), A)

        if won(transitions):
            # Each way to the goal gets a tail of steps that all must take: all distances grow by
            # as much.
            tail = [("tail", i) for i in range(rng.randint(1, 30))]
            longer = []
            for t in transitions:
                longer.append(t._replace(next_state=tail[0]) if t.next_state is SUCCESS else t)
            for a, b in itertools.pairwise([*tail, SUCCESS]):
                longer.append(Transition(a, "", b, "tail", 0.5))
            found = graph_advantages(longer, 0.5)[: len(transitions)]
            assert torch.allclose(found, A, atol=1e-9, rtol=0)
            tails += 1
    assert tails > 30


@pytest.mark.parametrize("omega", [0.1, 0.5, 0.9])
def test_nearer_is_better_among_steps_from_the_same_state(omega):
    # The paper's Proposition 4.1: A_G orders the steps from a state by d(next state) + cost.
    rng = random.Random(5)
    pairs = Counter()
    for _ in range(150):
        transitions = random_graph(rng, lambda rng: rng.choice([1, 1, 1.5]), 5)
        if not won(transitions):
            continue
        A = graph_advantages(transitions, omega).tolist()
        d = goal_distances(transitions)
        ahead = [d[t.next_state] + t.cost for t in transitions]
        for i, j in itertools.combinations(range(len(transitions)), 2):
            if transitions[i].state != transitions[j].state:
                continue
            pairs[ahead[i] == ahead[j]] += 1
            if ahead[i] == ahead[j]:
                assert A[i] == pytest.approx(A[j], rel=1e-12, abs=1e-12)
            else:
                assert (A[i] > A[j]) == (ahead[i] < ahead[j])
    assert min(pairs[True], pairs[False]) > 500


def test_credit_of_an_edge_does_not_depend_on_the_rollout_it_is_of():
    # The paper's Proposition 4.2. A random policy in random worlds, in which an action leads to
    # one of two places: given the edge, A_G has no variance, and what the rollout's outcome gives
    # (GRPO) has.
    rng = random.Random(6)
    met_again = 0
    outcome_varies = 0
    for _ in range(60):
        leads = {}
        for place in range(6):
            for action in "ab":
                leads[place, action] = [rng.choice([*range(6), SUCCESS]) for _ in range(2)]
        transitions = []
        returns = []
        for k in range(8):
            at = 0
            for _ in range(12):
                if at is not SUCCESS:
                    action = rng.choice("ab")
                    after = rng.choice(leads[at, action])
                    transitions.append(Transition(at, action, after, k))
                    at = after
            returns.append(float(at is SUCCESS))
        A_E = episode_advantages(torch.tensor(returns)).tolist()
        of_edge = {}
        for t, A_G in zip(transitions, graph_advantages(transitions).tolist()):
            pairs = of_edge.setdefault((t.state, t.action, t.next_state), [])
            pairs.append((A_G, A_E[t.trajectory]))
        for pairs in of_edge.values():
            ours, outcome = zip(*pairs)
            assert max(ours) - min(ours) < 1e-12
            met_again += len(pairs) > 1
            outcome_varies += statistics.pvariance(outcome) > 0.01
    assert met_again > 500
    assert outcome_varies > 300


def slow_distances(transitions, number=float) -> dict:
    """Bellman and Ford."""
    d = {SUCCESS: number(0)}
    for t in transitions:
        d.setdefault(t.state, math.inf)
        d.setdefault(t.next_state, math.inf)
    for _ in d:
        for t in transitions:
            if d[t.next_state] < math.inf:
                d[t.state] = min(d[t.state], d[t.next_state] + number(t.cost))
    beyond = max(x for x in d.values() if x < math.inf) + 1
    return {s: beyond if x == math.inf else x for s, x in d.items()}


@pytest.mark.parametrize("costs", COSTS)
def test_distances_against_bellman_ford(costs):
    rng = random.Random(0)
    outcomes = Counter()
    for _ in range(300):
        transitions = random_graph(rng, COSTS[costs])
        found = goal_distances(transitions)
        assert found == pytest.approx(slow_distances(transitions), rel=1e-12)
        outcomes[won(transitions)] += 1
    assert min(outcomes[True], outcomes[False]) > 30


def slow_advantages(transitions, omega: str) -> list[float]:
    """A_G from exact distances in numbers of 60 digits, one state after another."""
    found = [0.0] * len(transitions)
    if not won(transitions):
        return found
    d = slow_distances(transitions, Fraction)
    with localcontext() as context:
        context.prec = 60
        R = []
        for t in transitions:
            x = d[t.next_state] + Fraction(t.cost)
            R.append(10 * Decimal(omega) ** (Decimal(x.numerator) / x.denominator))
        for state in {t.state for t in transitions}:
            own = [i for i, t in enumerate(transitions) if t.state == state]
            mean = sum(R[i] for i in own) / len(own)
            squares = sum((R[i] - mean) ** 2 for i in own)
            if squares > Decimal("1e-100"):
                std = (squares / (len(own) - 1)).sqrt()
                for i in own:
                    found[i] = float((R[i] - mean) / std)
    return found


@pytest.mark.parametrize("omega", ["0.1", "0.5", "0.9"])
@pytest.mark.parametrize("costs", ["one", "whole", "eighths"])  # sums are exact, so equals are too
def test_advantages_against_the_definition(costs, omega):
    rng = random.Random(1)
    some = 0
    for _ in range(100):
        transitions = random_graph(rng, COSTS[costs])
        expected = slow_advantages(transitions, omega)
        found = graph_advantages(transitions, float(omega)).tolist()
        assert found == pytest.approx(expected, abs=1e-8)
        some += any(expected)
    assert some > 40


@pytest.mark.parametrize("function", [goal_distances, graph_advantages])
@pytest.mark.parametrize("cost", [0, -1, -0.0, math.nan, math.inf, -math.inf])
def test_wrong_costs_are_refused(function, cost):
    with pytest.raises(ValueError, match="want 0 < cost"):
        function([*walks("abG"), Transition("a", "", "b", 1, cost)])


@pytest.mark.parametrize("function", [goal_distances, graph_advantages])
def test_nothing_and_what_leaves_success_are_refused(function):
    with pytest.raises(ValueError, match="want at least one"):
        function([])
    with pytest.raises(ValueError, match="SUCCESS"):
        function([*walks("abG"), Transition(SUCCESS, "", "a", 1)])


@pytest.mark.parametrize("omega", [0, 1, -1, 2, math.nan, math.inf])
def test_wrong_omega_is_refused(omega):
    with pytest.raises(ValueError, match="omega"):
        graph_advantages(walks("abG"), omega)


# ---------------------------------------------------------------------- GraphGPO's baselines: GiGPO
def test_gigpo_by_hand():
    # Two rollouts whose steps were taken in turn, gamma = 1/2:
    #
    #     s -0- a -0- s -1- x         returns 1/4, 1/2, 1
    #     s -0- s -2- s               returns 1, 2
    #
    # At s: 1/4, 1, 1, 2, mean 17/16, deviations -13, -1, -1, 15 sixteenths, variance
    # (169 + 1 + 1 + 225) / 3 = 132 in (sixteenths)^2. The step from a is alone: 0.
    first = walks("sasx")
    second = [t._replace(trajectory=1) for t in walks("sss")]
    transitions = [first[0], second[0], first[1], second[1], first[2]]
    std = math.sqrt(132)
    expected = [-13 / std, -1 / std, 0, 15 / std, -1 / std]
    found = gigpo_advantages(transitions, [0, 0, 0, 2, 1], 0.5)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected)
    assert gigpo_advantages(transitions[:1], [3]).tolist() == [0]


def slow_gigpo(transitions, rewards, gamma) -> list[float]:
    """GiGPO's step term, each return added up for itself."""
    returns = []
    for i, t in enumerate(transitions):
        later = zip(transitions[i:], rewards[i:])
        rest = [r for u, r in later if u.trajectory == t.trajectory]
        returns.append(sum(gamma**k * r for k, r in enumerate(rest)))
    found = [0.0] * len(transitions)
    for state in {t.state for t in transitions}:
        own = [i for i, t in enumerate(transitions) if t.state == state]
        for i, z in zip(own, plain_z([returns[i] for i in own])):
            found[i] = z
    return found


@pytest.mark.parametrize("gamma", [0, 0.5, 1])  # sums are exact, so equals are too
def test_gigpo_against_the_definition(gamma):
    rng = random.Random(3)
    for _ in range(200):
        transitions = random_graph(rng, COSTS["whole"], 4)
        rewards = [rng.choice([0.0, 0.0, 1.0, -2.0]) for _ in transitions]
        found = gigpo_advantages(transitions, torch.tensor(rewards), gamma).tolist()
        assert found == pytest.approx(slow_gigpo(transitions, rewards, gamma), abs=1e-9)


@pytest.mark.parametrize(
    ("paths", "rewards", "gamma"),
    [
        ("abG", [0.0], 0.9),
        ("abG", [0.0] * 3, 0.9),
        ("abG", [[0.0, 0.0]], 0.9),
        ("abG", 1.0, 0.9),
        ("abG", [], 0.9),
        ("a", [], 0.9),  # no transition at all
        ("abG", [0.0, math.nan], 0.9),
        ("abG", [0.0, math.inf], 0.9),
        ("abG", [0.0, 1.0], -0.1),
        ("abG", [0.0, 1.0], 1.1),
        ("abG", [0.0, 1.0], math.nan),
    ],
)
def test_wrong_rewards_and_gamma_are_refused(paths, rewards, gamma):
    with pytest.raises(ValueError, match="want (finite rewards|0 <= gamma)"):
        gigpo_advantages(walks(paths), rewards, gamma)


# ----------------------------------------------------------------------- GraphGPO's baselines: GRPO
def test_episode_advantages():
    # Returns 1, 0, 0, 1: mean 1/2, variance 4 x 1/4 / 3 = 1/3, A = +-(1/2) sqrt(3).
    found = episode_advantages(torch.tensor([1.0, 0, 0, 1]))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([SQRT3 / 2, -SQRT3 / 2, -SQRT3 / 2, SQRT3 / 2])
    assert episode_advantages(torch.tensor([3.0])).tolist() == [0]


def test_episode_advantages_against_the_definition():
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(1, 9)
        returns = [rng.choice([0.0, 1.0, rng.gauss(0, 3)]) for _ in range(n)]
        assert episode_advantages(returns).tolist() == pytest.approx(plain_z(returns))


@pytest.mark.parametrize(
    "returns", [[], [[1.0, 2.0]], [[]], 1.0, [0.0, math.nan], [0.0, -math.inf]]
)
def test_wrong_returns_are_refused(returns):
    with pytest.raises(ValueError, match="want finite returns"):
        episode_advantages(torch.tensor(returns))
