"""What a pretrained Qwen learns in minutes on one GPU, and how fast. One command an item:

    python benchmarks/real_qwen.py treerl --model Qwen/Qwen2.5-Coder-0.5B-Instruct --data train.jsonl --minutes 5

    treerl, chainrl             treerl.py and its baseline on GSM8K (--data train.jsonl)
    tree_grpo, grpo             tree_grpo.py and its baseline on HotpotQA (--data hotpot_train_v1.1.json), BM25 over its
                                passages; without --data on the built-in questions, told in words
    graph_gpo, gigpo, episodes  graph_gpo.py and its baselines in the house, told in words, after --imitate supervised
                                steps on its demonstrations: untrained, the 0.5B did not succeed there
    search                      untrained: pass rate of EPTree and of chains over generated tokens (TreeRL, Figure 1)
    alignment                   untrained: how well one update's gradient points, of chains and of trees, on HotpotQA
    report                      tables and figure of what is in --rows; nothing is measured

The first seven run the script as its own command line would, with the arguments below and those of the script that are
given beside the options, but write no checkpoints and no model. Training stops early enough for the last evaluation to
end at about --minutes, as the last step and evaluation predict it, or once --tokens were generated, for a comparison at
equal tokens. Rows are added to --rows as they come, each with the item and the seconds since training began: a run that
is killed leaves its curve. --gpu-memory 24 allows no more than a card of 24 GB has.

search: --problems, 32 at a time, each with 40 chains and with EPTree's trees. The pass rate of chains at any number of
tokens is exact in expectation, as in search.py.

alignment: the policy stays as it is. Each batch of questions is answered by arms of about one budget, GRPO's 4 chains
and Tree-GRPO's trees with both terms, A_intra or A_inter, and beside them by 12 chains, from which the gradient of the
expected reward is estimated by REINFORCE with leave-one-out baselines. "alignment" is the cosine between one batch's
gradient and the expected one, whose direction and length come from the 12 chains of the other batches. Its square,
relative to that of chains, is what a batch is worth where gradients are mostly noise; "per token" divides that by the
arm's tokens, relative to chains. The last row has the cosine of two batches of the reference: unless it is well above
its error, the others say nothing. Intervals are by a jackknife over batches. Gradients of half a billion numbers are
kept as a sketch of 2^20: signed sums, which keep inner products to about 0.1 % of the lengths."""

import dataclasses
import datetime
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import common
import gradients
import search
import tiny
import torch
import transformers
from common import ENVS, RESULTS, ROOT, SCRIPTS, credits, graph_gpo, rollouts, table, tree_grpo, treerl

MATHS = {"prompts": 16, "max_tokens": 600, "lr": 2e-6, "warmup": 3, "at_once": 256, "eval_every": 5}
QUESTIONS = {"prompts": 48, "turn_tokens": 64, "lr": 3e-6, "warmup": 3, "at_once": 256, "eval_every": 5, "kl_coef": 0.0}
HOUSE = {"tasks": 32, "max_tokens": 24, "lr": 3e-6, "warmup": 3, "eval_every": 5, "kl_coef": 0.0}
ITEMS = {
    "treerl": ("treerl", MATHS),
    "chainrl": ("treerl", {**MATHS, "method": "chainrl", "M": 18, "keep": 18}),
    "tree_grpo": ("tree_grpo", QUESTIONS),
    "grpo": ("tree_grpo", {**QUESTIONS, "method": "grpo", "M": 4}),
    "graph_gpo": ("graph_gpo", HOUSE),
    "gigpo": ("graph_gpo", {**HOUSE, "method": "gigpo"}),
    "episodes": ("graph_gpo", {**HOUSE, "method": "grpo"}),
}
SHAPES = ((1, 2, 1, 2), (2, 2, 1, 2), (6, 2, 1, 2))  # of EPTree: M, N, L, T
SKETCH = 2**20


def add(options, event: str, **row) -> None:
    """A row of the run."""
    row = {"item": options.item, "seed": options.seed, "event": event, **row}
    common.write_rows(options.rows, [row], "a")
    print({key: round(value, 7) if isinstance(value, float) else value for key, value in row.items()}, flush=True)


