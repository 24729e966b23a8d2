"""Does it learn faster? Each method on its built-in task, beside others that cost as much.

    python benchmarks/learning.py                  make the runs that are missing, two at a time; then report
    python benchmarks/learning.py main --seeds 7 8     the same of one experiment and these seeds
    python benchmarks/learning.py --report             no runs: tables of results/learning*.jsonl, and figures

Every arm is to spend `budget` of what is counted (generated tokens, in graph_gpo.py environment steps) per update: the
number of prompts or tasks is what is owed by now over what one has cost lately, so what is missed in one update is made
up in the next. All arms start from the seed's own warm-started model and share all other flags, among them the default
run's learning rate. Success is on held-out tasks, every few updates; a run's score is its success at temperature 1
averaged over the evaluations after the first. Arms are compared seed by seed, so intervals are over training seeds.
CPU seconds are process time with one thread, evaluations left out.

main, budget, observations, hops, where: tree_grpo.py. "tree" is Tree-GRPO (M = 2, N = 2, L = 1: 6 leaves); "chains" is
GRPO with about as many generated tokens per prompt (4 chains, a tenth fewer); "group" is GRPO with as many leaves per
prompt (6 chains); "intra" is the tree without A_inter; "learned" is the tree with forks where rewards have differed so
far in the run (Learned, of when_trees_pay.py). The advantages of "tree" are sums of two z-scores, of a larger scale
than those of the others. In "error last" (Late, of hard_questions.py) the last fact lists former values too. In "where"
each question has three hops, so four turns, and the warm-started model is right in all of them but one, the first, the
third or the last.

treerl: "6,2,1,2" is TreeRL with these M, N, L, T, 16 of 30 leaves trained on; "2,2,2,2" a cheaper tree, 16 of 18; "18
chains" and "9 chains" are ChainRL with about as many generated tokens per prompt, all trained on; "random" is the first
tree forked at random places. At equal time: the mean success over time (linear between evaluations) until the first of
the two that are compared ends; chains go on for longer to make that fair.

house, sokoban: graph_gpo.py, the three methods, from each of two warm starts. Runs with one seed have the same tasks
whatever their start: they are averaged over the starts, and intervals and tests are over seeds, for these two starts.
alfworld: the same from one warm start, in the training games of ALFWorld (in $ALFWORLD_DATA) of two kinds, of which a
fifth is held out.
"""

import contextlib
import itertools
import random
import statistics
import time
import types
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import common
import released
import torch
from common import ROOT, SCRIPTS, flags, graph_gpo, interval, paired, read_rows, table, tiny_args, tree_grpo, treerl
from when_trees_pay import Learned

COLORS = ("tab:green", "tab:blue", "tab:orange", "tab:red", "tab:purple")
FILES = {name: f"learning{'' if name == 'tree_grpo' else f'_{name}'}.jsonl" for name in SCRIPTS}


class Setting(NamedTuple):
    arms: dict[str, str]  # arm -> its flags
    told: dict  # the flags that all arms share
    budget: int = 1000  # of `counted` per update
    counted: str = "generated_tokens"


class Experiment(NamedTuple):
    script: str
    settings: dict[str, Setting]
    seeds: range
    pairs: tuple[str, ...]  # of arms that are compared
    starts: tuple | None = None  # seeds of the warm starts (None: the run's own seed)
    updates: int = 0  # those that count at equal cost (0: all)


def of_chains(chains: int, names: str, told: dict, *budget) -> Setting:
    """Of tree_grpo.py: arms that cost about as much as so many chains."""
    tree = f"--M={chains // 2} --N=2 --L=1"
    arms = {"tree": tree, "learned": tree, "intra": f"{tree} --advantage=intra"}
    arms |= {"chains": f"--method=grpo --M={chains}", "group": f"--method=grpo --M={3 * chains // 2}"}
    return Setting({name: arms[name] for name in names.split()}, told, *budget)


def hard(kind: str, **more) -> dict:
    """The flags of runs on questions of hard_questions.py."""
    return {"env": f"{ROOT}/benchmarks/hard_questions.py:{kind}", "steps": 100, "eval_every": 10, **more}


