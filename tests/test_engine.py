"""The engine that the three scripts share: the sampler and the packed trainer against the naive ones (naive.py), what a
recorded step may do, the nucleus, what a lane keeps, and which models load. Trees are those of test_tree_grpo.py."""

import copy
import functools
import random
from collections import Counter
from types import SimpleNamespace

import naive
import pytest
import torch
from conftest import assert_stored_logps, chi_square, tiny_qwen
from test_tree_grpo import grow

import tree_grpo
from tree_grpo import BadInput, Lanes, Node, Packed, Sample, draw, load_model, packed_logps, prefill, sample


def tree_of(roots) -> list[list]:
    return [[node.tokens, node.sampled, node.tree] for root in roots for node in root.below()]


def packed_result(model, samples):
    """Log-probs of packed samples and the gradients of a sum of them that no symmetry helps."""
    model.zero_grad()
    logps = packed_logps(model, Packed(samples, model.device))
    (logps * torch.linspace(1, 2, len(logps), dtype=logps.dtype, device=logps.device).cos()).sum().backward()
    return logps.detach(), [p.grad.clone() for p in model.parameters()]


def samples_of(roots) -> list[Sample]:
    return [Sample(root, root.leaves(), [torch.ones(())] * len(root.leaves()), 1.0) for root in roots]


# ------------------------------------------------------------------------------------------------------ the naive twin
@pytest.mark.parametrize("look", [1, 8])
def test_the_engine_grows_the_naive_trees(architecture, look, monkeypatch):
    # Greedily, so that both draw the same: turns with observations, forks, end tokens and limits between two looks.
    model, plain = tiny_qwen(architecture, torch.float64)
    monkeypatch.setitem(tree_grpo.LOOK, "cpu", look)
    ours, counts = grow(model, None, random.Random(0), temperature=0)
    monkeypatch.setattr("test_tree_grpo.sample", naive.sample)
    theirs, expected = grow(plain, None, random.Random(0), temperature=0)
    assert tree_of(ours) == tree_of(theirs)
    assert counts["generated_tokens"] == expected["generated_tokens"]
    assert counts["entropy"] == pytest.approx(expected["entropy"], abs=1e-9)
    for one, other in zip(ours, theirs):
        for a, b in zip(one.below(), other.below()):
            assert a.logps == pytest.approx(b.logps, abs=1e-9)


@pytest.mark.parametrize("look", [2, 8])
def test_what_overran_between_two_looks_is_dropped(architecture, look, monkeypatch):
    model, plain = tiny_qwen(architecture, torch.float64)
    monkeypatch.setitem(tree_grpo.LOOK, "cpu", look)
    roots, counts = grow(model, torch.Generator().manual_seed(0), random.Random(0))
    leaves = [leaf for root in roots for leaf in root.leaves()]
    assert_stored_logps(plain, leaves, 1e-6)
    nodes = [node for root in roots for node in root.below()]
    for node in nodes:
        drawn = [token for token, sampled in zip(node.tokens, node.sampled) if sampled]
        assert not {1, 7} & set(drawn[:-1])  # the end token and what stop() stops at come last
    assert counts["forwarded_tokens"] == sum(len(node.tokens) for node in nodes) - len(roots)
    assert counts["generated_tokens"] == sum(sum(node.sampled) for node in nodes)


