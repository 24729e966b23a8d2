"""When does a tree of rollouts pay? tree_grpo.py on its built-in task, the tree beside chains that cost as much.

    python benchmarks/learning.py                      make the runs that are missing, two at a time; then report
    python benchmarks/learning.py main --seeds 7 8     the same of one experiment and these seeds
    python benchmarks/learning.py --report             no runs: tables of results/learning.jsonl, and the figures

Arms: "tree" is Tree-GRPO (M = 2, N = 2, L = 1: 6 leaves); "chains" is GRPO with about as many generated tokens per
prompt (4 chains, a tenth fewer); "group" is GRPO with as many leaves per prompt (6 chains); "intra" is the tree without
A_inter. Every arm is to generate `budget` tokens per update: the number of prompts is the budget over what a prompt
has cost in the updates before, rounded, so that a few per cent are missed; the tables say what was generated. All start
from the seed's own warm-started model and share all other flags, among them the default run's learning rate, which was
tuned for the tree. The advantages of "tree" are sums of two z-scores, of a larger scale than those of the others. The
score of a run is its success at temperature 1 on 200 held-out questions, averaged over ten evaluations on the way;
arms are compared seed by seed, so the intervals are over training seeds, for these questions.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded; two runs share the machine
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import tree_grpo

RESULTS = Path(__file__).resolve().parent / "results"
EVALUATIONS = 10

def shapes(M: int, chains: int, group: int) -> dict[str, list]:
    tree = ["--M", M, "--N", 2, "--L", 1]
    return {"tree": tree, "chains": ["--method", "grpo", "--M", chains], "group": ["--method", "grpo", "--M", group],
            **{terms: [*tree, "--advantage", terms] for terms in ("intra", "inter")}}

BASE = {"hard": "late", "steps": 100, "budget": 1000, "counted": "generated_tokens", "repeat": 1, "lr": 5e-4}
ANYWHERE, ALL = {**BASE, "hard": "anywhere", "steps": 40}, ("tree", "chains", "group", "intra")
EXPERIMENTS = {  # experiment -> setting -> shapes of the arms, the arms, and what the run is told
    "main": {"errors anywhere": (shapes(2, 4, 6), ALL, ANYWHERE), "error last": (shapes(2, 4, 6), ALL, BASE)},
    "budget": {f"error last, {n} chains": (shapes(n // 2, n, 3 * n // 2), ALL[:3], BASE) for n in (2, 8)},
    "observations": {"error last, observations x 4, equal forwarded tokens": (
        shapes(2, 4, 6), ALL[:3], {**BASE, "repeat": 4, "budget": 4000, "counted": "forwarded_tokens"})},
    "hops": {"error last, 2 to 4 hops": (shapes(2, 4, 6), ALL[:3], {**BASE, "hops": 4, "max_turns": 5})}}
SEEDS = {"main": range(12), "budget": range(6), "observations": range(4), "hops": range(4)}
COSTS = ("prompts", "signal", "_tokens", "tool_calls", "_cpu")
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)  # from 2 runs on

# ---------------------------------------------------------------------------------------------------------------- runs
class Agent(tree_grpo.Agent):
    """The script's agent, with a token budget per update, observations said `repeat` times, and more in its log."""
    repeat, budget, counted = 1, 0, ""
    price = 0.0  # what a prompt costs

    def observation(self, found: str) -> list[int]:
        return super().observation(", ".join([found] * self.repeat))

    def rollout(self, step: int):
        if not self.price:  # at first from a batch that is not used
            self.price = super().rollout(step)[1][self.counted] / self.args.prompts
        self.args.prompts = max(1, round(self.budget / self.price))
        began = time.process_time()
        groups, row = super().rollout(step)
        row["rollout_cpu"] = time.process_time() - began
        self.price = 0.7 * self.price + 0.3 * row[self.counted] / len(groups)
        self.row = {**row, "prompts": len(groups)}
        return groups, self.row

    def credit(self, step: int, groups):
        samples = super().credit(step, groups)
        advantages = [float(a) for item in samples for a in item.advantages]
        self.row["signal"] = sum(map(bool, advantages)) / len(advantages)
        return samples

class Budgeted:
    """Mixed into a script's solver or player: `budget` of `counted` per update. The number of `unit` is what is owed by
    now over what one has cost lately, so what is missed in one update is made up in the next."""
    unit, counted, budget = "prompts", "generated_tokens", 0
    price, spent = 0.0, 0  # what one costs, and what all of them have

    def rollout(self, step: int):
        if not self.price:  # at first from a batch that is not used
            self.price = super().rollout(step)[1][self.counted] / getattr(self.args, self.unit)
        setattr(self.args, self.unit, max(1, round((self.budget * (step + 1) - self.spent) / self.price)))
        began = time.process_time()
        groups, row = super().rollout(step)
        self.spent += row[self.counted]
        self.price = 0.7 * self.price + 0.3 * row[self.counted] / len(groups)
        return groups, {**row, self.unit: len(groups), "rollout_cpu": time.process_time() - began}