def begin(options) -> None:
    """The first row of a run, with what a result has to name."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, check=False, capture_output=True, text=True)
    cuda = torch.cuda.is_available()
    told = {
        "command": " ".join(["python", "benchmarks/real_qwen.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or commit.stdout.strip(),
        "gpu_memory": options.gpu_memory,
    }
    add(options, "start", **told)


def arguments_of(options, item: str, **more) -> list[str]:
    """What the item's script is told."""
    told = {**ITEMS[item][1], "model": options.model, "seed": options.seed, **more}
    if options.data:
        told["data"] = options.data
    return [*common.flags(told), *options.more]


# ------------------------------------------------------------------------------------------------------- training
class Enough(Exception):
    """The time or the tokens are spent."""


def train(options) -> None:
    script = SCRIPTS[ITEMS[options.item][0]]
    arguments = arguments_of(options, options.item, steps=10**6)
    made = script.open_log

    def open_log(args, size: int):
        log, began, tokens, evaluation = made(args, size), time.monotonic(), 0, 0.0
        last = began

        def log_more(event: str, step: int, row: dict) -> None:
            nonlocal last, tokens, evaluation
            log(event, step, row)
            now = time.monotonic()
            add(options, event, step=step, elapsed=now - began, **row)
            if event == "eval":
                evaluation = now - last
            else:
                tokens += row["generated_tokens"]
                evaluations = 1 + (args.eval_every > 0 and step % args.eval_every == 0)
                over = now + (now - last) + evaluations * evaluation > began + 60 * options.minutes
                args.steps = step if over or tokens >= options.tokens else args.steps
            last = now

        return log_more

    def save_checkpoint(out, step, model, tokenizer, optimizer, args) -> None:
        if step >= args.steps:
            raise Enough

    script.parse_args(script.Args, arguments)  # refuses what it does not know
    begin(options)
    parts = {"open_log": open_log, "save_checkpoint": save_checkpoint}
    with tempfile.TemporaryDirectory() as folder:
        if script is graph_gpo and options.imitate:
            arguments.append(f"--model={imitated(options, Path(folder, 'start'), arguments)}")
        try:
            common.run_script(script, Path(folder, "run"), arguments, **parts)
        except Enough:
            pass


