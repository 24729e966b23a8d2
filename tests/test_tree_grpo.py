"""Tree-GRPO: the exactness of sampling and of packed training, and the rollout."""

import copy
import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace

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

import tree_grpo
from tree_grpo import (
    Node,
    Packed,
    Sample,
    draw,
    grpo_loss,
    micro_batches,
    packed_logps,
    sample,
    tree_rollout,
    update,
)


# ----------------------------------------------------------------------------------- exactness of sampling and training
def grow(model, generator, rng, prompts=(3, 17, 30), chains=4, top_p=1.0, temperature=1.0):
    """Trees with observations of different lengths, forks at the root and inside, and a tool answer that is empty."""
    roots, counts = [], Counter()
    for n in prompts:
        roots.append(Node())
        roots[-1].add([rng.randrange(2, 50) for _ in range(n)])

    def play(nodes):
        limits = [rng.randrange(1, 40) for _ in nodes]
        sample(model, nodes, limits, lambda tokens: tokens[-1] == 7, {1}, generator, temperature, top_p, counts)

    first = [Node(root, tree=i) for root in roots for i in range(chains)]
    play(first)
    going = first[::2]
    for node, n in zip(going, itertools.cycle([5, 0, 9, 1])):
        node.add([rng.randrange(2, 50) for _ in range(n)])
    second = [Node(node) for node in going]
    play(second)
    play([Node(node) for node in (roots[0], going[0], going[0], going[1], roots[-1])])  # forks recompute nothing
    for node in second[:2]:
        node.add([3, 4])
    play([Node(second[0]), Node(second[1]), Node(going[2])])  # one lane with an observation to take in, one without
    return roots, counts


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_sampler_logps_are_those_of_a_plain_forward(architecture, dtype, tolerance):
    model, plain = tiny_qwen(architecture, dtype)
    roots, _ = grow(model, torch.Generator().manual_seed(0), random.Random(0))
    leaves = [leaf for root in roots for leaf in root.leaves()]
    assert len(leaves) > 12
    assert_stored_logps(plain, leaves, tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_sampler_and_packed_training_on_cuda(architecture):
    model, plain = (m.to("cuda") for m in tiny_qwen(architecture))
    roots, _ = grow(model, torch.Generator("cuda").manual_seed(0), random.Random(0))
    samples = [Sample(root, root.leaves(), [torch.ones(())] * len(root.leaves()), 1.0) for root in roots]
    assert_exact_on_cuda(model, plain, samples, packed_logps, Packed(samples, "cuda"))
    trained(model, samples, dtype="bfloat16")


def test_bfloat16_copy_keeps_the_positions_exact(architecture):
    # As main makes it: the parameters are cast, the frequencies of RoPE are not, else long contexts drift apart.
    model, plain = tiny_qwen(architecture)
    policy = copy.deepcopy(model)
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert policy.model.rotary_emb.inv_freq.dtype == torch.float32
    roots, _ = grow(policy, torch.Generator().manual_seed(0), random.Random(0), prompts=(30, 400))
    gaps = []
    for root in roots:
        leaf = root.leaves()[0]
        stored = [logp for node in leaf.path() for logp, drawn in zip(node.logps, node.sampled) if drawn]
        with torch.no_grad():
            gaps.append((torch.tensor(stored) - naive.path_logps(plain, leaf.path())).abs().mean().item())
    assert max(gaps) < 0.5 and gaps[1] < 4 * gaps[0] + 0.05  # bfloat16 rounds, but no more far from the beginning


def test_logps_are_at_temperature_one_whatever_is_drawn():
    model, plain = tiny_qwen("qwen2", torch.float64)
    roots, _ = grow(model, torch.Generator().manual_seed(0), random.Random(0), temperature=0.7, top_p=0.9)
    assert_stored_logps(plain, [leaf for root in roots for leaf in root.leaves()], 1e-6)


def test_each_token_is_forwarded_once(architecture):
    model, _ = tiny_qwen(architecture)
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    assert_each_token_is_forwarded_once(model, lambda: grow(model, generator, rng))


def test_finished_lanes_leave_the_batch():
    model, _ = tiny_qwen("qwen2")
    widths = []
    model.model.embed_tokens.register_forward_hook(lambda module, ids, out: widths.append(ids[0].shape[0]))
    root = Node()
    root.add([2, 3, 4])
    nodes = [Node(root) for _ in range(16)]
    sample(model, nodes, list(range(1, 17)), lambda tokens: False, set(), None, 1.0, 1.0, Counter())
    assert [len(node.tokens) for node in nodes] == list(range(1, 17))
    steps = widths[1:]  # the first is the prompt
    assert steps[-1] == 1 and sum(steps) < 0.75 * 16 * len(steps)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_draws_follow_the_policy(temperature, top_p):
    # First tokens after the prompt, and first tokens of forks after a turn and its observation, 4000 each.
    model, plain = tiny_qwen("qwen2", vocab_size=20)
    generator, n = torch.Generator().manual_seed(1), 4000
    root = Node()
    root.add([2, 3, 4, 5, 6])

    def first_tokens(parent):
        nodes = [Node(parent) for _ in range(n)]
        sample(model, nodes, [1] * n, lambda tokens: False, set(), generator, temperature, top_p, Counter())
        return nodes

    turn = Node(root)
    sample(model, [turn], [6], lambda tokens: False, set(), generator, 1.0, 1.0, Counter())
    turn.add([8, 9, 10])
    for parent in (root, turn):
        nodes = first_tokens(parent)
        with torch.no_grad():
            logits = plain(torch.tensor([[t for node in parent.path() for t in node.tokens]])).logits[0, -1]
        probs = (logits / temperature).softmax(-1)
        ranked = sorted(range(20), key=lambda i: -probs[i])
        kept, total = [], 0.0
        for i in ranked:  # the smallest set of most likely tokens that reaches top_p
            if total >= top_p - 1e-9:
                break
            kept.append(i)
            total += probs[i].item()
        probs = torch.tensor([probs[i].item() / total if i in kept else 0.0 for i in range(20)])
        counts = Counter(node.tokens[0] for node in nodes)
        assert all(probs[token] > 0 for token in counts)
        statistic, freedom = chi_square([counts[i] for i in range(20)], probs)
        # Wilson-Hilferty: (X/k)^(1/3) is nearly normal; beyond 4 sigma is one seed in thirty thousand.
        sigma = math.sqrt(2 / (9 * freedom))
        assert ((statistic / freedom) ** (1 / 3) - 1 + sigma**2) / sigma < 4


def test_greedy_and_top_p_edges():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    assert draw(logits, 0, 1.0, None).tolist() == [0, 2]
    for _ in range(20):
        assert draw(logits, 1.0, 0.5, None).tolist() == [0, 2]  # 0.5 is reached by the first token alone
        assert draw(logits, 1.0, 1e-9, None).tolist() == [0, 2]  # at least one token always stays


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_packed_loss_and_gradients_are_those_of_separate_sequences(architecture, dtype, tolerance, checkpointing):
    model, plain = tiny_qwen(architecture, dtype)
    roots, _ = grow(model, torch.Generator().manual_seed(2), random.Random(2))
    torch.manual_seed(3)
    samples = []
    for root in roots:  # not all leaves are kept: what lies below dropped ones alone must not matter
        leaves = root.leaves()[:-1]
        samples.append(Sample(root, leaves, list(torch.randn(len(leaves), dtype=dtype)), 1 / len(leaves) / len(roots)))

    def shifted(logps):  # some old policy, some reference: fixed functions of the log-probs
        return logps.detach() + 0.2 * torch.sin(9 * logps.detach()), 0.9 * logps.detach()

    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.train()
    packed = Packed(samples, "cpu")
    unique = {node for item in samples for leaf in item.leaves for node in leaf.path()}
    assert packed.ids.shape == (1, sum(len(node.tokens) for node in unique))
    logps = packed_logps(model, packed)
    loss = 0.0
    for item, (index, mask) in zip(samples, packed.paths):
        old, ref = shifted(logps[index])
        A = torch.stack(item.advantages)
        loss = loss + item.weight * grpo_loss(logps[index], old, ref, A, mask, 0.1, 0.2, 0.3)[0]
    loss.backward()

    separate = naive.loss(plain, samples, lambda logp: shifted(logp)[0], lambda logp: shifted(logp)[1], 0.1, 0.2, 0.3)
    separate.backward()
    assert loss.item() == pytest.approx(separate.item(), abs=tolerance)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        assert torch.allclose(ours.grad, theirs.grad, atol=tolerance * theirs.grad.abs().max().item(), rtol=0), name


def test_chunked_head_gives_the_same_gradients(monkeypatch):
    model, _ = tiny_qwen("qwen2", torch.float64)
    roots, _ = grow(model, torch.Generator().manual_seed(2), random.Random(2))
    packed = Packed([Sample(root, root.leaves(), [], 1.0) for root in roots], "cpu")
    results = []
    for vocab_size in (50, 2**23):  # chunks of 2^26 / vocabulary tokens: all at once, then 8 at a time
        model.zero_grad()
        model.config.vocab_size = vocab_size
        logps = packed_logps(model, packed)
        logps.sin().sum().backward()
        results.append((logps.detach(), [p.grad.clone() for p in model.parameters()]))
    (one, one_grads), (other, other_grads) = results
    assert len(one) > 16 and torch.allclose(one, other, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(one_grads, other_grads))


def test_gradients_of_shared_tokens_are_summed_in_a_fixed_order():
    # A prompt's tokens add up the gradients of all leaves. By x[index] threads would do that in whatever order.
    model, _ = tiny_qwen("qwen2")
    root = Node(None, [2, 3, 4], [False] * 3, [0.0] * 3)
    leaves = [Node(root, [5, 6], [True] * 2, [-1.0] * 2) for _ in range(3)]
    waiting = [packed_logps(model, Packed([Sample(root, leaves, [], 1.0)], "cpu")).sum().grad_fn]
    for step in waiting:  # it grows on the way
        waiting += [before for before, _ in step.next_functions if before and before not in waiting]
    names = Counter(step.name() for step in waiting)
    assert names["IndexSelectBackward0"] > 0 and names["IndexBackward0"] == names["IndexPutBackward0"] == 0


def test_a_step_is_the_same_again_with_several_threads():
    model, _ = tiny_qwen("qwen2")
    rng, root, after = random.Random(4), Node(), []
    root.add(rng.choices(range(2, 50), k=40))
    for _ in range(600):
        Node(root).add(rng.choices(range(2, 50), k=5), True, [-1.0] * 5)
    samples, threads = [Sample(root, root.leaves(), list(torch.randn(600)), 1 / 600)], torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for _ in range(3):
            trained(copied := copy.deepcopy(model), samples)
            after.append([p.detach() for p in copied.parameters()])
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(after[0][0], model.model.embed_tokens.weight)
    assert all(torch.equal(a, b) for other in after[1:] for a, b in zip(after[0], other))


def trained(model, samples, reference=None, **how):
    args = SimpleNamespace(**{"kl_coef": 0.0, "micro_tokens": 10**6, "epochs": 1, "dtype": "float32", "clip_low": 0.2,
                              "clip_high": 0.2, **how})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return update(model, reference, optimizer, samples, args)


def batch_of(seed=2, flat=False):
    model, plain = tiny_qwen("qwen2", torch.float64)
    roots, _ = grow(model, torch.Generator().manual_seed(seed), random.Random(seed))
    torch.manual_seed(1)
    sizes = [len(root.leaves()) for root in roots]
    samples = [Sample(root, root.leaves(), list(torch.randn(n).double()), 1 / n / 3) for root, n in zip(roots, sizes)]
    if flat:
        samples[1] = samples[1]._replace(advantages=[torch.zeros((), dtype=torch.float64) for _ in samples[1].leaves])
    return model, plain, samples


def test_micro_batches_do_not_change_the_step():
    (one, _, samples), (other, _, _) = batch_of(), batch_of()
    assert [len(batch) for batch in micro_batches(samples, 10**6)] == [3]
    assert [len(batch) for batch in micro_batches(samples, 1)] == [1, 1, 1]  # a tree is never split
    whole, split = trained(one, samples), trained(other, samples, micro_tokens=1)
    assert whole == pytest.approx(split, abs=1e-9)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(one.parameters(), other.parameters()))


