"""How fast the scripts are, beside what one would otherwise run: `python benchmarks/speed.py`. Prints Markdown tables.

A. Sampling with a shared prompt, against `generate` of transformers on as many independent chains.
B. Training on each token of a tree once, against the leaves as a right-padded batch: time and memory.
E. How far a decode step is from reading the weights and the live keys and values once.
F. treerl.py's trees on its built-in task: the search against as many tokens in chains, and B for its trees.
G. What sharing prompts saves in graph_gpo.py: one iteration in the house (16 tasks x 8 rollouts) by the tiny model,
   warm-started and trained. "one per step": each environment step's prompt goes through the model alone, in sampling
   and in training; "per wave": `--kept-tokens 0`, a prompt is computed once for all that meet in it in the same wave;
   "kept": the default, once for all waves. In training the last two are the same: each distinct prompt once.
H. What its graph costs: goal_distances and the step advantages for 10^3 to 10^6 transitions of random rollouts.

What is compared takes turns within one run (A B B A), so a machine that slows down does so for both; times are medians.
Look at the ratios, not at the seconds. Where other processes use the same cores, start it with OMP_WAIT_POLICY=passive:
else threads that spin while they wait for each other make everything several times slower, and the ratios meaningless.
On CUDA the models have the shapes of Qwen2.5-0.5B and 1.5B, with random weights; sampling is in bfloat16, training from
float32 weights under autocast. A part that fails there, as for want of memory, is left out with a line that says so."""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import itertools
import math
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import common
import torch
import transformers
from common import CPU, actor_of, credits, flags, graph_gpo, rollouts, table, tiny_args, tree_grpo, treerl
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Config, Qwen2ForCausalLM

from tree_grpo import Group, Lanes, Node, Packed, length

# A: rows, lanes, prompt, leaf. B: the same and the width of the model. E: as A, the leaf being what a lane holds.
TINY = {
    "A": [(8, 16, 64, 96), (8, 6, 200, 60), (4, 30, 400, 64), (16, 4, 64, 32), (16, 2, 16, 64)],
    "B": [
        (8, 16, 64, 96, 128),
        (8, 16, 192, 48, 128),
        (4, 30, 32, 24, 128),
        (4, 6, 200, 60, 256),
        (2, 16, 400, 64, 512),
    ],
    "E": [(8, 16, 64, 48), (8, 16, 512, 48)],
}
QWEN = {
    "A": [(16, 16, 256, 128), (8, 30, 1024, 64)],
    "B": [(2, 8, 256, 64, None), (1, 8, 512, 64, None)],
    "E": [(16, 16, 256, 128), (8, 30, 1024, 128), (1, 8, 1024, 128), (8, 24, 150, 100), (32, 24, 150, 100)],
}
QWEN_ON_CPU = {"A": [(2, 4, 32, 4)], "B": [(1, 2, 16, 8, None)], "E": [(2, 4, 32, 16)]}  # only to see that it runs
SIZES = {  # width, layers, heads, KV heads, inner width, vocabulary
    "0.5B": (896, 24, 14, 2, 4864, 151936),
    "1.5B": (1536, 28, 12, 2, 8960, 151936),
}


# ---------------------------------------------------------------------------------------------------------- helpers
def in_turns(ways: list, repeats: int, device: torch.device = CPU, clock=time.perf_counter) -> list[list[float]]:
    """Seconds of each function's calls, made in turns, every other time in the opposite order, after one untimed call
    each."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = [[] for _ in ways]
    for i in range(repeats + 1):
        for way, times in list(zip(ways, seconds))[:: 1 if i % 2 else -1]:
            wait()
            began = clock()
            way()
            wait()
            times.append(clock() - began)
    return [times[1:] for times in seconds]


def timed(ways: list, repeats: int, device: torch.device) -> list[float]:
    """Median seconds of each function."""
    return list(map(statistics.median, in_turns(ways, repeats, device)))


def peak_memory(way, device: torch.device) -> float | None:
    """MiB in use at the peak of a call, above what was in use before it; None where that cannot be measured."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name)))

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory that is free, but held, is used unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, starts anew
    except (OSError, AttributeError):  # not Linux, not glibc, or not allowed
        return None
    before = status("VmRSS")
    way()
    return (status("VmHWM") - before) / 1024


def show(head: str, lines: list) -> None:
    print("\n" + table(head, lines), flush=True)