def imitated(options, folder: Path, arguments: list[str]) -> Path:
    """The model after --imitate supervised steps, of 64 single actions each, on the house's own demonstrations."""
    began = time.monotonic()
    args, _ = graph_gpo.parse_args(graph_gpo.Args, arguments)
    args.env = args.env or f"{ENVS}/house.py:House"
    device = graph_gpo.pick_device(args)
    model, tokenizer = graph_gpo.load_model(options.model, device)
    world = common.task_of(graph_gpo, args)
    leaves = tiny.shown_steps(graph_gpo, model, tokenizer, args, world, 64 * options.imitate)
    tiny.imitate(graph_gpo, model, leaves, 64, args, lr=2e-5)
    graph_gpo.save_model(folder, model, tokenizer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    add(options, "imitation", step=options.imitate, seconds=time.monotonic() - began)
    return folder


# --------------------------------------------------------------------------------------------------- without training
def search_item(options) -> None:
    _, solver = common.pretrained(treerl, arguments_of(options, "treerl"))
    begin(options)
    rng, began = random.Random(options.seed), time.monotonic()
    problems = [*solver.task.held_out, *solver.task.training][: options.problems]
    for number, part in enumerate(treerl.batches(problems, 32)):
        if time.monotonic() > began + 60 * options.minutes:
            break
        roots, tokens = search.trees(solver, part, (search.CHAINS, 0, 0, 1), rng)
        right = [sum(r > 0.5 for r in rewards) for rewards in search.rewards_of(roots)]
        row = {"problems": len(part), "chains": tokens, "right": right}
        for shape in SHAPES:
            roots, tokens = search.trees(solver, part, shape, rng)
            passed = [int(max(rewards) > 0.5) for rewards in search.rewards_of(roots)]
            row[",".join(map(str, shape))] = {"tokens": tokens, "passed": passed}
        add(options, "part", step=number, **row, elapsed=time.monotonic() - began)


def sketch(gradient: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Signed sums of every SKETCH-th number, whose inner products are those of the gradients, on average."""
    gradient = gradient * signs
    return torch.nn.functional.pad(gradient, (0, -len(gradient) % SKETCH)).view(-1, SKETCH).sum(0).cpu()


def alignment(options) -> None:
    model, agent = common.pretrained(tree_grpo, arguments_of(options, "tree_grpo"))
    begin(options)
    usual, began, kept = agent.args, time.monotonic(), {}
    generator = torch.Generator(model.device).manual_seed(0)
    count = sum(parameter.numel() for parameter in model.parameters())
    signs = torch.randint(0, 2, (count,), generator=generator, device=model.device, dtype=torch.int8) * 2 - 1

    arms = {"chains": {"M": 4, "N": 0, "method": "grpo"}, "trees": {}, "reference": {"M": 12, "N": 0, "method": "grpo"}}
    for batch in range(options.batches):
        if time.monotonic() > began + 60 * options.minutes:
            break
        row = {}
        for arm, changes in arms.items():
            agent.args = dataclasses.replace(usual, **changes)
            found, counts = rollouts(tree_grpo, agent, batch)
            costs = {name: counts[name] for name in ("generated_tokens", "forwarded_tokens")}
            costs["reward"] = statistics.mean(leaf.reward for _, root in found for leaf in root.leaves())
            if arm == "reference":
                of = {arm: gradients.leave_one_out(tree_grpo, found)}
            elif arm == "chains":
                of = {arm: credits(tree_grpo, found, agent.args, batch)}
            else:
                terms = [dataclasses.replace(agent.args, advantage=term) for term in ("both", "intra", "inter")]
                of = {f"trees, {args.advantage}": credits(tree_grpo, found, args, batch) for args in terms}
            for name, groups in of.items():
                whole = gradients.gradient(tree_grpo, model, groups, usual.micro_tokens)
                kept.setdefault(name, []).append(sketch(whole, signs))
                row[name] = {**costs, "signal": common.signal(groups)}
        names = [*kept]
        stacked = torch.stack([torch.stack(kept[name]) for name in names])  # (arms, batches, SKETCH)
        # Of each arm's gradients so far with those of this batch: (arms, batches, arms).
        row["inner"] = (stacked @ stacked[:, -1].T).tolist()
        add(options, "batch", step=batch, **row, names=names, elapsed=time.monotonic() - began)


# --------------------------------------------------------------------------------------------------------- reports
def runs_of(rows: list[dict]) -> list[list[dict]]:
    """The rows of each run, which begins with what it was run on; several may have been written side by side."""
    runs, newest = [], {}
    for row in rows:
        key = row["item"], row["seed"]
        if row["event"] == "start":
            newest[key] = []
            runs.append(newest[key])
        if key in newest:
            newest[key].append(row)
    return runs


def curve(run: list[dict]) -> list[tuple]:
    """Of each evaluation: minutes, generated tokens until then, success sampled and greedily."""
    points, tokens = [], 0
    for row in run[1:]:
        if row["event"] == "train":
            tokens += row["generated_tokens"]
        elif row["event"] == "eval":
            points.append((row["elapsed"] / 60, tokens, row["success"], row["greedy_success"]))
    return points


def training_table(runs: list[list[dict]]) -> str:
    lines = []
    for run in runs:
        steps, points = [row for row in run if row["event"] == "train"], curve(run)
        if not steps or len(points) < 2:
            continue
        tokens = sum(row["generated_tokens"] for row in steps)
        seconds, sampling = (sum(row[name] for row in steps) for name in ("seconds", "seconds_sampling"))
        (_, _, sampled, greedy), (minutes, _, sampled_after, greedy_after) = points[0], points[-1]
        cells = [run[0]["item"], run[0]["seed"], run[0]["device"], f"{minutes:.1f}", len(steps), f"{tokens:,}"]
        cells += [f"{sampled:.3f} → {sampled_after:.3f}", f"{greedy:.3f} → {greedy_after:.3f}"]
        cells += [f"{steps[0]['reward']:.3f} → {steps[-1]['reward']:.3f}", f"{seconds / len(steps):.1f}"]
        cells += [f"{tokens / sampling:,.0f}", f"{sampling / seconds:.0%}"]
        gaps = [row["sampler_gap"] for row in steps if row["sampler_gap"] is not None] or [math.nan]
        lines.append([*cells, f"{statistics.mean(gaps):.4f}", f"{steps[-1]['peak_gb']:.1f}"])
    head = "item|seed|device|minutes|steps|generated tokens|success, sampled|greedy|reward of a step|seconds a step|"
    return table(head + "tokens/s sampling|time for sampling|sampler_gap|peak, GB", lines)


def search_table(run: list[dict]) -> str:
    """Paired by problem; standard errors over problems."""
    parts, lines = [row for row in run if row["event"] == "part"], []
    for shape in [",".join(map(str, shape)) for shape in SHAPES]:
        passed, same, tokens = [], [], []
        for part in parts:
            passed += part[shape]["passed"]
            k = part[shape]["tokens"] * search.CHAINS / part["chains"]
            same += [search.chance(right, k) for right in part["right"]]
            tokens += [part[shape]["tokens"]] * part["problems"]
        gaps = [one - other for one, other in zip(passed, same)]
        rates = [f"{statistics.mean(values):.3f} ± {common.error(values):.3f}" for values in (same, passed)]
        both = f"{statistics.mean(gaps):+.3f} ± {common.error(gaps):.3f}"
        lines.append([f"({shape})", len(passed), f"{statistics.mean(tokens):,.0f}", *rates, both])
    head = (
        "M, N, L, T|problems|generated tokens a problem|chains of as many tokens|EPTree|difference, s.e. over problems"
    )
    return table(head, lines)


def alignments(batches: list[dict], left_out: int | None = None) -> dict[str, tuple[float, float]]:
    """Of each arm the cosine of one batch's gradient with the expected one, and the square of that relative to chains.
    Of the reference the cosine of two batches; where that is not above 0, nothing is known."""
    names, n = batches[0]["names"], len(batches)
    inner = torch.zeros(len(names), n, len(names), n, dtype=torch.float64)
    for j, row in enumerate(batches):
        new = torch.tensor(row["inner"], dtype=torch.float64)  # (arms, j + 1, arms)
        inner[:, : j + 1, :, j] = new
        inner[:, j, :, : j + 1] = new.permute(2, 0, 1)
    used = torch.tensor([i for i in range(n) if i != left_out])
    inner, m = inner[:, used][..., used], len(used)
    others, last = 1 - torch.eye(m, dtype=torch.float64), names.index("reference")
    truth = (inner[last, :, last] * others).sum() / (m * (m - 1))  # squared length of the expected gradient
    found = {}
    for a, name in enumerate(names[:last]):
        along = (inner[a, :, last] * others).sum() / (m * (m - 1))
        square = inner[a, :, a].diagonal().mean()
        found[name] = along.item() / math.sqrt(square * truth) if square * truth > 0 else math.nan
    base = found["chains"] or math.nan
    marks = {name: (value, (value / base) ** 2) for name, value in found.items()}
    own = inner[last, :, last].diagonal().mean().item()
    return {**marks, "reference": (truth.item() / own if own else math.nan, math.nan)}


def alignment_table(run: list[dict]) -> str:
    batches = [row for row in run if row["event"] == "batch"]
    whole, n = alignments(batches), len(batches)
    without = [alignments(batches, i) for i in range(n)]
    cost = {name: Counter() for name in whole}
    for row in batches:
        for name in whole:
            cost[name].update(row[name])
    lines = []
    for name, values in whole.items():  # the last is the reference
        errors = []
        for i in (0, 1):
            left = [found[name][i] for found in without]
            errors.append(math.sqrt((n - 1) / n * sum((x - statistics.mean(left)) ** 2 for x in left)))
        cells = [f"{value:.3f} ± {error:.3f}" for value, error in zip(values, errors)]
        for tokens in ("generated_tokens", "forwarded_tokens"):
            share = cost[name][tokens] / cost["chains"][tokens]
            cells.append(f"{values[1] / share:.2f} ± {errors[1] / share:.2f}")
        if name == "reference":
            cells = [f"{cells[0]} (of two batches)", "", "", ""]
        lines.append([name, *cells, *(f"{cost[name][x] / n:.3f}" for x in ("reward", "signal"))])
    head = "arm|alignment, one batch|squared, / chains|per generated token|per forwarded token|reward|leaves with A ≠ 0"
    return f"{n} batches; ± one standard error, by a jackknife over batches\n\n" + table(head, lines)


def figure(runs: list[list[dict]], path: Path) -> None:
    scripts = [name for name in SCRIPTS if any(ITEMS[run[0]["item"]][0] == name for run in runs)]
    plt = common.pyplot()
    drawing, axes = plt.subplots(
        1, len(scripts), figsize=(4.2 * len(scripts), 3.6), layout="constrained", squeeze=False
    )
    for ax, name in zip(axes[0], scripts):
        for i, run in enumerate(run for run in runs if ITEMS[run[0]["item"]][0] == name):
            minutes, _, sampled, greedy = zip(*curve(run))
            ax.plot(minutes, sampled, "o-", color=f"C{i}", label=f"{run[0]['item']}, sampled")
            ax.plot(minutes, greedy, "s--", color=f"C{i}", label=f"{run[0]['item']}, greedy")
        ax.set(title=f"{name}.py", xlabel="minutes", ylim=(0, None))
        ax.legend(fontsize=8)
    axes[0][0].set_ylabel("held-out success")
    drawing.savefig(path, dpi=100)


def report(options) -> None:
    runs = runs_of(common.read_rows(options.rows.resolve()))
    for run in runs:
        told = ("command", "device", "torch", "transformers", "date", "commit")
        print("- " + ", ".join(f"{run[0][name]}" for name in told))
    trained = [run for run in runs if run[0]["item"] in ITEMS and curve(run)]
    if trained:
        print("\n" + training_table(trained))
        figure(trained, options.rows.with_suffix(".png"))
    for item, shown, least in (("search", search_table, 1), ("alignment", alignment_table, 3)):
        for run in [run for run in runs if run[0]["item"] == item and len(run) > least]:
            print(f"\n{item}, {run[0]['device']}\n\n{shown(run)}")


def main() -> None:
    parser = common.parser(__doc__)
    others = {"search": search_item, "alignment": alignment, "report": report}
    parser.add_argument("item", choices=(*ITEMS, *others))
    parser.add_argument("--model", help="a folder, or an id of the hub")
    parser.add_argument("--data", type=Path, help="as the script's")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, evaluations included")
    parser.add_argument("--tokens", type=float, default=math.inf, help="generated in training, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--imitate", type=int, default=60, help="supervised steps before the house")
    parser.add_argument("--problems", type=int, default=300, help="of search")
    parser.add_argument("--batches", type=int, default=32, help="of alignment, at most")
    parser.add_argument("--gpu-memory", type=float, default=0.0, help="GB, as on a smaller card (0: all)")
    parser.add_argument("--commit", default="", help="named in the rows, where git is not at hand")
    parser.add_argument("--rows", type=Path, default=RESULTS / "real_qwen.jsonl")
    parser.allow_abbrev = False
    options, options.more = parser.parse_known_args()
    if options.item != "report" and not options.model:
        parser.error("--model: needed")
    named = {argument.split("=")[0] for argument in options.more}
    if options.item == "report" and named or named & {"--method", "--out", "--resume"}:
        parser.error(f"not here: {' '.join(options.more)}")
    if options.gpu_memory:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.gpu_memory * 1e9 / whole)
    if options.item in ITEMS:
        train(options)
    else:
        others[options.item](options)


if __name__ == "__main__":
    main()
