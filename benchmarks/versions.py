"""The present engine beside that of commit e8a22ce, in turns within one run:

    git worktree add before e8a22ce && OMP_NUM_THREADS=1 python benchmarks/versions.py before

Prints a Markdown table of medians of CPU seconds; look at the ratios."""

import functools
import importlib.util
import itertools
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import common
import speed
import torch
from common import table, tree_grpo
from transformers import AttentionInterface, Qwen2ForCausalLM

SAMPLED = [(8, 16, 64, 96), (8, 6, 200, 60), (4, 30, 400, 64), (16, 4, 64, 32), (16, 2, 16, 64)]
TRAINED = [(8, 16, 64, 96, 128), (8, 16, 192, 48, 128), (4, 30, 32, 24, 128), (4, 6, 200, 60, 256)]


def loaded(folder: str):
    spec = importlib.util.spec_from_file_location("before", Path(folder, "tree_grpo.py"))
    module = sys.modules["before"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_for(module, width: int = 128):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(speed.config_of((width, 3, 4, 2, 2 * width, 512))).eval()
    AttentionInterface.register(f"{module.__name__}_tree", module.token_tree)
    return speed.attend(model, f"{module.__name__}_tree")


def node(module, parent, tokens: list[int], sampled: bool):
    logps = [-1.0] * len(tokens) if sampled else []
    if module is tree_grpo:
        return module.Node(parent, tokens, logps)
    new = module.Node(parent)
    new.add(tokens, sampled, logps or None)
    return new


def sampling(module, model, shape: tuple, top_p: float, seeds) -> None:
    (rows, lanes, prompt, leaf), seed = shape, next(seeds)
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


def compared(ways: list, repeats: int) -> list[str]:
    before, now = speed.in_turns(ways, repeats, clock=time.process_time)
    ratio = statistics.median(b / a for a, b in zip(before, now))
    return [f"{statistics.median(before):.3f}", f"{statistics.median(now):.3f}", f"{ratio:.2f}"]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("folder", help="with the scripts of commit e8a22ce")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    modules, rows = (loaded(options.folder), tree_grpo), []
    models = [model_for(module) for module in modules]
    for top_p, shape in itertools.product((1.0, 0.95), SAMPLED):
        ways = []
        for module, model in zip(modules, models):
            how = module, model, shape, top_p, itertools.count()
            ways.append(functools.partial(sampling, *how))
        name = "sampling {} x {}, {} + {}, top-p ".format(*shape) + str(top_p)
        rows.append([name, *compared(ways, options.repeats)])
    for shape in TRAINED:
        ways = [functools.partial(updating, module, model_for(module, shape[-1]), shape) for module in modules]
        name = "update {} x {} x ({} + {}), width {}".format(*shape)
        rows.append([name, *compared(ways, options.repeats)])
    print(f"torch {torch.__version__}, float32, medians of {options.repeats}\n")
    print(table("rows x lanes, prompt + leaf|before, s|now, s|now / before", rows))


if __name__ == "__main__":
    main()