def config_of(shape: tuple, tied: bool = True) -> Qwen2Config:
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size".split()
    how = {"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    how |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": tied}
    return Qwen2Config(**dict(zip(names, shape)), **how)


def new_model(size: str, device: torch.device, width: int = 128):
    """A Qwen2 with random weights in float32: the shape of a Qwen2.5, or "tiny", of 4 layers."""
    tree_grpo.quiet_transformers()
    torch.manual_seed(0)
    with device:
        model = Qwen2ForCausalLM(config_of(SIZES.get(size) or (width, 4, 4, 2, 2 * width, 500)))
    return attend(model.float().eval().to(device), "token_tree")


def attend(model, attention: str):
    """Let a model use this attention; "sdpa" is the usual one. So one copy of the weights will do."""
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    return model


def sampling_model(model):
    """What a script samples with: on CUDA the copy in bfloat16."""
    dtype = "bfloat16" if model.device.type == "cuda" else "float32"
    return tree_grpo.policy_and_reference(tree_grpo.Args(kl_coef=0.0, dtype=dtype), model, "")[0]


def random_tokens(n: int, rng: random.Random) -> list[int]:
    return [rng.randrange(1, 500) for _ in range(n)]


def stars(rows: int, lanes: int, prompt: int, rng: random.Random) -> list[Node]:
    """Below each of `rows` random prompts so many nodes without tokens."""
    roots = [Node(tokens=random_tokens(prompt, rng)) for _ in range(rows)]
    return [Node(root) for root in roots for _ in range(lanes)]


# ---------------------------------------------------------------------------------------- A. sampling
def sample_ours(model, shape: tuple, leaf: int, rng: random.Random, generator: torch.Generator) -> None:
    """Leaves of so many tokens by tree_grpo.sample, with nothing that ends one early, and nothing to begin below it."""
    nodes, counts = stars(*shape, rng), Counter()
    draws = generator, 1.0, 1.0, counts
    attend(model, "token_tree")
    tree_grpo.sample(model, nodes, [leaf] * len(nodes), lambda tokens: False, set(), *draws, keep=False)
    assert counts["generated_tokens"] == len(nodes) * leaf


def sample_theirs(model, shape: tuple, leaf: int, rng: random.Random) -> None:
    rows, lanes, prompt = shape
    ids = torch.tensor([random_tokens(prompt, rng) for _ in range(rows)], device=model.device)
    ids = ids.repeat_interleave(lanes, 0)
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0, "eos_token_id": None}
    how |= {"min_new_tokens": leaf, "max_new_tokens": leaf}
    out = attend(model, "sdpa").generate(ids, attention_mask=torch.ones_like(ids), **how)
    assert out.shape == (rows * lanes, prompt + leaf)


def sampling(size: str, shapes: dict, device: torch.device, repeats: int) -> None:
    print(f"\n## A. Sampling ({size})")
    model, lines = sampling_model(new_model(size, device)), []
    rng, generator = random.Random(0), torch.Generator(device).manual_seed(0)
    for rows, lanes, prompt, leaf in shapes["A"]:
        # Each call has new prompts, as each step of training has, so that no cache of them helps.
        shape = rows, lanes, prompt
        ours = functools.partial(sample_ours, model, shape, leaf, rng, generator)
        theirs = functools.partial(sample_theirs, model, shape, leaf, rng)
        a, b = timed([ours, theirs], repeats, device)
        name = f"{rows} x {lanes}", f"{prompt} + {leaf}"
        speed = f"{rows * lanes * leaf / a:,.0f}", f"{b / a:.2f} x"
        lines.append([*name, f"{b:.3f}", f"{a:.3f}", *speed])
    show("rows x lanes|prompt + leaf|generate, s|tree_grpo.sample, s|tokens/s|speed-up", lines)


# ---------------------------------------------------------------------------------------- B. training
def with_advantages(root: Node, weight: float) -> Group:
    leaves = root.leaves()
    return Group(root, leaves, torch.randn(len(leaves), 1), weight / len(leaves))


def other_advantages(groups: list[Group]) -> list[Group]:
    """Random ones, as flat groups have no gradient, which could not be compared."""
    torch.manual_seed(0)
    return [g._replace(advantages=torch.randn(len(g.leaves), 1)) for g in groups]


