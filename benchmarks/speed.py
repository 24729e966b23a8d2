"""How fast the scripts are, beside what one would otherwise run: `python benchmarks/speed.py`. Prints Markdown tables.

A. Sampling with a shared prompt, against `generate` of transformers on as many independent chains, and on CUDA against
   its continuous batching, which shares the prompt too.
B. Training on each token of a tree once, against the leaves as a right-padded batch: time and memory.
C. A whole step (sampling, advantages, update with a KL to a reference model), against the GRPOTrainer of TRL.
D. How the cost grows with the leaves, the prompt and the depth of a tree.
E. How far a decode step is from reading the weights and the live keys and values once.
F. treerl.py's trees on its built-in task: the search against as many tokens in chains, and B for its trees.

What is compared takes turns within one run (A B A B), so a machine that slows down does so for both; times are medians.
Look at the ratios, not at the seconds. Where other processes use the same cores, start it with OMP_WAIT_POLICY=passive:
else threads that spin while they wait for each other make everything several times slower, and the ratios meaningless.
On CUDA the models have the shapes of Qwen2.5-0.5B and 1.5B, with random weights; sampling is in bfloat16, training from
float32 weights under autocast. A part that fails there, as for want of memory, is left out with a line that says so."""

import argparse
import copy
import ctypes
import gc
import itertools
import logging
import math
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers import AttentionInterface, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tree_grpo
import treerl
from tree_grpo import Lanes, Node, Packed, Sample, grpo_loss, packed_logps

# A: rows, lanes, prompt, leaf. B: the same and the width of the model; forks: as `comb` takes them. C: as A. D: rows,
# lanes, prompt, leaf that are doubled from, and the tokens of an agent step. E: as A, the leaf being what a lane holds.
TINY = {
    "A": [(8, 16, 64, 96), (8, 6, 200, 60), (4, 30, 400, 64), (16, 4, 64, 32), (16, 2, 16, 64)],
    "B": [(8, 16, 64, 96, 128), (8, 16, 192, 48, 128), (4, 30, 32, 24, 128), (4, 6, 200, 60, 256),
          (2, 16, 400, 64, 512)],
    "forks": [(8, 64, 24, 3), (4, 64, 48, 4)],
    "C": [(8, 16, 64, 96), (8, 16, 192, 48)],
    "D": (8, 8, 64, 48, 24),
    "E": [(8, 16, 64, 48), (8, 16, 512, 48)],
}
QWEN = {
    "A": [(16, 16, 256, 128), (8, 30, 1024, 64)],
    "B": [(2, 8, 256, 64, None), (1, 8, 512, 64, None)],
    "forks": [(2, 256, 64, 3), (1, 256, 64, 4)],
    "C": [(4, 8, 256, 64), (4, 8, 512, 64)],
    "D": (4, 4, 64, 32, 32),
    "E": [(16, 16, 256, 128), (8, 30, 1024, 128), (1, 8, 1024, 128)],
}
QWEN_ON_CPU = {"A": [(2, 4, 32, 4)], "B": [(1, 2, 16, 8, None)], "forks": [(1, 16, 4, 2)], "C": [(1, 2, 16, 4)],
               "D": (1, 2, 16, 4, 4), "E": [(2, 4, 32, 16)]}  # only to see that the code runs
SIZES = {"0.5B": (896, 24, 14, 2, 4864, 151936), "1.5B": (1536, 28, 12, 2, 8960, 151936)}  # as new_model takes them
TREES = [(2, 2, 1), (2, 2, 2), (4, 4, 1), (2, 4, 2)]  # M, N, L, each with 1 and with 4 passages per search (topk)

