"""Does searching find more than sampling? Pass rate of treerl.py's search at equal numbers of generated tokens.

    python benchmarks/search.py                   three models, 500 problems each; prints the table, draws the figure
    python benchmarks/search.py --seeds 0 --problems 100
    python benchmarks/search.py --forks           only where the forks are, in the trees of M, N, L, T = 6, 2, 1, 2

On held-out built-in problems and the warm-started model that training begins with, drawn at temperature 1.2 and top-p
0.95: independent chains, EPTree, the same tree forked at random places, and MCTS. MCTS is UCT over lines, on the same
token tree and sampler: from the root it descends by mean reward + c sqrt(ln n(parent) / n(child)) to the first node
with fewer than `width` children, draws a solution from there to its end, and makes each of its lines a node; nodes
below which all is finished are left out. All problems take their next step together. It sees the outcome reward of what
it has found, so until a right solution is found it is guided by its counts alone.

The pass rate of chains at any number of tokens is exact in expectation: from 40 chains a problem, the chance that k of
them drawn at random hold a right one, k being tokens over the mean length of a chain, between whole k interpolated.
Every other method is compared with chains at its own number of tokens, problem by problem.
"""

import argparse
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from learning import RESULTS, table

import treerl

SHAPES = ((1, 2, 1, 2), (2, 2, 1, 2), (2, 2, 2, 2), (6, 2, 1, 2))  # M, N, L, T: 5, 10, 18 and 30 leaves
CHAINS, BATCH = 40, 50

def solver_for(seed: int, folder: str) -> treerl.Solver:
    args = treerl.Args(seed=seed, max_tokens=64, dtype="float32", device="cpu")
    model, tokenizer = treerl.calculator_model(args, torch.device("cpu"), Path(folder, "start"))
    return treerl.Solver(model, tokenizer, args, [], [])

def set_shape(solver: treerl.Solver, method: str, M: int, N: int = 0, L: int = 0, T: int = 1) -> None:
    vars(solver.args).update(method=method, M=M, N=N, L=L, T=T)

def trees(solver, problems, rng) -> tuple[list[list[float]], float]:
    """(rewards of each problem's leaves, generated tokens a problem)."""
    counts, rewards = Counter(), []
    for i in range(0, len(problems), BATCH):
        for _, root in solver.search(problems[i : i + BATCH], rng, counts):
            rewards.append([leaf.reward for leaf in root.leaves()])
    return rewards, counts["generated_tokens"] / len(problems)

def mcts(solver, problems, rng, tokens: list[float], width: int, c: float) -> list[tuple[list[float], float]]:
    """(has each problem a right solution, generated tokens a problem) when each number of `tokens` has been reached."""
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    groups, found = [(problem, solver.root(problem)) for problem in problems], []
    visits, value, done, spent, passed = Counter(), Counter(), set(), 0, dict.fromkeys(range(len(problems)), 0.0)
    def select(node):
        while len(node.children) >= width:
            going = [child for child in node.children if child not in done]
            node = max(going, key=lambda child: value[child] / visits[child]
                       + c * math.sqrt(math.log(visits[child.parent]) / visits[child]))
        return node
    while len(found) < len(tokens):
        live = [i for i, (_, root) in enumerate(groups) if root not in done]
        starts = [(groups[i][0], select(groups[i][1]), 0) for i in live]
        solver.play(starts, generator, solver.args.temperature, solver.args.top_p, Counter())
        for i, (_, start, _) in zip(live, starts):
            leaf = start.children[-1]
            reward, spent = leaf.reward, spent + len(leaf.tokens)
            passed[i] = max(passed[i], reward)
            for t in range(len(leaf.tokens) - 1, 0, -1):  # a node for each line
                if "\n" in solver.text(leaf.tokens[t - 1 : t]):
                    treerl.split(leaf, t)
            path = leaf.leaves()[0].path()
            for node in reversed(path):
                visits[node] += 1
                value[node] += reward
                if not node.children or len(node.children) >= width and done.issuperset(node.children):
                    done.add(node)
        while len(found) < len(tokens) and (spent / len(problems) >= tokens[len(found)] or not live):
            found.append((list(passed.values()), spent / len(problems)))
    return found

def chance(right: int, k: float) -> float:
    """Chance that k of CHAINS chains, of which `right` are right, hold a right one; between whole k interpolated."""
    def whole(k):
        return 1 - math.comb(CHAINS - right, k) / math.comb(CHAINS, k)
    low = min(int(k), CHAINS - 1)
    return whole(low) + (k - low) * (whole(low + 1) - whole(low))

def kinds_of_forks(solver, problems, rng) -> Counter:
    """What the token was at which a tree was forked, in the branch that was there first."""
    kinds = Counter()
    for i in range(0, len(problems), BATCH):
        for _, root in solver.search(problems[i : i + BATCH], rng, Counter()):
            for trunk in root.children:
                for node in trunk.below():
                    for first in node.children[:1]:
                        text = solver.text([*solver.solution(node), first.tokens[0]])
                        line = re.search(r" (\d+) ([-+*]\d) = (\d+)$", text)
                        kind = "product" if line and line[2][0] == "*" else "sum" if line else "other"
                        right = line and treerl.result(int(line[1]), line[2]) == int(line[3])
                        kinds[kind if kind == "other" else f"{'right' if right else 'wrong'} {kind}"] += 1
    return kinds

