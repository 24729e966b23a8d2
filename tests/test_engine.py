"""The engine that the three scripts share: the sampler and the packed trainer against the naive ones
(naive.py), what a recorded step may do, the nucleus, what a lane keeps, what a step of training is
made of, and which models load. The trees are grown by each script's own search (conftest.py)."""

import functools
import math
import random
from collections import Counter

import naive
import pytest
import torch
from conftest import (
    assert_stored_logps,
    chi_square,
    grow,
    needs_cuda,
    nodes_of,
    p_value,
    roots_of,
    tiny_qwen,
)
from tiny import imitate, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import graph_gpo
import tree_grpo
from tree_grpo import Args, BadInput, Group, Lanes, Node, Packed, packed_logps, sample, update

EXACT = [(torch.float64, 1e-6), (torch.float32, 1e-4)]


def never(tokens) -> bool:
    return False


def drawn_below(model, root, limits, generator=None, temperature=1.0, top_p=1.0, **how):
    """New nodes below one, sampled together to these limits, and the counts."""
    nodes, counts = [Node(root) for _ in limits], Counter()
    draws = generator, temperature, top_p, counts
    sample(model, nodes, limits, never, set(), *draws, **how)
    return nodes, counts


def assert_packed_logps(script, model, plain, groups, tolerance):
    packed = script.Packed(groups, model.device)
    with torch.no_grad():
        logps = script.packed_logps(model, packed)
        for group, (places, mask) in zip(groups, packed.paths):
            for leaf, row, drawn in zip(group.leaves, logps[places], mask):
                expected = naive.path_logps(plain, leaf.path())
                assert torch.allclose(row[drawn], expected, atol=tolerance, rtol=0)


def assert_same_gradients(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        most = max(1e-3, theirs.abs().max().item())
        assert torch.allclose(ours, theirs, atol=tolerance * most, rtol=0)


# -------------------------------------------------------------------------------- the naive sampler
@pytest.mark.parametrize("look", [1, 8])
def test_the_engine_grows_the_naive_trees(script, architecture, look, monkeypatch):
    # Greedily, so that both draw the same: observations, forks, and ends between two looks.
    model, plain = tiny_qwen(architecture, torch.float64)
    monkeypatch.setitem(script.LOOK, "cpu", look)
    ours, counts = grow(script, model, temperature=0)
    monkeypatch.setattr(script, "sample", naive.sample)
    monkeypatch.setattr(script, "compute", lambda model, nodes: [])
    theirs, expected = grow(script, plain, temperature=0)
    assert_same_trees(nodes_of(ours), nodes_of(theirs))
    assert counts["generated_tokens"] == expected["generated_tokens"]
    assert counts["entropy"] == pytest.approx(expected["entropy"], abs=1e-6)


def assert_same_trees(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one.tokens, one.tree, one.reward) == (other.tokens, other.tree, other.reward)
        assert len(one.children) == len(other.children)
        assert one.logps == pytest.approx(other.logps, abs=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), EXACT)
def test_logps_are_those_of_plain_forwards(script, architecture, dtype, tolerance):
    # At temperature 1, whatever is drawn at.
    model, plain = tiny_qwen(architecture, dtype)
    groups, _ = grow(script, model, temperature=1.2, top_p=0.95)
    leaves = [leaf for root in roots_of(groups) for leaf in root.leaves()]
    assert len(leaves) > 20
    assert_stored_logps(plain, leaves, tolerance)
    assert_packed_logps(script, model, plain, groups, tolerance)


@pytest.mark.parametrize("look", [2, 8])
def test_what_overran_between_two_looks_is_dropped(script, look, monkeypatch):
    model, plain = tiny_qwen("qwen2", torch.float64)
    monkeypatch.setitem(script.LOOK, "cpu", look)
    groups, counts = grow(script, model)
    nodes = nodes_of(groups)
    assert_stored_logps(plain, [node for node in nodes if node.logps], 1e-6)
    assert all(1 not in node.tokens[: len(node.logps) - 1] for node in nodes)  # an end comes last
    assert counts["forwarded_tokens"] == sum(len(n.tokens) for n in nodes) - len(roots_of(groups))
    assert counts["generated_tokens"] == sum(len(node.logps) for node in nodes)


