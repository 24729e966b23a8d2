"""Does credit by the graph teach faster? graph_gpo.py with GraphGPO, GiGPO and GRPO at equal environment steps.

    python benchmarks/learning_graph_gpo.py                     make the runs that are missing, two at a time; report
    python benchmarks/learning_graph_gpo.py house --seeds 7     the same of one world and these seeds
    python benchmarks/learning_graph_gpo.py --report            no runs: tables and figure of results/*_graph_gpo.jsonl

The methods differ in --method alone. Each starts from the same warm-started models, one per start, and plays `budget`
environment steps per update: the number of tasks is what is owed by now over what a task has cost lately, so what is
missed in one update is made up in the next. All share the default run's flags, among them the learning rate. Success is
on 40 held-out tasks, at temperature 1 (8 rollouts each) and greedy, every `every` updates; a run's score is its mean
over the evaluations after the first. A pair is two methods with the same start and the same seed.
Runs with one seed have the same tasks whatever their start: they are averaged over the starts, and
the intervals and tests are over seeds, for these two starts.
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
import unittest.mock
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

import graph_gpo

METHODS = ("graph_gpo", "gigpo", "grpo")
SOKOBAN = "envs/sokoban.py:Sokoban"
WORLDS = {  # world -> --env, environment steps per update, updates, updates between evaluations, flags, starts, seeds
    "house": ("", 1250, 40, 8, {}, (0, 1), 8),
    "sokoban": (SOKOBAN, 1500, 60, 12, {"max_steps": 15, "omega": 0.8}, (0, 1), 3),
    "sokoban, omega 0.1": (SOKOBAN, 1500, 60, 12, {"max_steps": 15}, (0, 1), 3)}
UNDIVIDED = ("sokoban",)  # worlds where GiGPO's terms are without the std, as in its Sokoban script
COSTS = ("tasks", "env_steps", "generated_tokens", "forwarded_tokens", "rollout_cpu", "update_cpu")
EVALUATED = ("success", "greedy_success", "progress_in_failed", "waste_in_successful")

# ---------------------------------------------------------------------------------------------------------------- runs
class Player(Budgeted, graph_gpo.Player):
    """The script's player with a budget; `undivided`: both terms of GiGPO are without the std."""
    unit, counted, undivided = "tasks", "env_steps", False

    def advantages(self, group) -> torch.Tensor:
        z_scores = centred if self.undivided and self.args.method == "gigpo" else graph_gpo.z_scores
        with unittest.mock.patch("graph_gpo.z_scores", z_scores):
            return super().advantages(group)

def centred(values: torch.Tensor, groups: list) -> torch.Tensor:
    """z_scores without the std; a success returns 10, as in its authors' code (tutorial, 3.7), not 1."""
    return 10 * (values.double() - graph_gpo.per_group(groups)(values.double(), "mean"))

def run_seeds(job: tuple) -> None:
    """The missing (seed, method) of one world and start, from one warm start, in a process of its own."""
    world, start, missing = job
    env, budget, updates, every, told, *_ = WORLDS[world]
    torch.set_num_threads(1)
    Player.budget, Player.undivided = budget, world in UNDIVIDED
    graph_gpo.update = functools.partial(timed_update, update=graph_gpo.update)
    env = env and str(RESULTS.parents[1] / env)
    make_env = graph_gpo.load_env(env) if env else graph_gpo.House
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null, \
            contextlib.redirect_stderr(null), contextlib.redirect_stdout(io.StringIO()):
        args = graph_gpo.Args(seed=start, dtype="float32", max_tokens=8, device="cpu", **told)
        graph_gpo.tiny_model(args, make_env, torch.device("cpu"), Path(folder, "start"))
        graph_gpo.Player = Player
        common = flags({**told, "env": env, "model": f"{folder}/start", "lr": 5e-4, "max_tokens": 8, "device": "cpu",
                        "steps": updates, "eval_every": every, "eval_tasks": 40, "save_every": 10**6})
        for seed, method in missing:
            began, out = time.perf_counter(), f"{folder}/{seed}-{method}"
            graph_gpo.main([*common, f"--method={method}", f"--seed={seed}", "--out", out])
            rows = graph_gpo.read_metrics(Path(out))
            evals, steps = ([row for row in rows if row["event"] == event] for event in ("eval", "train"))
            result = {"world": world, "start": start, "seed": seed, "method": method}
            for name in EVALUATED:
                result[name] = [None if row[name] is None else round(row[name], 3) for row in evals]
            for name in COSTS:
                result[name] = round(sum(row[name] for row in steps), 1)
            result["seconds"] = round(time.perf_counter() - began, 1)
            with open(RESULTS / "learning_graph_gpo.jsonl", "a") as file:
                file.write(json.dumps(result) + "\n")

