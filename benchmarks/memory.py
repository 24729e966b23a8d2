"""Memory of a run by model size, `python benchmarks/memory.py`: what the scripts expect before they start, for
tree_grpo.py --model with its defaults and on less memory. With `--measure` instead: what a training step of a small shape
takes here, sampling and update, beside what is expected of it."""

import argparse
import ctypes
import gc
import multiprocessing
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import speed

import tree_grpo
from tree_grpo import Node

SIZES = {**speed.SIZES, "3B": (2048, 36, 16, 2, 11008, 151936), "7B": (3584, 28, 28, 4, 18944, 152064)}
SHAPES = [("135M", 4, 64, 32, 32, False), ("135M", 4, 64, 64, 64, False), ("135M", 4, 64, 32, 32, True),
          ("tiny", 16, 64, 128, 64, False)]  # prompts, their tokens, lanes in all, tokens of each, checkpointing
speed.SIZES["135M"] = (576, 30, 9, 3, 1536, 49152)


def expected() -> None:
    speed.table("model", "as it is", "`--micro-tokens 4096`", "`--grad-checkpointing`", "both, `--kl-coef 0`, `--eval-batch 32`")
    for name, (width, layers, heads, kv_heads, inner, vocabulary) in SIZES.items():
        with torch.device("meta"):  # no weights
            model = Qwen2ForCausalLM(Qwen2Config(
                vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=name != "7B"))
        cells = []
        for changes in ({}, {"micro_tokens": 4096}, {"grad_checkpointing": True},
                        {"micro_tokens": 4096, "grad_checkpointing": True, "kl_coef": 0.0, "eval_batch": 32}):
            args = tree_grpo.Args(dtype="bfloat16", turn_tokens=500, **changes)
            leaves = max(args.eval_batch, args.prompts * args.M * (1 + args.N * args.L))
            tokens = args.max_turns * (args.turn_tokens + args.info_tokens) - args.info_tokens
            shape = {"prompts": max(args.eval_batch, args.prompts), "prompt": 200, "leaves": leaves, "tokens": tokens,
                     "lanes": max(args.eval_batch, args.prompts * args.M * args.N)}
            cells.append(f"{tree_grpo.memory_needed(model, args, **shape):.0f} GB")
        speed.row(f"Qwen2.5-{name}", *cells)


def memory_in_use(device: torch.device, peak: bool) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    name = "VmHWM" if peak else "VmRSS"
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name)))


def measured(device: str, size: str, prompts: int, prompt: int, lanes: int, tokens: int, recompute: bool) -> tuple:
    """GB at the peak of two training steps, and what memory_needed expects; called in a process of its own."""
    device = torch.device(device)
    AttentionInterface.register("token_tree", tree_grpo.token_tree)
    speed.new_model("tiny", device)  # what loading takes once and for all is not of a run
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before = memory_in_use(device, False)
    model = speed.new_model(size, device)
    if recompute:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(
            {"use_reentrant": False})
    args = speed.own_args(device, kl_coef=0.0, micro_tokens=10**6, grad_checkpointing=recompute)
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=1e-6), random.Random(0)
    for _ in range(2):  # in the second step the optimizer has its averages
        roots = [speed.new_root(prompt, rng) for _ in range(prompts)]
        nodes = [Node(root) for root in roots for _ in range(lanes // prompts)]
        generator = torch.Generator(device).manual_seed(0)
        tree_grpo.sample(model, nodes, [tokens] * lanes, lambda tokens: False, set(), generator, 1.0, 1.0, Counter())
        tree_grpo.forget(node for root in roots for node in root.below())
        tree_grpo.update(model, None, optimizer, [speed.with_advantages(root, 1 / prompts) for root in roots], args)
    gb = (memory_in_use(device, True) - before) / 1e9
    shape = {"prompts": prompts, "prompt": prompt, "lanes": lanes, "leaves": lanes, "tokens": tokens}
    return gb, tree_grpo.memory_needed(model, args, **shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if not options.measure:
        return expected()
    print(f"torch {torch.__version__}, {options.device}, float32")
    speed.table("model", "prompts x tokens", "lanes x tokens", "recomputed", "measured, GB", "expected, GB", "ratio")
    for size, prompts, prompt, lanes, tokens, recompute in SHAPES:
        with multiprocessing.get_context("spawn").Pool(1) as fresh:  # what another shape left free is not counted
            found, wanted = fresh.apply(measured, (options.device, size, prompts, prompt, lanes, tokens, recompute))
        speed.row(size, f"{prompts} x {prompt}", f"{lanes} x {tokens}", "yes" if recompute else "no", f"{found:.2f}",
                  f"{wanted:.2f}", f"{wanted / found:.2f}")


if __name__ == "__main__":
    main()