def test_the_host_looks_every_few_tokens(monkeypatch):
    # With no end in sight the draws are the same however often the host looks, and it looks so much less often.
    model, _ = tiny_qwen("qwen2", torch.float64)
    drawn, looks, decode = [], [], Lanes.decode
    monkeypatch.setattr(Lanes, "decode", lambda self, *how: looks.append(how[0]) or decode(self, *how))
    for look in (1, 4):
        monkeypatch.setitem(tree_grpo.LOOK, "cpu", look)
        looks.clear()
        root = Node(None, [3, 4, 5], [False] * 3, [0.0] * 3)
        nodes = [Node(root) for _ in range(5)]
        generator = torch.Generator().manual_seed(1)
        sample(model, nodes, [12] * 5, lambda tokens: False, set(), generator, 1.0, 1.0, Counter())
        assert looks == [look] * (12 // look)
        drawn.append([node.tokens for node in nodes])
    assert drawn[0] == drawn[1]


def test_long_observations_go_in_piece_by_piece(monkeypatch):
    # With the limit on a score matrix lowered to a few columns there are more forwards, and the result is the same.
    run, widths, trees = Lanes.run, [], []
    monkeypatch.setattr(Lanes, "run", lambda self, ids, *rest: widths.append(ids.shape[1]) or run(self, ids, *rest))
    for limit in (tree_grpo.MOST_SCORES, 2000):
        monkeypatch.setattr(tree_grpo, "MOST_SCORES", limit)
        model, _ = tiny_qwen("qwen2", torch.float64)
        widths.append(0)
        trees.append(grow(model, torch.Generator().manual_seed(0), random.Random(0))[0])
    again = widths.index(0, 1)
    assert len(widths) - again > again and max(widths[again:]) < max(widths[:again])
    assert tree_of(trees[0]) == tree_of(trees[1])
    for one, other in zip(*trees):
        for a, b in zip(one.below(), other.below()):
            assert a.logps == pytest.approx(b.logps, abs=1e-9)


# ----------------------------------------------------------------------------------------------------- a recorded step
def flight(model, prompts=((3, 4, 5, 6), (7, 8)), lanes=3) -> Lanes:
    """Lanes below prompts of different lengths, after two tokens each."""
    roots = [Node(None, list(p), [False] * len(p), [0.0] * len(p)) for p in prompts]
    nodes = [Node(root) for root in roots for _ in range(lanes)]
    prefill(model, nodes)
    lanes = Lanes(model, nodes)
    lanes.decode(2, 0, 1.0, None)
    lanes.length = [2] * len(lanes.grid)
    lanes.make_room(20)
    lanes.at.fill_(2)
    return lanes


def recorded_by_tracing(step, generator):
    """In the place of record(): as a CUDA graph does, make_fx writes down the operations of a step with the tensors that
    they act on. What the step does on the way, which recording on CUDA does not, is undone."""
    from torch.fx.experimental.proxy_tensor import make_fx

    lanes = step.func.__self__
    state = torch.get_rng_state()
    written = [lanes.at, lanes.token, lanes.drawn, *lanes.own]
    before = [x.clone() for x in written]
    recording = make_fx(step)()
    for x, was in zip(written, before):
        x.copy_(was)
    torch.set_rng_state(state)
    return SimpleNamespace(replay=recording)


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1.0), (1.0, 1.0), (1.2, 0.9)])
def test_a_step_asks_the_device_for_nothing(temperature, top_p, monkeypatch):
    # What a CUDA graph cannot hold: values that the host reads (item, tolist, a mask as an index) or writes. Tensors on
    # the device "meta" have no values: whoever asks for one, or hands them some, gets an error. Nobody does.
    model, _ = tiny_qwen("qwen2")
    monkeypatch.setattr(tree_grpo, "recording", lambda x: True)
    with torch.no_grad():
        lanes = flight(model)
        shape = lanes.drawn.shape
        lanes.model = model.to("meta")
        for name in ("prompt", "at", "token", "drawn", "prompt_mask"):
            setattr(lanes, name, getattr(lanes, name).to("meta"))
        lanes.own, lanes.shared = ([kv.to("meta") for kv in layers] for layers in (lanes.own, lanes.shared))
        try:
            lanes.step(10, temperature, top_p, None)
        except RuntimeError as error:
            if "autocast" in str(error):
                pytest.skip("older transformers ask torch for autocast on this device, which it cannot say")
            raise
        assert lanes.drawn.shape == shape and lanes.drawn.is_meta
        with pytest.raises((RuntimeError, NotImplementedError)):
            lanes.drawn.tolist()  # so it would have shown


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1.0), (1.0, 1.0), (1.2, 0.9)])
def test_a_recorded_step_is_the_step(architecture, temperature, top_p, monkeypatch):
    # Run again and again, a recording goes on from what is in the lanes' tensors, as step() does.
    model, _ = tiny_qwen(architecture, torch.float64)
    monkeypatch.setattr(tree_grpo, "recording", lambda x: True)
    results = []
    for recorded in (False, True):
        with torch.no_grad():
            lanes = flight(model)
            how = (20, temperature, top_p, None)
            if recorded:
                recording = recorded_by_tracing(functools.partial(lanes.step, *how), None).replay
            torch.manual_seed(0)
            drawn = []
            for _ in range(9):
                recording() if recorded else lanes.step(*how)
                drawn.append(lanes.drawn.clone())
            assert lanes.at.tolist() == [11] * 6
            results.append(torch.stack(drawn))
    assert torch.equal(*results)
    assert len({tuple(row) for row in results[0][:, 0].T.tolist()}) > 1  # prompts differ, so do their lanes