def test_flat_prompts_are_left_out_but_counted():
    # Without KL a prompt whose advantages are all 0 has no gradient: skipping it changes nothing, since the weights 1/3
    # are those of the whole step.
    (model, _, samples), (other, _, _) = batch_of(flat=True), batch_of(flat=True)
    seen = Counter()
    model.model.embed_tokens.register_forward_hook(lambda module, ids, out: seen.update(n=ids[0].numel()))
    trained(model, samples)
    trained(other, [samples[0], samples[2]])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert seen["n"] < sum(len(node.tokens) for item in samples for node in item.root.below())
    nothing = trained(model, [samples[1]])
    assert nothing["loss"] == nothing["grad_norm"] == 0


def test_second_epoch_compares_with_the_policy_before_the_first():
    model, _, samples = batch_of()
    row = trained(model, samples, epochs=3, clip_low=1e-4, clip_high=1e-4)
    assert row["clip_fraction"] > 0  # after the first step the ratio leaves so narrow a range
    assert trained(*batch_of()[::2])["clip_fraction"] == 0
    assert row["sampler_gap"] < 1e-5  # measured before any step


def test_kl_to_the_reference_is_zero_at_the_start_and_grows():
    model, _, samples = batch_of()
    reference, _, _ = batch_of()
    assert trained(model, samples, reference, kl_coef=0.1)["kl"] == pytest.approx(0, abs=1e-12)
    assert trained(model, samples, reference, kl_coef=0.1)["kl"] > 1e-9