def star(rows: int, leaves: int, prompt: int, leaf: int) -> list[Group]:
    """Trees without inner forks: random prompts, and below each its leaves."""
    rng = random.Random(0)
    nodes = stars(rows, leaves, prompt, rng)
    for node in nodes:
        node.tokens, node.logps = random_tokens(leaf, rng), [0.0] * leaf
    return [with_advantages(root, 1 / rows) for root in dict.fromkeys(node.parent for node in nodes)]


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def backward(model, packed: Packed, logps: torch.Tensor, old: torch.Tensor | None) -> float:
    """The loss of update without a reference model, its gradients left in the model."""
    packed.old_logps = logps.detach() if old is None else old
    loss = tree_grpo.batch_loss(packed, logps, tree_grpo.Args(kl_coef=0.0))[0]
    model.zero_grad(set_to_none=False)  # so that a call does not allocate them
    loss.backward()
    return float(loss.detach())


def packed_backward(model, groups: list[Group], old, device: torch.device) -> float:
    attend(model, "token_tree")
    packed = Packed(groups, device)
    with autocast(device):
        logps = tree_grpo.packed_logps(model, packed)
    return backward(model, packed, logps, old)


def padded_backward(model, groups: list[Group], packed: Packed, old, device: torch.device) -> float:
    """The same from right-padded leaves, the head at sampled tokens only. Of `packed` only the places are used to which
    the log-probs go."""
    attend(model, "sdpa")
    paths = [leaf.path() for group in groups for leaf in group.leaves]
    ids = [torch.tensor([token for node in path for token in node.tokens]) for path in paths]
    drawn = [torch.tensor([i < len(n.logps) for n in path for i in range(len(n.tokens))]) for path in paths]
    ids, read = (pad_sequence(x, True).to(device) for x in (ids, drawn))
    read = read[:, 1:]
    with autocast(device):  # causal, so the padding on the right is never seen
        hidden = model.model(ids, use_cache=False).last_hidden_state
        logits = tree_grpo.full_precision(model.lm_head(hidden[:, :-1][read]))
    target = ids[:, 1:][read]
    logps = -torch.nn.functional.cross_entropy(logits, target, reduction="none")
    # A token that leaves share was computed once for each of them: the mean is the same number.
    where = torch.cat([index[mask] for index, mask in packed.paths])
    sums = torch.zeros(len(packed.target), device=device).index_add(0, where, logps)
    return backward(model, packed, sums / where.bincount(minlength=len(sums)), old)


def compare_row(name: list, model, groups: list[Group], repeats: int, device: torch.device) -> list:
    """Path tokens / unique tokens; seconds, and MiB at the peak, padded and packed, forward and backward with all that
    prepares them."""
    paths = [leaf.path() for group in groups for leaf in group.leaves]
    ratio = sum(map(length, paths)) / length({node for path in paths for node in path})
    packed = Packed(groups, device)
    with torch.no_grad(), autocast(device):  # a little off the present, so that the loss depends
        old = tree_grpo.packed_logps(attend(model, "token_tree"), packed)
        old += 0.1 * torch.randn_like(old)
    pack = functools.partial(packed_backward, model, groups, old, device)
    pad = functools.partial(padded_backward, model, groups, packed, old, device)
    one, mine, other = pack(), [p.grad.clone() for p in model.parameters()], pad()
    far = sum(float((p.grad - g).square().sum()) for p, g in zip(model.parameters(), mine))
    gap = math.sqrt(far / sum(float(g.square().sum()) for g in mine))
    if device.type == "cpu":  # in float32, that is
        assert abs(one - other) < 1e-4, f"the losses differ: packed {one}, padded {other}"
        assert gap < 1e-4, f"the gradients differ by {gap} of their length"
    del mine
    a, b = timed([pack, pad], repeats, device)
    small, large = peak_memory(pack, device), peak_memory(pad, device)
    memory = ["-"] * 3 if small is None else [f"{large:.1f}", f"{small:.1f}", f"{large / max(small, 0.1):.2f} x"]
    attend(model, "token_tree")
    speed = f"{b:.3f}", f"{a:.3f}", f"{b / a:.2f} x", f"{b / a / ratio:.2f}"
    return [*name, f"{ratio:.2f}", *speed, *memory]


TRAINING = "r|padded, s|packed, s|speed-up|speed-up / r|padded, MiB|packed, MiB|ratio"


