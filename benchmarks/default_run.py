"""The default run of a script over ten seeds, on five of them beside a control of its wall time and one of its steps.

    python benchmarks/default_run.py tree_grpo
    python benchmarks/default_run.py treerl --seeds 0 1 2 --controls 1
    python benchmarks/default_run.py graph_gpo
    python benchmarks/default_run.py collapse      tree_grpo.py, and the same with 12 times its learning rate

Arms: the method's own is `python <script>.py --seed S`. "supervised" spends the time of the reinforcement learning on
more supervised steps on the same kind of demonstrations instead. "shuffled" is the method without its information: as
many steps, but in tree_grpo the advantages of each prompt are dealt out at random among its leaves, in treerl their
rewards are, before R(s) is computed from them, and in graph_gpo the advantages of each task's steps among these; so it
must not learn.
Prints a Markdown table of held-out success: each seed, mean and standard deviation over the seeds, and the range.

"collapse" keeps each run of results/collapse.jsonl: to repeat them, move that file away first. It prints the table of
results/collapse.md and draws results/collapse.png.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from unittest import mock

import common
from common import SCRIPTS, pyplot, read_rows, run_script, table, tree_grpo, write_rows


def run(script, *arguments) -> tuple[list[dict], float]:
    """(rows of metrics.jsonl, seconds of wall time) of one run of the script."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        return run_script(script, f"{folder}/run", arguments), time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------- the controls
def shuffled_advantages(credit):
    """tree_grpo.credit with a prompt's advantages dealt out at random among its leaves."""

    def credit_shuffled(root, args, rng):
        leaves, A = credit(root, args, rng)
        return leaves, A[rng.sample(range(len(A)), len(A))]

    return credit_shuffled


def shuffled_rewards(credit):
    """treerl.credit with a prompt's rewards dealt out at random among its leaves."""

    def credit_shuffled(root, args, rng):
        leaves = root.leaves()
        rewards = [leaf.reward for leaf in leaves]
        for leaf, reward in zip(leaves, rng.sample(rewards, len(rewards))):
            leaf.reward = reward
        return credit(root, args, rng)

    return credit_shuffled


def shuffled_steps(advantages):
    """graph_gpo.advantages with those of a task's steps dealt out at random among them."""

    def advantages_shuffled(task, args):
        A = advantages(task, args)
        return A[random.Random(task.text).sample(range(len(A)), len(A))]

    return advantages_shuffled


METHODS = {  # name of the arm, the function of the script that is replaced, and how
    "tree_grpo": ("Tree-GRPO", "credit", shuffled_advantages),
    "treerl": ("TreeRL", "credit", shuffled_rewards),
    "graph_gpo": ("GraphGPO", "advantages", shuffled_steps),
}


def default_runs(name: str, seeds: list[int], controls: int, arguments: list[str]) -> None:
    script, (method, part, shuffled) = SCRIPTS[name], METHODS[name]
    results = {method: [], "supervised": [], "shuffled": []}
    sft_steps = script.parse_args(script.Args, arguments)[0].sft_steps
    for number, seed in enumerate(seeds):
        fixed = ["--seed", seed, *arguments]
        rows, wall = run(script, *fixed)
        learning = sum(row["seconds"] for row in rows if row["event"] == "train")
        results[method].append((rows, wall))
        print(json.dumps({"seed": seed, method: rows[-1]}), flush=True)
        if number >= controls:
            continue
        # What is not learning is the warm start, which takes its time in proportion to its steps, and two evaluations.
        more = round(sft_steps * (1 + learning / max(1e-9, wall - learning)))
        results["supervised"].append(run(script, *fixed, "--steps", 0, "--sft-steps", more))
        with mock.patch.object(script, part, shuffled(getattr(script, part))):
            results["shuffled"].append(run(script, *fixed))
    warm, lines = [rows[0] for rows, _ in results[method]], []  # all three arms begin with the warm start
    for arm, runs in results.items():
        columns = []
        for seed, before, (rows, wall) in zip(seeds, warm, runs):
            ends = [row[column] for column in ("success", "greedy_success") for row in (before, rows[-1])]
            columns.append([*ends, wall])
            lines.append([arm, seed, *(f"{x:.3f}" for x in ends), f"{wall:.0f}"])
        if len(columns) > 1:
            *success, seconds = zip(*columns)
            spread = [f"{statistics.mean(c):.3f} ± {statistics.stdev(c):.3f}" for c in success]
            lines.append([arm, "mean ± std", *spread, f"{statistics.mean(seconds):.0f}"])
            lines.append([arm, "range", *(f"{min(c):.3f} to {max(c):.3f}" for c in success), ""])
    print("\n" + table("arm|seed|sampled before|after|greedy before|after|seconds", lines))


# -------------------------------------------------------------------------------------------------------- collapse
RUNS = {"lr 5e-4, seed 0": []}
RUNS |= {f"lr 6e-3, seed {seed}": ["--lr=0.006", f"--seed={seed}"] for seed in range(3)}
COLUMNS = {  # title and unit
    "success": ("success in training", "share of leaves"),
    "entropy": ("entropy", "nats per token"),
    "kl": ("KL", "nats per token"),
    "grad_norm": ("gradient norm", ""),
}
SHOWN = (1, 5, 10, 15, 20, 30, 60)


def collapse() -> None:
    """Runs what is missing: each of COLUMNS over the steps, and held-out success at T = 1, pairs of step and share."""
    there = {row["run"] for row in read_rows("collapse.jsonl")}
    for name in [name for name in RUNS if name not in there]:
        rows, _ = run(tree_grpo, *RUNS[name], "--eval-every", 10, "--device", "cpu")
        steps = [row for row in rows if row["event"] == "train"]
        found = {column: [round(row[column], 4) for row in steps] for column in COLUMNS}
        evals = [(row["step"], row["success"]) for row in rows if row["event"] == "eval"]
        write_rows(common.RESULTS / "collapse.jsonl", [{"run": name, **found, "held_out": evals}], "a")
    print(collapse_table())
    figure, axes = pyplot().subplots(2, 2, figsize=(10, 5.6), sharex=True, layout="constrained")
    for axis, (column, (title, unit)) in zip(axes.flat, COLUMNS.items()):
        for found in read_rows("collapse.jsonl"):
            color = "black" if "5e-4" in found["run"] else None
            axis.plot(range(1, 1 + len(found[column])), found[column], label=found["run"], color=color)
        axis.set(title=title, ylabel=unit)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0, 1].legend()
    figure.savefig(common.RESULTS / "collapse.png", dpi=100)


def collapse_table() -> str:
    """The runs at the steps SHOWN."""
    lines = []
    for found in read_rows("collapse.jsonl"):
        held_out = {step: f"{success:.3f}" for step, success in found["held_out"]}
        for step in SHOWN:
            success, entropy, kl, norm = (found[column][step - 1] for column in COLUMNS)
            cells = f"{success:.2f}", f"{entropy:.3f}", f"{kl:.2f}", f"{norm:.2f}"
            lines.append([found["run"], step, *cells, held_out.get(step, "")])
    return table(("run", "step", *(title for title, _ in COLUMNS.values()), "held-out success"), lines)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("what", choices=[*METHODS, "collapse"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--controls", type=int, default=5, help="the first so many seeds have them")
    parser.add_argument("--arguments", nargs=argparse.REMAINDER, default=[], help="passed on to the script")
    options = parser.parse_args()
    if options.what == "collapse":
        return collapse()
    default_runs(options.what, options.seeds, options.controls, options.arguments)


if __name__ == "__main__":
    main()