def test_the_host_looks_every_few_tokens(monkeypatch):
    # With no end in sight the draws are the same however often the host looks.
    model, _ = tiny_qwen("qwen2", torch.float64)
    drawn, looks, decode = [], [], Lanes.decode

    def watched(self, steps, *how):
        looks.append(steps)
        return decode(self, steps, *how)

    monkeypatch.setattr(Lanes, "decode", watched)
    for look in (1, 4):
        monkeypatch.setitem(tree_grpo.LOOK, "cpu", look)
        looks.clear()
        generator = torch.Generator().manual_seed(1)
        nodes, _ = drawn_below(model, Node(tokens=[3, 4, 5]), [12] * 5, generator)
        assert looks == [look] * (12 // look)
        drawn.append([node.tokens for node in nodes])
    assert drawn[0] == drawn[1]


def test_long_observations_go_in_piece_by_piece(monkeypatch):
    # With less room for a score matrix there are more and narrower forwards, and the same result.
    run, widths, trees = Lanes.run, [], []

    def watched(self, ids, count, seen):
        widths[-1].append(ids.shape[1])
        return run(self, ids, count, seen)

    monkeypatch.setattr(Lanes, "run", watched)
    model, plain = tiny_qwen("qwen2", torch.float64)
    for most in (tree_grpo.MOST_SCORES, 2000):
        monkeypatch.setattr(tree_grpo, "MOST_SCORES", most)
        widths.append([])
        trees.append(nodes_of(grow(tree_grpo, model)[0]))
    assert len(widths[1]) > len(widths[0]) and max(widths[1]) < max(widths[0])
    assert_same_trees(*trees)
    assert_stored_logps(plain, [node for node in trees[1] if node.logps], 1e-6)


def test_a_long_lane_beside_one_that_has_much_to_catch_up():
    # One chain wrote much and found little, the other wrote little and found much.
    model, plain = tiny_qwen("qwen2", torch.float64)
    root = Node(tokens=[3, 4, 5])
    (long, short), _ = drawn_below(model, root, [200, 20])
    long.tokens += [6, 7]
    short.tokens += [8] * 150
    leaves = [Node(node) for node in (long, short)]
    sample(model, leaves, [4, 4], never, set(), None, 0.0, 1.0, Counter())
    assert_stored_logps(plain, leaves, 1e-6)


def test_no_warm_start():
    model, _ = tiny_qwen("qwen2")
    before = [p.clone() for p in model.parameters()]
    imitate(tree_grpo, model, [], 32, Args(sft_steps=0))
    assert all(map(torch.equal, before, model.parameters()))


# ---------------------------------------------------------------------------------- lanes come and go
def watch_lanes(monkeypatch) -> list[Lanes]:
    """The Lanes that are made from now on."""
    made, init = [], Lanes.__init__

    def watched(self, *how):
        made.append(self)
        init(self, *how)

    monkeypatch.setattr(Lanes, "__init__", watched)
    return made


def test_new_lanes_go_on_where_the_room_ends(monkeypatch):
    model, plain = tiny_qwen("qwen2", torch.float64)
    made = watch_lanes(monkeypatch)
    root = Node(tokens=[3, 4, 5])
    nodes, counts = drawn_below(model, root, [150] * 4, torch.Generator().manual_seed(0))
    assert len(made) == 1 + 3  # for the prompt; then of room for 64, 64 + 64 and 128 + 64 tokens
    assert counts["forwarded_tokens"] == 2 + 4 * 150  # nothing is run again
    assert_stored_logps(plain, nodes, 1e-6)
    assert [node.cached for node in nodes] == [150] * 4


def test_finished_lanes_leave_the_batch(monkeypatch):
    model, plain = tiny_qwen("qwen2", torch.float64)
    made, limits = watch_lanes(monkeypatch), list(range(1, 17))
    nodes, counts = drawn_below(model, Node(tokens=[2, 3, 4]), limits)
    assert [len(node.tokens) for node in nodes] == [node.cached for node in nodes] == limits
    # A quarter may idle: of 16 lanes 12 go on, of these 9, and so on.
    assert [len(lanes.grid) for lanes in made[1:]] == [16, 12, 9, 6, 4, 3, 2, 1]
    assert counts["forwarded_tokens"] == 2 + sum(limits)
    assert_stored_logps(plain, nodes, 1e-6)


def test_leaves_that_nothing_can_begin_below_keep_nothing():
    model, plain = tiny_qwen("qwen2", torch.float64)
    root = Node(tokens=[3, 4, 5])
    (first,), _ = drawn_below(model, root, [5])
    (second,), _ = drawn_below(model, root, [5], keep=False)
    assert (root.cached, first.cached, second.cached) == (2, 5, 0)
    assert first.kv.shape == (2, 2, 2, 5, 16)  # layers, keys and values, heads, tokens, size
    assert first.kv.is_contiguous()  # its own, not a view of all lanes
    # What was not kept is computed again, in each lane.
    below, counts = [Node(first), Node(second), Node(second)], Counter()
    sample(model, below, [2] * 3, never, set(), None, 1.0, 1.0, counts)
    assert counts["forwarded_tokens"] == 1 + 6 + 6 + 3
    assert_stored_logps(plain, below, 1e-6)


# ----------------------------------------------------------------------------------- a recorded step
def flight(model) -> Lanes:
    """Lanes below prompts of different lengths, after two tokens each."""
    roots = [Node(tokens=[3, 4, 5, 6]), Node(tokens=[7, 8])]
    tree_grpo.compute(model, roots)
    lanes = Lanes(model, [Node(root) for root in roots for _ in range(3)])
    lanes.catch_up()
    lanes.decode(2, 0, 1.0, None)
    return lanes


class Tape(TorchDispatchMode):
    """In the place of torch.cuda.graph: as a CUDA graph does, it writes down the operations of a step
    with the tensors that they act on. What the step does on the way, which recording on CUDA does
    not, is undone."""

    def __init__(self, graph):
        super().__init__()
        self.graph, self.before = graph, []
        graph.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.is_mutable:
            self.before += [(x, x.clone()) for x in args[:1]]
        out = function(*args, **kwargs or {})
        self.graph.operations.append((function, args, kwargs or {}, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for x, was in reversed(self.before):
            x.copy_(was)


class Recording:
    """In the place of torch.cuda.CUDAGraph."""

    made = []  # noqa: RUF012

    def __init__(self):
        self.made.append(self)

    def replay(self):
        now = {}  # of the tensors that were made on the way, by the recorded ones
        for function, args, kwargs, out in self.operations:
            args, kwargs = tree_map(lambda x: now.get(id(x), x), (args, kwargs))
            again = function(*args, **kwargs)
            now.update((id(x), y) for x, y in zip(tree_leaves(out), tree_leaves(again)))


class OnCuda(torch.Tensor):
    """A tensor that says it were on CUDA."""

    is_cuda = True


def draw_while_recording(draw, logits, *how):
    return draw(logits.as_subclass(OnCuda), *how).as_subclass(torch.Tensor)


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1.0), (1.0, 1.0), (1.2, 0.9)])
def test_a_step_asks_the_device_for_nothing(temperature, top_p, monkeypatch):
    # What a CUDA graph cannot hold: values that the host reads (item, tolist, a mask as an index)
    # or writes. Tensors on the device "meta" have none: whoever asks for one gets an error.
    model, _ = tiny_qwen("qwen2")
    with torch.no_grad():
        lanes = flight(model)
        lanes.model = model.to("meta")
        for name in ("prompt", "at", "token", "drawn", "own", "shared"):
            setattr(lanes, name, getattr(lanes, name).to("meta"))
        draw = functools.partial(draw_while_recording, tree_grpo.draw)
        monkeypatch.setattr(tree_grpo, "draw", draw)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        try:
            lanes.step(10, temperature, top_p, None)
        except RuntimeError as error:
            if "autocast" in str(error):
                pytest.skip("older transformers ask torch for autocast on a device without one")
            raise
    assert lanes.drawn.shape == (3, 6) and lanes.drawn.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        lanes.drawn.tolist()  # so it would have shown


