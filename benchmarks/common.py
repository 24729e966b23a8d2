"""What the benchmarks share: statistics, tables, runs of the scripts, and a training step's parts outside of train()."""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
ENVS, RESULTS = ROOT / "envs", ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ENVS)]

import torch

import graph_gpo
import tree_grpo
import treerl

CPU = torch.device("cpu")
SCRIPTS = {"tree_grpo": tree_grpo, "treerl": treerl, "graph_gpo": graph_gpo}
ACTORS = {tree_grpo: tree_grpo.Agent, treerl: treerl.Solver, graph_gpo: graph_gpo.Player}
# What the scripts' main() sets where no --model is given.
TINY = {
    tree_grpo: {"env": f"{ENVS}/facts.py:Facts", "turn_tokens": 32},
    treerl: {"env": f"{ENVS}/sums.py:Sums", "max_tokens": 64},
    graph_gpo: {"env": f"{ENVS}/house.py:House", "max_tokens": 8},
}


# ------------------------------------------------------------------------------------------ results and statistics
def parser(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def read_rows(path: Path | str) -> list[dict]:
    """The lines of a file, of results/ if only its name is given; none if it is not there."""
    path = RESULTS / path
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_rows(path: Path, rows: list[dict], mode: str = "w") -> None:
    with open(path, mode) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def table(head, rows: list) -> str:
    """Markdown. head: the columns' titles, or a text that has "|" between them."""
    head = head.split("|") if isinstance(head, str) else head
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def error(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def quantile(values: list[float], share: float) -> float:
    from scipy import stats

    return float(stats.t.ppf(share, len(values) - 1))


def half_width(values: list[float]) -> float:
    """Half of the 95 % interval of the mean (Student's t)."""
    return quantile(values, 0.975) * error(values)


def interval(values: list[float], sign: str = "") -> str:
    """Mean and half of its 95 % interval."""
    return f"{statistics.mean(values):{sign}.3f} ± {half_width(values):.3f}"


def detectable(values: list[float]) -> float:
    """The true mean that a test at the 5 % level finds in 80 % of such experiments (by quantiles of Student's t: about
    5 % too small for 3 values, 1 % for 5)."""
    return (quantile(values, 0.975) + quantile(values, 0.8)) * error(values)


def rank_test(values: list[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of a median of 0, exact up to 17 values: unlike the interval it does
    not suppose that differences are normal."""
    from scipy import stats

    return float(stats.wilcoxon(values, method=stats.PermutationMethod(n_resamples=2**17)).pvalue)


def paired(gaps: list[float]) -> list[str]:
    """Of paired differences four cells: mean and interval, how often positive, p of the rank test, detectable mean."""
    ahead = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
    return [interval(gaps, "+"), ahead, f"{rank_test(gaps):.3f}", f"{detectable(gaps):.3f}"]


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("figures need a package: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


# ------------------------------------------------------------------------------------------------------------- runs
def in_processes(function, jobs: list, processes: int, most: int | None = 1) -> list:
    """function(job) of each job in processes of one thread, so many side by side, each for so many jobs at most."""
    if not jobs:
        return []
    one = {"initializer": torch.set_num_threads, "initargs": (1,), "maxtasksperchild": most}
    with multiprocessing.get_context("spawn").Pool(processes, **one) as pool:
        return list(tree_grpo.tqdm(pool.imap(function, jobs), total=len(jobs)))


@contextlib.contextmanager
def quietly():
    """A temporary folder; nothing is printed meanwhile."""
    errors, printed = contextlib.redirect_stderr, contextlib.redirect_stdout
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null, errors(null), printed(null):
        yield Path(folder)


def flags(arguments: dict) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]


def run_script(script, out: Path | str, arguments: list, **replaced) -> list[dict]:
    """The rows of metrics.jsonl of a run, in which parts of the script are replaced."""
    with mock.patch.multiple(script, catch_signals=list, **replaced):  # Ctrl-C ends all runs, at once
        script.main([*map(str, arguments), f"--out={out}"])
    return read_rows(Path(out, "metrics.jsonl").resolve())


def tiny_args(script, **changes):
    """Arguments as the default run has them, in float32."""
    return script.Args(**{"lr": 5e-4, "dtype": "float32", "device": "cpu", **TINY[script], **changes})


def task_of(script, args):
    """What --env names: a task, or of graph_gpo.py a function that makes a world."""
    make, text = script.load_named("--env", args.env)
    return functools.partial(make, *text) if script is graph_gpo else make(args, *text)


def warm_started(script, args) -> tuple:
    """The tiny model and its tokenizer."""
    start = script.load_beside("tiny.py", script.__name__)
    return start(script, args, task_of(script, args), torch.device(args.device))


def actor_of(script, model, tokenizer, args):
    """A script's Agent, Solver or Player."""
    return ACTORS[script](model, tokenizer, args, task_of(script, args))


def pretrained(script, arguments: list[str]) -> tuple:
    """The model that a script's arguments name, and its Agent or Solver, untrained, as it samples."""
    args, _ = script.parse_args(script.Args, arguments)
    device = script.pick_device(args)
    if script is treerl:
        args.max_tokens = args.max_tokens or 8192
        args.env = args.env or f"{ENVS}/problems.py:Problems"
    args.env = args.env or f"{ENVS}/{'questions.py:Questions' if args.data else 'facts.py:Facts'}"
    model, tokenizer = script.load_model(args.model, device)
    args.kl_coef = 0.0
    policy, _ = script.policy_and_reference(args, model, "")
    return model, actor_of(script, policy, tokenizer, args)


def rollouts(script, actor, step) -> tuple[list, Counter]:
    """What train() samples in a step, pairs of problem and root or tasks, and its counts. `step` may be a text, for a
    batch that no training step has."""
    args, counts = actor.args, Counter()
    rng = random.Random(f"{args.seed}/{step}")
    generator = torch.Generator(actor.model.device).manual_seed(rng.getrandbits(60))
    if script is graph_gpo:
        seeds = [rng.getrandbits(32) for _ in range(args.tasks)]
        return actor.play(seeds, args.K, generator, args.temperature, counts), counts
    play = functools.partial(actor.play, (generator, args.temperature, args.top_p, counts))
    found = [(problem, actor.root(problem)) for problem in script.batch_of(actor.task, step, args, rng)]
    if script is tree_grpo:
        tree_grpo.tree_search(play, found, args.M, args.N, args.L, rng)
    else:
        treerl.eptree(play, found, args.M, args.N, args.L, args.T, actor.answer_at)
    script.forget(node for _, root in found for node in root.below())
    return found, counts


def credits(script, found: list, args, step) -> list:
    """The groups that train() makes of what rollouts() found."""
    if script is graph_gpo:
        return [group for task in found for group in graph_gpo.credit(task, len(found), args)]
    groups, rng = [], random.Random(f"{args.seed}/{step}/keep")
    for _, root in found:
        leaves, A = script.credit(root, args, rng)
        groups.append(script.Group(root, leaves, A.view(len(leaves), -1), 1 / len(leaves) / len(found)))
    return groups


def signal(groups: list) -> float:
    """Share of the sequences that have an advantage."""
    return torch.cat([group.advantages.abs().amax(1) > 0 for group in groups]).double().mean().item()


def per_group(groups: list):
    """A function (values (n,), how) -> for each value "sum", "mean", "amin" or "amax" of its group's values, (n,)."""
    number = {}
    index = torch.tensor([number.setdefault(group, len(number)) for group in groups])

    def among(x, how: str):
        return x.new_zeros(len(number)).scatter_reduce(0, index, x, how, include_self=False)[index]

    return among