# ------------------------------------------------------------------------------------------------------------- reports
def read_results() -> dict[tuple, dict]:
    """(world, start, seed, method) -> result."""
    rows = read_rows("learning_graph_gpo.jsonl")
    return {(row["world"], row["start"], row["seed"], row["method"]): row for row in rows}

def whole_pairs(world: str) -> list[dict[str, dict]]:
    """method -> result, for each start and seed of a world that all methods have been run with."""
    found = read_results()
    pairs = [{method: found.get((world, start, seed, method)) for method in METHODS}
             for start, seed in sorted({key[1:3] for key in found if key[0] == world})]
    return [pair for pair in pairs if all(pair.values())]

def score(row: dict, name: str = "success") -> float:
    return statistics.mean(row[name][1:])  # [0] is the model that all methods start from

def by_seed(pairs: list[dict[str, dict]], value) -> list[float]:
    """value(pair) of each seed, the mean over its starts."""
    found = {}
    for pair in pairs:
        found.setdefault(pair[METHODS[0]]["seed"], []).append(value(pair))
    return list(map(statistics.mean, found.values()))

def curve(world: str, method: str, name: str) -> list[list[float]]:
    """Of each evaluation what the seeds have, as in by_seed."""
    pairs = whole_pairs(world)
    return [by_seed(pairs, lambda pair, i=i: pair[method][name][i])
            for i in range(len(pairs[0][method][name]))]

def learned_row(world: str, method: str) -> list[str]:
    pairs = whole_pairs(world)
    rows = [pair[method] for pair in pairs]
    after = [interval(curve(world, method, name)[-1]) for name in ("success", "greedy_success")]
    mean = {name: statistics.mean(row[name] for row in rows) for name in COSTS}
    before = statistics.mean(row["success"][0] for row in rows)
    return [world, method, str(len(rows)), f"{before:.3f}",
            interval(by_seed(pairs, lambda pair: score(pair[method]))), *after,
            *(f"{mean[name]:,.0f}" for name in ("env_steps", "forwarded_tokens")),
            *(f"{mean[name]:.1f}" for name in ("rollout_cpu", "update_cpu"))]

def gap_row(world: str, one: str, other: str) -> list[str]:
    pairs, starts = whole_pairs(world), {}
    for pair in pairs:
        starts.setdefault(pair[one]["start"], []).append(score(pair[one]) - score(pair[other]))
    greedy = by_seed(pairs, lambda pair: score(pair[one], "greedy_success")
                     - score(pair[other], "greedy_success"))
    after = by_seed(pairs, lambda pair: pair[one]["success"][-1] - pair[other]["success"][-1])
    return [world, f"{one} − {other}",
            *paired(by_seed(pairs, lambda pair: score(pair[one]) - score(pair[other]))),
            *paired(greedy)[:2], *paired(after)[:2],
            ", ".join(f"{statistics.mean(gaps):+.3f}" for gaps in starts.values()),
            f"{statistics.correlation(*starts.values()):+.2f}"]

def share_row(world: str, method: str) -> list[str]:
    rows = [pair[method] for pair in whole_pairs(world)]
    found = ([row[name][i] for row in rows if row[name][i] is not None]
             for name in reversed(EVALUATED[2:]) for i in (0, -1))
    return [world, method, *(f"{statistics.mean(x):.1%}" if x else "" for x in found)]

