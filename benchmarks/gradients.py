"""Why a tree of rollouts pays, or does not: how well one update's gradient points, at a fixed policy.

    python benchmarks/gradients.py                  settings of learning.py's tree_grpo.py; prints a Markdown table
    python benchmarks/gradients.py main --seeds 7   those of one experiment
    python benchmarks/gradients.py treerl           the same of treerl.py

For each seed and setting there is a policy: the warm start (in "main", "where" and "treerl"), and the same after some
updates of chains (not in "where"). At each, every arm of learning.py draws batches that cost its budget of tokens, from
questions that the policy was not trained on, and the gradient of its loss is taken, without a step. "alignment" is the
mean cosine of a batch's gradient with the gradient of the expected reward at temperature 1, estimated from many more
chains by REINFORCE with leave-one-out baselines; "/ chains" is that over the alignment of the chains of the same seed
(4 in tree_grpo.py, 18 in treerl.py), with Wilcoxon's p of a median of 1. "agreement" is the mean cosine of two batches
of the arm. Where gradients are mostly noise, alignment grows with the square root of the batch, and agreement with the
batch; "reference" is the cosine between two halves of the estimate, whose noise lowers all alignments by one factor.
The arm "inter" is the tree without A_intra; in TreeRL "all leaves" trains on all 30, and "outcomes" gives each leaf's
outcome, leave-one-out, to all of its tokens instead of R(s).
"""

import argparse
import dataclasses
import os
import statistics

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded; two runs share the machine

import torch
import torch.nn.functional as F
from common import (
    SCRIPTS,
    actor_of,
    credits,
    in_processes,
    interval,
    quietly,
    rank_test,
    rollouts,
    table,
    treerl,
)
from learning import EXPERIMENTS, arm_of, budgeted_run, task_of, tree_arms, warm_start

BATCHES, REFERENCE = 32, 48
CHAINS = {"tree_grpo": "chains", "treerl": "18 chains"}


def gradient(script, model, groups: list) -> torch.Tensor:
    """Of the loss at ratio 1 without KL, flat."""
    packed = script.Packed(groups, model.device)
    logps = script.packed_logps(model, packed)
    packed.old_logps = logps.detach()
    model.zero_grad()
    script.batch_loss(packed, logps, script.Args(kl_coef=0.0))[0].backward()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])


def leave_one_out(script, found: list) -> list:
    """REINFORCE: each sampled token carries its leaf's reward less the mean of the others, and
    tokens are summed, for which the loss, a mean over them, needs their number."""
    groups = []
    for _, root in found:
        leaves = root.leaves()
        A = treerl.leave_one_out(torch.tensor([leaf.reward for leaf in leaves]))
        sizes = [sum(len(node.logps) for node in leaf.path()) for leaf in leaves]
        A = (A * torch.tensor(sizes))[:, None]
        groups.append(script.Group(root, leaves, A.float(), 1 / len(leaves) / len(found)))
    return groups


def with_outcomes(groups: list) -> list:
    """Each leaf's leave-one-out reward in the place of its path's R(s)."""
    changed = []
    for group in groups:
        leaves = group.root.leaves()
        A = treerl.leave_one_out(torch.tensor([leaf.reward for leaf in leaves]))
        of = dict(zip(leaves, A.float()))
        rows = torch.stack([of[leaf] for leaf in group.leaves])[:, None]
        changed.append(group._replace(advantages=rows))
    return changed


def arms_of(name: str, arms: dict[str, str]) -> dict[str, str]:
    if EXPERIMENTS[name].script == "tree_grpo":
        return {**arms, **tree_arms(2, 4, 6, "inter")}
    tree = arms["6,2,1,2"]
    return {**arms, "6,2,1,2, all leaves": f"{tree} --keep=30", "6,2,1,2, outcomes": tree}


