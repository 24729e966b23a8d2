"""Does searching find more than sampling? Pass rate of treerl.py's search at equal numbers of generated tokens.

    python benchmarks/search.py            five models, 500 problems each; then the report
    python benchmarks/search.py --seeds 0 1 --problems 100 --out elsewhere    less, not into results/
    python benchmarks/search.py --report   nothing is measured: table and figure of search.jsonl
    python benchmarks/search.py --forks    only where the forks are, with M, N, L, T = 6, 2, 1, 2
    python benchmarks/search.py explore --model Qwen/Qwen2.5-1.5B-Instruct --data math500.jsonl --eval-prompts 500
                                           treerl.py's search with a model of yours, without training: pass rate

On held-out built-in problems and the warm-started model that training begins with, drawn at temperature 1.2 and top-p
0.95: independent chains, EPTree, the same tree forked at random places, and MCTS. MCTS is UCT over lines, on the same
token tree and sampler: from the root it descends by mean reward + c sqrt(ln n(parent) / n(child)) to the first node
with fewer than `width` children, draws a solution from there to its end, and makes each of its lines a node; nodes
below which all is finished are left out. All problems take their next step together. It sees the outcome reward of what
it has found, so until a right solution is found it is guided by its counts alone.

The pass rate of chains at any number of tokens is exact in expectation: from 40 chains a problem, the chance that k of
them drawn at random hold a right one, k being tokens over the mean length of a chain, between whole k interpolated.
Every other method is compared with chains at its own number of tokens, problem by problem.

What varies independently is the warm-started model: all models get the same problems. So means and 95 % intervals are
over models. "s.e. over problems" is the standard error of one model's difference over its problems (root mean square
over the models): how well each model's figure is known, not how models differ. "detectable" is the true mean difference
that an experiment with as many models and their spread finds, at the 5 % level, in 80 % of its repetitions. "p, Holm" is
that of Student's t over models, corrected by Holm for the number of comparisons in the table.
"""

import functools
import itertools
import json
import math
import random
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import common
from common import RESULTS, interval, table, treerl
from released import random_forks
from sums import make_problem, result

SHAPES = ((1, 2, 1, 2), (2, 2, 1, 2), (2, 2, 2, 2), (6, 2, 1, 2))  # M, N, L, T: 5, 10, 18 and 30 leaves
CHAINS = 40
METHODS = {"random forks": "tab:orange", "MCTS": "tab:red", "EPTree": "tab:green"}


def solver_for(seed: int) -> treerl.Solver:
    args = common.tiny_args(treerl, seed=seed)
    return common.actor_of(treerl, *common.warm_started(treerl, args), args)


def drawing_of(solver, rng: random.Random, counts: Counter) -> functools.partial:
    """solver.play with this generator, and as training draws."""
    generator = treerl.torch.Generator(solver.model.device).manual_seed(rng.getrandbits(60))
    return functools.partial(solver.play, (generator, solver.args.temperature, solver.args.top_p, counts))


def trees(solver, problems, shape: tuple, rng, forks: str = "entropy") -> tuple[list, float]:
    """The root of each problem's trees, and generated tokens a problem."""
    counts, roots = Counter(), []
    choose = random_forks(rng) if forks == "random" else treerl.fork_points
    with mock.patch.object(treerl, "fork_points", choose):
        for part in treerl.batches(problems, solver.args.at_once):
            found = [(problem, solver.root(problem)) for problem in part]
            treerl.eptree(drawing_of(solver, rng, counts), found, *shape, solver.answer_at)
            roots += [root for _, root in found]
            treerl.forget(node for _, root in found for node in root.below())
    return roots, counts["generated_tokens"] / len(problems)


def rewards_of(roots: list) -> list[list[float]]:
    return [[leaf.reward for leaf in root.leaves()] for root in roots]


def explore(arguments: list[str]) -> dict[str, float]:
    """Pass rate (some leaf is right) and accuracy (share of right leaves) of the search, on --eval-prompts problems of
    --data or --env. `arguments` are those of treerl.py."""
    _, solver = common.pretrained(treerl, arguments)
    args = solver.args
    problems = [*solver.task.held_out, *solver.task.training][: args.eval_prompts]  # in random order
    shape = args.M, 0 if args.method == "chainrl" else args.N, args.L, args.T
    roots, tokens = trees(solver, problems, shape, random.Random(args.seed))
    rewards = rewards_of(roots)
    rates = {"pass_rate": max, "accuracy": statistics.mean}
    found = {name: statistics.mean(map(rate, rewards)) for name, rate in rates.items()}
    return {"problems": len(problems), **found, "generated_tokens": tokens * len(problems)}


