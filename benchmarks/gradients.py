"""Why a tree of rollouts pays, or does not: how well one update's gradient points, at a fixed policy.

    python benchmarks/gradients.py --seeds 200 201       prints a Markdown table

For each seed and task there are two policies: the warm start, and the same after some updates of GRPO on 4 chains. At
each, every arm of learning.py draws batches that cost the same number of generated tokens, and the gradient of its loss
is taken, without a step. "alignment" is the mean cosine of a batch's gradient with the gradient of the expected reward,
estimated from many more chains by REINFORCE with leave-one-out baselines; "agreement" is the mean cosine of two batches
of the same arm. While they are small, alignment grows with the square root of the batch and agreement with the batch.
"reference" is the cosine between two halves of that estimate: its noise lowers the alignments of all arms alike.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path

from learning import ALL, BASE, EXPERIMENTS, Agent, flags, interval, torch, tree_grpo  # which sets OMP_NUM_THREADS

ARMS = (*ALL, "inter")  # "inter": the tree without A_intra
LEARNED = {"errors anywhere": 5, "error last": 40}  # updates after which about half is learned
BATCHES, REFERENCE = 48, 64

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
    """Of one task, seed and policy: (task, stage, arm, alignment, agreement, share of A != 0, reference)."""
    setting, seed, learned = job
    torch.set_num_threads(1)
    shapes, _, told = EXPERIMENTS["main"][setting]
    told = {name: value for name, value in told.items() if name not in ("repeat", "budget", "counted")}
    Agent.budget, Agent.counted = BASE["budget"], BASE["counted"]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null, \
            contextlib.redirect_stderr(null), contextlib.redirect_stdout(io.StringIO()):
        args = tree_grpo.Args(seed=seed, topk=1, turn_tokens=32, dtype="float32", **told)
        model, tokenizer = tree_grpo.built_in_model(args, torch.device("cpu"), Path(folder, "start"))
        if learned:
            changes = {**told, "model": f"{folder}/start", "out": f"{folder}/run", "steps": learned, "seed": seed,
                       "device": "cpu", "eval_prompts": 1}
            tree_grpo.main([*map(str, shapes["chains"]), *flags(changes)])
            model, tokenizer = tree_grpo.load_model(f"{folder}/run/final", torch.device("cpu"))

    def agent(**changes):
        return Agent(model, tokenizer, tree_grpo.Args(**{**vars(args), "prompts": 16, **changes}), [], [])

    many, halves = agent(method="grpo", M=8), [0.0, 0.0]
    for step in range(REFERENCE):
        groups = tree_grpo.Agent.rollout(many, 10**6 + step)[0]  # other questions than the arms get
        halves[step % 2] = halves[step % 2] + gradient(model, leave_one_out(groups))
    cosine = torch.nn.functional.cosine_similarity
    reference, rows = cosine(*halves, dim=0).item(), []
    for arm in ARMS:
        names = [name[2:] for name in shapes[arm][::2]]
        one = agent(**dict(zip(names, shapes[arm][1::2])))
        gradients, signal = [], []
        for step in range(BATCHES):
            gradients.append(gradient(model, one.credit(step, one.rollout(step)[0])))
            signal.append(one.row["signal"])
        unit = torch.nn.functional.normalize(torch.stack(gradients), dim=1)
        pairs = (unit @ unit.T).triu(1).sum() / (BATCHES * (BATCHES - 1) / 2)
        alignment = (unit @ torch.nn.functional.normalize(sum(halves), dim=0)).mean()
        rows.append((setting, learned, arm, alignment.item(), pairs.item(), statistics.mean(signal), reference))
    return rows

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202])
    parser.add_argument("--processes", type=int, default=2, help="side by side, each with one thread")
    options = parser.parse_args()
    jobs = [(setting, seed, learned) for seed in options.seeds for setting, updates in LEARNED.items()
            for learned in (0, updates)]
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        rows = [row for part in tree_grpo.tqdm(pool.imap_unordered(measure, jobs), total=len(jobs)) for row in part]
    print(f"Mean ± half of the 95 % interval over seeds {', '.join(map(str, options.seeds))}; {BATCHES} batches of "
          f"{BASE['budget']} generated tokens per arm and policy.\n")
    print("| task | policy | arm | alignment | agreement | leaves with A ≠ 0 | reference |\n" + "|---" * 7 + "|")
    for setting, updates in LEARNED.items():
        for learned in (0, updates):
            for arm in ARMS:
                columns = zip(*(row[3:] for row in rows if row[:3] == (setting, learned, arm)))
                alignment, agreement, signal, reference = map(list, columns)
                policy = f"after {learned} updates" if learned else "warm start"
                print(f"| {setting} | {policy} | {arm} | {interval(alignment)} | {interval(agreement)} "
                      f"| {statistics.mean(signal):.0%} | {statistics.mean(reference):.3f} |")

if __name__ == "__main__":
    main()