def training(size: str, shapes: dict, device: torch.device, repeats: int) -> None:
    print(f"\n## B. Training, forward + backward ({size})")
    print("\nr: path tokens / unique tokens; MiB: at the peak, beyond weights and gradients.")
    lines = []
    for *shape, width in shapes["B"]:
        model = new_model(size, device, width)
        name = "{} x {} x ({} + {}), ".format(*shape) + str(model.config.hidden_size)
        lines.append(compare_row([name], model, star(*shape), repeats, device))
    show(f"stars: rows x leaves x (prompt + leaf), width|{TRAINING}", lines)
    if size != "tiny":
        return
    usual = tiny_args(tree_grpo, sft_steps=120, device=str(device))
    (model, tokenizer), lines = common.warm_started(tree_grpo, usual), []
    trees = ((2, 2, 1), (2, 2, 2), (4, 4, 1), (2, 4, 2))
    for topk, (M, N, L) in itertools.product((1, 4), trees):
        args = dataclasses.replace(usual, M=M, N=N, L=L, topk=topk)
        found, _ = rollouts(tree_grpo, actor_of(tree_grpo, model, tokenizer, args), 0)
        groups = other_advantages(credits(tree_grpo, found, args, 0))
        name = [f"M {M}, N {N}, L {L}, topk {topk}", sum(len(group.leaves) for group in groups)]
        lines.append(compare_row(name, model, groups, repeats, device))
    show(f"the script's own trees, 16 prompts|leaves|{TRAINING}", lines)


# ------------------------------------------------------------------------------------ E. a decode step
def bandwidth(device: torch.device) -> float:
    """Bytes per second of memory, the best of reading a tensor larger than caches, and copying."""
    x = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    read, copied = map(min, in_turns([x.sum, lambda: y.copy_(x)], 5, device))
    return max(x.nbytes / read, 2 * x.nbytes / copied)


@torch.inference_mode()
def decode_step(model, shape: tuple, device: torch.device, repeats: int) -> tuple:
    """Seconds of a step that runs a token in each lane and draws the next (on CUDA recorded, a mean over the tokens
    between two looks of the host), at top-p 1 and 0.95; seconds of the head alone; and the bytes of the keys and values
    that the step attends to."""
    rng, (rows, lanes, prompt, own) = random.Random(0), shape
    above = stars(rows, lanes, prompt, rng)
    for node in above:
        node.tokens = random_tokens(own, rng)
    tree_grpo.compute(model, [node.parent for node in above])
    flight, other = (Lanes(model, [Node(node) for node in above]) for _ in range(2))
    flight.catch_up()
    other.catch_up()
    generator = torch.Generator(device).manual_seed(0)
    look, width = tree_grpo.LOOK.get(device.type, 1), model.config.hidden_size
    hidden = torch.randn(1, len(flight.grid), width, device=device, dtype=model.dtype)

    def head():
        return tree_grpo.products(hidden, model.lm_head.weight[None])

    # The same steps again and again.
    steps, nucleus = (functools.partial(x.decode, look, 1.0, p, generator) for x, p in ((flight, 1.0), (other, 0.95)))
    several, drawn, once = timed([steps, nucleus, head], 10 * repeats, device)
    slots = flight.own.shape[-2]
    return several / look, drawn / look, once, flight.own.nbytes // slots * own + flight.shared.nbytes


def decode(size: str, shapes: dict, device: torch.device, repeats: int) -> None:
    speed = bandwidth(device)
    print(f"\n## E. A decode step against reading weights and live keys and values once ({size})\n")
    print(
        "The bound is the bytes of the parameters and of all keys and values that a step attends to, a prompt's counted"
    )
    print(
        f"once, over the measured {speed / 1e9:,.1f} GB/s of memory. 1 is a step that only reads; above it are arithmetic,"
    )
    print("the calls of some hundred operations, and keys, values and scores that are read or written more than once.")
    model, lines = sampling_model(new_model(size, device)), []
    for shape in shapes["E"]:
        whole, nucleus, head, kept = decode_step(model, shape, device, repeats)
        weights = sum(p.nbytes for p in model.parameters())
        bound = (weights + kept) / speed
        cells = [f"{weights / 1e6:.1f}", f"{kept / 1e6:.1f}", f"{1000 * bound:.3f}"]
        cells += [f"{1000 * whole:.2f}", f"{1000 * head:.2f}", f"{whole / bound:.1f}", f"{1000 * nucleus:.2f}"]
        lines.append(["{} x {}".format(*shape), "{2} + {3}".format(*shape), *cells])
    head = "rows x lanes|prompt + own|parameters, MB|keys and values, MB|bound, ms|measured, ms|"
    show(head + "of it the head, ms|measured / bound|at top-p 0.95, ms", lines)