def mcts(solver, problems, rng, tokens: list[float], width: int, c: float) -> list[tuple[list[float], float]]:
    """(has each problem a right solution, generated tokens a problem) when each number of `tokens` has been reached."""
    play = drawing_of(solver, rng, Counter())
    groups, found = [(problem, solver.root(problem)) for problem in problems], []
    visits, value, done, spent = Counter(), Counter(), set(), 0
    passed = [0.0] * len(problems)

    def bound(child) -> float:
        explored = math.sqrt(math.log(visits[child.parent]) / visits[child])
        return value[child] / visits[child] + c * explored

    def select(node):
        while len(node.children) >= width:
            node = max((child for child in node.children if child not in done), key=bound)
        return node

    while len(found) < len(tokens):
        live = [i for i, (_, root) in enumerate(groups) if root not in done]
        starts = [(groups[i][0], select(groups[i][1]), 0) for i in live]
        play(starts, keep=True)
        for i, (_, start, _) in zip(live, starts):
            leaf = start.children[-1]
            reward, spent = leaf.reward, spent + len(leaf.tokens)
            passed[i] = max(passed[i], reward)
            for t in range(len(leaf.tokens) - 1, 0, -1):  # a node for each line
                if "\n" in solver.text(leaf.tokens[t - 1 : t]):
                    treerl.split(leaf, t)
            for node in reversed(leaf.leaves()[0].path()):
                visits[node] += 1
                value[node] += reward
                full = len(node.children) >= width and done.issuperset(node.children)
                if full or not node.children:
                    done.add(node)
        while len(found) < len(tokens) and (spent / len(problems) >= tokens[len(found)] or not live):
            found.append((list(passed), spent / len(problems)))
    return found


def chance(right: int, k: float) -> float:
    """Chance that k of CHAINS chains, of which `right` are right, hold a right one; between whole k interpolated."""

    def whole(k):
        return 1 - math.comb(CHAINS - right, k) / math.comb(CHAINS, k)

    low = min(int(k), CHAINS - 1)
    return whole(low) + (k - low) * (whole(low + 1) - whole(low))


def kinds_of_forks(solver, problems, rng, forks: str) -> Counter:
    """What the token was at which a tree was forked, in the branch that was there first."""
    kinds = Counter()
    for root in trees(solver, problems, (6, 2, 1, 2), rng, forks)[0]:
        for node in [node for node in root.below()[1:] if node.children]:
            text = solver.text([*solver.solution(node), node.children[0].tokens[0]])
            kind, line = "other", re.search(r" (\d+) ([-+*]\d) = (\d+)$", text)
            if line:
                right = result(int(line[1]), line[2]) == int(line[3])
                kind = f"{'right' if right else 'wrong'} {'product' if line[2][0] == '*' else 'sum'}"
            kinds[kind] += 1
    return kinds


def report_forks(seeds: list[int], problems: list) -> None:
    names = ("wrong product", "right product", "wrong sum", "right sum", "other")
    print("Share of the forks by the token that was there first, a line's result or other:\n")
    found = {"EPTree": Counter(), "random": Counter()}
    for seed in seeds:
        solver = solver_for(seed)
        for forks, kinds in found.items():
            kinds.update(kinds_of_forks(solver, problems, random.Random(f"forks/{seed}"), forks))
    shares = [[forks, *(f"{of[name] / of.total():.1%}" for name in names)] for forks, of in found.items()]
    print(table(("forks", *names), shares))


def measure(seed: int, problems: list, width: int, c: float) -> list[dict]:
    """The rows of one model. Of its chains, how many of each problem's CHAINS are right; of every other method and
    shape, whether ("1") or not ("0") it found a right solution of each problem."""
    rng, solver = random.Random(f"search/{seed}"), solver_for(seed)
    roots, tokens = trees(solver, problems, (CHAINS, 0, 0, 1), rng)
    right = [int(sum(rewards)) for rewards in rewards_of(roots)]
    rows = [{"seed": seed, "method": "chains", "tokens": tokens, "right": right}]

    def add(method: str, shape: tuple, passed: list[float], tokens: float) -> None:
        digits = "".join("1" if reward == 1 else "0" for reward in passed)
        rows.append({"seed": seed, "method": method, "budget": shape, "tokens": tokens, "pass": digits})

    for forks, name in (("entropy", "EPTree"), ("random", "random forks")):
        for shape in SHAPES:
            roots, tokens = trees(solver, problems, shape, rng, forks)
            add(name, shape, list(map(max, rewards_of(roots))), tokens)
    budgets = [row["tokens"] for row in rows if row["method"] == "EPTree"]
    for shape, found in zip(SHAPES, mcts(solver, problems, rng, budgets, width, c)):
        add("MCTS", shape, *found)
    return rows


# --------------------------------------------------------------------------------------------------------- reports
class Model:
    """What was measured of one model. By method and shape: tokens, generated ones a problem; passed, of each problem
    whether it was solved, or the chance of that; gaps, that minus the chance of chains of as many tokens. As many
    tokens as EPTree have the chains of a shape."""

    def __init__(self, rows: list[dict]):
        [chains] = [row for row in rows if row["method"] == "chains"]
        self.right, self.tokens, self.passed, self.gaps = chains["right"], {}, {}, {}
        for row in [row for row in rows if row is not chains]:
            key, shape = (row["method"], tuple(row["budget"])), tuple(row["budget"])
            same = [chance(n, row["tokens"] * CHAINS / chains["tokens"]) for n in self.right]
            self.tokens[key], self.passed[key] = row["tokens"], [float(digit) for digit in row["pass"]]
            self.gaps[key] = [one - other for one, other in zip(self.passed[key], same)]
            if row["method"] == "EPTree":
                self.tokens["chains", shape], self.passed["chains", shape] = row["tokens"], same

    def accuracy(self) -> float:
        return statistics.mean(self.right) / CHAINS


