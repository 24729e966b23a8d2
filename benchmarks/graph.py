"""What sharing prompts saves in graph_gpo.py, and what its graph costs: `python benchmarks/graph.py`. Markdown tables.

sharing: one iteration in the house (16 tasks x 8 rollouts) by the tiny model, warm-started and trained, three ways:
  "one per step": each environment step's prompt goes through the model alone, in sampling and in training; "per wave":
  `--kept-tokens 0`, a prompt is computed once for all that meet in it in the same wave; "kept": the default, once for
  all waves. In training the last two are the same: each distinct prompt of a task once, below what all begin with.
graph: goal_distances and the two step advantages for 10^3 to 10^6 transitions of random rollouts on a grid.

What is compared takes turns within one run; times are medians. Look at the ratios, not at the seconds."""

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from learning import table

import graph_gpo
from graph_gpo import Group, Node, Player, Sample, length

WAYS = ("one per step", "per wave", "kept")

class Alone(Player):
    """A prompt of its own for each step: nothing is shared, in sampling or in training."""

    def prompt(self, group: Group, told: list[str]) -> Node:
        shared = super().prompt(group, told)
        group.root.children.clear()
        group.prompts.clear()
        root = Node()
        root.add([*group.root.tokens, *shared.tokens])
        return root

    def credit(self, step: int, groups: list[Group]) -> list[Sample]:
        return [Sample(action.parent, [action], [A], 1 / len(group.steps) / len(groups))
                for group in groups for (_, action, *_), A in zip(group.steps, self.advantages(group))]

def compute_nothing(model, nodes, counts) -> None:
    """In the place of compute(): sample() itself computes the prompts, each a root."""
    counts["prompt_tokens_sampling"] += length(nodes)

def iteration(way: str, model, tokenizer, args, step: int) -> dict[str, float]:
    """Tokens and seconds of one iteration, sampling and training, of one way."""
    args.kept_tokens = {"kept": 10**9}.get(way, 0)
    player = (Alone if way == WAYS[0] else Player)(model, tokenizer, args, graph_gpo.House)
    original, graph_gpo.compute = graph_gpo.compute, compute_nothing if way == WAYS[0] else graph_gpo.compute
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    began = time.perf_counter()
    groups, row = player.rollout(step)
    middle = time.perf_counter()
    samples = player.credit(step, groups)
    graph_gpo.update(model, None, optimizer, samples, args)
    end, graph_gpo.compute = time.perf_counter(), original
    packed = sum(length({node for item in batch for leaf in item.leaves for node in leaf.path()[:-1]})
                 for batch in graph_gpo.micro_batches(samples, args.micro_tokens))
    return {"steps": row["env_steps"], "sampling": row["prompt_tokens_sampling"], "training": packed,
            "sampling_s": middle - began, "training_s": end - middle}

def sharing(repeats: int, trained: int) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args = graph_gpo.Args(dtype="float32", max_tokens=8, device="cpu", kl_coef=0.0, micro_tokens=16384)
        graph_gpo.tiny_model(args, graph_gpo.House, torch.device("cpu"), Path(folder, "start"))
        with contextlib.redirect_stdout(sys.stderr):
            graph_gpo.main(["--model", f"{folder}/start", "--lr", "5e-4", "--max-tokens", "8", "--device", "cpu",
                            "--steps", str(trained), "--eval-tasks", "1", "--out", f"{folder}/out"])
        for policy, path in (("warm-started", f"{folder}/start"), (f"after {trained} steps", f"{folder}/out/final")):
            for history in (0, 2):
                model, tokenizer = graph_gpo.load_model(path, torch.device("cpu"))
                args.history, found = history, {way: [] for way in WAYS}
                for step in range(repeats + 1):
                    for way in WAYS:
                        found[way].append(iteration(way, model, tokenizer, args, step))
                median = {way: {name: statistics.median(x[name] for x in runs[1:]) for name in runs[0]}
                          for way, runs in found.items()}  # the first is to get warm
                base = median[WAYS[0]]
                for way in WAYS:
                    row = median[way]
                    whole, base_whole = (x["sampling_s"] + x["training_s"] for x in (row, base))
                    rows.append([policy, str(history), way, f"{row['steps']:,.0f}", f"{row['sampling']:,.0f}",
                                 f"{row['training']:,.0f}", f"{row['sampling_s']:.2f}", f"{row['training_s']:.2f}",
                                 f"{base_whole / whole:.2f} x"])
    print("\n" + table(("policy", "history", "prompts", "env steps", "prompt tokens, sampling", "training",
                        "sampling, s", "training, s", "iteration, speed-up"), rows))

def grid(n: int, seed: int = 0) -> list[graph_gpo.Transition]:
    """n transitions of random rollouts of 50 steps, on a grid with n / 10 fields of which one is the goal."""
    rng, side, found, rollout = random.Random(seed), max(3, round((n / 10) ** 0.5)), [], 0
    while len(found) < n:
        rollout += 1
        x, y = rng.randrange(side), rng.randrange(side)
        for _ in range(min(50, n - len(found))):
            dx, dy = rng.choice(((0, 1), (1, 0), (0, -1), (-1, 0)))
            to = (min(max(x + dx, 0), side - 1), min(max(y + dy, 0), side - 1))
            won = to == (side // 2, side // 2)
            found.append(graph_gpo.Transition((x, y), "move", graph_gpo.SUCCESS if won else to, rollout))
            x, y = to
            if won:
                break
    return found

def graph(repeats: int) -> None:
    rows = []
    for n in (10**3, 10**4, 10**5, 10**6):
        transitions, seconds = grid(n), Counter()
        rewards = torch.tensor([float(t.next_state is graph_gpo.SUCCESS) for t in transitions])
        states = len(graph_gpo.goal_distances(transitions))
        for name, work in (("distances", lambda t=transitions: graph_gpo.goal_distances(t)),
                           ("graph", lambda t=transitions: graph_gpo.graph_advantages(t)),
                           ("gigpo", lambda t=transitions, r=rewards: graph_gpo.gigpo_advantages(t, r))):
            times = []
            for _ in range(repeats):
                began = time.perf_counter()
                work()
                times.append(time.perf_counter() - began)
            seconds[name] = statistics.median(times)
        rows.append([f"{n:,}", f"{states:,}", *(f"{seconds[name]:.4f}" for name in ("distances", "graph", "gigpo"))])
    heads = ("transitions", "states", "goal_distances, s", "graph_advantages, s", "gigpo_advantages, s")
    print("\n" + table(heads, rows))

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="of sharing, graph (default: both)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trained", type=int, default=60, help="steps of training of the second policy")
    options = parser.parse_args()
    if unknown := set(options.parts) - {"sharing", "graph"}:
        parser.error(f"no such part: {', '.join(unknown)}")
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}, median of {options.repeats}")
    if "sharing" in (options.parts or ["sharing"]):
        sharing(options.repeats, options.trained)
    if "graph" in (options.parts or ["graph"]):
        graph(options.repeats)

if __name__ == "__main__":
    main()