def test_scores_and_logits_of_bfloat16_are_in_float32(monkeypatch):
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 5, 8).bfloat16()
    exact = a.double() @ b.double().mT
    assert torch.allclose(tree_grpo.products(a, b).double(), exact, atol=1e-5)
    mask = torch.zeros(2, 1, 5).index_fill(2, torch.tensor([1]), -torch.inf)
    assert torch.allclose(tree_grpo.products(a, b, mask, 0.3).double(), 0.3 * exact + mask, atol=1e-5)
    model, run, states = tree_grpo.in_bfloat16(tiny_qwen("qwen2")[0]), Lanes.run, []
    with torch.inference_mode():
        lanes = flight(model)
        monkeypatch.setattr(Lanes, "run", lambda self, *rest: states.append(run(self, *rest)) or states[-1])
        lanes.step(10, 0, 1.0, None)
        logps = (states[0][:, 0].double() @ model.lm_head.weight.double().T).log_softmax(-1)
    token, logp, entropy = lanes.drawn.double()
    assert torch.equal(token.long(), logps.argmax(-1))
    assert torch.allclose(logp, logps.max(-1).values, atol=1e-5)
    assert torch.allclose(entropy, -(logps.exp() * logps).sum(-1), atol=1e-5)


@pytest.mark.parametrize("look", [1, 8])
def test_a_run_on_recordings_grows_the_naive_trees(architecture, look, monkeypatch):
    # As on CUDA: recorded steps, again after buffers grew and lanes left, that see the whole room of a lane.
    model, plain = tiny_qwen(architecture, torch.float64)
    recordings, set_grid, shrunk = [], Lanes.set_grid, []

    def as_on_cuda(self, rows):
        shrunk.append(hasattr(self, "drawn"))
        self.on_cuda = self.recorded = True
        set_grid(self, rows)

    monkeypatch.setattr(Lanes, "set_grid", as_on_cuda)
    monkeypatch.setattr(tree_grpo, "record", lambda *how: recordings.append(recorded_by_tracing(*how)) or recordings[-1])
    monkeypatch.setitem(tree_grpo.LOOK, "cpu", look)
    how = lambda tokens: tokens[-1] == 7, {1}, None, 0, 1.0
    grown = []
    for chosen, draw_by in ((model, torch.no_grad()(sample.__wrapped__)), (plain, naive.sample)):  # make_fx: no inference
        rng, counts = random.Random(3), Counter()
        roots = [Node(None, rng.choices(range(8, 50), k=n), [False] * n, [0.0] * n) for n in (3, 9)]
        nodes = [Node(root) for root in roots for _ in range(4)]
        draw_by(chosen, nodes, [60, 3, 4, 1, 60, 2, 30, 1], *how, counts)
        nodes[1].add([5, 6, 9])
        draw_by(chosen, [Node(nodes[1]), Node(nodes[1]), Node(roots[1])], [45, 9, 3], *how, counts)
        grown.append((tree_of(roots), [logp for root in roots for node in root.below() for logp in node.logps]))
    assert grown[0][0] == grown[1][0] and grown[0][1] == pytest.approx(grown[1][1], abs=1e-9)
    assert len(recordings) > sum(shrunk) + 2 > 3  # two calls, lanes that left, and buffers that grew


def test_lanes_have_room_for_what_comes_and_let_the_finished_go():
    model, plain = tiny_qwen("qwen2", torch.float64)
    root = Node(None, [3, 4, 5], [False] * 3, [0.0] * 3)
    nodes = [Node(root) for _ in range(8)]
    limits = [150, 150, *range(2, 8)]  # far beyond the room of 32 that a lane begins with; the others leave early
    sample(model, nodes, limits, lambda tokens: False, set(), torch.Generator().manual_seed(0), 1.0, 1.0, Counter())
    assert_stored_logps(plain, nodes, 1e-6)
    assert [node.cached for node in nodes] == limits == [len(node.tokens) for node in nodes]


