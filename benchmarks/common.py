"""What the benchmarks share: statistics, tables, and a training step's parts outside of train()."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import graph_gpo
import tree_grpo
import treerl

RESULTS = Path(__file__).resolve().parent / "results"
SCRIPTS = {"tree_grpo": tree_grpo, "treerl": treerl, "graph_gpo": graph_gpo}
# What the scripts' main() sets where no --model is given.
TINY = {
    tree_grpo: {"topk": 1, "turn_tokens": 32},
    treerl: {"max_tokens": 64},
    graph_gpo: {"max_tokens": 8},
}


# ---------------------------------------------------------------------------- results and statistics
def read_rows(path: Path | str) -> list[dict]:
    """The lines of a file, of results/ if only its name is given; none if it is not there."""
    path = RESULTS / path
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(head: tuple, rows: list) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    """The true mean that a test at the 5 % level finds in 80 % of such experiments (by quantiles of
    Student's t: about 5 % too small for 3 values, 1 % for 5)."""
    return (quantile(values, 0.975) + quantile(values, 0.8)) * error(values)


def rank_test(values: list[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of a median of 0, exact up to 17 values: unlike
    the interval it does not suppose that differences are normal."""
    from scipy import stats

    return float(stats.wilcoxon(values, method=stats.PermutationMethod(n_resamples=2**17)).pvalue)


def paired(gaps: list[float]) -> list[str]:
    """Of paired differences four cells: mean and interval, how often positive, p of the rank test,
    detectable mean."""
    ahead = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
    return [interval(gaps, "+"), ahead, f"{rank_test(gaps):.3f}", f"{detectable(gaps):.3f}"]


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_band(axis, x: list[float], curves: list[list[float]], **how) -> None:
    """Mean of the curves, and its 95 % interval."""
    mean = [statistics.mean(values) for values in zip(*curves)]
    half = [half_width(values) for values in zip(*curves)]
    axis.plot(x, mean, **how)
    low = [m - h for m, h in zip(mean, half)]
    high = [m + h for m, h in zip(mean, half)]
    axis.fill_between(x, low, high, color=how["color"], alpha=0.12, linewidth=0)


# ----------------------------------------------------------------------------------------------- runs
def in_processes(function, jobs: list, processes: int) -> list:
    """function(job) of each job, each in a process of its own, so many side by side."""
    if not jobs:
        return []
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        return list(tree_grpo.tqdm(pool.imap(function, jobs), total=len(jobs)))


@contextlib.contextmanager
def quietly():
    """A temporary folder; nothing is printed meanwhile."""
    with contextlib.ExitStack() as stack:
        null = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stderr(null))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield Path(stack.enter_context(tempfile.TemporaryDirectory()))


def flags(arguments: dict) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]


def tiny_args(script, **changes):
    """Arguments as the default run has them, in float32."""
    usual = {"lr": 5e-4, "dtype": "float32", "device": "cpu", **TINY[script]}
    return script.Args(**{**usual, **changes})


def warm_started(script, args, make_env=graph_gpo.House):
    """The tiny model and its tokenizer."""
    device = torch.device(args.device)
    worlds = [make_env] if script is graph_gpo else []
    return script.built_in_model(args, *worlds, device)


def actor_of(script, model, tokenizer, args, make_env=graph_gpo.House):
    """A script's Agent, Solver or Player, for its built-in task."""
    if script is graph_gpo:
        return graph_gpo.Player(model, tokenizer, args, make_env)
    actor = script.Agent if script is tree_grpo else script.Solver
    return actor(model, tokenizer, args, [], [])


def rollouts(script, actor, step) -> tuple[list, Counter]:
    """What train() samples in a step, pairs of problem and root or tasks, and its counts. `step`
    may be a text, for a batch that no training step has."""
    args, counts = actor.args, Counter()
    rng = random.Random(f"{args.seed}/{step}")
    generator = torch.Generator(actor.model.device).manual_seed(rng.getrandbits(60))
    if script is graph_gpo:
        seeds = [rng.getrandbits(32) for _ in range(args.tasks)]
        return actor.play(seeds, args.K, generator, args.temperature, counts), counts
    play = functools.partial(actor.play, (generator, args.temperature, args.top_p, counts))
    problems = actor.questions if script is tree_grpo else actor.problems
    found = [(problem, actor.root(problem)) for problem in problems(step, rng)]
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
        A = A[:, None] if A.dim() == 1 else A
        groups.append(script.Group(root, leaves, A, 1 / len(leaves) / len(found)))
    return groups


def per_group(groups: list):
    """A function (values (n,), how) -> for each value "sum", "mean", "amin" or "amax" of its group's
    values, (n,)."""
    number = {}
    index = torch.tensor([number.setdefault(group, len(number)) for group in groups])

    def among(x, how: str):
        return x.new_zeros(len(number)).scatter_reduce(0, index, x, how, include_self=False)[index]

    return among
