"""Does a tree with process rewards learn faster than chains? treerl.py on its built-in task, TreeRL beside ChainRL.

    python benchmarks/learning_treerl.py                 make the runs that are missing, two at a time; then report
    python benchmarks/learning_treerl.py --seeds 7       the same of these seeds
    python benchmarks/learning_treerl.py --report        no runs: tables of results/learning_treerl.jsonl, the figure

Arms: "6,2,1,2" is TreeRL with these M, N, L, T, 16 of 30 leaves trained on; "2,2,2,2" a cheaper tree, 16 of 18; "18
chains" and "9 chains" are ChainRL with about as many generated tokens per prompt, all trained on; "random" is the first
tree forked at random places. Every arm generates `BUDGET` tokens per update: the number of prompts is what is owed by
now over what a prompt has cost lately, so what is missed in one update is made up in the next. All arms start from the
seed's own warm-started model and share all other flags, the default run's. Success is at temperature 1 on 200 held-out
problems, every `EVERY` updates. Score at equal tokens: its mean over the evaluations of `UPDATES` updates. At equal
time: its mean over time (linear between evaluations) until the first of the two that are compared ends; chains go on
for longer to make that fair. Time is CPU time of sampling and training with one thread, evaluations left out.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded; two runs share the machine
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from learning import (
    RESULTS,
    Budgeted,
    flags,
    half_width,
    in_processes,
    interval,
    paired,
    read_rows,
    table,
    timed_update,
)

import treerl

BUDGET, UPDATES, EVERY = 4000, 48, 6
ARMS = {  # arm -> (its flags, number of updates)
    "6,2,1,2": ("--M=6 --N=2 --L=1 --T=2", UPDATES),
    "18 chains": ("--method=chainrl --M=18 --keep=18", UPDATES * 3 // 2),
    "2,2,2,2": ("--M=2 --N=2 --L=2 --T=2", UPDATES),
    "9 chains": ("--method=chainrl --M=9 --keep=9", UPDATES * 3 // 2),
    "random": ("--method=random --M=6 --N=2 --L=1 --T=2", UPDATES)}
COSTS = ("prompts", "generated_tokens", "forwarded_tokens", "rollout_cpu", "update_cpu")
PAIRS = (("6,2,1,2", "18 chains"), ("2,2,2,2", "9 chains"), ("6,2,1,2", "2,2,2,2"), ("18 chains", "9 chains"),
         ("6,2,1,2", "random"))

# ---------------------------------------------------------------------------------------------------------------- runs
class Solver(Budgeted, treerl.Solver):
    budget = BUDGET

def run_seed(job: tuple[int, list[str]]) -> None:
    """The missing arms of one seed, from one warm start, in a process of its own."""
    seed, missing = job
    torch.set_num_threads(1)
    treerl.Solver, treerl.update = Solver, functools.partial(timed_update, update=treerl.update)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null, \
            contextlib.redirect_stderr(null), contextlib.redirect_stdout(io.StringIO()):
        args = treerl.Args(seed=seed, dtype="float32", max_tokens=64, device="cpu")
        treerl.calculator_model(args, torch.device("cpu"), Path(folder, "start"))
        common = flags({"model": f"{folder}/start", "lr": 5e-4, "max_tokens": 64, "seed": seed, "device": "cpu",
                        "eval_every": EVERY, "save_every": 10**6})
        for arm in missing:
            began, (told, updates) = time.perf_counter(), ARMS[arm]
            treerl.main([*told.split(), *common, f"--steps={updates}", "--out", f"{folder}/{arm}"])
            rows = treerl.read_metrics(Path(folder, arm))
            evals, steps = ([row for row in rows if row["event"] == event] for event in ("eval", "train"))
            cpu = [row["rollout_cpu"] + row["update_cpu"] for row in steps]
            result = {"seed": seed, "arm": arm, "success": [round(row["success"], 3) for row in evals],
                      "greedy_success": [round(row["greedy_success"], 3) for row in evals],
                      "cpu": [round(sum(cpu[: row["step"]]), 2) for row in evals]}
            for name in COSTS:
                result[name] = round(sum(row[name] for row in steps[:UPDATES]), 1)
            result["seconds"] = round(time.perf_counter() - began, 1)
            with open(RESULTS / "learning_treerl.jsonl", "a") as file:
                file.write(json.dumps(result) + "\n")

# ------------------------------------------------------------------------------------------------------------- reports
def read_results() -> dict[str, dict[int, dict]]:
    """arm -> seed -> result."""
    found = {arm: {} for arm in ARMS}
    for row in read_rows("learning_treerl.jsonl"):
        found[row["arm"]][row["seed"]] = row
    return found

def score(row: dict) -> float:
    """Mean success over the evaluations of the first UPDATES updates; [0] is the model that all arms start from."""
    return statistics.mean(row["success"][1 : UPDATES // EVERY + 1])

def mean_until(row: dict, end: float) -> float:
    """Mean success over CPU time from 0 to `end`, linear between evaluations."""
    area = 0.0
    for (t, y), (u, z) in itertools.pairwise(zip(row["cpu"], row["success"])):
        if t < end:
            cut = min(u, end)
            area += (cut - t) * (y + (y + (z - y) * (cut - t) / (u - t))) / 2
    return area / end

def at_equal_time(one: dict, other: dict) -> tuple[float, float]:
    end = min(one["cpu"][-1], other["cpu"][-1])
    return mean_until(one, end), mean_until(other, end)

def tables() -> str:
    """What was learned and what it cost, of the seeds for which all arms have run; then the pairs."""
    found, last = read_results(), UPDATES // EVERY
    seeds = sorted(set.intersection(*map(set, found.values())))
    learned, pairs = [], []
    for arm, runs in found.items() if seeds else ():
        rows = [runs[seed] for seed in seeds]
        mean = {name: statistics.mean(row[name] for row in rows) for name in COSTS}
        ends = [interval([row[name][last] for row in rows]) for name in ("success", "greedy_success")]
        learned.append([arm, interval([score(row) for row in rows]), *ends, f"{mean['prompts'] / UPDATES:.1f}",
                        *(f"{mean[name]:,.0f}" for name in ("generated_tokens", "forwarded_tokens")),
                        f"{mean['rollout_cpu']:.1f}", f"{mean['update_cpu']:.1f}"])
    for one, other in PAIRS if seeds else ():
        tokens = [score(found[one][seed]) - score(found[other][seed]) for seed in seeds]
        times = [a - b for a, b in (at_equal_time(found[one][seed], found[other][seed]) for seed in seeds)]
        pairs.append([f"{one} − {other}", *paired(tokens), *paired(times)[:3]])
    heads = (("arm", "score at equal tokens", "sampled after", "greedy after", "prompts per update", "generated tokens",
              "forwarded tokens", "CPU s sampling", "CPU s training"),
             ("pair", "difference at equal tokens", "ahead", "rank test, p", "detectable", "difference at equal time",
              "ahead in time", "rank test in time, p"))
    return "\n\n".join(map(table, heads, (learned, pairs)))

def figure() -> None:
    """learning_treerl.png: mean curves over tokens and over time."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found, colors = read_results(), dict(zip(ARMS, ("tab:green", "tab:blue", "tab:purple", "tab:cyan", "tab:orange")))
    seeds = sorted(set.intersection(*map(set, found.values())))
    drawing, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for arm, runs in found.items():
        curves = [runs[seed]["success"] for seed in seeds]
        mean, width = [list(map(f, zip(*curves))) for f in (statistics.mean, half_width)]
        x, times = [BUDGET * EVERY * i for i in range(len(mean))], list(zip(*(runs[seed]["cpu"] for seed in seeds)))
        axes[0].plot(x, mean, color=colors[arm], label=arm)
        axes[0].fill_between(x, [m - w for m, w in zip(mean, width)], [m + w for m, w in zip(mean, width)],
                             color=colors[arm], alpha=0.08, linewidth=0)
        axes[1].plot(list(map(statistics.mean, times)), mean, color=colors[arm], label=arm)
    axes[0].set_xlabel("generated tokens")
    axes[1].set_xlabel("CPU seconds of sampling and training, one thread")
    axes[0].set_ylabel(f"held-out success at T = 1, mean of {len(seeds)} seeds")
    axes[1].legend(loc="lower right")
    drawing.savefig(RESULTS / "learning_treerl.png", dpi=100)

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(8))
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, each with one thread")
    parser.add_argument("--report", action="store_true", help="no runs: tables and figure of the results there are")
    options = parser.parse_args()
    found, jobs = read_results(), []
    for seed in options.seeds if not options.report else ():
        if missing := [arm for arm in ARMS if seed not in found[arm]]:
            jobs.append((seed, missing))
    if jobs:
        in_processes(run_seed, jobs, options.processes)
    print("Means over the seeds, ± half of the 95 % interval of the mean; costs are sums over the updates that count\n"
          f"at equal tokens.\n\n{tables()}")
    figure()

if __name__ == "__main__":
    main()