def test_leaves_that_nothing_can_begin_below_keep_nothing():
    model, plain = tiny_qwen("qwen2", torch.float64)
    root = Node(None, [3, 4, 5], [False] * 3, [0.0] * 3)
    how = (lambda tokens: False, set(), torch.Generator().manual_seed(0), 1.0, 1.0, Counter())
    first, second = Node(root), Node(root)
    sample(model, [first], [5], *how)
    sample(model, [second], [5], *how, keep=False)
    assert (root.cached, first.cached, second.cached) == (2, 5, 0)
    assert first.kv.shape[0] == 2 and first.kv.is_contiguous()  # its own, not a view of all lanes
    counts = how[-1]
    before = counts["forwarded_tokens"]
    below = [Node(first), Node(second), Node(second)]
    sample(model, below, [2] * 3, *how)  # what was not kept is computed again, in each lane
    assert counts["forwarded_tokens"] - before == 1 + 6 + 6 + 3
    assert_stored_logps(plain, below, 1e-9)


# --------------------------------------------------------------------------------------------------------- the nucleus
@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.8, 0.95, 0.999])
def test_draws_are_from_the_nucleus_that_sorting_gives(top_p, capturing, monkeypatch):
    monkeypatch.setattr(tree_grpo, "recording", lambda x: capturing)
    torch.manual_seed(int(1000 * top_p))
    logits = torch.randn(30) * 2
    logits[3:6] = logits[0]  # equals: the earlier word first
    ranked, order = logits.double().softmax(-1).sort(descending=True, stable=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
    probs = torch.zeros(30, dtype=torch.float64).scatter(0, order, ranked / ranked.sum())
    n = 40_000
    counts = draw(logits.expand(n, 30), 1.0, top_p, None).bincount(minlength=30)
    assert not counts[probs == 0].any()
    statistic, freedom = chi_square(counts.tolist(), probs)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5


@pytest.mark.parametrize("capturing", [False, True])
def test_of_equally_likely_words_the_first_come_first(capturing, monkeypatch):
    monkeypatch.setattr(tree_grpo, "recording", lambda x: capturing)
    torch.manual_seed(0)
    for top_p, kept in ((0.2, 1), (0.5, 2), (0.51, 3), (0.99, 4)):  # of four words with a quarter each
        assert set(draw(torch.zeros(999, 4), 1.0, top_p, None).tolist()) == set(range(kept))


def test_a_draw_does_without_float64_where_there_is_none():
    # MPS has no float64: there a tensor of that kind cannot be made. Here only what is asked for can be seen.
    class Elsewhere(torch.Tensor):
        device = torch.device("mps")

    asked = []

    def cumsum(self, dim, dtype):
        asked.append(dtype)
        raise StopIteration

    weights = torch.ones(2, 3).as_subclass(Elsewhere)
    Elsewhere.cumsum = cumsum
    with pytest.raises(StopIteration):
        tree_grpo.draw_index(weights, None)
    assert asked == [torch.float32]


# ------------------------------------------------------------------------------------------------------ packed training
def loop_of_attention(q, k, v, start_q, start_k, most_q, most_k, *, scale, window_size, enable_gqa):
    """What varlen_attn does, by a call for each sequence, on any device: causal, aligned at the lower right."""
    assert window_size == (-1, 0) and enable_gqa and start_q.dtype == start_k.dtype == torch.int32
    out = []
    for a, b, c, d in zip(start_q.tolist(), start_q.tolist()[1:], start_k.tolist(), start_k.tolist()[1:]):
        assert 0 < b - a <= most_q and b - a <= d - c <= most_k
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        parts = (x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d]))
        o = torch.nn.functional.scaled_dot_product_attention(*parts, mask, scale=scale, enable_gqa=True)
        out.append(o[0].transpose(0, 1))
    return torch.cat(out)


