"""How fast tree_grpo.py is, beside what one would otherwise run: `python benchmarks/speed.py`. Prints Markdown tables.

A. Sampling with a shared prompt, against `generate` of transformers on as many independent chains.
B. Training on each token of a tree once, against the leaves as a right-padded batch.
C. A whole step of the built-in task.

What is compared takes turns within one run (A B A B), so a machine that slows down does so for both; times are medians.
Look at the ratios, not at the seconds. Where other processes use the same cores, start it with OMP_WAIT_POLICY=passive:
else threads that spin while they wait for each other make everything several times slower, and the ratios meaningless.
"""

import argparse
import copy
import itertools
import logging
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tree_grpo
from tree_grpo import Node, Packed, Sample, grpo_loss, packed_logps

SAMPLING = [(8, 16, 64, 96), (8, 6, 200, 60), (4, 30, 400, 64), (16, 4, 64, 32), (16, 2, 16, 64)]
STARS = [(8, 16, 64, 96, 128), (8, 16, 192, 48, 128), (4, 30, 32, 24, 128), (4, 6, 200, 60, 256), (2, 16, 400, 64, 512)]
TREES = [(2, 2, 1), (2, 2, 2), (4, 4, 1), (2, 4, 2)]  # M, N, L, each with 1 and with 4 passages per search (topk)

# ------------------------------------------------------------------------------------------------------------- helpers
def timed(ways: list, repeats: int, device: torch.device) -> list[float]:
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
    return [statistics.median(times[1:]) for times in seconds]