# ---------------------------------------------------------------------------------------- F. treerl.py
def treerl_trees(device: torch.device, repeats: int) -> None:
    print("\n## F. treerl.py on its built-in task, 16 prompts\n")
    print("Tree and chains generate about as many tokens.")
    usual = tiny_args(treerl, sft_steps=200, device=str(device))
    model, tokenizer = common.warm_started(treerl, usual)

    def search(method: str, M: int, N: int = 0, L: int = 0, T: int = 1):
        args = dataclasses.replace(usual, method=method, M=M, N=N, L=L, T=T)
        return rollouts(treerl, actor_of(treerl, model, tokenizer, args), 0)

    lines, trained = [], []
    for shape in ((6, 2, 1, 2), (2, 2, 2, 2), (1, 2, 1, 2)):
        found, counts = search("treerl", *shape)
        drawn = counts["generated_tokens"]
        M = round(16 * drawn / search("chainrl", 16)[1]["generated_tokens"])
        ways = [lambda s=shape: search("treerl", *s), lambda M=M: search("chainrl", M)]
        ours, chains = timed(ways, repeats, device)
        name, leaves = ", ".join(map(str, shape)), sum(len(root.leaves()) for _, root in found)
        times = f"{chains:.3f}", f"{ours:.3f}", f"{ours / chains:.2f}"
        lines.append([name, leaves, f"{drawn:,}", M, *times])
        for keep in [10**6, 16] if leaves > 16 * len(found) else [16]:
            args = dataclasses.replace(usual, keep=keep)
            groups = other_advantages(credits(treerl, found, args, 0))
            kept = sum(len(group.leaves) for group in groups)
            title = f"{name}, 16 kept" if kept < leaves else name
            trained.append(compare_row([title, kept], model, groups, repeats, device))
    show("M, N, L, T|leaves|generated tokens|chains|chains, s|tree, s|tree / chains", lines)
    show(f"treerl.py's own trees, 16 prompts|leaves|{TRAINING}", trained)


# ------------------------------------------------------------------------------------ G. graph_gpo.py
WAYS = ("one per step", "per wave", "kept")


class Alone(graph_gpo.Player):
    """A prompt of its own for each step: nothing is shared."""

    def prompt(self, task, k: int) -> Node:
        shared = super().prompt(task, k)
        task.prompts.clear()
        task.root.children.clear()
        return Node(Node(tokens=task.root.tokens), shared.tokens)


def alone_groups(tasks: list, args) -> list[Group]:
    groups = []
    for task in tasks:
        for step, A in zip(task.steps, graph_gpo.advantages(task, args)):
            root, weight = step.node.path()[0], 1 / len(task.steps) / len(tasks)
            groups.append(Group(root, [step.node], A.view(1, 1), weight))
    return groups


def iteration(way: str, model, tokenizer, args, step: int) -> dict[str, float]:
    """Tokens and seconds of one iteration, sampling and training, of one way."""
    args.kept_tokens = {"kept": 10**9}.get(way, 0)
    kind = Alone if way == WAYS[0] else graph_gpo.Player
    player = kind(model, tokenizer, args, common.task_of(graph_gpo, args))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    began = time.perf_counter()
    tasks, counts = rollouts(graph_gpo, player, step)
    middle = time.perf_counter()
    groups = alone_groups(tasks, args) if way == WAYS[0] else credits(graph_gpo, tasks, args, step)
    graph_gpo.update(model, None, optimizer, groups, args)
    end, trained = time.perf_counter(), 0
    for batch in graph_gpo.micro_batches(groups, args.micro_tokens):
        leaves = [leaf for group in batch for leaf in group.leaves]
        trained += length({node for leaf in leaves for node in leaf.path()[:-1]})
    sampled = counts["prompt_tokens_sampling"]
    tokens = {"steps": counts["env_steps"], "sampling": sampled, "training": trained}
    return {**tokens, "sampling_s": middle - began, "training_s": end - middle}