THREE, ALL = "tree chains group", "tree chains group intra"
REPEATED = of_chains(4, THREE, hard("LateRepeated"), 4000, "forwarded_tokens")
TREE_GRPO = {  # experiment -> seeds, settings
    "main": (
        12,
        {
            "errors anywhere": of_chains(4, ALL, {"steps": 40, "eval_every": 4}),
            "error last": of_chains(4, ALL, hard("Late")),
        },
    ),
    "budget": (6, {f"error last, {n} chains": of_chains(n, THREE, hard("Late")) for n in (2, 8)}),
    "observations": (4, {"error last, observations x 4, equal forwarded tokens": REPEATED}),
    "hops": (4, {"error last, 2 to 4 hops": of_chains(4, THREE, hard("Late:4", max_turns=5))}),
    "where": (
        6,
        {f"decisive turn {i} of 4": of_chains(4, "tree chains learned", hard(f"Decisive:{i}")) for i in (1, 3, 4)},
    ),
}
PAIRS = ("tree − chains", "tree − group", "tree − intra", "learned − chains", "learned − tree")
EXPERIMENTS = {name: Experiment("tree_grpo", what, range(seeds), PAIRS) for name, (seeds, what) in TREE_GRPO.items()}

TREERL = {
    "6,2,1,2": "--M=6 --N=2 --L=1 --T=2",
    "18 chains": "--method=chainrl --M=18 --keep=18 --steps=72",
    "2,2,2,2": "--M=2 --N=2 --L=2 --T=2",
    "9 chains": "--method=chainrl --M=9 --keep=9 --steps=72",
    "random": "--M=6 --N=2 --L=1 --T=2",
}
setting = Setting(TREERL, {"steps": 48, "eval_every": 6}, 4000)
pairs = ("6,2,1,2 − 18 chains", "2,2,2,2 − 9 chains", "6,2,1,2 − 2,2,2,2", "18 chains − 9 chains", "6,2,1,2 − random")
EXPERIMENTS["treerl"] = Experiment("treerl", {"": setting}, range(8), pairs, updates=48)

SOKOBAN = {"steps": 60, "eval_every": 12, "max_steps": 15, "env": f"{ROOT}/envs/sokoban.py:Sokoban"}
ALFWORLD = {"steps": 20, "eval_every": 10, "max_steps": 20, "eval_tasks": 24}
ALFWORLD["env"] = f"{ROOT}/envs/alfworld_games.py:ALFWorld:train,pick,heat"
WORLDS = {  # flags, environment steps per update, seeds, seeds of the warm starts
    "house": ({"steps": 40, "eval_every": 8}, 1250, 8, (0, 1)),
    "sokoban": ({**SOKOBAN, "omega": 0.8}, 1500, 3, (0, 1)),
    "sokoban, omega 0.1": (SOKOBAN, 1500, 3, (0, 1)),
    "alfworld": (ALFWORLD, 1200, 4, (0,)),
}
for world, (told, budget, seeds, starts) in WORLDS.items():
    methods = {method: f"--method={method}" for method in ("graph_gpo", "gigpo", "grpo")}
    setting = Setting(methods, {"eval_tasks": 40, **told}, budget, "env_steps")
    pairs = tuple(" − ".join(pair) for pair in itertools.combinations(methods, 2))
    EXPERIMENTS[world] = Experiment("graph_gpo", {"": setting}, range(seeds), pairs, starts)


# ------------------------------------------------------------------------------------------------------------- runs
def learned_search(search=tree_grpo.tree_search):
    """tree_search with forks where rewards have differed so far (when_trees_pay.py), for one run."""
    rule = Learned(0)

    def search_learned(play, prompts, M, N, L, rng):
        rule.seed(rng.getrandbits(60))
        search(play, prompts, M, N, L, rule)
        for _, root in prompts:
            rule.observe(root)

    return search_learned


def centred(values: torch.Tensor, groups: list) -> torch.Tensor:
    """z_scores without the std; a success returns 10 (tutorial, A.3), not 1."""
    return 10 * (values.double() - common.per_group(groups)(values.double(), "mean"))