def waste_row(world: str, one: str, other: str) -> list[str]:
    def waste(row: dict) -> float:
        return row["waste_in_successful"][-1]
    gaps = by_seed(whole_pairs(world), lambda pair: waste(pair[one]) - waste(pair[other]))
    return [world, f"{one} − {other}", *paired(gaps)]

def tables() -> str:
    """What was learned and what it cost; the pairs; and the shares of the paper's Figure 1."""
    worlds = [world for world in WORLDS if whole_pairs(world)]
    runs = list(itertools.product(worlds, METHODS))
    gaps = [(world, *pair) for world in worlds for pair in itertools.combinations(METHODS, 2)]
    return "\n\n".join((
        table(("world", "method", "runs", "sampled before", "score", "sampled after",
               "greedy after", "env steps", "forwarded tokens", "CPU s sampling", "CPU s training"),
              [learned_row(*run) for run in runs]),
        table(("world", "pair", "score", "ahead", "rank test, p", "detectable", "greedy score",
               "ahead, greedy", "sampled after", "ahead, after", "score of each start",
               "r of the starts"), [gap_row(*gap) for gap in gaps]),
        table(("world", "method", "waste, before", "waste, after", "progress, before",
               "progress, after"), [share_row(*run) for run in runs]),
        table(("world", "pair", "waste, after", "more", "rank test, p", "detectable"),
              [waste_row(*gap) for gap in gaps])))

def figure() -> None:
    """learning_graph_gpo.png: mean curves over environment steps, sampled and greedy, of each world."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    worlds = [world for world in WORLDS if whole_pairs(world)]
    drawing, axes = plt.subplots(len(worlds), 2, figsize=(10, 3.6 * len(worlds)), squeeze=False, layout="constrained")
    for pair_of_axes, world in zip(axes, worlds):
        _, budget, _, every, *_ = WORLDS[world]
        for axis, name, words in zip(pair_of_axes, EVALUATED, ("at temperature 1", "greedy")):
            for method, color in zip(METHODS, ("tab:green", "tab:orange", "tab:blue")):
                curves = curve(world, method, name)
                x, mean, width = [budget * every * i for i in range(len(curves))], *(
                    list(map(f, curves)) for f in (statistics.mean, half_width))
                axis.plot(x, mean, color=color, label=method)
                axis.fill_between(x, [m - w for m, w in zip(mean, width)], [m + w for m, w in zip(mean, width)],
                                  color=color, alpha=0.12, linewidth=0)
            axis.set_title(f"{world}, {words}")
            axis.set_xlabel("environment steps")
        pair_of_axes[0].set_ylabel("held-out success, 95 % interval")
    axes[0, 0].legend(loc="lower right")
    drawing.savefig(RESULTS / "learning_graph_gpo.png", dpi=100)

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", nargs="*", help=f"of {', '.join(WORLDS)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 7 in the house, 0 to 2 in Sokoban")
    parser.add_argument("--starts", type=int, nargs="+", help="seeds of the warm starts (default: 0 and 1)")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, each with one thread")
    parser.add_argument("--report", action="store_true", help="no runs: tables and figure of the results there are")
    options = parser.parse_args()
    found, jobs = read_results(), []
    if unknown := set(options.worlds) - WORLDS.keys():
        parser.error(f"no such world: {', '.join(unknown)}")
    for world in (options.worlds or WORLDS) if not options.report else ():
        *_, starts, seeds = WORLDS[world]
        for start in options.starts or starts:
            missing = [(seed, method) for seed in options.seeds or range(seeds) for method in METHODS
                       if (world, start, seed, method) not in found]
            jobs += [(world, start, missing)] if missing else []
    if jobs:
        in_processes(run_seeds, jobs, options.processes)
    print("Means over starts and seeds, ± half of the 95 % interval over seeds.\n\n" + tables())
    figure()

if __name__ == "__main__":
    main()