def test_attention_without_masks_is_the_same(architecture, monkeypatch):
    model, _ = tiny_qwen(architecture, torch.float64)
    samples = samples_of(grow(model, torch.Generator().manual_seed(2), random.Random(2))[0])
    usual, usual_grads = packed_result(model, samples)
    monkeypatch.setattr(
        Packed, "attention", lambda self, *how: functools.partial(self.attend_without_masks, loop_of_attention))
    other, grads = packed_result(model, samples)
    assert torch.allclose(usual, other, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(usual_grads, grads))


def test_attention_without_masks_is_for_bfloat16_on_cuda(monkeypatch):
    packed = Packed(samples_of([tree()]), "cpu")
    monkeypatch.setattr(tree_grpo, "varlen_kernel", lambda: loop_of_attention)
    assert packed.attention(torch.bfloat16, 2).func == packed.attend  # on a CPU with masks
    packed.ids = type("OnCuda", (), {"is_cuda": True})()
    assert packed.attention(torch.bfloat16, 2).func == packed.attend_without_masks
    assert packed.attention(torch.float32, 2).func == packed.attend
    monkeypatch.setattr(tree_grpo, "varlen_kernel", lambda: None)  # before torch 2.12
    assert packed.attention(torch.bfloat16, 2).func == packed.attend


def tree() -> Node:
    """x (3 tokens) with s (2 sampled, 2 found) below it, under which hang a (2) and b (1)."""
    x = Node(None, [11, 12, 13], [False] * 3, [0.0] * 3)
    s = Node(x, [21, 22, 23, 24], [True, True, False, False], [-1.0, -2.0, 0.0, 0.0])
    Node(s, [31, 32], [True, True], [-3.0, -4.0])
    Node(s, [41], [True], [-5.0])
    return x


def test_a_tree_as_a_row_by_hand():
    x = tree()
    row = tree_grpo.flatten(samples_of([x]))
    # x and s have no branch between them: one segment. b was put on the stack last, so it comes before a.
    assert row.tokens == [11, 12, 13, 21, 22, 23, 24, 41, 31, 32]
    assert row.position == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8]
    assert row.parent == [0, 0, 1, 2, 3, 4, 5, 6, 6, 8]
    first = list(range(7))
    assert row.segments == [(7, first), (1, [*first, 7]), (2, [*first, 8, 9])]
    assert row.read == [3, 4, 7, 8, 9] and row.logps == [-1, -2, -5, -3, -4]
    s = x.children[0]
    assert [row.index[node] for node in (x, s, *s.children)] == [range(0), range(2), range(3, 5), range(2, 3)]
    # Seven tokens in a bucket of their own; one and two share one, the first with a pad. Keys in multiples of 8.
    buckets, number = tree_grpo.place(row.segments)
    assert buckets == [
        ([first], [[*first, 0]]),
        ([[7, 7], [8, 9]], [[*first, 7, *[0] * 8], [*first, 8, 9, *[0] * 7]]),
    ]
    assert number == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]  # the eighth query is the pad
    (places, mask), = tree_grpo.leaf_paths(samples_of([x]), row.index, "cpu")
    assert places[mask].tolist() == [0, 1, 3, 4, 0, 1, 2] and mask.sum(1).tolist() == [4, 3]