def arm_of(experiment: str, arm: str):
    """What an arm replaces in its script, while this lasts."""
    if arm == "learned":
        return mock.patch.object(tree_grpo, "tree_search", learned_search())
    if arm == "random":
        return mock.patch.object(treerl, "fork_points", released.random_forks(random.Random(0)))
    if (experiment, arm) == ("sokoban", "gigpo"):  # both terms as in its Sokoban script: no std
        return mock.patch.object(graph_gpo, "z_scores", centred)
    return contextlib.nullcontext()


class Budget:
    """Sets --prompts (or --tasks) before each update, and notes what an update cost in its row."""

    def __init__(self, script, budget: int, counted: str):
        self.script, self.budget, self.counted = script, budget, counted
        self.unit = "tasks" if script is graph_gpo else "prompts"
        self.spent, self.signal = 0, 0.0
        self.parts = script.train, script.update, script.open_log

    def set(self, step: int) -> None:
        owed = self.budget * step - self.spent
        setattr(self.args, self.unit, max(1, round(owed / self.price)))

    def train(self, args, model, reference, actor, state) -> None:
        _, counts = common.rollouts(self.script, actor, "price")  # a batch that is not used says what one costs
        self.args, self.price = args, counts[self.counted] / getattr(args, self.unit)
        self.set(1)
        self.parts[0](args, model, reference, actor, state)

    def update(self, model, reference, optimizer, groups, args) -> dict:
        self.signal = common.signal(groups)
        return self.parts[1](model, reference, optimizer, groups, args)

    def open_log(self, args, size: int):
        log = self.parts[2](args, size)

        def log_budget(event: str, step: int, row: dict) -> None:
            if event == "train":
                number = getattr(args, self.unit)
                row |= {self.unit: number, "signal": self.signal, "rollout_cpu": row["seconds_sampling"]}
                row["update_cpu"] = row["seconds"] - row["seconds_sampling"]
                self.spent += row[self.counted]
                self.price = 0.7 * self.price + 0.3 * row[self.counted] / number
                self.set(step + 1)
            log(event, step, row)

        return log_budget


def budgeted_run(script, out: Path, arguments: list[str], budget: int, counted: str) -> list[dict]:
    """The rows of metrics.jsonl of a run that spends `budget` of what is counted per update."""
    spend = Budget(script, budget, counted)
    clock = types.SimpleNamespace(perf_counter=time.process_time, strftime=time.strftime)
    parts = {"train": spend.train, "update": spend.update, "open_log": spend.open_log}
    return common.run_script(script, out, arguments, time=clock, **parts)


def warm_start(script, setting: Setting, seed: int, folder: Path) -> list[str]:
    """A seed's warm-started model, in folder/start, and the flags of all runs from it."""
    told = {name: value for name, value in setting.told.items() if name != "steps"}
    script.save_model(folder / "start", *common.warm_started(script, tiny_args(script, seed=seed, **told)))
    shared = {**common.TINY[script], "model": folder / "start", "lr": 5e-4, "device": "cpu", "save_every": 10**6}
    return flags({**shared, **setting.told})


SUMS = "prompts tasks env_steps generated_tokens forwarded_tokens tool_calls rollout_cpu update_cpu"
EVALUATED = ("success", "greedy_success", "progress_in_failed", "waste_in_successful")


def summary(rows: list[dict], updates: int) -> dict:
    """What is kept of a run; costs are of so many updates (0: of all)."""
    evals = [row for row in rows if row["event"] == "eval"]
    steps = [row for row in rows if row["event"] == "train"]
    found = {}
    for name in EVALUATED:
        if name in evals[0]:
            found[name] = [None if row[name] is None else round(row[name], 3) for row in evals]
    cpu = [row["rollout_cpu"] + row["update_cpu"] for row in steps]
    found["cpu"] = [round(sum(cpu[: row["step"]]), 2) for row in evals]
    steps = steps[: updates or None]
    for name in SUMS.split():
        if name in steps[0]:
            found[name] = round(sum(row[name] for row in steps), 1)
    found["signal"] = round(statistics.mean(row["signal"] for row in steps), 3)
    return found