def timed_update(*arguments, update=tree_grpo.update) -> dict[str, float]:
    began = time.process_time()
    return {**update(*arguments), "update_cpu": time.process_time() - began}

def flags(arguments: dict) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]

def set_up(told: dict, seed: int, folder: str):
    """Let the script use Agent; warm-start a model in `folder`. Returns it, its tokenizer, the arguments, and flags."""
    for name in ("repeat", "budget", "counted"):
        setattr(Agent, name, told[name])
    torch.set_num_threads(1)
    tree_grpo.Agent, tree_grpo.update = Agent, timed_update
    told = {name: value for name, value in told.items() if name not in ("repeat", "budget", "counted")}
    args = tree_grpo.Args(seed=seed, topk=1, turn_tokens=32, dtype="float32", device="cpu", **told)
    common = flags({**told, "model": f"{folder}/start", "turn_tokens": 32, "seed": seed, "device": "cpu"})
    return *tree_grpo.built_in_model(args, torch.device("cpu"), Path(folder, "start")), args, common

def run_seed(job: tuple) -> None:
    """The missing arms of one setting and seed, from one warm start, in a process of its own."""
    experiment, setting, seed, missing = job
    commands, _, told = EXPERIMENTS[experiment][setting]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null, \
            contextlib.redirect_stderr(null), contextlib.redirect_stdout(io.StringIO()):
        common = set_up(told, seed, folder)[-1]
        common += flags({"eval_every": told["steps"] // EVALUATIONS, "save_every": told["steps"]})
        for arm in missing:
            began = time.perf_counter()
            tree_grpo.main([*map(str, commands[arm]), *common, "--out", f"{folder}/{arm}"])
            rows = tree_grpo.read_metrics(Path(folder, arm))
            result = {"experiment": experiment, "setting": setting, "arm": arm, "seed": seed,
                      "seconds": round(time.perf_counter() - began, 1)}
            evals, steps = ([row for row in rows if row["event"] == event] for event in ("eval", "train"))
            for name in ("success", "greedy_success"):
                result[name] = [round(row[name], 3) for row in evals]
            for name in ("prompts", "generated_tokens", "forwarded_tokens", "tool_calls", "rollout_cpu", "update_cpu"):
                result[name] = round(sum(row[name] for row in steps), 1)
            result["signal"] = round(statistics.mean(row["signal"] for row in steps), 3)
            with open(RESULTS / "learning.jsonl", "a") as file:
                file.write(json.dumps(result) + "\n")

# ------------------------------------------------------------------------------------------------------------- reports
def read_rows(name: str) -> list[dict]:
    """The lines of results/<name>, none if it is not there."""
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

def read_results() -> dict[tuple, dict[int, dict]]:
    """(experiment, setting, arm) -> seed -> result."""
    found = {}
    for row in read_rows("learning.jsonl"):
        found.setdefault((row["experiment"], row["setting"], row["arm"]), {})[row["seed"]] = row
    return found

def score(row: dict) -> float:
    return statistics.mean(row["success"][1:])  # [0] is the model that all arms start from

def interval(values: list[float], sign: str = "") -> str:
    """Mean and half-width of the 95 % interval of the mean (Student's t)."""
    return f"{statistics.mean(values):{sign}.3f} ± {half_width(values):.3f}"

def half_width(values: list[float]) -> float:
    if len(values) < 2:
        return float("nan")
    return T_95[min(len(values), 16) - 2] * statistics.stdev(values) / len(values) ** 0.5

def table(head: tuple, rows: list) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])

def in_processes(function, jobs: list, processes: int) -> list:
    """function(job) of each job, each in a process of its own, so many side by side."""
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        return list(tree_grpo.tqdm(pool.imap(function, jobs), total=len(jobs)))

def common_runs(found: dict, experiment: str, setting: str) -> tuple[dict[str, dict], list[int]]:
    """(arm -> seed -> result, the seeds for which all arms have run)."""
    runs = {arm: found.get((experiment, setting, arm), {}) for arm in EXPERIMENTS[experiment][setting][1]}
    return runs, sorted(set.intersection(*map(set, runs.values())))