@pytest.mark.parametrize("look", [1, 8])
def test_a_run_on_recordings_grows_the_naive_trees(architecture, look, monkeypatch):
    # As on CUDA: recorded steps that see the whole room of a lane, recorded anew in new Lanes.
    model, plain = tiny_qwen(architecture, torch.float64)
    always = property(lambda lanes: True, lambda lanes, value: None)
    monkeypatch.setattr(Lanes, "recorded", always, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", Tape)
    monkeypatch.setattr(Recording, "made", [])
    monkeypatch.setitem(tree_grpo.LOOK, "cpu", look)
    grown = []
    for chosen, draw_by in ((model, sample), (plain, naive.sample)):
        how = lambda tokens: tokens[-1] == 7, {1}, None, 0, 1.0, Counter()
        roots = [Node(tokens=[9, 8, 30]), Node(tokens=list(range(20, 29)))]
        nodes = [Node(root) for root in roots for _ in range(4)]
        draw_by(chosen, nodes, [90, 3, 4, 1, 90, 2, 30, 1], *how)
        nodes[1].tokens += [5, 6, 9]
        below = [Node(nodes[1]), Node(nodes[1]), Node(roots[1])]
        draw_by(chosen, below, [45, 9, 3], *how)
        grown.append([node for root in roots for node in root.below()])
    assert_same_trees(*grown)
    # There were two calls of sample, so some are of lanes that go on.
    assert len(Recording.made) > 2


# --------------------------------------------------------------------------------------- the nucleus
@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.8, 0.95, 0.999])
def test_draws_are_from_the_nucleus_that_sorting_gives(top_p, capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    draw = functools.partial(draw_while_recording, tree_grpo.draw) if capturing else tree_grpo.draw
    torch.manual_seed(int(1000 * top_p))
    logits = torch.randn(30) * 2
    logits[3:6] = logits[0]  # equals: the earlier word first
    ranked, order = logits.double().softmax(-1).sort(descending=True, stable=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
    probs = torch.zeros(30, dtype=torch.float64).scatter(0, order, ranked / ranked.sum())
    counts = draw(logits.expand(40_000, 30), 1.0, top_p, None).bincount(minlength=30)
    assert not counts[probs == 0].any()
    assert chi_square(counts.tolist(), probs)[1] == 0 or p_value(counts.tolist(), probs) > 1e-5


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("V", [5003, 5120])  # with 5120 words a block is drawn first
def test_draws_from_many_words_are_in_proportion(V, top_p, capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    draw = functools.partial(draw_while_recording, tree_grpo.draw) if capturing else tree_grpo.draw
    torch.manual_seed(V)
    logits = torch.full((V,), -math.inf)
    words = torch.randperm(V)[:40]
    logits[words] = torch.randn(40) * 1.5
    ranked, order = logits.double().softmax(-1).sort(descending=True, stable=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
    probs = torch.zeros(V, dtype=torch.float64).scatter(0, order, ranked / ranked.sum())
    counts = sum(draw(logits.expand(2000, V), 1.0, top_p, None).bincount(minlength=V) for _ in range(10))
    assert not counts[probs == 0].any()
    assert p_value(counts[words].tolist(), probs[words]) > 1e-5


@pytest.mark.parametrize("capturing", [False, True])
def test_of_equally_likely_words_the_first_come_first(capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    draw = functools.partial(draw_while_recording, tree_grpo.draw) if capturing else tree_grpo.draw
    torch.manual_seed(0)
    for top_p, kept in ((1e-9, 1), (0.2, 1), (0.5, 2), (0.51, 3), (0.99, 4)):  # a quarter each
        drawn = draw(torch.zeros(999, 4), 1.0, top_p, None)
        assert set(drawn.tolist()) == set(range(kept))
    assert not draw(torch.zeros(999, 4), 0, 1.0, None).any()  # greedy


def test_a_draw_does_without_float64_where_there_is_none():
    # MPS has no float64: there a tensor of that kind cannot be made. Here only what is asked for
    # can be seen.
    class Elsewhere(torch.Tensor):
        device = torch.device("mps")

        def cumsum(self, dim, dtype):
            asked.append(dtype)
            raise StopIteration

    asked = []
    with pytest.raises(StopIteration):
        tree_grpo.draw_index(torch.ones(2, 3).as_subclass(Elsewhere), None)
    assert asked == [torch.float32]


# ---------------------------------------------------------------------------------------- packed trees
def group_below(root, leaves=None) -> Group:
    leaves = leaves or root.leaves()
    return Group(root, leaves, torch.randn(len(leaves), 1), 1.0)


def test_a_tree_as_a_row_by_hand():
    # x of three tokens, below it s of two drawn and two found, below that a of two and b of one.
    x = Node(tokens=[11, 12, 13])
    s = Node(x, [21, 22, 23, 24], [-1.0, -2.0])
    a, b = Node(s, [31, 32], [-3.0, -4.0]), Node(s, [41], [-5.0])
    packed = Packed([group_below(x, [b, a])], "cpu")
    assert packed.ids.tolist() == [[11, 12, 13, 21, 22, 23, 24, 31, 32, 41]]
    assert packed.position.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 7]]
    # A drawn token is predicted by the one before it: of s by x's last, of a and b by s's last.
    assert packed.read.tolist() == [2, 3, 6, 7, 6]
    assert packed.target.tolist() == [21, 22, 31, 32, 41]
    assert packed.sampler_logps.tolist() == [-1, -2, -3, -4, -5]
    ((places, mask),) = packed.paths
    assert mask.tolist() == [[True] * 3 + [False], [True] * 4]
    assert places[mask].tolist() == [0, 1, 4, 0, 1, 2, 3]
    # Segments at least half as long as s share a bucket, a and x with pads; b is alone. Keys come in
    # multiples of 8. A query is a token's place in the row; so is a key, and 0 stands for none.
    (many, many_keys), (one, one_keys) = packed.buckets
    assert many.tolist() == [[7, 8, 8, 8], [0, 1, 2, 2], [3, 4, 5, 6]]
    rows = [[*range(9)], [*range(3)], [*range(7)]]
    assert many_keys.tolist() == [row + [0] * (16 - len(row)) for row in rows]
    assert (one.tolist(), one_keys.tolist()) == ([[9]], [[0, 1, 2, 3, 4, 5, 6, 9]])
    assert packed.number.tolist() == [4, 5, 6, 8, 9, 10, 11, 0, 1, 12]  # x, s, a, b among queries


def test_packing_against_the_naive_on_random_trees():
    model, plain = tiny_qwen("qwen2", torch.float64)
    rng = random.Random(7)
    for _ in range(40):
        root = Node(tokens=rng.choices(range(2, 50), k=rng.randint(1, 9)))
        for _ in range(rng.randint(1, 12)):
            tokens = rng.choices(range(2, 50), k=rng.randint(0, 20))
            Node(rng.choice(root.below()), tokens, [0.0] * rng.randint(0, len(tokens)))
        leaves = root.leaves()
        kept = rng.sample(leaves, min(len(leaves), rng.randint(1, 4)))
        group = group_below(root, kept)
        needed = {node for leaf in kept for node in leaf.path()}
        assert Packed([group], "cpu").ids.shape[1] == sum(len(node.tokens) for node in needed)
        assert_packed_logps(tree_grpo, model, plain, [group], 1e-9)


def shifted(logps):
    """Log-probs of some older policy and of some reference: fixed functions of the present ones."""
    return logps.detach() + 0.2 * torch.sin(9 * logps.detach()), 0.9 * logps.detach()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), EXACT)
def test_the_packed_loss_is_that_of_separate_sequences(
    script, architecture, dtype, tolerance, checkpointing
):
    model, plain = tiny_qwen(architecture, dtype)
    groups, _ = grow(script, model)
    assert all(group.advantages.any() for group in groups[:2])
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.train()
    packed = script.Packed(groups, "cpu")
    logps = script.packed_logps(model, packed)
    packed.old_logps, packed.ref_logps = shifted(logps)
    args = Args(clip_low=0.1, clip_high=0.2, kl_coef=0.3)
    loss, stats = script.batch_loss(packed, logps, args)
    loss.backward()
    old, ref = (lambda logp, path: shifted(logp)[0]), (lambda logp, path: shifted(logp)[1])
    separate = naive.loss(plain, groups, old, ref, 0.1, 0.2, 0.3)
    separate.backward()
    assert loss.item() == pytest.approx(separate.item(), abs=tolerance)
    gradients = ([p.grad for p in m.parameters()] for m in (model, plain))
    assert_same_gradients(*gradients, tolerance)
    assert stats["clipped"] > 0 and stats["kl"] > 0
    assert stats["tokens"] == sum(
        len(naive.path_logps(plain, leaf.path())) for g in groups for leaf in g.leaves
    )


def test_a_head_in_chunks_gives_the_same_gradients():
    model, _ = tiny_qwen("qwen2", torch.float64)
    packed, results = Packed(grow(tree_grpo, model)[0], "cpu"), []
    for vocab_size in (50, 2**23):  # chunks of 2^26 / vocabulary tokens: all at once, then 8
        model.zero_grad()
        model.config.vocab_size = vocab_size
        logps = packed_logps(model, packed)
        logps.sin().sum().backward()
        results.append((logps.detach(), [p.grad.clone() for p in model.parameters()]))
    (one, gradients), (other, in_chunks) = results
    assert len(one) > 16 and torch.allclose(one, other, atol=1e-12)
    assert_same_gradients(in_chunks, gradients, 1e-9)


def test_gradients_of_shared_tokens_are_summed_in_a_fixed_order():
    # A prompt's tokens add up the gradients of all leaves. By x[index] threads would do that in
    # whatever order.
    model, _ = tiny_qwen("qwen2")
    root = Node(tokens=[2, 3, 4])
    for _ in range(3):
        Node(root, [5, 6], [-1.0] * 2)
    waiting = [packed_logps(model, Packed([group_below(root)], "cpu")).sum().grad_fn]
    for step in waiting:  # it grows on the way
        waiting += [f for f, _ in step.next_functions if f and f not in waiting]
    names = Counter(step.name() for step in waiting)
    assert names["IndexSelectBackward0"] > 0
    assert names["IndexBackward0"] == names["IndexPutBackward0"] == 0


# ----------------------------------------------------------------------------------- a training step
class Caught:
    """In the place of an optimizer: the gradients that it was given."""

    def __init__(self, model):
        self.model = model

    def step(self):
        self.gradients = [p.grad.clone() for p in self.model.parameters()]

    def zero_grad(self):
        self.model.zero_grad()


def trained(model, groups, reference=None, **how):
    args = Args(**{"kl_coef": 0.0, "dtype": "float32", **how})
    return update(model, reference, torch.optim.SGD(model.parameters(), 0.1), groups, args)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_micro_batches_do_not_change_the_step(script, kl_coef):
    # Loss, KL and gradients are those of separate sequences, however the groups are divided.
    model, plain = tiny_qwen("qwen2", torch.float64)
    groups, _ = grow(script, model)
    reference, plain_reference = tiny_qwen("qwen2", torch.float64)
    for ours, theirs in zip(reference.parameters(), plain_reference.parameters()):
        theirs.data = ours.data = ours.data + 0.02 * torch.randn_like(ours)
    kl = []

    def ref(logp, path):
        found = naive.path_logps(plain_reference, path).detach()
        gap = found - logp.detach()
        kl.extend((gap.exp() - gap - 1).tolist())
        return found

    loss = naive.loss(plain, groups, lambda logp, path: logp.detach(), ref, 0.2, 0.2, kl_coef)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    rows, parts = [], []
    for most in (10**6, 150, 1):
        args = script.Args(kl_coef=kl_coef, dtype="float32", micro_tokens=most)
        parts.append(len(script.micro_batches(groups, most)))
        caught = Caught(model)
        rows.append(script.update(model, reference, caught, groups, args))
        assert_same_gradients(caught.gradients, [p.grad for p in plain.parameters()], 1e-6)
        assert rows[-1]["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert rows[-1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
        assert rows[-1]["clip_fraction"] == 0 and rows[-1]["sampler_gap"] < 1e-5
        if kl_coef:  # without, prompts whose advantages are all 0 are left out, also of the mean
            assert rows[-1]["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-6)
    assert parts[0] == 1 < parts[1] and parts[2] == len(groups)  # a group is never split


def test_what_groups_share_counts_once_in_a_micro_batch():
    model, _ = tiny_qwen("qwen2")
    groups, _ = grow(graph_gpo, model)
    for most in (60, 150, 400):
        parts = graph_gpo.micro_batches(groups, most)
        assert sum(parts, []) == groups  # noqa: RUF017
        sizes = [Packed(part, "cpu").ids.shape[1] for part in parts]
        for part, size, later in zip(parts, sizes, parts[1:]):
            assert size <= most or len(part) == 1
            assert Packed([*part, later[0]], "cpu").ids.shape[1] > most  # none too early


def of_one_batch():
    """The same model and groups again and again."""
    model, _ = tiny_qwen("qwen2", torch.float64)
    groups, _ = grow(tree_grpo, model)
    return model, groups


def test_groups_without_advantages_are_left_out_but_counted():
    # Without KL they have no gradient, and the weights are those of the whole step.
    (model, groups), (other, _) = of_one_batch(), of_one_batch()
    groups[1] = groups[1]._replace(advantages=torch.zeros(len(groups[1].leaves), 1))
    seen = Counter()
    model.model.embed_tokens.register_forward_hook(
        lambda module, ids, out: seen.update(n=ids[0].numel())
    )
    row = trained(model, groups)
    n = seen["n"]
    assert trained(other, [groups[0], groups[2]]) == row and row["grad_norm"] > 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert n == Packed([groups[0], groups[2]], "cpu").ids.numel()
    nothing = trained(model, [groups[1]])
    assert (nothing["loss"], nothing["grad_norm"], nothing["sampler_gap"]) == (0, 0, None)
    assert seen["n"] == n


def test_later_epochs_compare_with_the_policy_before_the_first():
    row = trained(*of_one_batch(), epochs=3, clip_low=1e-4, clip_high=1e-4)
    assert row["clip_fraction"] > 0  # after the first step the ratio leaves so narrow a range
    assert row["sampler_gap"] < 1e-5  # measured before any step
    assert trained(*of_one_batch(), clip_low=1e-4, clip_high=1e-4)["clip_fraction"] == 0


def test_an_infinite_loss_stops_before_the_step():
    model, groups = of_one_batch()
    before = [p.detach().clone() for p in model.parameters()]
    groups[0].advantages[0] = torch.inf
    with pytest.raises(FloatingPointError):
        trained(model, groups)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_logits_that_are_not_finite_stop_the_sampler():
    model, _ = tiny_qwen("qwen2")
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError):
        drawn_below(model, Node(tokens=[3, 4]), [4])


# ------------------------------------------------------------------------------------------ bfloat16
def policy_in_bfloat16(model, folder, **how):
    """What samples in the place of `model`, and the reference."""
    from tree_grpo import policy_and_reference, save_model

    args = Args(dtype="bfloat16", **{"kl_coef": 0.0, **how})
    if args.kl_coef:
        save_model(folder, model, tiny_model([], torch.device("cpu"), 0)[1])
    return policy_and_reference(args, model, str(folder))


def test_scores_and_logits_of_bfloat16_are_in_float32(tmp_path, monkeypatch):
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 5, 8).bfloat16()
    exact = a.double() @ b.double().mT
    assert torch.allclose(tree_grpo.products(a, b).double(), exact, atol=1e-5)
    model, run, states = policy_in_bfloat16(tiny_qwen("qwen2")[0], tmp_path)[0], Lanes.run, []
    with torch.inference_mode():
        lanes = flight(model)

        def watched(self, *rest):
            states.append(run(self, *rest))
            return states[-1]

        monkeypatch.setattr(Lanes, "run", watched)
        lanes.step(10, 0, 1.0, None)
        logps = (states[0][:, 0].double() @ model.lm_head.weight.double().T).log_softmax(-1)
    token, logp, entropy = lanes.drawn.double()
    assert torch.equal(token.long(), logps.argmax(-1))
    assert torch.allclose(logp, logps.max(-1).values, atol=1e-5)
    assert torch.allclose(entropy, -(logps.exp() * logps).sum(-1), atol=1e-5)


def test_a_copy_in_bfloat16_keeps_the_positions_exact(architecture, tmp_path):
    # The parameters are cast, the frequencies of RoPE are not, else long contexts drift apart.
    model, plain = tiny_qwen(architecture)
    policy, _ = policy_in_bfloat16(model, tmp_path)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert policy.model.rotary_emb.inv_freq.dtype == torch.float32
    groups, _ = grow(tree_grpo, policy, prompts=(30, 400))
    gaps = []
    for group in groups:
        path = group.leaves[0].path()
        stored = torch.tensor([logp for node in path for logp in node.logps])
        with torch.no_grad():
            gaps.append((stored - naive.path_logps(plain, path)).abs().mean().item())
    assert 0 < gaps[0] < 0.5 and gaps[1] < 4 * gaps[0] + 0.05
    model.model.norm.weight.data += 1
    policy.load_state_dict(model.state_dict())  # as after each step
    for ours, theirs in zip(policy.parameters(), model.parameters()):
        assert torch.equal(ours, theirs.bfloat16())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_the_reference_is_the_starting_model(architecture, device, tmp_path):
    # Under autocast it computes what the model does: no KL before the first step.
    model = tiny_qwen(architecture)[0].to(device)
    policy, reference = policy_in_bfloat16(model, tmp_path, kl_coef=0.1)
    assert not any(p.requires_grad for p in reference.parameters())
    groups, _ = grow(tree_grpo, policy)
    row = trained(model, groups, reference, dtype="bfloat16", kl_coef=0.1)
    assert row["kl"] == pytest.approx(0, abs=1e-6) and row["grad_norm"] > 0
    assert 0 < row["sampler_gap"] < 0.2  # bfloat16 rounds
    assert trained(model, groups, reference, dtype="bfloat16", kl_coef=0.1)["kl"] > 1e-5
    assert policy_in_bfloat16(model, tmp_path)[1] is None  # without KL


# ------------------------------------------------------------------------------------------- on a GPU
@needs_cuda
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_recorded_steps_on_cuda(script, architecture, top_p, monkeypatch):
    # Of drawn trees the log-probs are those of plain forwards; greedy trees are the naive ones.
    model, plain = (m.double().to("cuda") for m in tiny_qwen(architecture))
    groups, _ = grow(script, model, top_p=top_p)
    assert_stored_logps(plain, [node for node in nodes_of(groups) if node.logps], 1e-6)
    assert_packed_logps(script, model, plain, groups, 1e-6)
    ours, _ = grow(script, model, temperature=0)
    monkeypatch.setattr(script, "sample", naive.sample)
    monkeypatch.setattr(script, "compute", lambda model, nodes: [])
    assert_same_trees(nodes_of(ours), nodes_of(grow(script, plain, temperature=0)[0]))


@needs_cuda
def test_sampler_and_trainer_in_a_gpus_rounding(script, architecture):
    model, plain = (m.to("cuda") for m in tiny_qwen(architecture))
    groups, _ = grow(script, model)
    assert_stored_logps(plain, [node for node in nodes_of(groups) if node.logps], 1e-3)
    assert_packed_logps(script, model, plain, groups, 1e-3)
    assert trained(model, groups, dtype="bfloat16")["grad_norm"] > 0


@needs_cuda
def test_draws_of_a_recorded_step_differ_and_are_seeded():
    model, _ = (m.to("cuda") for m in tiny_qwen("qwen2"))
    drawn = []
    for seed in (0, 0, 1):
        generator = torch.Generator("cuda").manual_seed(seed)
        nodes, _ = drawn_below(model, Node(tokens=[3, 4, 5]), [24] * 64, generator)
        drawn.append([tuple(node.tokens) for node in nodes])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 60
    same = {tokens[i] == tokens[i + 1] for tokens in drawn[0] for i in range(23)}
    assert same == {True, False}  # a step does not draw what the last one drew


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_draws_from_a_large_vocabulary(device):
    # The surprise of what is drawn, -log p, is the entropy of what it is drawn from, on average.
    model, plain = (m.to(device) for m in tiny_qwen("qwen2", vocab_size=151936))
    for m in (model, plain):
        m.model.norm.weight.data *= 3
    generator = torch.Generator(device).manual_seed(0)
    nodes, counts = drawn_below(model, Node(tokens=[3, 4, 5]), [8] * 32, generator)
    surprise = torch.tensor([-logp for node in nodes for logp in node.logps])
    assert 1 < surprise.mean() < 8
    assert abs(surprise.mean() - counts["entropy"] / 256) < 4 * surprise.std() / 256**0.5
    # With top-p what is likelier than a drawn token has less than that.
    nodes, _ = drawn_below(model, Node(tokens=[3, 4, 5]), [12] * 64, generator, top_p=0.7)
    for node in nodes:
        ids = torch.tensor([[3, 4, 5, *node.tokens]], device=device)
        with torch.no_grad():
            probs = plain(ids).logits[0, 2:-1].double().softmax(-1)
        own = probs.gather(-1, ids[0, 3:, None])
        assert (probs.where(probs > own, 0).sum(-1) < 0.7 + 1e-4).all()


# -------------------------------------------------------------------------------------- which models load
SHAPE = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MORE = {"mistral": {"sliding_window": None}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def saved(folder, kind: str, **more) -> str:
    """A folder with a random model of this kind and a tokenizer of single bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny_model([], torch.device("cpu"), 0)[1].save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **more})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", tree_grpo.KINDS)
def test_each_kind_of_model_is_exact(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    path = saved(tmp_path, kind, **MORE.get(kind, {}))
    model, _ = tree_grpo.load_model(path, torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    groups, _ = grow(tree_grpo, model)
    assert_stored_logps(plain, [node for node in nodes_of(groups) if node.logps], 1e-4)
    assert_packed_logps(tree_grpo, model, plain, groups, 1e-4)


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("mistral", {"sliding_window": 64}, "mistral.*sliding"),
        ("gemma2", {}, "sliding_attention"),
        (
            "qwen3_next",
            {**EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
            "linear",
        ),
        ("granite", {"logits_scaling": 8.0}, "it is granite"),  # a head that divides
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "it is gpt2"),
    ],
)
def test_other_models_are_refused_in_a_line(kind, more, reason, tmp_path):
    with pytest.raises(BadInput, match=f"^--model .*{reason}") as refused:
        tree_grpo.load_model(saved(tmp_path, kind, **more), torch.device("cpu"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("model.norm.weight", None),  # missing
        ("model.layers.1.mlp.up_proj.weight", None),
        ("model.more", torch.ones(2)),  # unknown
        ("model.norm.weight", torch.ones(7)),  # of another shape
    ],
)
def test_weights_that_do_not_fit_are_refused(name, weight, tmp_path):
    from safetensors.torch import load_file, save_file

    path, file = saved(tmp_path, "qwen2"), tmp_path / "model.safetensors"
    tree_grpo.load_model(path, torch.device("cpu"))
    weights = {**load_file(file), name: weight}
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="^--resume .*no model that can be used"):
        tree_grpo.load_model(path, torch.device("cpu"), "--resume")