def run(job: tuple) -> None:
    """The missing (seed, arm) of a setting and a warm start, in a process of its own."""
    name, setting_name, start, missing = job
    experiment = EXPERIMENTS[name]
    script, setting = SCRIPTS[experiment.script], experiment.settings[setting_name]
    with common.quietly() as folder:
        shared = warm_start(script, setting, start, folder)
        for seed, arm in missing:
            began, own = time.perf_counter(), [*setting.arms[arm].split(), f"--seed={seed}"]
            with arm_of(name, arm):
                out = folder / f"{seed}-{arm}"
                rows = budgeted_run(script, out, [*shared, *own], setting.budget, setting.counted)
            result = {"experiment": name, "setting": setting_name, "start": start, "seed": seed, "arm": arm}
            result |= {**summary(rows, experiment.updates), "seconds": round(time.perf_counter() - began, 1)}
            common.write_rows(common.RESULTS / FILES[experiment.script], [result], "a")


# ---------------------------------------------------------------------------------------------------------- results
def read_runs(name: str) -> dict[str, dict[str, dict[tuple, dict]]]:
    """setting -> arm -> (start, seed) -> result."""
    found = {key: {arm: {} for arm in what.arms} for key, what in EXPERIMENTS[name].settings.items()}
    for row in read_rows(FILES[EXPERIMENTS[name].script]):
        # Older rows say "world" and "method", or nothing as there is one experiment in their file.
        of, arm = row.get("experiment", row.get("world", "treerl")), row.get("arm", row.get("method"))
        if of == name:
            found[row.get("setting", "")][arm][row.get("start", row["seed"]), row["seed"]] = row
    return found


def whole_runs(name: str, setting: str) -> list[dict[str, dict]]:
    """arm -> result, for each start and seed that all arms have been run with."""
    runs = read_runs(name)[setting]
    keys = sorted(set.intersection(*map(set, runs.values())))
    return [{arm: of[key] for arm, of in runs.items()} for key in keys]


def by_seed(found: list[dict[str, dict]], value) -> list[float]:
    """value(arm -> result) of each seed, the mean over its starts."""
    values = {}
    for runs in found:
        seed = next(iter(runs.values()))["seed"]
        values.setdefault(seed, []).append(value(runs))
    return list(map(statistics.mean, values.values()))


def score(row: dict, last: int | None = None) -> float:
    """Mean over the evaluations; [0] is the model that all arms start from."""
    return statistics.mean(row["success"][1:last])


def mean_until(row: dict, end: float) -> float:
    """Mean success over CPU time from 0 to `end`, linear between evaluations."""
    area = 0.0
    for (t, y), (u, z) in itertools.pairwise(zip(row["cpu"], row["success"])):
        if t < end:
            cut = min(u, end)
            area += (cut - t) * (y + (y + (z - y) * (cut - t) / (u - t))) / 2
    return area / end


def at_equal_time(one: dict, other: dict) -> float:
    """The difference of the means until the first of the two ends."""
    end = min(one["cpu"][-1], other["cpu"][-1])
    return mean_until(one, end) - mean_until(other, end)


def arm_row(found: list[dict[str, dict]], arm: str, last: int | None) -> dict[str, str]:
    """What an arm learned, and what it cost."""
    rows = [runs[arm] for runs in found]

    def over_seeds(value) -> str:
        return interval(by_seed(found, lambda runs: value(runs[arm])))

    fell = sum(row["success"][-1] < max(row["success"]) - 0.2 for row in rows)
    cells = {
        "score": over_seeds(lambda row: score(row, last)),
        "sampled after": over_seeds(lambda row: row["success"][:last][-1]),
        "greedy after": over_seeds(lambda row: row["greedy_success"][:last][-1]),
        "fell by 0.2 from its best": f"{fell} of {len(rows)}",
    }
    for name in EVALUATED[2:]:
        known = [row[name][-1] for row in rows if name in row and row[name][-1] is not None]
        if known:
            cells[f"{name.replace('_', ' ')}, after"] = f"{statistics.mean(known):.1%}"
    for name in SUMS.split():
        if name in rows[0]:
            cells[name.replace("_", " ")] = f"{statistics.mean(row[name] for row in rows):,.1f}"
    return cells