def tables(experiment: str) -> str:
    """What was learned, and what it cost, of the seeds for which all arms of a setting have run."""
    found, learned, costs = read_results(), [], []
    for setting, (_, arms, told) in EXPERIMENTS[experiment].items():
        runs, seeds = common_runs(found, experiment, setting)
        for arm in arms if seeds else ():
            rows = [runs[arm][seed] for seed in seeds]
            gaps = [score(runs["tree"][seed]) - score(runs[arm][seed]) for seed in seeds]
            ends = [interval([row[name][-1] for row in rows]) for name in ("success", "greedy_success")]
            against = ["", ""] if arm == "tree" else [interval(gaps, "+"), f"{sum(g > 0 for g in gaps)} of {len(gaps)}"]
            lost = f"{sum(row['success'][-1] < max(row['success']) - 0.2 for row in rows)} of {len(rows)}"
            learned.append([setting, arm, interval([score(row) for row in rows]), *against, *ends, lost])
            mean = {name: statistics.mean(row[name] for row in rows) for name in rows[0] if name.endswith(COSTS)}
            costs.append([setting, arm, f"{mean['prompts'] / told['steps']:.1f}", f"{mean['signal']:.0%}",
                          *(f"{mean[name]:,.0f}" for name in ("generated_tokens", "forwarded_tokens", "tool_calls")),
                          f"{mean['rollout_cpu']:.1f}", f"{mean['update_cpu']:.1f}"])
    heads = (("setting", "arm", "score", "tree − arm", "tree ahead", "sampled after", "greedy after",
              "fell by 0.2 from its best"),
             ("setting", "arm", "prompts per update", "leaves with A ≠ 0", "generated tokens", "forwarded tokens",
              "tool calls", "CPU s sampling", "CPU s training"))
    return "\n\n".join(map(table, heads, (learned, costs)))

def figures() -> None:
    """learning.png: curves of "main" and paired differences; learning_gaps.png: differences of the scores of all."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found, colors = read_results(), dict(zip(ALL, ("tab:green", "tab:blue", "tab:orange", "tab:red")))
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharey="row", sharex="col", layout="constrained")
    for (upper, lower), (setting, (_, _, told)) in zip(axes.T, EXPERIMENTS["main"].items()):
        x = [i * told["steps"] // EVALUATIONS for i in range(EVALUATIONS + 1)]
        runs, seeds = common_runs(found, "main", setting)
        for arm in ALL if seeds else ():
            upper.plot(x, [statistics.mean(runs[arm][s]["success"][i] for s in seeds) for i in range(len(x))],
                       label=arm, color=colors[arm])
            gaps = [[runs["tree"][s]["success"][i] - runs[arm][s]["success"][i] for s in seeds] for i in range(len(x))]
            means, widths = list(map(statistics.mean, gaps)), list(map(half_width, gaps))
            if arm != "tree":
                lower.plot(x, means, label=f"tree − {arm}", color=colors[arm])
                lower.fill_between(x, [m - w for m, w in zip(means, widths)], [m + w for m, w in zip(means, widths)],
                                   color=colors[arm], alpha=0.12, linewidth=0)
        lower.axhline(0, color="black", linewidth=0.8)
        upper.set_title(f"{setting} ({len(seeds)} seeds)")
        lower.set_xlabel(f"updates of about {told['budget']:,} generated tokens")
    axes[0, 0].set_ylabel("held-out success at T = 1, mean")
    axes[1, 0].set_ylabel("paired difference, 95 % interval")
    axes[0, 1].legend(loc="upper left")
    axes[1, 1].legend(loc="upper left")
    figure.savefig(RESULTS / "learning.png", dpi=100)

    figure, axis = plt.subplots(figsize=(9, 4.4), layout="constrained")
    rows = [(experiment, setting) for experiment, settings in EXPERIMENTS.items() for setting in settings]
    for y, key in enumerate(rows):
        runs, seeds = common_runs(found, *key)
        for shift, arm in zip((-0.2, 0.0, 0.2), ALL[1:]):
            if gaps := [score(runs["tree"][s]) - score(runs[arm][s]) for s in seeds if arm in runs]:
                axis.errorbar(statistics.mean(gaps), y + shift, xerr=half_width(gaps), fmt="o", color=colors[arm],
                              capsize=3, label=f"tree − {arm}" if y == 0 else None)
                axis.plot(gaps, [y + shift] * len(gaps), "x", color=colors[arm], markersize=4, alpha=0.6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [setting for _, setting in rows])
    axis.invert_yaxis()
    axis.set_xlabel("difference of the scores: each seed, and the mean with its 95 % interval")
    axis.legend(loc="best", fontsize=8)
    figure.savefig(RESULTS / "learning_gaps.png", dpi=100)

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 11 in main, 0 to 5 or 3 elsewhere")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, each with one thread")
    parser.add_argument("--report", action="store_true", help="no runs: tables and figures of the results there are")
    options = parser.parse_args()
    names, found, jobs = options.experiments or list(EXPERIMENTS), read_results(), []
    if unknown := set(names) - EXPERIMENTS.keys():
        parser.error(f"no such experiment: {', '.join(unknown)}")
    for experiment in names if not options.report else ():
        for seed in options.seeds or SEEDS[experiment]:
            for setting, (_, arms, _) in EXPERIMENTS[experiment].items():
                missing = [arm for arm in arms if seed not in found.get((experiment, setting, arm), {})]
                jobs += [(experiment, setting, seed, missing)] if missing else []
    if jobs:
        in_processes(run_seed, jobs, options.processes)
    print("Means over the seeds, ± half of the 95 % interval of the mean. Costs are sums over a run's training steps,\n"
          "CPU seconds with two runs side by side.")
    for experiment in names:
        print(f"\n## {experiment}\n\n{tables(experiment)}")
    figures()

if __name__ == "__main__":
    main()
