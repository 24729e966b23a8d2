"""The engine of these scripts against that of an earlier version, in turns within one run: `git worktree add FOLDER COMMIT`,
then `python benchmarks/versions.py FOLDER`. Prints Markdown tables of medians; look at the ratios."""

import argparse
import importlib.util
import inspect
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AttentionInterface

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import speed

import graph_gpo
import tree_grpo
import treerl

NOW = {"tree_grpo": tree_grpo, "treerl": treerl, "graph_gpo": graph_gpo}


def loaded(folder: str, name: str):
    spec = importlib.util.spec_from_file_location(f"before_{name}", Path(folder, f"{name}.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_turns(before, now, repeats: int) -> tuple[float, float, float]:
    """Median seconds of two functions of the number of the call, and the median of the ratios of calls side by side."""
    seconds = []
    for i in range(repeats + 1):
        pair = []
        for way in (before, now) if i % 2 else (now, before):
            began = time.perf_counter()
            way(i)
            pair.append(time.perf_counter() - began)
        seconds.append(pair if i % 2 else pair[::-1])
    old, new = zip(*seconds[1:])
    return statistics.median(old), statistics.median(new), statistics.median(b / a for a, b in zip(old, new))


def report(name: str, before, now, repeats: int) -> None:
    old, new, ratio = in_turns(before, now, repeats)
    speed.row(name, f"{old:.3f}", f"{new:.3f}", f"{ratio:.2f}")


def sampling(module, model, shape: tuple, top_p: float, seed: int) -> None:
    rows, lanes, prompt, leaf = shape
    rng, roots = random.Random(seed), [module.Node() for _ in range(rows)]
    for root in roots:
        root.add(speed.random_tokens(prompt, rng))
    nodes = [module.Node(root) for root in roots for _ in range(lanes)]
    keep = {"keep": False} if "keep" in inspect.signature(module.sample).parameters else {}  # nothing begins below
    generator = torch.Generator().manual_seed(seed)
    module.sample(model, nodes, [leaf] * len(nodes), lambda tokens: False, set(), generator, 1.0, top_p, Counter(), **keep)


def stars(module, shape: tuple) -> list:
    rows, leaves, prompt, leaf, _ = shape
    rng, samples = random.Random(0), []
    for _ in range(rows):
        root = module.Node()
        root.add(speed.random_tokens(prompt, rng))
        for _ in range(leaves):
            module.Node(root).add(speed.random_tokens(leaf, rng), True, [-1.0] * leaf)
        samples.append(module.Sample(root, root.leaves(), list(torch.randn(leaves)), 1 / rows / leaves))
    return samples


def actors(module, folder: Path) -> tuple:
    """A script's actor on its built-in task, and what an update needs."""
    args = module.Args(device="cpu", dtype="float32", lr=5e-4, kl_coef=0.0)
    if module.__name__.endswith("tree_grpo"):
        args.turn_tokens, args.topk = 32, 1
        return args, module.Agent(*module.built_in_model(args, torch.device("cpu"), folder), args, [], [])
    if module.__name__.endswith("treerl"):
        args.max_tokens = 64
        return args, module.Solver(*module.calculator_model(args, torch.device("cpu"), folder), args, [], [])
    args.max_tokens = 8
    return args, module.Player(*module.tiny_model(args, module.House, torch.device("cpu"), folder), args, module.House)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with the earlier scripts")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = {name: loaded(options.folder, name) for name in NOW}
    AttentionInterface.register("token_tree", tree_grpo.token_tree)
    device, heads = torch.device("cpu"), ("before, s", "now, s", "now / before")
    print(f"torch {torch.__version__}, {options.threads} CPU threads, float32, medians of {options.repeats}")

    model = speed.new_model("tiny", device)
    speed.table("sampling: rows x lanes, prompt + leaf", *heads)
    for top_p in (1.0, 0.95):
        for shape in speed.TINY["A"]:
            name = "{} x {}, {} + {}".format(*shape) + ("" if top_p == 1 else f", top-p {top_p}")
            ways = [lambda i, m=m, s=shape, p=top_p: sampling(m, model, s, p, i) for m in (before["tree_grpo"], tree_grpo)]
            report(name, *ways, options.repeats)

    speed.table("an update, stars: rows x leaves x (prompt + leaf), width", *heads)
    args = tree_grpo.Args(dtype="float32", kl_coef=0.0)
    for shape in speed.TINY["B"]:
        model = speed.new_model("tiny", device, shape[-1])
        optimizer, ways = torch.optim.SGD(model.parameters(), lr=0.0), []
        for module in (before["tree_grpo"], tree_grpo):
            samples = stars(module, shape)
            ways.append(lambda i, m=module, s=samples, model=model, o=optimizer: m.update(model, None, o, s, args))
        report("{} x {} x ({} + {}), {}".format(*shape), *ways, options.repeats)

    speed.table("the scripts' own tasks", *heads)
    for name, now in NOW.items():
        rollouts, updates = [], []
        for module in (before[name], now):
            with tempfile.TemporaryDirectory() as folder:
                args, actor = actors(module, Path(folder, "start"))
            optimizer = torch.optim.SGD(actor.model.parameters(), lr=0.0)
            groups = actor.rollout(0)[0]
            samples = actor.credit(0, groups)
            rollouts.append(lambda i, actor=actor: actor.rollout(i))
            updates.append(lambda i, m=module, a=actor, o=optimizer, s=samples, args=args: m.update(a.model, None, o, s, args))
        report(f"{name}.py, rollouts of a step", *rollouts, options.repeats)
        report(f"{name}.py, an update", *updates, options.repeats)


if __name__ == "__main__":
    main()
