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
than those of the others. In "error last" (late, of released.py) the last fact lists former values too. In "where" each
question has three hops, so four turns, and the warm-started model is right in all of them but one, the first, the third
or the last.

treerl: "6,2,1,2" is TreeRL with these M, N, L, T, 16 of 30 leaves trained on; "2,2,2,2" a cheaper tree, 16 of 18; "18
chains" and "9 chains" are ChainRL with about as many generated tokens per prompt, all trained on; "random" is the first
tree forked at random places. At equal time: the mean success over time (linear between evaluations) until the first of
the two that are compared ends; chains go on for longer to make that fair.

house, sokoban: graph_gpo.py, the three methods, from each of two warm starts. Runs with one seed have the same tasks
whatever their start: they are averaged over the starts, and intervals and tests are over seeds, for these two starts.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import statistics
import time
import types
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded; two runs share the machine

import released
import torch
from common import (
    RESULTS,
    SCRIPTS,
    TINY,
    draw_band,
    flags,
    graph_gpo,
    in_processes,
    interval,
    paired,
    per_group,
    pyplot,
    quietly,
    read_rows,
    rollouts,
    table,
    tiny_args,
    tree_grpo,
    treerl,
    warm_started,
)

LEARNED = (("learned", "chains"), ("learned", "tree"))
COLORS = ("tab:green", "tab:blue", "tab:orange", "tab:red", "tab:purple")


class Setting(NamedTuple):
    arms: dict[str, str]  # arm -> its flags
    told: dict  # the flags that all arms share
    budget: int = 1000  # of `counted` per update
    counted: str = "generated_tokens"
    decisive: object = ""  # tree_grpo: "late", or the turn that decides
    repeat: int = 1  # tree_grpo: how often an observation is said


class Experiment(NamedTuple):
    script: str
    settings: dict[str, Setting]
    seeds: range
    starts: tuple | None = None  # seeds of the warm starts (None: the run's own seed)
    updates: int = 0  # those that count at equal cost (0: all)
    pairs: tuple = (("tree", "chains"), ("tree", "group"), ("tree", "intra"), *LEARNED)

    @property
    def file(self) -> Path:
        return RESULTS / {"tree_grpo": "learning.jsonl"}.get(
            self.script, f"learning_{self.script}.jsonl"
        )


def tree_arms(M: int, chains: int, group: int, *names: str) -> dict[str, str]:
    tree = f"--M={M} --N=2 --L=1"
    arms = {"tree": tree, "learned": tree, "inter": f"{tree} --advantage=inter"}
    arms["intra"] = f"{tree} --advantage=intra"
    arms["chains"] = f"--method=grpo --M={chains}"
    arms["group"] = f"--method=grpo --M={group}"
    return {name: arms[name] for name in names}