def sharing(repeats: int, trained: int = 60) -> None:
    print("\n## G. Sharing prompts in graph_gpo.py")
    args, lines = tiny_args(graph_gpo, kl_coef=0.0), []
    with tempfile.TemporaryDirectory() as folder:
        graph_gpo.save_model(Path(folder, "start"), *common.warm_started(graph_gpo, args))
        told = {"model": f"{folder}/start", "lr": 5e-4, "max_tokens": 8, "device": "cpu"}
        told |= {"steps": trained, "eval_tasks": 1, "out": f"{folder}/out"}
        with contextlib.redirect_stdout(sys.stderr):
            graph_gpo.main(flags(told))
        policies = {"warm-started": "start", f"after {trained} steps": "out/final"}
        for (policy, path), args.history in itertools.product(policies.items(), (0, 2)):
            model, tokenizer = graph_gpo.load_model(f"{folder}/{path}", CPU)
            found = {way: [] for way in WAYS}
            for step in range(repeats + 1):
                for way in WAYS:
                    found[way].append(iteration(way, model, tokenizer, args, step))
            base = None
            for way, runs in found.items():  # the first of each is to get warm
                row = {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}
                whole = row["sampling_s"] + row["training_s"]
                base = base or whole
                tokens = [f"{row[key]:,.0f}" for key in ("steps", "sampling", "training")]
                times = f"{row['sampling_s']:.2f}", f"{row['training_s']:.2f}"
                name = policy, str(args.history), way
                lines.append([*name, *tokens, *times, f"{base / whole:.2f} x"])
    head = "policy|history|prompts|env steps|prompt tokens, sampling|training|"
    show(head + "sampling, s|training, s|iteration, speed-up", lines)


# --------------------------------------------------------------------------------------- H. its graph
def grid(n: int, seed: int = 0) -> list[graph_gpo.Transition]:
    """n transitions of random rollouts of 50 steps, on a grid with n / 10 fields of which one is the goal."""
    rng, side, found, rollout = random.Random(seed), max(3, round((n / 10) ** 0.5)), [], 0
    goal = (side // 2, side // 2)
    while len(found) < n:
        rollout += 1
        x, y = rng.randrange(side), rng.randrange(side)
        for _ in range(min(50, n - len(found))):
            dx, dy = rng.choice(((0, 1), (1, 0), (0, -1), (-1, 0)))
            to = (min(max(x + dx, 0), side - 1), min(max(y + dy, 0), side - 1))
            end = graph_gpo.SUCCESS if to == goal else to
            found.append(graph_gpo.Transition((x, y), "move", end, rollout))
            x, y = to
            if to == goal:
                break
    return found


def graph(repeats: int) -> None:
    print("\n## H. The cost of the graph")
    lines = []
    for n in (10**3, 10**4, 10**5, 10**6):
        transitions = grid(n)
        rewards = [float(t.next_state is graph_gpo.SUCCESS) for t in transitions]
        ways = [functools.partial(way, transitions) for way in (graph_gpo.goal_distances, graph_gpo.graph_advantages)]
        ways.append(functools.partial(graph_gpo.gigpo_advantages, transitions, rewards))
        seconds = timed(ways, repeats, CPU)
        states = len(graph_gpo.goal_distances(transitions))
        lines.append([f"{n:,}", f"{states:,}", *(f"{s:.4f}" for s in seconds)])
    show("transitions|states|goal_distances, s|graph_advantages, s|gigpo_advantages, s", lines)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--parts", nargs="+", choices=tuple("ABEFGH"), default=tuple("ABEFGH"), help="default: all")
    sizes = ("tiny", *SIZES)
    parser.add_argument("--model", choices=sizes, help="default: tiny on a CPU, both Qwens on CUDA")
    parser.add_argument("--repeats", type=int, help="timed calls of each way (default: 5 on a CPU, 2 on CUDA)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    repeats = args.repeats or (2 if cuda else 5)
    where = torch.cuda.get_device_name(device) if cuda else f"{args.threads} CPU threads"
    how = "bfloat16 (training: autocast)" if cuda else "float32"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {where}, {how}, medians of {repeats}")
    of_models = {"A": sampling, "B": training, "E": decode}
    jobs = []
    for size in [args.model] if args.model else SIZES if cuda else ["tiny"]:
        shapes = TINY if size == "tiny" else QWEN if cuda else QWEN_ON_CPU
        jobs += [(part, job, (size, shapes, device, repeats)) for part, job in of_models.items()]
    jobs += [("F", treerl_trees, (device, repeats)), ("G", sharing, (repeats,)), ("H", graph, (repeats,))]
    for part, job, how in [job for job in jobs if job[0] in args.parts]:
        try:
            job(*how)
        except Exception as error:  # on a GPU other parts may still fit into its memory
            if not cuda:
                raise
            traceback.print_exc()
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"\nThe rest of part {part} is left out: {reason}", flush=True)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