def read_models(folder: Path) -> dict[int, Model]:
    found = {}
    for row in common.read_rows(folder.resolve() / "search.jsonl"):
        found.setdefault(row["seed"], []).append(row)
    return {seed: Model(rows) for seed, rows in found.items()}


def holm(p: list[float]) -> list[float]:
    """Holm's correction: the smallest p times their number, the next times one less, and so on; none is less than one
    before it."""
    corrected, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = corrected[i] = max(least, min(1.0, p[i] * (len(p) - rank)))
    return corrected


def search_table(models: list[Model]) -> str:
    from scipy import stats

    keys = [(method, shape) for shape in SHAPES for method in METHODS]
    compared = {key: [model.gaps[key] for model in models] for key in keys}
    means = {key: list(map(statistics.mean, gaps)) for key, gaps in compared.items()}
    p = dict(zip(means, holm([float(stats.ttest_1samp(gaps, 0).pvalue) for gaps in means.values()])))
    lines = []
    for shape, method in itertools.product(SHAPES, ("chains", *METHODS)):
        key, cells = (method, shape), [""] * 5
        passed = [statistics.mean(model.passed[key]) for model in models]
        if method != "chains":
            gaps, squares = means[key], [common.error(values) ** 2 for values in compared[key]]
            cells = [interval(gaps, "+"), f"{p[key]:.3f}", f"{common.detectable(gaps):.3f}"]
            cells += [", ".join(f"{gap:+.3f}" for gap in gaps), f"{statistics.mean(squares) ** 0.5:.3f}"]
        tokens = statistics.mean(model.tokens[key] for model in models)
        lines.append([f"as {shape}", method, f"{tokens:.0f}", interval(passed), *cells])
    head = "budget|method|generated tokens a problem|pass rate|method − chains at its own tokens|p, Holm|detectable|"
    return table(head + "of each model|s.e. over problems", lines)


def figure(models: list[Model], path: Path) -> None:
    drawing, (left, right) = common.pyplot().subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for i, (method, color) in enumerate({"chains": "tab:blue", **METHODS}.items()):
        x, rates = [], []
        for key in [(method, shape) for shape in SHAPES]:
            x.append(statistics.mean(model.tokens[key] for model in models))
            rates.append(statistics.mean(statistics.mean(model.passed[key]) for model in models))
            if method != "chains":
                gaps = [statistics.mean(model.gaps[key]) for model in models]
                aside = x[-1] + 8 * (i - 2)  # beside each other where tokens are alike
                right.plot([aside] * len(gaps), gaps, "x", color=color, markersize=4, alpha=0.6)
                right.errorbar(aside, statistics.mean(gaps), common.half_width(gaps), fmt="o", capsize=3, color=color)
        left.plot(x, rates, "o-", color=color, label=method)
    right.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="generated tokens per problem", ylabel=f"pass rate, mean of {len(models)} models")
    title = "method − chains of as many tokens:\neach model, mean and 95 % interval"
    right.set(xlabel="generated tokens per problem", ylabel=title)
    left.legend()
    drawing.savefig(path, dpi=100)


def report(folder: Path) -> None:
    models = read_models(folder)
    for seed, model in models.items():
        print(f"seed {seed}: a chain is right with probability {model.accuracy():.3f}")
    size = ", ".join(sorted({str(len(model.right)) for model in models.values()}))
    print(f"\n{size} problems for each model; mean ± half of the 95 % interval, over models\n")
    print(search_table(list(models.values())))
    figure(list(models.values()), folder / "search.png")


def main() -> None:
    if sys.argv[1:2] == ["explore"]:
        return print(json.dumps(explore(sys.argv[2:])))
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5), help="of the models and of the search")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--width", type=int, default=3, help="children of a node in MCTS")
    parser.add_argument("--c", type=float, default=1.0, help="weight of exploration in MCTS")
    parser.add_argument("--forks", action="store_true", help="no pass rates, only where the forks are")
    parser.add_argument("--report", action="store_true", help="table and figure of search.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of search.jsonl and search.png (overwritten)")
    options = parser.parse_args()
    rng = random.Random("search")
    problems = [make_problem(rng, 8, True) for _ in range(options.problems)]
    if options.forks:
        return report_forks(options.seeds, problems)
    if not options.report:
        options.out.mkdir(exist_ok=True)
        common.write_rows(options.out / "search.jsonl", [])
        for seed in options.seeds:
            common.write_rows(options.out / "search.jsonl", measure(seed, problems, options.width, options.c), "a")
    report(options.out)


if __name__ == "__main__":
    main()