def table(*columns: str) -> None:
    print("\n" + "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)

def row(*cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)

def verdict(requirement: str, misses: list[str]) -> None:
    print(f"\n{requirement}: " + (f"DOES NOT HOLD for {'; '.join(misses)}" if misses else "holds"), flush=True)

def new_model(width: int, device: torch.device):
    """A Qwen2 of 4 layers with random weights, its attention being token_tree."""
    config = Qwen2Config(
        vocab_size=500, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=0, attn_implementation="token_tree",
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).float().to(device).eval()

def plain_copy(model):
    """The same weights with the usual attention of transformers."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    return plain

def random_tokens(n: int, rng: random.Random) -> list[int]:
    return [rng.randrange(1, 500) for _ in range(n)]

# --------------------------------------------------------------------------------------------------------- A. sampling
def generate_and_sample(model, plain, shape: tuple[int, int, int, int], device: torch.device) -> list:
    """Two functions that draw rows x lanes x leaf tokens: `generate`, from a prompt for each lane, and `sample`."""
    rows, lanes, prompt, leaf = shape
    prompts = [random_tokens(prompt, random.Random(r)) for r in range(rows)]
    repeated = torch.tensor([tokens for tokens in prompts for _ in range(lanes)], device=device)
    generator = torch.Generator(device).manual_seed(0)

    def generate():
        out = plain.generate(repeated, attention_mask=torch.ones_like(repeated), do_sample=True, temperature=1.0,
                             top_k=0, top_p=1.0, use_cache=True, max_new_tokens=leaf, min_new_tokens=leaf,
                             eos_token_id=None, pad_token_id=0)
        assert out.shape == (rows * lanes, prompt + leaf)

    def sample():
        nodes, counts = [], Counter()
        for tokens in prompts:
            root = Node()
            root.add(list(tokens))
            nodes += [Node(root) for _ in range(lanes)]
        tree_grpo.sample(model, nodes, [leaf] * len(nodes), lambda tokens: False, set(), generator, 1.0, 1.0, counts)
        assert counts["generated_tokens"] == rows * lanes * leaf

    return [generate, sample]

def sampling(device: torch.device, repeats: int) -> None:
    print("\n## A. Sampling (4 layers, width 128)")
    table("rows x lanes", "prompt + leaf", "generate, s", "tree_grpo.sample, s", "tokens/s", "speed-up")
    model, short, long = new_model(128, device), [], []
    plain = plain_copy(model)
    for shape in SAMPLING:
        theirs, ours = timed(generate_and_sample(model, plain, shape, device), repeats, device)
        rows, lanes, prompt, leaf = shape
        name, speed = (f"{rows} x {lanes}", f"{prompt} + {leaf}"), theirs / ours
        row(*name, f"{theirs:.3f}", f"{ours:.3f}", f"{rows * lanes * leaf / ours:,.0f}", f"{speed:.2f} x")
        if speed < (2 if prompt > leaf else 1):
            (long if prompt > leaf else short).append(f"{', '.join(name)} ({speed:.2f} x)")
    verdict("`sample` at least as fast as `generate` where the prompt is shorter than the leaf", short)
    verdict("`sample` at least twice as fast where the prompt is longer", long)

# --------------------------------------------------------------------------------------------------------- B. training
def star(rows: int, leaves: int, prompt: int, leaf: int) -> list[Sample]:
    """Trees without inner forks: random prompts, and below each its leaves, which are sampled throughout."""
    rng, samples = random.Random(0), []
    for _ in range(rows):
        root = Node()
        root.add(random_tokens(prompt, rng))
        for _ in range(leaves):
            Node(root).add(random_tokens(leaf, rng), sampled=True)
        advantages = [torch.tensor(rng.gauss(0, 1)) for _ in root.children]
        samples.append(Sample(root, root.children, advantages, 1 / leaves / rows))
    return samples

def padded_logps(model, samples: list[Sample], device: torch.device) -> list[torch.Tensor]:
    """What packed_logps computes, from right-padded leaves, the head at sampled tokens only; (leaves, length) each."""
    paths = [leaf.path() for item in samples for leaf in item.leaves]
    tokens = [torch.tensor([t for node in path for t in node.tokens]) for path in paths]
    sampled = [torch.tensor([s for node in path for s in node.sampled]) for path in paths]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, True).to(device)
    read = torch.nn.utils.rnn.pad_sequence(sampled, True)[:, 1:].to(device)
    attended = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], True).to(device)
    hidden = model.model(ids, attention_mask=attended, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][read])
    logps = -torch.nn.functional.cross_entropy(logits, ids[:, 1:][read], reduction="none")
    leaves = iter(logps.split([int(s.sum()) for s in sampled]))
    return [torch.nn.utils.rnn.pad_sequence(list(itertools.islice(leaves, len(item.leaves))), True) for item in samples]

def compare(model, plain, samples: list[Sample], repeats: int, device: torch.device) -> tuple[float, float, float]:
    """Path tokens / unique tokens, and seconds packed and padded, forward and backward with all that prepares them."""
    paths = [leaf.path() for item in samples for leaf in item.leaves]
    ratio = sum(map(tree_grpo.length, paths)) / tree_grpo.length({node for path in paths for node in path})
    packed = Packed(samples, device)
    torch.manual_seed(0)
    with torch.no_grad():  # old log-probs a little off the present ones, so that the loss depends on these
        old = packed_logps(model, packed)
        old += 0.1 * torch.randn_like(old)
    parts = [(item, old[index], mask) for item, (index, mask) in zip(samples, packed.paths)]

    def backward(model, logps: list[torch.Tensor]) -> torch.Tensor:
        loss = 0.0
        for (item, before, mask), logp in zip(parts, logps):
            advantages = torch.stack(list(item.advantages)).to(device)
            loss = loss + grpo_loss(logp, before, None, advantages, mask)[0] * item.weight
        model.zero_grad()
        loss.backward()
        return loss.detach()

    def pack():
        packed = Packed(samples, device)
        logps = packed_logps(model, packed)
        return backward(model, [logps[index] for index, _ in packed.paths])

    def pad():
        return backward(plain, padded_logps(plain, samples, device))

    one, other = float(pack()), float(pad())
    assert abs(one - other) < 1e-4, f"the losses differ: packed {one}, padded {other}"
    gradients = [torch.cat([p.grad.reshape(-1) for p in m.parameters()]) for m in (model, plain)]
    gap = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    assert gap < 1e-4, f"the gradients differ by {gap} of their length"
    return ratio, *timed([pack, pad], repeats, device)

def training(device: torch.device, repeats: int, built_in) -> None:
    print("\n## B. Training, forward + backward")
    print("\nr is the ratio of path tokens to unique tokens; all losses and gradients agree to 1e-4.")
    columns = "r", "padded, s", "packed, s", "speed-up", "speed-up / r"
    slower, behind = [], []

    def report(name: tuple, ratio: float, packed: float, padded: float, own: bool) -> None:
        speed = padded / packed
        row(*name, f"{ratio:.2f}", f"{padded:.3f}", f"{packed:.3f}", f"{speed:.2f} x", f"{speed / ratio:.2f}")
        label = " ".join(map(str, name))
        if speed < 1:
            slower.append(f"{label} ({speed:.2f} x)")
        if own and ratio >= 2 and speed < 0.6 * ratio:
            behind.append(f"{label} ({speed / ratio:.2f})")

    table("stars: rows x leaves x (prompt + leaf), width", *columns)
    for rows, leaves, prompt, leaf, width in STARS:
        model = new_model(width, device)
        result = compare(model, plain_copy(model), star(rows, leaves, prompt, leaf), repeats, device)
        report((f"{rows} x {leaves} x ({prompt} + {leaf}), {width}",), *result, False)
    table("the script's own trees, 16 prompts", "leaves", *columns)
    model, tokenizer = built_in
    for topk, (M, N, L) in itertools.product((1, 4), TREES):
        agent = tree_grpo.Agent(model, tokenizer, own_args(device, M=M, N=N, L=L, topk=topk), [], [])
        samples = agent.credit(0, agent.rollout(0)[0])
        torch.manual_seed(0)  # other advantages, as flat groups have no gradient, which could not be compared
        samples = [item._replace(advantages=list(torch.randn(len(item.leaves)))) for item in samples]
        name = f"M {M}, N {N}, L {L}, topk {topk}", sum(len(item.leaves) for item in samples)
        report(name, *compare(model, plain_copy(model), samples, repeats, device), True)
    verdict("packed never slower than padded", slower)
    verdict("on the script's own trees with r >= 2 at least 0.6 r times as fast", behind)

# ------------------------------------------------------------------------------------------------------ C. a whole step
def own_args(device: torch.device, **changes):
    """Arguments as `python tree_grpo.py` has them, on the built-in task."""
    return tree_grpo.Args(**{"lr": 5e-4, "topk": 1, "turn_tokens": 32, "sft_steps": 120, "dtype": "float32",
                             "device": str(device), **changes})

def whole_step(device: torch.device, repeats: int, built_in) -> None:
    print("\n## C. A step of the built-in task (16 prompts, M 2, N 2, L 1, KL to a reference model)")
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

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each way, of which the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    AttentionInterface.register("token_tree", tree_grpo.token_tree)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{args.threads} CPU threads"
    print(f"torch {torch.__version__}, {where}, float32, medians of {args.repeats}")
    sampling(device, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        built_in = tree_grpo.built_in_model(own_args(device), device, Path(folder))
        training(device, args.repeats, built_in)
        whole_step(device, args.repeats, built_in)

if __name__ == "__main__":
    main()