def measure(job: tuple) -> list[tuple]:
    """Of one setting, seed and policy, per arm: alignment, agreement, share of leaves with A != 0,
    reference."""
    name, setting_name, seed, learned = job
    experiment = EXPERIMENTS[name]
    script, setting = SCRIPTS[experiment.script], experiment.settings[setting_name]
    torch.set_num_threads(1)
    with quietly() as folder, task_of(setting):
        common, path = warm_start(script, setting, seed, folder), folder / "start"
        chains = setting.arms[CHAINS[experiment.script]]
        if learned:
            own = [*chains.split(), f"--steps={learned}", "--eval-prompts=1", "--eval-every=0"]
            arguments = [*common, *own, f"--seed={seed}", f"--out={folder}/run"]
            budgeted_run(script, arguments, setting.budget, setting.counted)
            path = folder / "run" / "final"
        model, tokenizer = script.load_model(str(path), torch.device("cpu"))

        def actor(told: str, **changes):
            args, _ = script.parse_args(script.Args, [*common, *told.split()])
            return actor_of(script, model, tokenizer, dataclasses.replace(args, **changes))

        many, halves = actor(chains, M=8, N=0, temperature=1.0, top_p=1.0, seed=seed), [0.0, 0.0]
        for step in range(REFERENCE):
            found, _ = rollouts(script, many, f"reference {step}")
            halves[step % 2] = halves[step % 2] + gradient(
                script, model, leave_one_out(script, found)
            )
        reference = F.cosine_similarity(*halves, dim=0).item()
        truth, rows = F.normalize(sum(halves), dim=0), []
        for arm, told in arms_of(name, setting.arms).items():
            chain = {"N": 0} if "--method" in told else {}
            one = actor(told, seed=seed, **chain)
            gradients, signal = [], []
            with arm_of(name, arm):
                _, counts = rollouts(script, one, "price")
                one.args.prompts = round(
                    setting.budget * one.args.prompts / counts[setting.counted]
                )
                for step in range(BATCHES):
                    found, _ = rollouts(script, one, f"batch {step}")
                    groups = credits(script, found, one.args, step)
                    groups = with_outcomes(groups) if "outcomes" in arm else groups
                    gradients.append(gradient(script, model, groups))
                    A = torch.cat([group.advantages.abs().amax(1) for group in groups])
                    signal.append((A > 0).double().mean().item())
            unit = F.normalize(torch.stack(gradients), dim=1)
            agreement = (unit @ unit.T).triu(1).sum() / (BATCHES * (BATCHES - 1) / 2)
            marks = (unit @ truth).mean().item(), agreement.item(), statistics.mean(signal)
            rows.append((setting_name, learned, arm, *marks, reference))
    return rows


def policies(name: str, setting: str) -> tuple[int, ...]:
    """After how many updates: 0 is the warm start; the other has learned about half in "main"."""
    after = 8 if setting == "errors anywhere" else 24 if name == "treerl" else 40
    return {"main": (0, after), "treerl": (0, after), "where": (0,)}.get(name, (after,))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    of = [name for name, what in EXPERIMENTS.items() if what.script != "graph_gpo"]
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(of)} (default: not treerl)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202])
    parser.add_argument("--processes", type=int, default=2, help="side by side, one thread each")
    options = parser.parse_args()
    names = options.experiments or of[:-1]
    if unknown := set(names) - set(of):
        parser.error(f"no such experiment: {', '.join(unknown)}")
    settings = []
    for name in names:
        for setting in EXPERIMENTS[name].settings:
            settings += [(name, setting, learned) for learned in policies(name, setting)]
    jobs = [(name, key, seed, learned) for name, key, learned in settings for seed in options.seeds]
    rows = [row for part in in_processes(measure, jobs, options.processes) for row in part]
    lines = []
    for name, setting, learned in settings:
        found = {}
        for *key, arm, alignment, agreement, signal, reference in rows:
            if key == [setting, learned]:
                found.setdefault(arm, []).append((alignment, agreement, signal, reference))
        chains = [marks[0] for marks in found[CHAINS[EXPERIMENTS[name].script]]]
        for arm, marks in found.items():
            alignment, agreement, signal, reference = zip(*marks)
            ratio = [a / c for a, c in zip(alignment, chains)]
            cells = [setting or name, f"after {learned} updates" if learned else "warm start", arm]
            cells += [interval(alignment), interval(ratio), "", "", interval(agreement)]
            if set(ratio) != {1.0}:
                each = ", ".join(f"{r:.2f}" for r in ratio)
                cells[5:7] = f"{rank_test([r - 1 for r in ratio]):.3f}", each
            means = f"{statistics.mean(signal):.0%}", f"{statistics.mean(reference):.3f}"
            lines.append([*cells, *means])
    print(f"Mean ± half of the 95 % interval over seeds {', '.join(map(str, options.seeds))}.\n")
    head = "setting|policy|arm|alignment|/ chains|p|each seed|agreement|leaves with A ≠ 0|reference"
    print(table(head.split("|"), lines))


if __name__ == "__main__":
    main()