# ------------------------------------------------------------------------------------------------------------- helpers
def timed(ways: list, repeats: int, device: torch.device, pick=statistics.median) -> list[float]:
    """Median seconds of each function, called in turns after one untimed call each."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = [[] for _ in ways]
    for _ in range(repeats + 1):
        for way, times in zip(ways, seconds):
            wait()
            began = time.perf_counter()
            way()
            wait()
            times.append(time.perf_counter() - began)
    return [pick(times[1:]) for times in seconds]

def peak_memory(way, device: torch.device) -> float | None:
    """MiB in use at the peak of a call, above what was in use before it; None where that cannot be measured."""
    def status(name: str) -> int:
        return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name)))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory that is free, but still held, would be used without being seen
        Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, starts anew
    except (OSError, AttributeError):  # not Linux, not glibc, or not allowed
        return None
    before = status("VmRSS")
    way()
    return (status("VmHWM") - before) / 1024

def table(*columns: str) -> None:
    print("\n" + "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)

def row(*cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)

def verdict(requirement: str, misses: list[str]) -> None:
    print(f"\n{requirement}: " + (f"DOES NOT HOLD for {'; '.join(misses)}" if misses else "holds"), flush=True)

def new_model(size: str, device: torch.device, width: int = 128):
    """A Qwen2 with random weights in float32: the shape of a Qwen2.5, or "tiny", of 4 layers. Attention: token_tree."""
    width, layers, heads, kv_heads, inner, vocabulary = SIZES.get(size) or (width, 4, 4, 2, 2 * width, 500)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with device:
        model = Qwen2ForCausalLM(config).float().eval()
    return attend(model.to(device), "token_tree")

def attend(model, attention: str):
    """Let a model use this attention; "sdpa" is the usual one of transformers. So one copy of the weights will do."""
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    return model

def sampling_model(model):
    """On CUDA in bfloat16, in place; not the buffers, as RoPE needs float32."""
    for parameter in model.parameters() if model.device.type == "cuda" else ():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model

def random_tokens(n: int, rng: random.Random) -> list[int]:
    return [rng.randrange(1, 500) for _ in range(n)]

def new_root(prompt: int, rng: random.Random) -> Node:
    root = Node()
    root.add(random_tokens(prompt, rng))
    return root

def draw(model, nodes: list[Node], tokens: int, generator: torch.Generator) -> None:
    """tree_grpo.sample with nothing that ends a node early, and nothing to begin below it."""
    counts, how = Counter(), (lambda tokens: False, set(), generator, 1.0, 1.0)
    attend(model, "token_tree")
    tree_grpo.sample(model, nodes, [tokens] * len(nodes), *how, counts, keep=False)
    assert counts["generated_tokens"] == len(nodes) * tokens

# --------------------------------------------------------------------------------------------------------- A. sampling
def continuous_batching() -> tuple[str, object]:
    """The attention and the settings under which generate_batch of transformers is at its fastest."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils import is_flash_attn_2_available
    attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    paged = f"paged|{attention}"  # newer versions find the paged form themselves
    config = ContinuousBatchingConfig(allow_block_sharing=True, max_memory_percent=0.4)  # the others need memory too
    config.auto_switch_to_flash = False  # else it may download a kernel
    return (paged if paged in ALL_ATTENTION_FUNCTIONS.valid_keys() else attention), config

def samplers(model, shape: tuple[int, int, int, int], device: torch.device) -> list:
    """Three functions that draw rows x lanes x leaf tokens: `sample`, `generate`, from a prompt for each lane, and
    `generate_batch`. Each call has new prompts, as each step of training has, so that no cache of prompts helps."""
    rows, lanes, prompt, leaf = shape
    rng, generator = random.Random(0), torch.Generator(device).manual_seed(0)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0, "max_new_tokens": leaf}
    def sample():
        draw(model, [Node(root) for root in [new_root(prompt, rng) for _ in range(rows)] for _ in range(lanes)],
             leaf, generator)
    def generate():
        prompts = torch.tensor([random_tokens(prompt, rng) for _ in range(rows)], device=device)
        prompts = prompts.repeat_interleave(lanes, 0)
        out = attend(model, "sdpa").generate(prompts, attention_mask=torch.ones_like(prompts), use_cache=True,
                                             min_new_tokens=leaf, eos_token_id=None, **how)
        assert out.shape == (rows * lanes, prompt + leaf)
    def generate_batch():
        attention, config = continuous_batching()
        prompts = [random_tokens(prompt, rng) for _ in range(rows)]  # each is read once, then forked into lanes
        settings = GenerationConfig(num_return_sequences=lanes, eos_token_id=-1, **how)
        out = attend(model, attention).generate_batch(prompts, settings, config, persistent_manager=True).values()
        if [len(chain.generated_tokens) for chain in out] != [leaf] * rows * lanes:
            raise RuntimeError(f"{len(out)} of {rows * lanes} chains came back, {[x.error for x in out][:1]}")
    return [sample, generate, generate_batch]