def test_held_out_tasks_are_played_so_many_at_once():
    held_out, played = ["right", "wrong", "right", "wrong", "right"], []

    def play(starts, generator, temperature, top_p, counts):
        played.append((temperature, len(starts)))
        for task, root, _ in starts:
            Node(root).reward = float(task == "right" or temperature == 0)

    for most, sizes in ((2, [2, 2, 1]), (5, [5]), (128, [5])):
        agent = SimpleNamespace(model=SimpleNamespace(device="cpu"), args=SimpleNamespace(eval_batch=most), play=play,
                                held_out=held_out, root=lambda task: Node())
        played.clear()
        assert tree_grpo.held_out_success(agent) == {"success": 3 / 5, "greedy_success": 1}
        assert played == [(temperature, size) for temperature in (1.0, 0.0) for size in sizes]


def test_an_infinite_loss_stops_before_the_step():
    model, _, samples = batch_of()
    before = [p.detach().clone() for p in model.parameters()]
    samples[0].advantages[0] = torch.tensor(float("inf"), dtype=torch.float64)
    with pytest.raises(FloatingPointError):
        trained(model, samples)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# --------------------------------------------------------------------------------------------------------- the rollout
def scripted(rng, lengths):
    """A play() without a model: each branch gets a chain of steps, its length drawn from `lengths`."""
    drawn = []

    def play(starts):
        drawn.append([(node, tree) for _, node, tree in starts])
        for _, node, tree in starts:
            for _ in range(rng.choice(lengths)):
                node = Node(node, tree=tree)
            node.reward = rng.random()

    return play, drawn


