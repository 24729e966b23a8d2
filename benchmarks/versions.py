"""The present engine beside that of commit e8a22ce, in turns within one run:

    git worktree add before e8a22ce && OMP_NUM_THREADS=1 python benchmarks/versions.py before

Prints a Markdown table of medians of CPU seconds; look at the ratios."""

import argparse
import importlib.util
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from common import table, tree_grpo
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

SAMPLED = [(8, 16, 64, 96), (8, 6, 200, 60), (4, 30, 400, 64), (16, 4, 64, 32), (16, 2, 16, 64)]
TRAINED = [(8, 16, 64, 96, 128), (8, 16, 192, 48, 128), (4, 30, 32, 24, 128), (4, 6, 200, 60, 256)]


def loaded(folder: str):
    spec = importlib.util.spec_from_file_location("before", Path(folder, "tree_grpo.py"))
    module = sys.modules["before"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_for(module, width: int = 128):
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    AttentionInterface.register(f"{module.__name__}_tree", module.token_tree)
    model.set_attn_implementation(f"{module.__name__}_tree")
    return model


def node(module, parent, tokens: list[int], sampled: bool):
    logps = [-1.0] * len(tokens) if sampled else []
    if module is tree_grpo:
        return module.Node(parent, tokens, logps)
    new = module.Node(parent)
    new.add(tokens, sampled, logps or None)
    return new


def sampling(module, model, shape: tuple, top_p: float, seed: int) -> None:
    rows, lanes, prompt, leaf = shape
    rng = random.Random(seed)
    roots = [node(module, None, rng.choices(range(512), k=prompt), False) for _ in range(rows)]
    nodes = [module.Node(root) for root in roots for _ in range(lanes)]
    limits = [rng.randint(leaf // 2, leaf) for _ in nodes]
    draws = torch.Generator().manual_seed(seed), 1.0, top_p, Counter()
    module.sample(model, nodes, limits, lambda tokens: False, set(), *draws, keep=False)


def updating(module, model, shape: tuple) -> None:
    rows, leaves, prompt, leaf, _ = shape
    rng, groups = random.Random(0), []
    for _ in range(rows):
        root = node(module, None, rng.choices(range(512), k=prompt), False)
        for _ in range(leaves):
            node(module, root, rng.choices(range(512), k=leaf), True)
        A = torch.randn(leaves, 1)
        kind = module.Group if module is tree_grpo else module.Sample
        groups.append(kind(root, root.leaves(), A if module is tree_grpo else list(A), 1 / rows))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    module.update(model, None, optimizer, groups, module.Args(dtype="float32", kl_coef=0.0))


def in_turns(ways: list, repeats: int) -> list[str]:
    seconds = []
    for i in range(repeats + 1):
        pair = [0.0, 0.0]
        for which in (0, 1) if i % 2 else (1, 0):
            began = time.process_time()
            ways[which](i)
            pair[which] = time.process_time() - began
        seconds.append(pair)
    before, now = zip(*seconds[1:])
    ratio = statistics.median(b / a for a, b in seconds[1:])
    return [f"{statistics.median(before):.3f}", f"{statistics.median(now):.3f}", f"{ratio:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="with the scripts of commit e8a22ce")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    modules, rows = (loaded(options.folder), tree_grpo), []
    models = [model_for(module) for module in modules]
    for top_p in (1.0, 0.95):
        for shape in SAMPLED:
            name = "sampling {} x {}, {} + {}".format(*shape)
            ways = []
            for m, model in zip(modules, models):
                ways.append(
                    lambda i, m=m, model=model, s=shape, p=top_p: sampling(m, model, s, p, i)
                )
            rows.append([f"{name}, top-p {top_p}", *in_turns(ways, options.repeats)])
    for shape in TRAINED:
        ways = []
        for m in modules:
            model = model_for(m, shape[-1])
            ways.append(lambda i, m=m, model=model, s=shape: updating(m, model, s))
        name = "update {} x {} x ({} + {}), width {}".format(*shape)
        rows.append([name, *in_turns(ways, options.repeats)])
    print(f"torch {torch.__version__}, float32, medians of {options.repeats}\n")
    print(table(["rows x lanes, prompt + leaf", "before, s", "now, s", "now / before"], rows))


if __name__ == "__main__":
    main()