def pair_row(found: list[dict[str, dict]], one: str, other: str, last: int | None) -> dict[str, str]:
    gaps = by_seed(found, lambda runs: score(runs[one], last) - score(runs[other], last))
    cells = dict(zip(("score", "ahead", "rank test, p", "detectable"), paired(gaps)))
    if "cpu" in found[0][one]:
        gaps = by_seed(found, lambda runs: at_equal_time(runs[one], runs[other]))
        cells |= dict(zip(("at equal time", "ahead in time", "rank test in time, p"), paired(gaps)))
    return cells


def report(name: str) -> str:
    """Of each setting, for the seeds for which all arms have run: what was learned and what it cost; and paired
    differences."""
    learned, pairs, experiment = [], [], EXPERIMENTS[name]
    for setting, what in experiment.settings.items():
        found = whole_runs(name, setting)
        last = experiment.updates // what.told["eval_every"] + 1 if experiment.updates else None
        for arm in what.arms if found else ():
            learned.append({"setting": setting or name, "arm": arm, **arm_row(found, arm, last)})
        for pair in experiment.pairs if found else ():
            if what.arms.keys() >= {*pair.split(" − ")}:
                cells = pair_row(found, *pair.split(" − "), last)
                pairs.append({"setting": setting or name, "pair": pair, **cells})
    return "\n\n".join(table(rows[0], [row.values() for row in rows]) for rows in (learned, pairs) if rows)


def figure(name: str) -> None:
    """results/learning_curves_<experiment>.png: held-out success of each arm, and 95 % intervals."""
    settings = EXPERIMENTS[name].settings
    size = {"figsize": (5.5 * len(settings), 4), "layout": "constrained"}
    drawing, axes = common.pyplot().subplots(1, len(settings), squeeze=False, **size)
    for axis, (setting, what) in zip(axes[0], settings.items()):
        found = whole_runs(name, setting)
        for color, arm in zip(COLORS, what.arms if found else ()):
            evals = range(len(found[0][arm]["success"]))
            curve = [by_seed(found, lambda runs, arm=arm, i=i: runs[arm]["success"][i]) for i in evals]
            mean, half = zip(*((statistics.mean(values), common.half_width(values)) for values in curve))
            x = [what.budget * what.told["eval_every"] * i for i in range(len(mean))]
            axis.plot(x, mean, color=color, label=arm)
            bounds = ([m + sign * h for m, h in zip(mean, half)] for sign in (-1, 1))
            axis.fill_between(x, *bounds, color=color, alpha=0.12, linewidth=0)
        axis.set(title=setting or name, xlabel=what.counted.replace("_", " "))
        axis.legend()
    axes[0, 0].set_ylabel("held-out success at T = 1")
    drawing.savefig(common.RESULTS / f"learning_curves_{name.replace(', ', '_').replace(' ', '_')}.png", dpi=100)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("experiments", nargs="*", help=f"default: all, {'; '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: each experiment's own")
    parser.add_argument("--starts", type=int, nargs="+", help="graph_gpo.py's warm starts")
    parser.add_argument("--processes", type=int, default=2, help="side by side, one thread each")
    parser.add_argument("--report", action="store_true", help="no runs: tables and figures")
    options = parser.parse_args()
    names, jobs = options.experiments or list(EXPERIMENTS), {}
    if unknown := set(names) - EXPERIMENTS.keys():
        parser.error(f"no such experiment: {', '.join(unknown)}")
    for name in names if not options.report else ():
        experiment = EXPERIMENTS[name]
        for setting, arms in read_runs(name).items():
            for seed, arm in itertools.product(options.seeds or experiment.seeds, arms):
                for start in (options.starts or experiment.starts) if experiment.starts else (seed,):
                    if (start, seed) not in arms[arm]:
                        jobs.setdefault((name, setting, start), []).append((seed, arm))
    common.in_processes(run, [(*key, missing) for key, missing in jobs.items()], options.processes)
    print("Means over the seeds, ± half of the 95 % interval of the mean; costs are sums over a run.")
    for name in names:
        print(f"\n## {name}\n\n{report(name)}")
        figure(name)


if __name__ == "__main__":
    main()