def sampling(size: str, shapes: dict, device: torch.device, repeats: int, paged: bool) -> None:
    print(f"\n## A. Sampling ({size})")
    table("rows x lanes", "prompt + leaf", "generate, s", "generate_batch, s", "tree_grpo.sample, s", "tokens/s",
          "speed-up over generate", "over generate_batch")
    model, short, long, notes = sampling_model(new_model(size, device)), [], [], []
    for shape in shapes["A"]:
        ways = samplers(model, shape, device)
        try:
            if not paged:
                raise RuntimeError("made for GPUs, it runs on a CPU with --paged only")
            ways[-1]()
            notes.append(f"generate_batch shares the prompt among its lanes; attention {continuous_batching()[0]}")
        except Exception as error:  # noqa: BLE001 (it is new, and differs from version to version)
            notes.append(f"generate_batch was left out: {' '.join(str(error).split())[:200] or type(error).__name__}")
            ways.pop()
        ours, theirs, *batched = timed(ways, repeats, device)
        if hasattr(model, "destroy_cached_continuous_batching_manager"):
            model.destroy_cached_continuous_batching_manager()  # it is made for one shape, and holds its cache
        rows, lanes, prompt, leaf = shape
        name, speed = (f"{rows} x {lanes}", f"{prompt} + {leaf}"), theirs / ours
        row(*name, f"{theirs:.3f}", f"{batched[0]:.3f}" if batched else "-", f"{ours:.3f}",
            f"{rows * lanes * leaf / ours:,.0f}", f"{speed:.2f} x", f"{batched[0] / ours:.2f} x" if batched else "-")
        if speed < (2 if prompt > leaf else 1):
            (long if prompt > leaf else short).append(f"{', '.join(name)} ({speed:.2f} x)")
    print("".join(f"\n{note}" for note in dict.fromkeys(notes)))
    verdict("`sample` at least as fast as `generate` where the prompt is not longer than the leaf", short)
    verdict("`sample` at least twice as fast as `generate` where the prompt is longer", long)

# --------------------------------------------------------------------------------------------------------- B. training
def with_advantages(root: Node, weight: float) -> Sample:
    leaves = root.leaves()
    return Sample(root, leaves, list(torch.randn(len(leaves))), weight / len(leaves))

def star(rows: int, leaves: int, prompt: int, leaf: int) -> list[Sample]:
    """Trees without inner forks: random prompts, and below each its leaves, which are sampled throughout."""
    rng, roots = random.Random(0), []
    torch.manual_seed(0)
    for _ in range(rows):
        roots.append(new_root(prompt, rng))
        for _ in range(leaves):
            Node(roots[-1]).add(random_tokens(leaf, rng), sampled=True)
    return [with_advantages(root, 1 / rows) for root in roots]

def comb(rows: int, prompt: int, turn: int, steps: int, rng: random.Random, write) -> list[Node]:
    """Trees with inner forks: two trunks of agent steps, each of `turn` tokens that write(nodes) adds and, but for the
    last, as many observed; and from each of their nodes that is no leaf a branch of one step. Returns the roots."""
    roots = [new_root(prompt, rng) for _ in range(rows)]
    ends, forks = roots * 2, roots * 2
    for step in range(steps):
        ends = [Node(end) for end in ends]
        write(ends)
        if step + 1 < steps:
            for node in ends:
                node.add(random_tokens(turn, rng))
            forks = forks + ends
    write([Node(fork) for fork in forks])
    return roots

def padded_logps(model, samples: list[Sample], device: torch.device) -> list[torch.Tensor]:
    """What packed_logps computes, from right-padded leaves, the head at sampled tokens only; (leaves, length) each."""
    paths = [leaf.path() for item in samples for leaf in item.leaves]
    tokens = [torch.tensor([t for node in path for t in node.tokens]) for path in paths]
    sampled = [torch.tensor([s for node in path for s in node.sampled]) for path in paths]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, True).to(device)
    read = torch.nn.utils.rnn.pad_sequence(sampled, True)[:, 1:].to(device)
    hidden = model.model(ids, use_cache=False).last_hidden_state  # causal, so the padding on the right is never seen
    logits = tree_grpo.full_precision(model.lm_head(hidden[:, :-1][read]))
    logps = -torch.nn.functional.cross_entropy(logits, ids[:, 1:][read], reduction="none")
    leaves = iter(logps.split([int(s.sum()) for s in sampled]))
    return [torch.nn.utils.rnn.pad_sequence(list(itertools.islice(leaves, len(item.leaves))), True) for item in samples]

def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

def backward(model, samples: list[Sample], logps: list[torch.Tensor], old: list[torch.Tensor], masks: list) -> float:
    """The loss of update without a reference model, its gradients left in the model. Lists have an entry per prompt."""
    loss = 0.0
    for item, logp, before, mask in zip(samples, logps, old, masks):
        advantages = torch.stack(list(item.advantages)).to(logp.device)
        loss = loss + grpo_loss(logp, before, None, advantages, mask)[0] * item.weight
    model.zero_grad(set_to_none=False)  # so that a call does not allocate them
    loss.backward()
    return float(loss.detach())

