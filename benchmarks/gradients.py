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

import dataclasses
import statistics

import common
import torch
import torch.nn.functional as F
from common import CPU, SCRIPTS, actor_of, credits, in_processes, interval, quietly, rank_test, rollouts, table, treerl
from learning import EXPERIMENTS, arm_of, budgeted_run, warm_start
from speed import autocast

BATCHES, REFERENCE = 32, 48
CHAINS = {"tree_grpo": "chains", "treerl": "18 chains"}


def gradient(script, model, groups: list, micro_tokens: int = 10**9) -> torch.Tensor:
    """Of the loss at ratio 1 without KL, flat, in micro-batches and on CUDA under autocast as update takes it."""
    model.zero_grad()
    model.train()  # gradient checkpointing asks for it
    for part in script.micro_batches(groups, micro_tokens):
        packed = script.Packed(part, model.device)
        with autocast(model.device):
            logps = script.packed_logps(model, packed)
        packed.old_logps = logps.detach()
        script.batch_loss(packed, logps, script.Args(kl_coef=0.0))[0].backward()
    model.eval()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])


def outcomes(root) -> dict:
    """Each leaf's reward less the mean of the others'."""
    leaves = root.leaves()
    return dict(zip(leaves, treerl.leave_one_out(torch.tensor([leaf.reward for leaf in leaves]))))


def leave_one_out(script, found: list) -> list:
    """REINFORCE: each sampled token carries its leaf's outcome, and tokens are summed, for which the loss, a mean over
    them, needs their number."""
    groups = []
    for _, root in found:
        A = [a * sum(len(node.logps) for node in leaf.path()) for leaf, a in outcomes(root).items()]
        groups.append(script.Group(root, root.leaves(), torch.stack(A)[:, None].float(), 1 / len(A) / len(found)))
    return groups


def with_outcomes(groups: list) -> list:
    """Each leaf's outcome in the place of its path's R(s)."""
    changed = []
    for group in groups:
        of = outcomes(group.root)
        rows = torch.stack([of[leaf] for leaf in group.leaves])[:, None].float()
        changed.append(group._replace(advantages=rows))
    return changed


def arms_of(name: str, arms: dict[str, str]) -> dict[str, str]:
    if EXPERIMENTS[name].script == "tree_grpo":
        return {**arms, "inter": f"{arms['tree']} --advantage=inter"}
    tree = arms["6,2,1,2"]
    return {**arms, "6,2,1,2, all leaves": f"{tree} --keep=30", "6,2,1,2, outcomes": tree}


def measure(job: tuple) -> list[tuple]:
    """Of one setting, seed and policy, per arm: alignment, agreement, share of leaves with A != 0, reference."""
    name, setting_name, seed, learned = job
    experiment = EXPERIMENTS[name]
    script, setting = SCRIPTS[experiment.script], experiment.settings[setting_name]
    with quietly() as folder:
        shared, path = warm_start(script, setting, seed, folder), folder / "start"
        chains = setting.arms[CHAINS[experiment.script]]
        if learned:
            own = [*chains.split(), f"--steps={learned}", "--eval-prompts=1", "--eval-every=0", f"--seed={seed}"]
            budgeted_run(script, folder / "run", [*shared, *own], setting.budget, setting.counted)
            path = folder / "run" / "final"
        model, tokenizer = script.load_model(str(path), CPU)

        def actor(told: str, **changes):
            args, _ = script.parse_args(script.Args, [*shared, *told.split()])
            return actor_of(script, model, tokenizer, dataclasses.replace(args, **changes))

        many, halves = actor(chains, M=8, N=0, temperature=1.0, top_p=1.0, seed=seed), [0.0, 0.0]
        for step in range(REFERENCE):
            found, _ = rollouts(script, many, f"reference {step}")
            halves[step % 2] = halves[step % 2] + gradient(script, model, leave_one_out(script, found))
        reference = F.cosine_similarity(*halves, dim=0).item()
        truth, rows = F.normalize(sum(halves), dim=0), []
        for arm, told in arms_of(name, setting.arms).items():
            one = actor(told, seed=seed, **({"N": 0} if "--method" in told else {}))
            gradients, signal = [], []
            with arm_of(name, arm):
                _, counts = rollouts(script, one, "price")
                one.args.prompts = round(setting.budget * one.args.prompts / counts[setting.counted])
                for step in range(BATCHES):
                    found, _ = rollouts(script, one, f"batch {step}")
                    groups = credits(script, found, one.args, step)
                    groups = with_outcomes(groups) if "outcomes" in arm else groups
                    gradients.append(gradient(script, model, groups))
                    signal.append(common.signal(groups))
            unit = F.normalize(torch.stack(gradients), dim=1)
            agreement = (unit @ unit.T).triu(1).sum() / (BATCHES * (BATCHES - 1) / 2)
            marks = (unit @ truth).mean().item(), agreement.item(), statistics.mean(signal)
            rows.append((name, setting_name, learned, arm, *marks, reference))
    return rows


def policies(name: str, setting: str) -> tuple[int, ...]:
    """After how many updates: 0 is the warm start; the other has learned about half in "main"."""
    after = 8 if setting == "errors anywhere" else 24 if name == "treerl" else 40
    return {"main": (0, after), "treerl": (0, after), "where": (0,)}.get(name, (after,))


def main() -> None:
    parser = common.parser(__doc__)
    of = [name for name, what in EXPERIMENTS.items() if what.script != "graph_gpo"]
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(of)} (default: not treerl)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202])
    parser.add_argument("--processes", type=int, default=2, help="side by side, one thread each")
    options = parser.parse_args()
    names = options.experiments or of[:-1]
    if unknown := set(names) - set(of):
        parser.error(f"no such experiment: {', '.join(unknown)}")
    settings = [
        (name, setting, learned)
        for name in names
        for setting in EXPERIMENTS[name].settings
        for learned in policies(name, setting)
    ]
    jobs = [(name, key, seed, learned) for name, key, learned in settings for seed in options.seeds]
    found, lines = {key: {} for key in settings}, []
    for rows in in_processes(measure, jobs, options.processes):
        for *key, arm, alignment, agreement, signal, reference in rows:
            found[tuple(key)].setdefault(arm, []).append((alignment, agreement, signal, reference))
    for (name, setting, learned), arms in found.items():
        chains = [marks[0] for marks in arms[CHAINS[EXPERIMENTS[name].script]]]
        for arm, marks in arms.items():
            alignment, agreement, signal, reference = zip(*marks)
            ratio, tested = [a / c for a, c in zip(alignment, chains)], ["", ""]
            if set(ratio) != {1.0}:
                tested = f"{rank_test([r - 1 for r in ratio]):.3f}", ", ".join(f"{r:.2f}" for r in ratio)
            policy = f"after {learned} updates" if learned else "warm start"
            cells = [setting or name, policy, arm, interval(alignment), interval(ratio), *tested, interval(agreement)]
            lines.append([*cells, f"{statistics.mean(signal):.0%}", f"{statistics.mean(reference):.3f}"])
    print(f"Mean ± half of the 95 % interval over seeds {', '.join(map(str, options.seeds))}.\n")
    head = "setting|policy|arm|alignment|/ chains|p|each seed|agreement|leaves with A ≠ 0|reference"
    print(table(head, lines))


if __name__ == "__main__":
    main()
