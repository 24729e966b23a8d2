"""Why TreeRL learns as it does in learning_treerl.py: how well one update's gradient points, at a fixed policy.

    python benchmarks/gradients_treerl.py

As gradients.py, for the arms of learning_treerl.py and for two variants of its first tree: trained on all 30 leaves,
and with each leaf's outcome, leave-one-out, for all of its tokens instead of R(s). Policies: the warm start, and the
same after 24 updates of the arm "18 chains". At each, every arm draws batches of about 4,000 generated tokens, and the
gradient of its loss is taken, without a step. "alignment" is the mean cosine of a batch's gradient with the gradient
of the expected reward at temperature 1, estimated from many more chains by REINFORCE with leave-one-out baselines; "/
18 chains" is that over the alignment of this arm at the same policy; "agreement" the mean cosine of two batches of the
arm; "reference" the cosine between two halves of the estimate, whose noise lowers all alignments by one factor.
"""

import argparse
import contextlib
import functools
import io
import os
import statistics
import tempfile
from pathlib import Path

import learning_treerl
import torch
from gradients import BATCHES, REFERENCE, gradient, leave_one_out
from learning import flags, in_processes, interval

import treerl

TREE, CHAINS = (learning_treerl.ARMS[arm][0] for arm in ("6,2,1,2", "18 chains"))
ARMS = {arm: told for arm, (told, _) in learning_treerl.ARMS.items()}
ARMS |= {"6,2,1,2, all leaves": f"{TREE} --keep=30", "6,2,1,2, outcomes": TREE}
LEARNED = (0, 24)  # updates

def with_outcomes(samples: list) -> list:
    """Each leaf's leave-one-out reward in the place of its path's R(s)."""
    changed = []
    for item in samples:
        leaves = item.root.leaves()
        A = dict(zip(leaves, treerl.leave_one_out(torch.tensor([leaf.reward for leaf in leaves]))))
        changed.append(item._replace(advantages=[A[leaf] for leaf in item.leaves]))
    return changed

def measure(job: tuple[int, int]) -> list[tuple]:
    """Of one seed and policy, per arm: alignment, agreement, reference."""
    seed, learned = job
    torch.set_num_threads(1)
    told = {"seed": seed, "max_tokens": 64, "device": "cpu", "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null, \
            contextlib.redirect_stderr(null), contextlib.redirect_stdout(io.StringIO()):
        model, tokenizer = treerl.calculator_model(treerl.Args(**told), torch.device("cpu"), Path(folder, "start"))
        if learned:
            treerl.Solver = learning_treerl.Solver  # a budget of tokens per update
            treerl.main([*CHAINS.split(), *flags({"model": f"{folder}/start", "lr": 5e-4, "seed": seed, "device": "cpu",
                         "steps": learned, "eval_prompts": 1, "out": f"{folder}/run"})])
            model, tokenizer = treerl.load_model(f"{folder}/run/final", torch.device("cpu"))

    def solver(*arguments):
        args, _ = treerl.parse_args(treerl.Args, [*arguments, *flags(told)])
        return learning_treerl.Solver(model, tokenizer, args, [], [])

    many, halves = solver("--method=chainrl", "--M=8", "--temperature=1", "--top-p=1"), [0.0, 0.0]
    for step in range(REFERENCE):
        groups = super(learning_treerl.Solver, many).rollout(10**6 + step)[0]  # of 16 prompts, whatever they cost
        halves[step % 2] = halves[step % 2] + gradient(model, leave_one_out(groups))
    cosine = functools.partial(torch.nn.functional.cosine_similarity, dim=0)
    rows = []
    for arm, arguments in ARMS.items():
        one, gradients = solver(*arguments.split()), []
        one.args.seed = 10**5 + seed  # other problems than those that were trained on
        for step in range(BATCHES):
            samples = one.credit(step, one.rollout(step)[0])
            gradients.append(gradient(model, with_outcomes(samples) if "outcomes" in arm else samples))
        unit = torch.nn.functional.normalize(torch.stack(gradients), dim=1)
        agreement = (unit @ unit.T).triu(1).sum() / (BATCHES * (BATCHES - 1) / 2)
        alignment = (unit @ torch.nn.functional.normalize(sum(halves), dim=0)).mean()
        rows.append((learned, arm, alignment.item(), agreement.item(), cosine(*halves).item()))
    return rows

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202])
    parser.add_argument("--processes", type=int, default=2, help="side by side, each with one thread")
    options = parser.parse_args()
    jobs = [(seed, learned) for learned in LEARNED for seed in options.seeds]
    rows = [row for part in in_processes(measure, jobs, options.processes) for row in part]
    print(f"Mean ± half of the 95 % interval over seeds {', '.join(map(str, options.seeds))}.\n")
    names = "policy", "arm", "alignment", "/ 18 chains", "agreement", "reference"
    print(f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|")
    for learned in LEARNED:
        found = {arm: list(zip(*(row[2:] for row in rows if row[:2] == (learned, arm)))) for arm in ARMS}
        for arm, (alignment, agreement, reference) in found.items():
            ratio = [a / c for a, c in zip(alignment, found["18 chains"][0])]
            policy = f"after {learned} updates" if learned else "warm start"
            print(f"| {policy} | {arm} | {interval(alignment)} | {interval(ratio)} | {interval(agreement)} | "
                  f"{statistics.mean(reference):.3f} |")

if __name__ == "__main__":
    main()