def report_forks(seeds: list[int], problems: list) -> None:
    names = ("wrong product", "right product", "wrong sum", "right sum", "other")
    print("Share of the forks by the token that was there first, the result of a line or something else:\n")
    found = {"EPTree": Counter(), "random": Counter()}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            solver = solver_for(seed, folder)
        for method, name in (("treerl", "EPTree"), ("random", "random")):
            set_shape(solver, method, 6, 2, 1, 2)
            found[name] += kinds_of_forks(solver, problems, random.Random(f"forks/{seed}"))
    print(table(("forks", *names), [[name, *(f"{kinds[kind] / kinds.total():.1%}" for kind in names)]
                                    for name, kinds in found.items()]))

def mean_error(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5

def measure(seed: int, problems: list, width: int, c: float) -> dict:
    """method -> for each shape (pass of each problem, pass of chains at as many tokens, tokens)."""
    rng = random.Random(f"search/{seed}")
    with tempfile.TemporaryDirectory() as folder:
        solver = solver_for(seed, folder)
    set_shape(solver, "chainrl", CHAINS)
    chains, cost = trees(solver, problems, rng)
    right, cost = [int(sum(rewards)) for rewards in chains], cost / CHAINS
    def row(passed, tokens):
        return passed, [chance(n, tokens / cost) for n in right], tokens
    found = {"EPTree": [], "random forks": []}
    for method, name in (("treerl", "EPTree"), ("random", "random forks")):
        for shape in SHAPES:
            set_shape(solver, method, *shape)
            rewards, tokens = trees(solver, problems, rng)
            found[name].append(row([max(r) for r in rewards], tokens))
    budgets = [tokens for *_, tokens in found["EPTree"]]
    found["MCTS"] = [row(passed, tokens) for passed, tokens in mcts(solver, problems, rng, budgets, width, c)]
    found["chains"] = [row([chance(n, tokens / cost) for n in right], tokens) for tokens in budgets]
    found["accuracy"] = statistics.mean(right) / CHAINS
    return found

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the models and of the search")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--width", type=int, default=3, help="children of a node in MCTS")
    parser.add_argument("--c", type=float, default=1.0, help="weight of exploration in MCTS")
    parser.add_argument("--forks", action="store_true", help="no pass rates, only where the forks are")
    options = parser.parse_args()
    rng = random.Random("search")
    problems = [treerl.make_problem(rng, 8, True) for _ in range(options.problems)]
    if options.forks:
        return report_forks(options.seeds, problems)
    results = []
    for seed in options.seeds:
        results.append(measure(seed, problems, options.width, options.c))
        print(f"seed {seed}: accuracy of a chain {results[-1]['accuracy']:.3f}", flush=True)
    print(f"\n{len(problems)} problems x models of seeds {', '.join(map(str, options.seeds))}; ± standard error over "
          "problems and models\n")
    heads = ("budget", "method", "generated tokens a problem", "pass rate", "method − chains at its own tokens",
             "of each model")
    lines = []
    for i, shape in enumerate(SHAPES):
        for method in ("chains", "random forks", "MCTS", "EPTree"):
            rows = [result[method][i] for result in results]
            passed = mean_error([x for row in rows for x in row[0]])
            gaps = [[a - b for a, b in zip(row[0], row[1])] for row in rows]
            gain = mean_error([x for gap in gaps for x in gap])
            cells = [f"as {shape}", method, f"{statistics.mean(row[2] for row in rows):.0f}",
                     f"{passed[0]:.3f} ± {passed[1]:.3f}"]
            cells += [""] * 2 if method == "chains" else [
                f"{gain[0]:+.3f} ± {gain[1]:.3f}", ", ".join(f"{statistics.mean(gap):+.3f}" for gap in gaps)]
            lines.append(cells)
    print(table(heads, lines))
    with open(RESULTS / "search.jsonl", "w") as file:
        for seed, result in zip(options.seeds, results):
            for method in ("chains", "random forks", "MCTS", "EPTree"):
                for shape, (passed, same, tokens) in zip(SHAPES, result[method]):
                    file.write(json.dumps({"seed": seed, "method": method, "budget": shape, "tokens": round(tokens, 1),
                                           "pass": round(statistics.mean(passed), 4),
                                           "chains": round(statistics.mean(same), 4)}) + "\n")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for method, color in (("chains", "tab:blue"), ("random forks", "tab:orange"), ("MCTS", "tab:red"),
                          ("EPTree", "tab:green")):
        points = []
        for i in range(len(SHAPES)):
            rows = [result[method][i] for result in results]
            points.append((statistics.mean(row[2] for row in rows), *mean_error([x for row in rows for x in row[0]])))
        axis.errorbar(*zip(*((x, y) for x, y, _ in sorted(points))), [e for *_, e in sorted(points)], fmt="o-",
                      capsize=3, color=color, label=method)
    axis.set_xlabel("generated tokens per problem")
    axis.set_ylabel("pass rate, ± standard error")
    axis.legend()
    figure.savefig(RESULTS / "search.png", dpi=100)

if __name__ == "__main__":
    main()