@pytest.mark.parametrize(("M", "N", "L"), [(2, 2, 1), (1, 3, 2), (3, 1, 2), (4, 0, 1), (4, 2, 0), (1, 0, 0)])
def test_number_of_leaves(M, N, L):
    rng = random.Random(0)
    play, _ = scripted(rng, [1, 2, 3, 4])
    groups = [(f"question {i}", Node()) for i in range(5)]
    tree_rollout(play, groups, M, N, L, rng)
    for _, root in groups:
        leaves = root.leaves()
        assert len(leaves) == M * (1 + N * L)
        assert Counter(leaf.tree for leaf in leaves) == dict.fromkeys(range(M), 1 + N * L)
        assert all(node.reward is None for node in root.below() if node.children)
        for node in root.below()[1:]:  # a branch stays in the tree of the node it starts from
            assert node.parent is root or node.parent.tree == node.tree


def test_expanded_nodes_are_drawn_uniformly_and_are_no_leaves():
    # A trunk of 4 steps: the root and 3 inner steps are drawn with 1/4 each, with replacement; the leaf never is.
    counts, pairs = Counter(), Counter()
    for seed in range(4000):
        play, drawn = scripted(random.Random(seed), [4])
        tree_rollout(play, [("question", Node())], 2, 2, 1, random.Random(seed))
        for tree in range(2):
            chosen = [node for node, of in drawn[1] if of == tree]
            assert all(node.children and (node.tree == tree or node.parent is None) for node in chosen)
            depths = [len(node.path()) - 1 for node in chosen]
            counts.update(depths)
            pairs[depths[0] == depths[1]] += 1
    assert set(counts) == {0, 1, 2, 3}
    statistic, freedom = chi_square([counts[i] for i in range(4)], torch.full((4,), 0.25))
    assert freedom == 3 and statistic < 24  # beyond is one in forty thousand
    assert abs(pairs[True] / 8000 - 0.25) < 0.02  # with replacement: the same node twice in a quarter of the draws


def test_second_round_may_expand_what_the_first_added():
    rng = random.Random(1)
    found = False
    for _ in range(50):
        play, drawn = scripted(rng, [3])
        tree_rollout(play, [("question", Node())], 1, 2, 2, rng)
        trunk = set(drawn[1][0][0].path()[0].leaves()[0].path())
        found = found or any(node not in trunk for node, _ in drawn[2])
    assert found
