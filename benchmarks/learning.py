"""When does a tree of rollouts pay? tree_grpo.py on its built-in task, the tree beside chains that cost as much.

    python benchmarks/learning.py                      make the runs that are missing, two at a time; then report
    python benchmarks/learning.py main --seeds 7 8     the same of one experiment and these seeds
    python benchmarks/learning.py --report             no runs: tables of results/learning.jsonl, and the figures

Arms: "tree" is Tree-GRPO (M = 2, N = 2, L = 1: 6 leaves); "chains" is GRPO with about as many generated tokens per
prompt (4 chains, a tenth fewer); "group" is GRPO with as many leaves per prompt (6 chains); "intra" is the tree
without A_inter; "learned" is the tree with forks where rewards have differed so far in the run (Learned, of
when_trees_pay.py). Every arm is to generate `budget` tokens per update: the number of prompts is the budget over what
a prompt has cost in the updates before, rounded, so that a few per cent are missed; the tables say what was
generated. All start from the seed's own warm-started model and share all other flags, among them the default run's
learning rate, which was tuned for the tree. The advantages of "tree" are sums of two z-scores, of a larger scale than
those of the others. The score of a run is its success at temperature 1 on 200 held-out questions, averaged over ten
evaluations on the way; arms are compared seed by seed, so the intervals are over training seeds, for these questions.
In "where" each question has three hops, so four turns, and the warm-started model is right in all of them but one,
the first, the third or the last.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
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
    return {"tree": tree, "learned": tree, "chains": ["--method", "grpo", "--M", chains],
            "group": ["--method", "grpo", "--M", group],
            **{terms: [*tree, "--advantage", terms] for terms in ("intra", "inter")}}

def decisive(turn: int) -> dict:
    return {**BASE, "decisive": turn, "hops": 3}

BASE = {"hard": "late", "decisive": 0, "steps": 100, "budget": 1000, "counted": "generated_tokens", "repeat": 1,
        "lr": 5e-4}
ANYWHERE, ALL = {**BASE, "hard": "anywhere", "steps": 40}, ("tree", "chains", "group", "intra")
EXPERIMENTS = {  # experiment -> setting -> shapes of the arms, the arms, and what the run is told
    "main": {"errors anywhere": (shapes(2, 4, 6), ALL, ANYWHERE), "error last": (shapes(2, 4, 6), ALL, BASE)},
    "budget": {f"error last, {n} chains": (shapes(n // 2, n, 3 * n // 2), ALL[:3], BASE) for n in (2, 8)},
    "observations": {"error last, observations x 4, equal forwarded tokens": (
        shapes(2, 4, 6), ALL[:3], {**BASE, "repeat": 4, "budget": 4000, "counted": "forwarded_tokens"})},
    "hops": {"error last, 2 to 4 hops": (shapes(2, 4, 6), ALL[:3], {**BASE, "hops": 4, "max_turns": 5})},
    "where": {f"decisive turn {turn} of 4": (shapes(2, 4, 6), ("tree", "chains", "learned"), decisive(turn))
              for turn in (1, 3, 4)}}
SEEDS = {"main": range(12), "budget": range(6), "observations": range(4), "hops": range(4), "where": range(6)}
COSTS = ("prompts", "signal", "_tokens", "tool_calls", "_cpu")

# ------------------------------------------------------------------------------- questions with one decisive turn of four
MISTAKEN = {"mother": "friend", "friend": "teacher", "teacher": "mother", "birthplace": "home", "home": "birthplace",
            "mayor": "founder", "founder": "mayor"}  # what the demonstrator asks for instead in turns 1 to 3

def hard_question(turn: int, rng, held_out: bool) -> tree_grpo.Question:
    """Of three hops. In turn 1, 2 or 3 the mistaken relation is known too, and from there on leads to another answer; in
    turn 4 the last fact lists four names, of which the first is right."""
    while True:
        entities, relations = [rng.choice(tree_grpo.PEOPLE + tree_grpo.CITIES)], []
        for _ in range(3):
            fit = [r for r in MISTAKEN if entities[-1] in tree_grpo.RELATIONS[r][0] and r not in relations]
            relations.append(rng.choice(fit))
            entities.append(rng.choice([e for e in tree_grpo.RELATIONS[relations[-1]][1] if e not in entities]))
        where = "Where" if entities[-1] in tree_grpo.CITIES else "Who"
        text = f"{where} is the {' of the '.join(reversed(relations))} of {entities[0]}?"
        mistaken = MISTAKEN[relations[min(turn, 3) - 1]]
        if mistaken not in relations and (random.Random(text).random() < 0.2) == held_out:
            break
    unused = {kind: [e for e in kind if e not in entities] for kind in (tree_grpo.PEOPLE, tree_grpo.CITIES)}
    for names in unused.values():
        rng.shuffle(names)
    facts = {(relation, of): value for relation, of, value in zip(relations, entities, entities[1:])}
    if turn == 4:
        former = ", ".join(unused[tree_grpo.RELATIONS[relations[-1]][1]][:3])
        facts[relations[-1], entities[2]] += f", formerly {former}"
    else:
        of = entities[turn - 1]
        for relation in (mistaken, *relations[turn:]):
            other = unused[tree_grpo.RELATIONS[relation][1]].pop()
            facts[relation, of] = other
            of = other
    passages = [("", f"the {relation} of {of} is {value}") for (relation, of), value in facts.items()]
    rng.shuffle(passages)
    return tree_grpo.Question(text, [entities[-1]], tree_grpo.BM25(passages), entities[0], tuple(relations))

def hard_demonstration(turn: int, question: tree_grpo.Question, rng) -> list[tuple[str, str]]:
    """Right in all turns but one, in which it is mistaken four times in five."""
    turns, names = [], [question.start]
    for number, relation in enumerate(question.relations, 1):
        asked = MISTAKEN[relation] if number == turn and rng.random() < 0.8 else relation
        query = f"{asked} of {names[0]}"
        found = question.passages.top(query, 1)[0][1]
        turns.append((f"<think> next {asked}</think><search> {query}</search>", found))
        names = found.partition(" is ")[2].replace("formerly ", "").split(", ")
    answer = rng.choices(names, [2, 4, 2, 2])[0] if turn == 4 else names[0]
    return [*turns, (f"<think> done</think><answer> {answer}</answer>", "")]

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

TREE_ROLLOUT = tree_grpo.tree_rollout

def learned_rollout():
    """tree_rollout with forks where rewards have differed so far (when_trees_pay.py), for one run."""
    from when_trees_pay import Learned
    rule = Learned(0)
    def rollout(play, groups, M, N, L, rng):
        rule.seed(rng.getrandbits(60))
        TREE_ROLLOUT(play, groups, M, N, L, rule)
        for _, root in groups:
            rule.observe(root)
    return rollout

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
    if turn := told["decisive"]:
        tree_grpo.make_question = lambda rng, max_hops, hard, held_out: hard_question(turn, rng, held_out)
        tree_grpo.demonstrate = lambda question, hard, rng: hard_demonstration(turn, question, rng)
    told = {name: value for name, value in told.items() if name not in ("repeat", "budget", "counted", "decisive")}
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
            tree_grpo.tree_rollout = learned_rollout() if arm == "learned" else TREE_ROLLOUT
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
    """Mean and half of its 95 % interval."""
    return f"{statistics.mean(values):{sign}.3f} ± {half_width(values):.3f}"

def half_width(values: list[float]) -> float:
    """Half of the 95 % interval of the mean (Student's t)."""
    return quantile(values, 0.975) * error(values)

def detectable(values: list[float]) -> float:
    """The true mean that a test at the 5 % level finds in 80 % of such experiments (by quantiles of Student's t: about 5 %
    too small for 3 values, 1 % for 5)."""
    return (quantile(values, 0.975) + quantile(values, 0.8)) * error(values)

def quantile(values: list[float], share: float) -> float:
    from scipy import stats
    return float(stats.t.ppf(share, len(values) - 1))

def error(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")

def rank_test(values: list[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of a median of 0, exact up to 17 values: unlike the interval it does not
    suppose that differences are normal."""
    from scipy import stats
    return float(stats.wilcoxon(values, method=stats.PermutationMethod(n_resamples=2**17)).pvalue)

def table(head: tuple, rows: list) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])

def in_processes(function, jobs: list, processes: int) -> list:
    """function(job) of each job, each in a process of its own, so many side by side."""
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        return list(tree_grpo.tqdm(pool.imap(function, jobs), total=len(jobs)))

def paired(gaps: list[float]) -> list[str]:
    """Of paired differences four cells: mean and interval, how often positive, p of the rank test, detectable mean."""
    return [interval(gaps, "+"), f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}", f"{rank_test(gaps):.3f}",
            f"{detectable(gaps):.3f}"]

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
            against = [""] * 4 if arm == "tree" else paired(gaps)
            lost = f"{sum(row['success'][-1] < max(row['success']) - 0.2 for row in rows)} of {len(rows)}"
            learned.append([setting, arm, interval([score(row) for row in rows]), *against, *ends, lost])
            mean = {name: statistics.mean(row[name] for row in rows) for name in rows[0] if name.endswith(COSTS)}
            costs.append([setting, arm, f"{mean['prompts'] / told['steps']:.1f}", f"{mean['signal']:.0%}",
                          *(f"{mean[name]:,.0f}" for name in ("generated_tokens", "forwarded_tokens", "tool_calls")),
                          f"{mean['rollout_cpu']:.1f}", f"{mean['update_cpu']:.1f}"])
    heads = (("setting", "arm", "score", "tree − arm", "tree ahead", "rank test, p", "detectable", "sampled after",
              "greedy after", "fell by 0.2 from its best"),
             ("setting", "arm", "prompts per update", "leaves with A ≠ 0", "generated tokens", "forwarded tokens",
              "tool calls", "CPU s sampling", "CPU s training"))
    return "\n\n".join([*map(table, heads, (learned, costs)), *pair_table(experiment, found)])

def pair_table(experiment: str, found: dict) -> list[str]:
    """Of an experiment with the arm "learned": all its pairs."""
    lines = []
    for setting, (_, arms, _) in EXPERIMENTS[experiment].items():
        runs, seeds = common_runs(found, experiment, setting)
        for one, other in (("tree", "chains"), ("learned", "chains"), ("learned", "tree")) if "learned" in arms else ():
            gaps = [score(runs[one][seed]) - score(runs[other][seed]) for seed in seeds]
            lines.append([setting, f"{one} − {other}", *paired(gaps)])
    return [table(("setting", "pair", "score", "ahead", "rank test, p", "detectable"), lines)] if lines else []

def figures() -> None:
    """learning.png: curves of "main" and paired differences; learning_gaps.png: differences of the scores of all."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found, colors = read_results(), dict(
        zip((*ALL, "learned"), ("tab:green", "tab:blue", "tab:orange", "tab:red", "tab:purple")))
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
    rows, drawn = [(experiment, setting) for experiment, settings in EXPERIMENTS.items() for setting in settings], set()
    for y, key in enumerate(rows):
        runs, seeds = common_runs(found, *key)
        for shift, arm in zip((-0.3, -0.1, 0.1, 0.3), (*ALL[1:], "learned")):
            if gaps := [score(runs["tree"][s]) - score(runs[arm][s]) for s in seeds if arm in runs]:
                axis.errorbar(statistics.mean(gaps), y + shift, xerr=half_width(gaps), fmt="o", color=colors[arm],
                              capsize=3, label=None if arm in drawn else f"tree − {arm}")
                drawn.add(arm)
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