def test_packing_against_the_naive_on_random_trees():
    model, plain = tiny_qwen("qwen2", torch.float64)
    rng = random.Random(7)
    for _ in range(40):
        root = Node()
        root.add(rng.choices(range(2, 50), k=rng.randint(1, 9)))
        for _ in range(rng.randint(1, 12)):
            node = Node(rng.choice(root.below()))
            for _ in range(rng.randint(1, 3)):
                node.add(rng.choices(range(2, 50), k=rng.randint(1, 11)), rng.random() < 0.6)
        samples = samples_of([root])
        rng.shuffle(samples[0].leaves)
        kept = samples[0].leaves[: rng.randint(1, 4)]
        packed = Packed([samples[0]._replace(leaves=kept)], "cpu")
        with torch.no_grad():
            logps = packed_logps(model, packed)
            for leaf, places, mask in zip(kept, *packed.paths[0]):
                assert torch.allclose(logps[places[mask]], naive.path_logps(plain, leaf.path()), atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- on a GPU
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@needs_cuda
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_recorded_steps_on_cuda(architecture, top_p, monkeypatch):
    # Greedy trees are the naive ones; of drawn ones the log-probs are those of plain forwards.
    model, plain = (m.double().to("cuda") for m in tiny_qwen(architecture))
    roots, _ = grow(model, torch.Generator("cuda").manual_seed(0), random.Random(0), top_p=top_p)
    assert_stored_logps(plain, [leaf for root in roots for leaf in root.leaves()], 1e-6)
    ours, _ = grow(model, None, random.Random(0), temperature=0)
    monkeypatch.setattr("test_tree_grpo.sample", naive.sample)
    assert tree_of(ours) == tree_of(grow(plain, None, random.Random(0), temperature=0)[0])


@needs_cuda
def test_draws_of_a_recorded_step_differ_and_are_seeded():
    model, _ = (m.to("cuda") for m in tiny_qwen("qwen2"))
    drawn = []
    for seed in (0, 0, 1):
        root = Node(None, [3, 4, 5], [False] * 3, [0.0] * 3)
        nodes = [Node(root) for _ in range(64)]
        generator = torch.Generator("cuda").manual_seed(seed)
        sample(model, nodes, [24] * 64, lambda tokens: False, set(), generator, 1.0, 1.0, Counter())
        drawn.append([node.tokens for node in nodes])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(tokens) for tokens in drawn[0]}) > 60
    assert len({tokens[i] == tokens[i + 1] for tokens in drawn[0] for i in range(23)}) == 2  # not the same again


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_draws_from_a_large_vocabulary(device):
    # The surprise of what is drawn, -log p, is the entropy of what it is drawn from, on average.
    model = tiny_qwen("qwen2", vocab_size=151936)[0].to(device)
    model.model.norm.weight.data *= 3
    root, counts = Node(None, [3, 4, 5], [False] * 3, [0.0] * 3), Counter()
    nodes = [Node(root) for _ in range(32)]
    generator = torch.Generator(device).manual_seed(0)
    sample(model, nodes, [8] * 32, lambda tokens: False, set(), generator, 1.0, 1.0, counts)
    surprise = torch.tensor([-logp for node in nodes for logp in node.logps])
    assert 1 < surprise.mean() < 8
    assert abs(surprise.mean() - counts["entropy"] / 256) < 4 * surprise.std() / 256**0.5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_bfloat16(architecture, device):
    # The same rounded weights on both sides. The sampler's scores and logits are in float32.
    model = tree_grpo.in_bfloat16(tiny_qwen(architecture)[0]).to(device)
    roots, _ = grow(model, torch.Generator(device).manual_seed(0), random.Random(0))
    packed = Packed(samples_of(roots), device)
    with torch.no_grad():
        assert (packed_logps(model, packed) - packed.sampler_logps).abs().mean() < 0.1


@needs_cuda
def test_attention_without_masks_on_cuda(architecture, monkeypatch):
    model = tiny_qwen(architecture)[0].to("cuda")
    samples = samples_of(grow(model, torch.Generator("cuda").manual_seed(0), random.Random(0))[0])
    results = []
    for kernel in (tree_grpo.varlen_kernel(), None):
        monkeypatch.setattr(tree_grpo, "varlen_kernel", lambda kernel=kernel: kernel)
        with torch.autocast("cuda", torch.bfloat16):
            results.append(packed_result(model, samples))
    (one, one_grads), (other, other_grads) = results
    assert (one - other).abs().mean() < 0.05
    far = sum((a - b).square().sum() for a, b in zip(one_grads, other_grads)) / sum(a.square().sum() for a in one_grads)
    assert far.sqrt() < 0.1


def test_products_in_bfloat16_on_cuda_are_by_a_kernel_that_gives_float32(monkeypatch):
    def bmm(a, b, out_dtype):  # on a CPU there is none
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        return (a.double() @ b.double()).to(out_dtype)

    class OnCuda(torch.Tensor):
        is_cuda = True

    a, b, mask = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 5, 8).bfloat16(), torch.randn(2, 1, 5)
    expected = [tree_grpo.products(a, b), tree_grpo.products(a, b, mask, 0.3)]
    monkeypatch.setattr(torch, "bmm", bmm)
    found = [tree_grpo.products(a.as_subclass(OnCuda), b, *how) for how in ((), (mask, 0.3))]
    assert all(torch.allclose(x.as_subclass(torch.Tensor), y, atol=1e-6) for x, y in zip(found, expected))


