"""Memory of a run by model size, `python benchmarks/memory.py`: what tree_grpo.py --model needs with
its defaults and on less memory, by a formula. With `--measure` instead: what a training step of a
small shape takes here, sampling and update, beside what the formula expects of it."""

import multiprocessing
import random
from collections import Counter

import common
import speed
import torch
from common import table, tiny_args, tree_grpo
from transformers import Qwen2ForCausalLM

SIZES = {  # width, layers, heads, KV heads, inner width, vocabulary
    **speed.SIZES,
    "3B": (2048, 36, 16, 2, 11008, 151936),
    "7B": (3584, 28, 28, 4, 18944, 152064),
}
SHAPES = [  # prompts, their tokens, lanes in all, tokens of each, recomputed
    ("135M", 4, 64, 32, 32, False),
    ("135M", 4, 64, 64, 64, False),
    ("135M", 4, 64, 32, 32, True),
    ("tiny", 16, 64, 128, 64, False),
]
speed.SIZES["135M"] = (576, 30, 9, 3, 1536, 49152)
LESS = {"micro_tokens": 4096, "grad_checkpointing": True, "kl_coef": 0.0, "at_once": 32}
COLUMNS = {
    "as it is": {},
    "`--micro-tokens 4096`": {"micro_tokens": 4096},
    "`--grad-checkpointing`": {"grad_checkpointing": True},
    "both, `--kl-coef 0`, `--at-once 32`": LESS,
}


def memory_needed(model, args, prompts: int, prompt: int, lanes: int, leaves: int, tokens: int):
    """About how many GB a run takes at its peak if all rollouts get as long as they may.

    prompts: sampled from together, `prompt` tokens long; lanes: in flight below them; leaves: of their trees, whose
    keys and values are kept; tokens: the most of a path below its prompt."""
    c, size = model.config, 2 if args.dtype == "bfloat16" else 4
    W, layers, heads = c.hidden_size, c.num_hidden_layers, c.num_attention_heads
    groups, D = heads // c.num_key_value_heads, getattr(c, "head_dim", None) or W // heads
    parameters = sum(p.numel() for p in model.parameters())
    weights = 12 * parameters  # float32, with AdamW's two averages
    weights += 2 * parameters if size == 2 else 0  # the copy that samples
    weights += 4 * parameters if args.kl_coef else 0  # the reference

    kv = 2 * layers * c.num_key_value_heads * D * size  # of a token
    # Lanes are made again when full. The new ones are beside the nodes, which for a moment hold all that was sampled.
    room = 1 + 64
    while room < tokens:
        room += max(64, room // 2)
    sampling = kv * (2 * prompts * prompt + lanes * room + leaves * tokens)
    sampling += 16 * min(tree_grpo.MOST_SCORES, lanes * heads * tokens)  # pieces, or one token each
    sampling += 28 * lanes * c.vocab_size  # logits, what is drawn from, its running sum

    packed = min(args.micro_tokens, prompts * prompt + leaves * tokens)
    layer = 58 * W + (11 if size == 2 else 16) * c.intermediate_size  # kept of a token for backward
    if args.grad_checkpointing:
        layer = layer / layers + 4 * W
    training = packed * (layer * layers + groups * size * (prompt + tokens))  # and masks
    training += 16 * min(2**26, packed * c.vocab_size)  # a chunk of the head
    training += (6 if size == 2 else 4) * parameters  # gradients, and the weights cast by autocast
    return (weights + max(sampling, training)) / 1e9 + 0.1  # workspaces


def expected() -> None:
    lines = []
    for name in ("0.5B", "1.5B", "3B", "7B"):
        with torch.device("meta"):  # no weights
            model = Qwen2ForCausalLM(speed.config_of(SIZES[name], tied=name != "7B"))
        cells = []
        for changes in COLUMNS.values():
            args = tree_grpo.Args(dtype="bfloat16", turn_tokens=500, **changes)
            sampled = min(args.prompts, args.at_once)
            evaluated = min(args.eval_prompts, args.at_once)  # a chain each
            shape = {
                "prompts": max(sampled, evaluated),
                "prompt": 200,
                "lanes": max(evaluated, sampled * args.M * args.N),
                "leaves": max(evaluated, sampled * args.M * (1 + args.N * args.L)),
                "tokens": args.max_turns * (args.turn_tokens + args.info_tokens) - args.info_tokens,
            }
            cells.append(f"{memory_needed(model, args, **shape):.0f} GB")
        lines.append([f"Qwen2.5-{name}", *cells])
    print(table(("model", *COLUMNS), lines))


def measured(device: str, size: str, prompts: int, prompt: int, lanes: int, tokens: int, recompute: bool) -> tuple:
    """GB at the peak of two training steps, and what memory_needed expects; called in a process of its own."""
    device, expected = torch.device(device), []
    speed.new_model("tiny", device)  # what loading takes once and for all is not of a run
    args = tiny_args(tree_grpo, kl_coef=0.0, micro_tokens=10**6, grad_checkpointing=recompute)

    def two_steps():
        model = speed.new_model(size, device)
        tree_grpo.policy_and_reference(args, model, "")  # switches recomputing on
        optimizer, rng = torch.optim.AdamW(model.parameters(), lr=1e-6), random.Random(0)
        for _ in range(2):  # in the second step the optimizer has its averages
            nodes = speed.stars(prompts, lanes // prompts, prompt, rng)
            roots = list(dict.fromkeys(node.parent for node in nodes))
            draws = torch.Generator(device).manual_seed(0), 1.0, 1.0, Counter()
            tree_grpo.sample(model, nodes, [tokens] * lanes, lambda tokens: False, set(), *draws)
            tree_grpo.forget(node for root in roots for node in root.below())
            groups = [speed.with_advantages(root, 1 / prompts) for root in roots]
            tree_grpo.update(model, None, optimizer, groups, args)
        shape = {"prompts": prompts, "prompt": prompt, "lanes": lanes, "leaves": lanes, "tokens": tokens}
        expected.append(memory_needed(model, args, **shape))

    return speed.peak_memory(two_steps, device) * 2**20 / 1e9, *expected


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if not options.measure:
        return expected()
    lines = []
    for size, prompts, prompt, lanes, tokens, recompute in SHAPES:
        # A process for each: what another shape left free is not counted.
        shape = (options.device, size, prompts, prompt, lanes, tokens, recompute)
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            found, wanted = fresh.apply(measured, shape)
        line = [size, f"{prompts} x {prompt}", f"{lanes} x {tokens}", "yes" if recompute else "no"]
        lines.append([*line, f"{found:.2f}", f"{wanted:.2f}", f"{wanted / found:.2f}"])
    print(f"torch {torch.__version__}, {options.device}, float32\n")
    print(table("model|prompts x tokens|lanes x tokens|recomputed|measured, GB|expected, GB|ratio", lines))


if __name__ == "__main__":
    main()
