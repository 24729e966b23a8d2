"""Why a tree of rollouts pays, or does not: how well one update's gradient points, at a fixed policy.

    python benchmarks/gradients.py                  all settings of learning.py; prints a Markdown table
    python benchmarks/gradients.py main --seeds 7   those of one experiment

For each seed and setting there is a policy: the warm start (in "main" and "where"), and the same after some updates
of GRPO on 4 chains (not in "where"). At each, every arm draws batches that cost the same number of tokens, from
questions that the policy was not trained on, and the gradient of its loss is taken, without a step. "alignment" is
the mean cosine of a batch's gradient with the gradient of the expected reward, estimated from many more chains by
REINFORCE with leave-one-out baselines; "/ chains" is that over the alignment of the chains of the same seed, with
Wilcoxon's p of a median of 1. "agreement" is the mean cosine of two batches of the arm. Where gradients are mostly
noise, alignment grows with the square root of the batch, and agreement with the batch; "reference" is the cosine
between two halves of the estimate, whose noise lowers all alignments by one factor. The arm "inter" is the tree
without A_intra.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile

import torch
from learning import (
    EXPERIMENTS,
    TREE_ROLLOUT,
    Agent,
    flags,
    in_processes,
    interval,
    learned_rollout,
    rank_test,
    set_up,
    shapes,
    tree_grpo,
)

LEARNED = {"anywhere": 8, "late": 40}  # updates after which about half is learned in "main"
BATCHES, REFERENCE = 32, 48

def gradient(model, samples) -> torch.Tensor:
    """Of the GRPO loss at ratio 1 without KL, flat."""
    packed = tree_grpo.Packed(samples, model.device)
    logps, loss = tree_grpo.packed_logps(model, packed), 0.0
    for item, (index, mask) in zip(samples, packed.paths):
        advantages = torch.nn.utils.rnn.pad_sequence([a.reshape(-1) for a in item.advantages], True)
        loss = loss + tree_grpo.grpo_loss(logps[index], logps[index].detach(), None, advantages, mask)[0] * item.weight
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])

def leave_one_out(groups) -> list:
    """REINFORCE: each sampled token carries its leaf's reward less the mean of the others; summed over tokens."""
    samples = []
    for _, root in groups:
        leaves = root.leaves()
        rewards = torch.tensor([leaf.reward for leaf in leaves])
        advantages = (rewards - rewards.mean()) * len(leaves) / (len(leaves) - 1)
        sizes = [sum(sum(node.sampled) for node in leaf.path()) for leaf in leaves]
        samples.append(tree_grpo.Sample(root, leaves, [a * n for a, n in zip(advantages, sizes)], 1 / len(groups)))
    return samples

def measure(job: tuple) -> list[tuple]:
    """Of one setting, seed and policy, per arm: alignment, agreement, share of leaves with A != 0, reference."""
    experiment, setting, seed, learned = job
    arms, names, told = EXPERIMENTS[experiment][setting]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null, \
            contextlib.redirect_stderr(null), contextlib.redirect_stdout(io.StringIO()):
        model, tokenizer, args, common = set_up(told, seed, folder)
        if learned:
            changes = flags({"steps": learned, "out": f"{folder}/run", "eval_prompts": 1})
            tree_grpo.main([*map(str, shapes(2, 4, 6)["chains"]), *common, *changes])
            model, tokenizer = tree_grpo.load_model(f"{folder}/run/final", torch.device("cpu"))

    def agent(**changes):
        return Agent(model, tokenizer, tree_grpo.Args(**{**vars(args), "prompts": 16, **changes}), [], [])

    many, halves = agent(method="grpo", M=8), [0.0, 0.0]
    for step in range(REFERENCE):
        groups = super(Agent, many).rollout(10**6 + step)[0]  # of 16 prompts, whatever they cost
        halves[step % 2] = halves[step % 2] + gradient(model, leave_one_out(groups))
    cosine = torch.nn.functional.cosine_similarity
    reference, rows = cosine(*halves, dim=0).item(), []
    for arm in (*names, "inter"):
        one = agent(**{name[2:]: value for name, value in zip(arms[arm][::2], arms[arm][1::2])})
        tree_grpo.tree_rollout = learned_rollout() if arm == "learned" else TREE_ROLLOUT
        gradients, signal = [], []
        for step in range(10**5, 10**5 + BATCHES):  # questions that nothing was trained on
            gradients.append(gradient(model, one.credit(step, one.rollout(step)[0])))
            signal.append(one.row["signal"])
        unit = torch.nn.functional.normalize(torch.stack(gradients), dim=1)
        agreement = (unit @ unit.T).triu(1).sum() / (BATCHES * (BATCHES - 1) / 2)
        alignment = (unit @ torch.nn.functional.normalize(sum(halves), dim=0)).mean()
        rows.append((setting, learned, arm, alignment.item(), agreement.item(), statistics.mean(signal), reference))
    return rows

def policies(experiment: str, told: dict) -> tuple[int, ...]:
    """After how many updates: 0 is the warm start."""
    after = LEARNED[told["hard"]]
    return {"main": (0, after), "where": (0,)}.get(experiment, (after,))

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202])
    parser.add_argument("--processes", type=int, default=2, help="side by side, each with one thread")
    options = parser.parse_args()
    settings = [(experiment, setting, learned) for experiment in options.experiments or EXPERIMENTS
                for setting, (_, _, told) in EXPERIMENTS[experiment].items()
                for learned in policies(experiment, told)]
    jobs = [(experiment, setting, seed, learned) for experiment, setting, learned in settings for seed in options.seeds]
    rows = [row for part in in_processes(measure, jobs, options.processes) for row in part]
    print(f"Mean ± half of the 95 % interval over seeds {', '.join(map(str, options.seeds))}.\n")
    names = ("setting", "policy", "arm", "alignment", "/ chains", "rank test, p", "of each seed", "agreement",
             "leaves with A ≠ 0", "reference")
    print(f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|")
    for _, setting, learned in settings:
        found = {}  # arm -> a list per column, over the seeds in the same order
        for row in rows:
            if row[:2] == (setting, learned):
                for column, value in zip(found.setdefault(row[2], [[], [], [], []]), row[3:]):
                    column.append(value)
        for arm, (alignment, agreement, signal, reference) in found.items():
            ratio = [a / c for a, c in zip(alignment, found["chains"][0])]
            policy = f"after {learned} updates" if learned else "warm start"
            against = ["", ""]
            if arm != "chains":
                against = [f"{rank_test([r - 1 for r in ratio]):.3f}", ", ".join(f"{r:.2f}" for r in ratio)]
            cells = [setting, policy, arm, interval(alignment), interval(ratio), *against, interval(agreement)]
            print(f"| {' | '.join(cells)} | {statistics.mean(signal):.0%} | {statistics.mean(reference):.3f} |")

if __name__ == "__main__":
    main()