def test_the_reference_in_bfloat16_is_the_starting_model(architecture):
    # What autocast makes of float32 weights at each step, the reference has for good: no KL before the first step.
    model, _ = tiny_qwen(architecture)
    reference = tree_grpo.linear_in_bfloat16(copy.deepcopy(model)).requires_grad_(False)
    roots, _ = grow(model, torch.Generator().manual_seed(0), random.Random(0))
    samples = [item._replace(advantages=list(torch.randn(len(item.leaves)))) for item in samples_of(roots)]
    args = tree_grpo.Args(dtype="bfloat16", kl_coef=0.1)
    told = tree_grpo.update(model, reference, torch.optim.SGD(model.parameters(), lr=0.1), samples, args)
    assert told["kl"] == 0 and told["grad_norm"] > 0
    assert tree_grpo.update(model, reference, torch.optim.SGD(model.parameters(), lr=0.1), samples, args)["kl"] > 0


# ------------------------------------------------------------------------------------------------------ loading a model
SHAPE = {
    "vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def saved(folder, kind: str, **more):
    """A folder with a random model of this kind and a tokenizer of single bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tree_grpo.save_tiny_model(folder, [], 0)
    torch.manual_seed(0)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **more})).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "more"), [
    ("qwen2", {}), ("qwen3", {}), ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    ("qwen3_moe", EXPERTS), ("llama", {}), ("mistral", {"sliding_window": None}), ("smollm3", {}), ("olmo2", {}),
    ("phi3", {}), ("phi", {}), ("glm4", {}),
])  # fmt: skip
def test_models_with_full_attention_are_exact(kind, more, tmp_path):
    from transformers import AutoModelForCausalLM

    path = saved(tmp_path, kind, **more)
    model, _ = load_model(str(path), torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    roots, _ = grow(model, torch.Generator().manual_seed(0), random.Random(0))
    samples = samples_of(roots)
    packed = Packed(samples, "cpu")
    with torch.no_grad():
        logps = packed_logps(model, packed)
        for item, (places, mask) in zip(samples, packed.paths):
            expected = assert_stored_logps(plain, item.leaves, 1e-4)
            for logp, row, drawn in zip(expected, logps[places], mask):
                assert torch.allclose(row[drawn], logp, atol=1e-4)


@pytest.mark.parametrize(("kind", "more", "reason"), [
    ("mistral", {"sliding_window": 64}, "its sliding_attention keeps no keys and values"),
    ("gemma2", {}, "its sliding_attention keeps no keys and values"),
    ("qwen3_next", {**EXPERTS, "layer_types": ["linear_attention", "full_attention"]}, "its linear_attention keeps no"),
    ("granite", {"logits_scaling": 8.0}, "its log-probs are others"),  # a head that does more than lm_head
    ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "its log-probs are others"),
])  # fmt: skip
def test_other_models_are_refused_in_a_line(kind, more, reason, tmp_path):
    with pytest.raises(BadInput, match="^--model ") as refused:
        load_model(str(saved(tmp_path, kind, **more)), torch.device("cpu"))
    assert reason in str(refused.value) and len(str(refused.value).splitlines()) == 1


def renamed(weights):
    return {"module." + name: value for name, value in weights.items()}


@pytest.mark.parametrize(("change", "reason"), [
    (renamed, "weights are missing: 2"),
    (lambda w: {name: value for name, value in w.items() if "layers.1.mlp" not in name}, "weights are missing: 3, such"),
    (lambda w: {**w, "model.more": torch.ones(2)}, "weights are unexpected: 1, such as model.more"),
    (lambda w: {**w, "model.norm.weight": torch.ones(7)}, "no model and tokenizer to be loaded there"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(change, reason, tmp_path):
    from safetensors.torch import load_file, save_file

    path = saved(tmp_path, "qwen2") / "model.safetensors"
    weights = load_file(path)
    save_file(change(weights), path, metadata={"format": "pt"})
    with pytest.raises(BadInput) as refused:
        load_model(str(tmp_path), torch.device("cpu"))
    assert reason in str(refused.value)