THREE, ALL = ("tree", "chains", "group"), ("tree", "chains", "group", "intra")
UPDATES = {"steps": 100, "eval_every": 10}
FOUR = tree_arms(2, 4, 6, *ALL)
MAIN = {
    "errors anywhere": Setting(FOUR, {"steps": 40, "eval_every": 4}),
    "error last": Setting(FOUR, UPDATES, decisive="late"),
}
BUDGET = {
    f"error last, {n} chains": Setting(
        tree_arms(n // 2, n, 3 * n // 2, *THREE), UPDATES, decisive="late"
    )
    for n in (2, 8)
}
OBSERVATIONS = Setting(tree_arms(2, 4, 6, *THREE), UPDATES, 4000, "forwarded_tokens", "late", 4)
HOPS = Setting(tree_arms(2, 4, 6, *THREE), {**UPDATES, "hops": 4, "max_turns": 5}, decisive="late")
WHERE = {
    f"decisive turn {turn} of 4": Setting(
        tree_arms(2, 4, 6, "tree", "chains", "learned"), {**UPDATES, "hops": 3}, decisive=turn
    )
    for turn in (1, 3, 4)
}
TREERL_ARMS = {
    "6,2,1,2": "--M=6 --N=2 --L=1 --T=2",
    "18 chains": "--method=chainrl --M=18 --keep=18 --steps=72",
    "2,2,2,2": "--M=2 --N=2 --L=2 --T=2",
    "9 chains": "--method=chainrl --M=9 --keep=9 --steps=72",
    "random": "--M=6 --N=2 --L=1 --T=2",
}
TREERL_PAIRS = (
    ("6,2,1,2", "18 chains"),
    ("2,2,2,2", "9 chains"),
    ("6,2,1,2", "2,2,2,2"),
    ("18 chains", "9 chains"),
    ("6,2,1,2", "random"),
)
METHODS = {method: f"--method={method}" for method in ("graph_gpo", "gigpo", "grpo")}
HOUSE = {"steps": 40, "eval_every": 8, "eval_tasks": 40}
SOKOBAN = {"steps": 60, "eval_every": 12, "eval_tasks": 40, "max_steps": 15}
SOKOBAN["env"] = str(RESULTS.parents[1] / "envs" / "sokoban.py:Sokoban")
WORLDS = {
    "house": (HOUSE, 1250, 8),
    "sokoban": ({**SOKOBAN, "omega": 0.8}, 1500, 3),
    "sokoban, omega 0.1": (SOKOBAN, 1500, 3),
}
EXPERIMENTS = {
    "main": Experiment("tree_grpo", MAIN, range(12)),
    "budget": Experiment("tree_grpo", BUDGET, range(6)),
    "observations": Experiment(
        "tree_grpo",
        {"error last, observations x 4, equal forwarded tokens": OBSERVATIONS},
        range(4),
    ),
    "hops": Experiment("tree_grpo", {"error last, 2 to 4 hops": HOPS}, range(4)),
    "where": Experiment("tree_grpo", WHERE, range(6)),
    "treerl": Experiment(
        "treerl",
        {"": Setting(TREERL_ARMS, {"steps": 48, "eval_every": 6}, 4000)},
        range(8),
        updates=48,
        pairs=TREERL_PAIRS,
    ),
}
for world, (told, budget, seeds) in WORLDS.items():
    setting = Setting(METHODS, told, budget, "env_steps")
    pairs = tuple(itertools.combinations(METHODS, 2))
    starts = (0, 1)
    EXPERIMENTS[world] = Experiment("graph_gpo", {"": setting}, range(seeds), starts, pairs=pairs)

# ------------------------------------------------------ questions with one decisive turn of four
MISTAKEN = {  # what the demonstrator asks for instead in turns 1 to 3
    "mother": "friend",
    "friend": "teacher",
    "teacher": "mother",
    "birthplace": "home",
    "home": "birthplace",
    "mayor": "founder",
    "founder": "mayor",
}


def hard_question(turn: int, rng, max_hops: int, held_out: bool) -> tree_grpo.Question:
    """Of three hops. In turn 1, 2 or 3 the mistaken relation is known too, and from there on leads
    to another answer; in turn 4 the last fact lists four names, of which the first is right."""
    of_what = tree_grpo.RELATIONS
    while True:
        way, relations = [rng.choice(tree_grpo.PEOPLE + tree_grpo.CITIES)], []
        for _ in range(3):
            fit = [r for r in MISTAKEN if way[-1] in of_what[r][0] and r not in relations]
            relations.append(rng.choice(fit))
            way.append(rng.choice([e for e in of_what[relations[-1]][1] if e not in way]))
        where = "Where" if way[-1] in tree_grpo.CITIES else "Who"
        text = f"{where} is the {' of the '.join(reversed(relations))} of {way[0]}?"
        mistaken = MISTAKEN[relations[min(turn, 3) - 1]]
        if mistaken not in relations and (random.Random(text).random() < 0.2) == held_out:
            break
    unused = {}
    for kind in ("PEOPLE", "CITIES"):
        names = [e for e in getattr(tree_grpo, kind) if e not in way]
        rng.shuffle(names)
        unused[kind] = names

    def others(relation: str) -> list[str]:
        return unused["PEOPLE" if of_what[relation][1] is tree_grpo.PEOPLE else "CITIES"]

    facts = {(relation, of): value for relation, of, value in zip(relations, way, way[1:])}
    if turn == 4:
        facts[relations[-1], way[2]] += f", formerly {', '.join(others(relations[-1])[:3])}"
    else:
        of = way[turn - 1]
        for relation in (mistaken, *relations[turn:]):
            facts[relation, of] = others(relation).pop()
            of = facts[relation, of]
    passages = [
        ("", f"the {relation} of {of} is {value}") for (relation, of), value in facts.items()
    ]
    rng.shuffle(passages)
    index = tree_grpo.BM25(passages)
    return tree_grpo.Question(text, [way[-1]], index, way[0], tuple(relations))


def hard_demonstration(turn: int, question, rng) -> list[tuple[str, str]]:
    """Right in all turns but one, in which it is mistaken four times in five."""
    turns, names = [], [question.start]
    for number, relation in enumerate(question.relations, 1):
        asked = MISTAKEN[relation] if number == turn and rng.random() < 0.8 else relation
        query = f"{asked} of {names[0]}"
        found = question.passages.top(query, 1)[0][1]
        turns.append((f"<think> next {asked}</think><search> {query}</search>", found))
        names = released.values_of(found)
    answer = rng.choices(names, [2, 4, 2, 2])[0] if turn == 4 else names[0]
    return [*turns, (f"<think> done</think><answer> {answer}</answer>", "")]


# ----------------------------------------------------------------------------------------------- runs
def learned_search(search=tree_grpo.tree_search):
    """tree_search with forks where rewards have differed so far (when_trees_pay.py), for one
    run."""
    from when_trees_pay import Learned

    rule = Learned(0)

    def search_learned(play, prompts, M, N, L, rng):
        rule.seed(rng.getrandbits(60))
        search(play, prompts, M, N, L, rule)
        for _, root in prompts:
            rule.observe(root)

    return search_learned


def repeated(repeat: int, observation=tree_grpo.Agent.observation):
    def say(agent, found: str) -> list[int]:
        return observation(agent, ", ".join([found] * repeat))

    return mock.patch.object(tree_grpo.Agent, "observation", say)


@contextlib.contextmanager
def task_of(setting: Setting):
    """The questions and observations of a setting, while this lasts."""
    with contextlib.ExitStack() as stack:
        if setting.decisive == "late":
            stack.enter_context(released.late())
        elif turn := setting.decisive:
            make = functools.partial(hard_question, turn)
            demonstrate = functools.partial(hard_demonstration, turn)
            stack.enter_context(released.questions(make, demonstrate))
        if setting.repeat > 1:
            stack.enter_context(repeated(setting.repeat))
        yield


def centred(values: torch.Tensor, groups: list) -> torch.Tensor:
    """z_scores without the std; a success returns 10 (tutorial, A.3), not 1."""
    return 10 * (values.double() - per_group(groups)(values.double(), "mean"))


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
    """Sets --prompts (or --tasks) before each update."""

    def __init__(self, script, budget: int, counted: str):
        self.script, self.budget, self.counted = script, budget, counted
        self.unit = "tasks" if script is graph_gpo else "prompts"
        self.spent, self.signal = 0, 0.0

    def begin(self, args, actor) -> None:
        """What one costs, from a batch that is not used."""
        self.args = args
        _, counts = rollouts(self.script, actor, "price")
        self.price = counts[self.counted] / getattr(args, self.unit)
        self.set(1)

    def set(self, step: int) -> None:
        owed = self.budget * step - self.spent
        setattr(self.args, self.unit, max(1, round(owed / self.price)))

    def end(self, step: int, row: dict) -> None:
        """Takes note of a finished update, and adds to its row."""
        number = getattr(self.args, self.unit)
        row[self.unit], row["signal"] = number, self.signal
        row["rollout_cpu"] = row["seconds_sampling"]
        row["update_cpu"] = row["seconds"] - row["seconds_sampling"]
        self.spent += row[self.counted]
        self.price = 0.7 * self.price + 0.3 * row[self.counted] / number
        self.set(step + 1)


def budgeted_run(script, arguments: list[str], budget: int, counted: str) -> list[dict]:
    """The rows of metrics.jsonl of a run that spends `budget` of what is counted per update."""
    spend, train, update, log = (
        Budget(script, budget, counted),
        script.train,
        script.update,
        script.Log,
    )

    def train_budgeted(args, model, reference, actor, state):
        spend.begin(args, actor)
        train(args, model, reference, actor, state)

    def update_watched(model, reference, optimizer, groups, args):
        A = torch.cat([group.advantages.abs().amax(1) for group in groups])
        spend.signal = (A > 0).double().mean().item()
        return update(model, reference, optimizer, groups, args)

    class LogWithBudget(log):
        def __call__(self, event, step, row):
            if event == "train":
                spend.end(step, row)
            super().__call__(event, step, row)

    clock = types.SimpleNamespace(perf_counter=time.process_time)
    replaced = {"train": train_budgeted, "update": update_watched, "Log": LogWithBudget}
    replaced["catch_signals"] = list  # Ctrl-C ends all runs, at once
    with mock.patch.multiple(script, time=clock, **replaced):
        script.main(arguments)
    out = next(a.partition("=")[2] for a in arguments if a.startswith("--out="))
    return read_rows(Path(out, "metrics.jsonl"))


def warm_start(script, setting: Setting, seed: int, folder: Path) -> list[str]:
    """A seed's warm-started model, in folder/start, and the flags of all runs from it."""
    told = {name: value for name, value in setting.told.items() if name not in ("env", "steps")}
    make_env = graph_gpo.House
    if "env" in setting.told:
        make_env = graph_gpo.load_env(setting.told["env"])
    model, tokenizer = warm_started(script, tiny_args(script, seed=seed, **told), make_env)
    script.save_model(folder / "start", model, tokenizer)
    shared = {**TINY[script], "model": folder / "start", "lr": 5e-4, "device": "cpu"}
    return flags({**shared, "save_every": 10**6, **setting.told})


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
    torch.set_num_threads(1)
    with quietly() as folder, task_of(setting):
        common = warm_start(script, setting, start, folder)
        for seed, arm in missing:
            began, own = time.perf_counter(), setting.arms[arm].split()
            where = [f"--seed={seed}", f"--out={folder}/{seed}-{arm}"]
            with arm_of(name, arm):
                rows = budgeted_run(
                    script, [*common, *own, *where], setting.budget, setting.counted
                )
            result = {"experiment": name, "setting": setting_name, "start": start, "seed": seed}
            result |= {"arm": arm, **summary(rows, experiment.updates)}
            result["seconds"] = round(time.perf_counter() - began, 1)
            with open(experiment.file, "a") as file:
                file.write(json.dumps(result) + "\n")


# -------------------------------------------------------------------------------------------- results
def read_runs(name: str) -> dict[str, dict[str, dict[tuple, dict]]]:
    """setting -> arm -> (start, seed) -> result."""
    found = {
        key: {arm: {} for arm in what.arms} for key, what in EXPERIMENTS[name].settings.items()
    }
    for row in read_rows(EXPERIMENTS[name].file):
        # Older rows say "world" and "method", or nothing as there is one experiment in their file.
        of, arm = (
            row.get("experiment", row.get("world", "treerl")),
            row.get("arm", row.get("method")),
        )
        if of == name:
            key = row.get("start", row["seed"]), row["seed"]
            found[row.get("setting", "")][arm][key] = row
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


def pair_row(
    found: list[dict[str, dict]], one: str, other: str, last: int | None
) -> dict[str, str]:
    gaps = by_seed(found, lambda runs: score(runs[one], last) - score(runs[other], last))
    cells = dict(zip(("score", "ahead", "rank test, p", "detectable"), paired(gaps)))
    if "cpu" in found[0][one]:
        gaps = by_seed(found, lambda runs: at_equal_time(runs[one], runs[other]))
        head = ("at equal time", "ahead in time", "rank test in time, p")
        cells |= dict(zip(head, paired(gaps)))
    return cells


def report(name: str) -> str:
    """Of each setting, for the seeds for which all arms have run: what was learned and what it
    cost; and paired differences."""
    learned, pairs = [], []
    for setting, what in EXPERIMENTS[name].settings.items():
        found, last = whole_runs(name, setting), None
        if updates := EXPERIMENTS[name].updates:
            last = updates // what.told["eval_every"] + 1
        for arm in what.arms if found else ():
            cells = arm_row(found, arm, last)
            learned.append({"setting": setting or name, "arm": arm, **cells})
        for one, other in EXPERIMENTS[name].pairs if found else ():
            if {one, other} <= what.arms.keys():
                cells = pair_row(found, one, other, last)
                pairs.append({"setting": setting or name, "pair": f"{one} − {other}", **cells})
    of = [
        table(tuple(rows[0]), [list(row.values()) for row in rows])
        for rows in (learned, pairs)
        if rows
    ]
    return "\n\n".join(of)


def figure(name: str) -> None:
    """results/learning_curves_<experiment>.png: held-out success of each arm, and 95 % intervals."""
    settings = EXPERIMENTS[name].settings
    drawing, axes = pyplot().subplots(
        1, len(settings), figsize=(5.5 * len(settings), 4), squeeze=False, layout="constrained"
    )
    for axis, (setting, what) in zip(axes[0], settings.items()):
        found = whole_runs(name, setting)
        for color, arm in zip(COLORS, what.arms if found else ()):
            n = len(found[0][arm]["success"])
            at = [
                by_seed(found, lambda runs, i=i, arm=arm: runs[arm]["success"][i]) for i in range(n)
            ]
            x = [what.budget * what.told["eval_every"] * i for i in range(n)]
            draw_band(axis, x, list(zip(*at)), color=color, label=arm)
        axis.set_title(setting or name)
        axis.set_xlabel(what.counted.replace("_", " "))
        axis.legend()
    axes[0, 0].set_ylabel("held-out success at T = 1")
    drawing.savefig(
        RESULTS / f"learning_curves_{name.replace(', ', '_').replace(' ', '_')}.png", dpi=100
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", help=f"default: all, {'; '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: each experiment's own")
    parser.add_argument("--starts", type=int, nargs="+", help="graph_gpo.py's warm starts")
    parser.add_argument("--processes", type=int, default=2, help="side by side, one thread each")
    parser.add_argument("--report", action="store_true", help="no runs: tables and figures")
    options = parser.parse_args()
    names, jobs = options.experiments or list(EXPERIMENTS), []
    if unknown := set(names) - EXPERIMENTS.keys():
        parser.error(f"no such experiment: {', '.join(unknown)}")
    for name in names if not options.report else ():
        experiment, seeds = EXPERIMENTS[name], options.seeds or EXPERIMENTS[name].seeds
        for setting, arms in read_runs(name).items():
            missing = {}
            for seed, arm in itertools.product(seeds, arms):
                starts = (options.starts or experiment.starts) if experiment.starts else (seed,)
                for start in starts:
                    if (start, seed) not in arms[arm]:
                        missing.setdefault(start, []).append((seed, arm))
            jobs += [(name, setting, start, pairs) for start, pairs in missing.items()]
    in_processes(run, jobs, options.processes)
    print(
        "Means over the seeds, ± half of the 95 % interval of the mean; costs are sums over a run."
    )
    for name in names:
        print(f"\n## {name}\n\n{report(name)}")
        figure(name)


if __name__ == "__main__":
    main()