def packed_backward(model, samples: list[Sample], old: list[torch.Tensor] | None, device: torch.device) -> float:
    attend(model, "token_tree")
    packed = Packed(samples, device)
    with autocast(device):
        logps = packed_logps(model, packed)
    logps = [logps[index] for index, _ in packed.paths]
    return backward(model, samples, logps, old or [x.detach() for x in logps], [mask for _, mask in packed.paths])

def varied(samples: list[Sample], seed: int) -> list[Sample]:
    """The same trees, with runs of tokens up to a tenth longer. In training no two calls have the same shapes, and on CUDA
    a new one may cost more than the work."""
    rng, copies = random.Random(seed), {}
    for root in dict.fromkeys(item.root for item in samples):
        for node in root.below():
            copy_of = copies[node] = Node(copies.get(node.parent), node.tokens[:], node.sampled[:], node.logps[:])
            for _ in range(rng.randint(0, len(node.tokens) // 10)):
                copy_of.add(random_tokens(1, rng), node.sampled[-1])
    return [item._replace(root=copies[item.root], leaves=[copies[leaf] for leaf in item.leaves]) for item in samples]

def compare(model, samples: list[Sample], repeats: int, device: torch.device) -> tuple[list[float], float]:
    """Path tokens / unique tokens; then seconds, of fresh trees in each repeat, then MiB at the peak, packed and padded,
    forward and backward with all that prepares them. Besides the distance of the two gradients, relative to their length."""
    paths = [leaf.path() for item in samples for leaf in item.leaves]
    ratio = sum(map(tree_grpo.length, paths)) / tree_grpo.length({node for path in paths for node in path})
    packed = Packed(samples, device)
    torch.manual_seed(0)
    with torch.no_grad(), autocast(device):  # log-probs a little off the present, so that the loss depends on these
        old = packed_logps(attend(model, "token_tree"), packed)
        old += 0.1 * torch.randn_like(old)
    old, masks = [old[index] for index, _ in packed.paths], [mask for _, mask in packed.paths]
    def pack():
        return packed_backward(model, samples, old, device)
    def pad():
        attend(model, "sdpa")
        with autocast(device):
            logps = padded_logps(model, samples, device)
        return backward(model, samples, logps, old, masks)
    one, mine, other = pack(), [p.grad.clone() for p in model.parameters()], pad()
    far, long = (sum(float(x.square().sum()) for x in xs) for xs in (
        (p.grad - g for p, g in zip(model.parameters(), mine)), (p.grad for p in model.parameters())))
    gap = math.sqrt(far / long)
    del mine
    if device.type == "cpu":  # in float32, that is
        assert abs(one - other) < 1e-4, f"the losses differ: packed {one}, padded {other}"
        assert gap < 1e-4, f"the gradients differ by {gap} of their length"
    trees = [varied(samples, seed) for seed in range(repeats + 1)]
    packs, pads = iter(trees), iter([(items, [mask for _, mask in Packed(items, device).paths]) for items in trees])
    def pack_fresh():
        return packed_backward(model, next(packs), None, device)
    def pad_fresh():
        attend(model, "sdpa")
        items, masks = next(pads)
        with autocast(device):
            logps = padded_logps(model, items, device)
        return backward(model, items, logps, [x.detach() for x in logps], masks)
    seconds = timed([pack_fresh, pad_fresh], repeats, device)
    return [ratio, *seconds, *(peak_memory(way, device) for way in (pack, pad))], gap

TRAINING = "r", "padded, s", "packed, s", "speed-up", "speed-up / r", "padded, MiB", "packed, MiB", "ratio"

def compare_row(name: tuple, model, samples: list[Sample], repeats: int, device: torch.device) -> tuple:
    """Prints the row of TRAINING for these samples. Returns r, the speed-up, and the distance of the gradients."""
    (ratio, packed, padded, small, large), gap = compare(model, samples, repeats, device)
    speed, memory = padded / packed, ("-",) * 3
    if small is not None:
        memory = f"{large:.1f}", f"{small:.1f}", f"{large / max(small, 0.1):.2f} x"
    row(*name, f"{ratio:.2f}", f"{padded:.3f}", f"{packed:.3f}", f"{speed:.2f} x", f"{speed / ratio:.2f}", *memory)
    return ratio, speed, gap

def other_advantages(samples: list[Sample]) -> list[Sample]:
    """Random ones, as flat groups have no gradient, which could not be compared."""
    torch.manual_seed(0)
    return [item._replace(advantages=list(torch.randn(len(item.leaves)))) for item in samples]

def training(size: str, shapes: dict, device: torch.device, repeats: int, built_in) -> None:
    print(f"\n## B. Training, forward + backward ({size})")
    print("\nr is the ratio of path tokens to unique tokens; MiB: at the peak, beyond weights and gradients." + (
        "" if size == "tiny" else "\nWith so many words in the vocabulary packed_logps also runs the head in chunks."))
    slower, behind, gaps = [], [], []
    def report(name: tuple, model, samples: list[Sample], own: bool) -> None:
        ratio, speed, gap = compare_row(name, model, samples, repeats, device)
        label = " ".join(map(str, name))
        gaps.append(gap)
        if speed < 1:
            slower.append(f"{label} ({speed:.2f} x)")
        if own and ratio >= 2 and speed < 0.6 * ratio:
            behind.append(f"{label} ({speed / ratio:.2f})")
    table("stars: rows x leaves x (prompt + leaf), width", *TRAINING)
    for rows, leaves, prompt, leaf, width in shapes["B"]:
        model = new_model(size, device, width)
        name = f"{rows} x {leaves} x ({prompt} + {leaf}), {model.config.hidden_size}"
        report((name,), model, star(rows, leaves, prompt, leaf), False)
    table("inner forks and observations: rows x (prompt, then steps of turn + turn)", *TRAINING)
    for rows, prompt, turn, steps in shapes["forks"]:
        model, rng = new_model(size, device), random.Random(0)
        def write(nodes, turn=turn, rng=rng):
            for node in nodes:
                node.add(random_tokens(turn, rng), sampled=True)
        samples = [with_advantages(root, 1 / rows) for root in comb(rows, prompt, turn, steps, rng, write)]
        report((f"{rows} x ({prompt}, {steps} of {turn} + {turn})",), model, samples, False)
    if built_in:
        table("the script's own trees, 16 prompts", "leaves", *TRAINING)
        model, tokenizer = built_in
        for topk, (M, N, L) in itertools.product((1, 4), TREES):
            agent = tree_grpo.Agent(model, tokenizer, own_args(device, M=M, N=N, L=L, topk=topk), [], [])
            samples = other_advantages(agent.credit(0, agent.rollout(0)[0]))
            name = f"M {M}, N {N}, L {L}, topk {topk}", sum(len(item.leaves) for item in samples)
            report(name, model, samples, True)
            attend(model, "token_tree")
    print(f"\nThe gradients of the two ways differ by at most {max(gaps):.1e} of their length.")
    verdict("packed never slower than padded", slower)
    if built_in:
        verdict("on the script's own trees with r >= 2 at least 0.6 r times as fast", behind)

# ----------------------------------------------------------------------------------------------------- C. a whole step
def own_args(device: torch.device, **changes):
    """Arguments as `python tree_grpo.py` has them, on the built-in task, but for a shorter warm start."""
    return tree_grpo.Args(**{"lr": 5e-4, "topk": 1, "turn_tokens": 32, "sft_steps": 120, "dtype": "float32",
                             "device": str(device), **changes})

def reward(tokens: list[int]) -> float:
    return sum(t % 2 for t in tokens) / len(tokens)

def step_by_step(size: str, shape: tuple[int, int, int, int], device: torch.device, repeats: int) -> list[float]:
    """Median seconds of a step of TRL, of its generate, of a step of tree_grpo and of its sample. They take turns: each
    step of TRL's trainer comes after one of ours. Both start from the same weights; their first steps do not count."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.trainer_callback import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    rows, lanes, prompt, leaf = shape
    cuda, rng, generator = device.type == "cuda", random.Random(0), torch.Generator(device).manual_seed(0)
    wait = torch.cuda.synchronize if cuda else lambda: None
    seconds = {name: [] for name in ("TRL", "generate", "ours", "sample")}
    def clocked(name, function):
        def call(*args, **kwargs):
            wait()
            began = time.perf_counter()
            result = function(*args, **kwargs)
            wait()
            seconds[name].append(time.perf_counter() - began)
            return result
        return call
    model = new_model(size, device)
    reference = copy.deepcopy(model).requires_grad_(False)
    policy = sampling_model(copy.deepcopy(model)) if cuda else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0)
    args = own_args(device, kl_coef=0.001, dtype="bfloat16" if cuda else "float32")
    sample = clocked("sample", draw)
    def step():
        roots = [new_root(prompt, rng) for _ in range(rows)]
        sample(policy, [Node(root, tree=tree) for root in roots for tree in range(lanes)], leaf, generator)
        samples = []
        for root in roots:
            rewards = torch.tensor([reward(node.tokens) for node in root.children])
            advantages = tree_grpo.tree_advantages(rewards, torch.arange(lanes))
            samples.append(Sample(root, root.children, list(advantages), 1 / lanes / rows))
        tree_grpo.update(model, reference, optimizer, samples, args)
        for copied, master in zip(policy.parameters(), model.parameters() if policy is not model else ()):
            copied.data.copy_(master.data)
    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clocked("ours", step)()
            wait()
            self.began = time.perf_counter()
        def on_step_end(self, *_, **__):
            wait()
            seconds["TRL"].append(time.perf_counter() - self.began)
    def rewards(completion_ids, **_):
        assert [len(tokens) for tokens in completion_ids] == [leaf] * rows * lanes
        return [reward(tokens) for tokens in completion_ids]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(model.config.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0", unk_token="w0")
    texts = [" ".join(f"w{t}" for t in random_tokens(prompt, rng)) for _ in range(rows * (repeats + 1))]
    assert {len(ids) for ids in tokenizer(texts)["input_ids"]} == {prompt}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = GRPOConfig(
            output_dir=folder, max_steps=repeats + 1, per_device_train_batch_size=rows * lanes, num_generations=lanes,
            gradient_accumulation_steps=1, max_completion_length=leaf, generation_kwargs={"min_new_tokens": leaf},
            temperature=1.0, top_p=1.0, top_k=0, beta=0.001, loss_type="grpo", learning_rate=1e-6, adam_beta2=0.99,
            lr_scheduler_type="constant", gradient_checkpointing=False, bf16=cuda, use_cpu=not cuda,
            dataloader_pin_memory=cuda, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
        trainer = GRPOTrainer(
            model=folder, reward_funcs=rewards, args=config, processing_class=tokenizer, callbacks=[Turns()],
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]))
        trainer.remove_callback(PrinterCallback)
        trainer.model.generate = clocked("generate", trainer.model.generate)
        trainer.train()
    assert {len(times) for times in seconds.values()} == {repeats + 1}, seconds
    return [statistics.median(times[1:]) for times in seconds.values()]

def built_in_step(device: torch.device, repeats: int, built_in) -> None:
    print("\nA step of the built-in task (16 prompts, M 2, N 2, L 1, KL to a reference model)")
    table("rollout, s", "credit and update, s", "generated tokens", "per second of rollout", "per second of the step")
    (model, tokenizer), args = built_in, own_args(device)
    reference = copy.deepcopy(model).requires_grad_(False)
    agent, grown = tree_grpo.Agent(model, tokenizer, args, [], []), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)  # so that the policy stays what it is
    def rollout():
        grown.append(agent.rollout(0))
    def learn():
        tree_grpo.update(model, reference, optimizer, agent.credit(0, grown[-1][0]), args)
    first, second = timed([rollout, learn], repeats, device)
    n = grown[-1][1]["generated_tokens"]
    row(f"{first:.3f}", f"{second:.3f}", n, f"{n / first:,.0f}", f"{n / (first + second):,.0f}")

def whole_step(size: str, shapes: dict, device: torch.device, repeats: int, built_in) -> None:
    print(f"\n## C. A whole step ({size})")
    if built_in:
        built_in_step(device, repeats, built_in)
    try:
        import trl
    except ImportError:
        print("\nFor the comparison with TRL: pip install trl")
        return
    print(f"\nAgainst the GRPOTrainer of trl {trl.__version__}, which samples by `generate`: one gradient step on the "
          "whole batch, the same model, lengths and beta.")
    table("rows x lanes x (prompt + leaf)", "TRL, s", "of it generate", "tree_grpo, s", "of it sample", "speed-up",
          "in sampling", "in the rest")
    slower = []
    for rows, lanes, prompt, leaf in shapes["C"]:
        name = f"{rows} x {lanes} x ({prompt} + {leaf})"
        theirs, generate, ours, sample = step_by_step(size, (rows, lanes, prompt, leaf), device, repeats)
        row(name, *(f"{s:.3f}" for s in (theirs, generate, ours, sample)), f"{theirs / ours:.2f} x",
            f"{generate / sample:.2f} x", f"{(theirs - generate) / (ours - sample):.2f} x")
        slower += [f"{name} ({theirs / ours:.2f} x)"] if theirs < 2 * ours else []
    verdict("a step at least twice as fast as TRL's", slower)

# ------------------------------------------------------------------------------------------------ D. how the cost grows
def growth(size: str, shapes: dict, device: torch.device, repeats: int) -> None:
    rows, lanes, prompt, leaf, turn = shapes["D"]
    print(f"\n## D. How the cost grows ({size}, {rows} prompts)")
    print(f"\nFirst stars of {lanes} leaves, {prompt} + {leaf} tokens, of which one number doubles. Then depth k: two "
          f"trunks of k agent steps, each of {turn} sampled\nand {turn} observed tokens, and from each of their nodes "
          "that is no leaf a branch of one step: tokens grow with k, and paths get longer.\nForward + backward are "
          "packed, over all that was sampled; x is the factor over the row above.")
    table("what doubles", "unique tokens", "x", "sampling, s", "x", "forward + backward, s", "x")
    rng, generator = random.Random(0), torch.Generator(device).manual_seed(0)
    sampler = sampling_model(new_model(size, device))
    trainer = new_model(size, device) if device.type == "cuda" else sampler  # in float32
    def grow_star(lanes: int, prompt: int) -> list[Node]:
        roots = [new_root(prompt, rng) for _ in range(rows)]
        draw(sampler, [Node(root) for root in roots for _ in range(lanes)], leaf, generator)
        return roots
    def grow_comb(steps: int) -> list[Node]:
        return comb(rows, prompt, turn, steps, rng, lambda nodes: draw(sampler, nodes, turn, generator))
    def measure(grow, *args) -> list[float]:  # unique tokens and the two times
        grown = []
        seconds = timed([lambda: grown.append(grow(*args))], repeats, device)
        samples = [with_advantages(root, 1 / rows) for root in grown[-1]]
        seconds += timed([lambda: packed_backward(trainer, samples, None, device)], repeats, device)
        return [sum(tree_grpo.length(root.below()) for root in grown[-1]), *seconds]
    blocks = [[(f"{n * lanes} leaves per prompt", grow_star, n * lanes, prompt) for n in (1, 2, 4)],
              [(f"prompt of {n * prompt} tokens", grow_star, lanes, n * prompt) for n in (1, 2, 4, 8)],
              [(f"depth {n}, {2 * n + 2} leaves", grow_comb, n) for n in (1, 2, 4, 8)]]
    for block in blocks:
        above = None
        for name, *what in block:
            now = measure(*what)
            x = [f"{a / b:.2f}" for a, b in zip(now, above)] if above else [""] * 3
            row(name, f"{now[0]:,}", x[0], f"{now[1]:.3f}", x[1], f"{now[2]:.3f}", x[2])
            above = now

# ---------------------------------------------------------------------------------------------------- E. a decode step
def bandwidth(device: torch.device) -> float:
    """Bytes per second of memory, the best of reading a tensor larger than caches, and of copying it."""
    x = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    read, copied = timed([x.sum, lambda: y.copy_(x)], 5, device, min)
    return max(x.nbytes / read, 2 * x.nbytes / copied)

@torch.inference_mode()
def decode_step(model, shape: tuple[int, int, int, int], device: torch.device, repeats: int) -> tuple:
    """Seconds of a step that runs a token in each lane and draws the next (on CUDA recorded, a mean over the tokens between
    two looks of the host); seconds of the head alone; and the bytes of the keys and values that the step attends to."""
    rng, (rows, lanes, prompt, own) = random.Random(0), shape
    roots = [new_root(prompt, rng) for _ in range(rows)]
    tree_grpo.prefill(model, roots)
    flight = Lanes(model, [Node(root) for root in roots for _ in range(lanes)])
    flight.new = [random_tokens(own + 1, rng) for _ in flight.grid]
    flight.catch_up()
    generator, look = torch.Generator(device).manual_seed(0), tree_grpo.LOOK.get(device.type, 1)
    hidden = torch.randn(1, len(flight.grid), model.config.hidden_size, device=device, dtype=model.dtype)
    def head():
        return tree_grpo.products(hidden, model.lm_head.weight[None])
    def steps():  # the same again and again
        flight.decode(look, 1.0, 1.0, generator)
    several, once = timed([steps, head], 10 * repeats, device)
    kept = sum(kv.numel() // kv.shape[3] * (own + 1) for kv in flight.own) + sum(kv.numel() for kv in flight.shared)
    return several / look, once, kept * flight.own[0].element_size()

def decode(size: str, shapes: dict, device: torch.device, repeats: int) -> None:
    speed = bandwidth(device)
    print(f"\n## E. A decode step against reading weights and live keys and values once ({size})")
    print("\nThe bound is the bytes of the parameters and of all keys and values that a step attends to, a prompt's "
          f"counted once, over the\nmeasured {speed / 1e9:,.1f} GB/s of memory.")
    table("rows x lanes", "prompt + own", "parameters, MB", "keys and values, MB", "bound, ms", "measured, ms",
          "of it the head, ms", "measured / bound")
    model = sampling_model(new_model(size, device))
    for shape in shapes["E"]:
        whole, head, kept = decode_step(model, shape, device, repeats)
        weights = sum(p.nbytes for p in model.parameters())
        bound = (weights + kept) / speed
        row("{} x {}".format(*shape), "{2} + {3}".format(*shape), f"{weights / 1e6:.1f}", f"{kept / 1e6:.1f}",
            f"{1000 * bound:.3f}", f"{1000 * whole:.2f}", f"{1000 * head:.2f}", f"{whole / bound:.1f}")
    print("\n1 would be a step that only reads. Above it are arithmetic, the calls of some hundred operations, "
          "and keys, values and\nscores that are read or written more than once.")

# -------------------------------------------------------------------------------------------------------- F. treerl.py
def treerl_trees(device: torch.device, repeats: int) -> None:
    print("\n## F. treerl.py on its built-in task, 16 prompts\n\nTree and chains generate about as many tokens.")
    args = treerl.Args(sft_steps=200, max_tokens=64, dtype="float32", device=str(device))
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = treerl.calculator_model(args, device, Path(folder))
    solver, grown = treerl.Solver(model, tokenizer, args, [], []), []
    table("M, N, L, T", "leaves", "generated tokens", "chains", "chains, s", "tree, s", "tree / chains")
    def search(method: str, *shape):
        vars(args).update(zip("MNLT", shape), method=method)
        return solver.rollout(0)
    for shape in ((6, 2, 1, 2), (2, 2, 2, 2), (1, 2, 1, 2)):
        groups, told = search("treerl", *shape)
        chain = search("chainrl", 16, 0, 0, 1)[1]["generated_tokens"] / 16
        M = round(told["generated_tokens"] / chain)
        ours, chains = timed([lambda shape=shape: search("treerl", *shape), lambda M=M: search("chainrl", M, 0, 0, 1)],
                             repeats, device)
        grown.append((shape, groups))
        leaves = sum(len(root.leaves()) for _, root in groups)
        row(", ".join(map(str, shape)), leaves, f"{told['generated_tokens']:,}", M, f"{chains:.3f}", f"{ours:.3f}",
            f"{ours / chains:.2f}")
    table("treerl.py's own trees, 16 prompts", "leaves", *TRAINING)
    for shape, groups in grown:
        for keep in (10**6, 16):
            args.method, args.keep = "treerl", keep
            samples = other_advantages(solver.credit(0, groups))
            kept = sum(len(item.leaves) for item in samples)
            if keep == 16 and kept == sum(len(root.leaves()) for _, root in groups):
                continue  # there are no more than that
            name = f"{', '.join(map(str, shape))}{', 16 kept' * (keep == 16)}", kept
            compare_row(name, model, samples, repeats, device)
            attend(model, "token_tree")

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--parts", nargs="+", choices=tuple("ABCDEF"), default=tuple("ABCDEF"), help="default: all")
    parser.add_argument("--model", choices=("tiny", *SIZES), help="default: tiny on a CPU, both Qwens on CUDA")
    parser.add_argument("--repeats", type=int, help="timed calls of each way, of which the median counts "
                                                    "(default: 5 on a CPU, 2 on CUDA)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--paged", action="store_true", help="continuous batching (part A) on a CPU too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    repeats = args.repeats or (2 if cuda else 5)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    AttentionInterface.register("token_tree", tree_grpo.token_tree)
    where = torch.cuda.get_device_name(device) if cuda else f"{args.threads} CPU threads"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {where}, "
          f"{'bfloat16 (training: autocast)' if cuda else 'float32'}, medians of {repeats}")
    for size in [args.model] if args.model else SIZES if cuda else ["tiny"]:
        built_in, shapes = None, TINY if size == "tiny" else QWEN if cuda else QWEN_ON_CPU
        if size == "tiny" and {"B", "C"} & set(args.parts):
            with tempfile.TemporaryDirectory() as folder:
                built_in = tree_grpo.built_in_model(own_args(device), device, Path(folder))
        for part in args.parts:
            try:
                if part == "A":
                    sampling(size, shapes, device, repeats, cuda or args.paged)
                if part == "B":
                    training(size, shapes, device, repeats, built_in)
                if part == "C":
                    whole_step(size, shapes, device, repeats, built_in)
                if part == "D":
                    growth(size, shapes, device, repeats)
                if part == "E":
                    decode(size, shapes, device, repeats)
                if part == "F" and size == "tiny":
                    treerl_trees(device, repeats)
            except Exception as error:  # on a GPU other parts may still fit into its memory
                if not cuda:
                    raise
                traceback.print_exc()
                print(f"\nThe rest of part {part} is left out: {type(error).__name__}: {str(error)[:200]}", flush=True)
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()

if __name__ == "__main__":
    main()
