"""The default run of a script over ten seeds, on five of them beside a control of its wall time and one of its steps.

    python benchmarks/default_run.py tree_grpo
    python benchmarks/default_run.py treerl --seeds 0 1 2 --controls 1
    python benchmarks/default_run.py graph_gpo

Arms: the method's own is `python <script>.py --seed S`. "supervised" spends the time of the reinforcement learning on
more supervised steps on the same kind of demonstrations instead. "shuffled" is the method without its information: as
many steps, but in tree_grpo the advantages of each prompt are dealt out at random among its leaves, in treerl their
rewards are, before R(s) is computed from them, and in graph_gpo the advantages of each task's steps among these; so it
must not learn.
Prints a Markdown table of held-out success: each seed, mean and standard deviation over the seeds, and the range.
"""

import argparse
import contextlib
import importlib
import io
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

def run(script, *arguments) -> tuple[list[dict], float]:
    """(rows of metrics.jsonl, seconds of wall time) of one run of the script."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        script.main(["--out", f"{folder}/run", *map(str, arguments)])
        return script.read_metrics(Path(folder, "run")), time.perf_counter() - began


def shuffled_advantages(credit):
    """credit() with each prompt's advantages dealt out at random among its leaves."""

    def credit_shuffled(agent, step, groups):
        rng = random.Random(step)
        return [item._replace(advantages=rng.sample(item.advantages, len(item.advantages)))
                for item in credit(agent, step, groups)]

    return credit_shuffled


def shuffled_rewards(credit):
    """credit() with each prompt's rewards dealt out at random among its leaves."""

    def credit_shuffled(solver, step, groups):
        rng = random.Random(step)
        for leaves in (root.leaves() for _, root in groups):
            rewards = [leaf.reward for leaf in leaves]
            for leaf, reward in zip(leaves, rng.sample(rewards, len(rewards))):
                leaf.reward = reward
        return credit(solver, step, groups)

    return credit_shuffled


def shuffled_steps(advantages):
    """advantages() with those of a task's steps dealt out at random among them."""

    def advantages_shuffled(player, group):
        order = list(range(len(group.steps)))
        random.Random(group.task).shuffle(order)
        return advantages(player, group)[order]

    return advantages_shuffled


SCRIPTS = {  # name of the arm, class and its method that is shuffled, and how
    "tree_grpo": ("Tree-GRPO", "Agent", "credit", shuffled_advantages),
    "treerl": ("TreeRL", "Solver", "credit", shuffled_rewards),
    "graph_gpo": ("GraphGPO", "Player", "advantages", shuffled_steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--controls", type=int, default=5, help="the first seeds that have the two controls as well")
    parser.add_argument("--arguments", nargs=argparse.REMAINDER, default=[], help="passed on to the script")
    options = parser.parse_args()
    script, (method, name, part, shuffled) = importlib.import_module(options.script), SCRIPTS[options.script]
    actor, results = getattr(script, name), {method: [], "supervised": [], "shuffled": []}
    original = getattr(actor, part)
    sft_steps = script.Args().sft_steps
    for number, seed in enumerate(options.seeds):
        fixed = ["--seed", seed, *options.arguments]
        rows, wall = run(script, *fixed)
        learning = sum(row["seconds"] for row in rows if row["event"] == "train")
        results[method].append((rows, wall))
        print(json.dumps({"seed": seed, method: rows[-1]}), flush=True)
        if number >= options.controls:
            continue
        # what is not learning is the warm start and two evaluations; the warm start's share scales with its steps
        more = round(sft_steps * (1 + learning / max(1e-9, wall - learning)))
        results["supervised"].append(run(script, *fixed, "--steps", 0, "--sft-steps", more))
        setattr(actor, part, shuffled(original))
        results["shuffled"].append(run(script, *fixed))
        setattr(actor, part, original)
    print("\n| arm | seed | sampled before | after | greedy before | after | seconds |\n|---|---|---|---|---|---|---|")
    warm = [rows[0] for rows, _ in results[method]]  # evaluations of the warm start that the three arms begin with
    for arm, runs in results.items():
        columns = []
        for seed, before, (rows, wall) in zip(options.seeds, warm, runs):
            ends = [row[name] for name in ("success", "greedy_success") for row in (before, rows[-1])]
            columns.append([*ends, wall])
            print(f"| {arm} | {seed} | " + " | ".join(f"{x:.3f}" for x in columns[-1][:4]) + f" | {wall:.0f} |")
        if len(columns) > 1:
            success, seconds = list(zip(*columns))[:4], f"{statistics.mean(c[4] for c in columns):.0f}"
            spread = [f"{statistics.mean(c):.3f} ± {statistics.stdev(c):.3f}" for c in success]
            print(f"| {arm} | mean ± std | {' | '.join(spread)} | {seconds} |")
            print(f"| {arm} | range | {' | '.join(f'{min(c):.3f} to {max(c):.3f}' for c in success)} | |")


if __name__ == "__main__":
    main()
