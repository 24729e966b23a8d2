# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.0", "tqdm"]
# ///
"""GraphGPO: graph-based credit assignment for agentic RL (ICML 2026, arXiv 2605.26684).

    python graph_gpo.py                              a tiny Qwen learns to tidy up a house, on a CPU
    python graph_gpo.py --model Qwen/Qwen2.5-1.5B-Instruct --env envs/alfworld_games.py:ALFWorld

The algorithm, of which `train` is the loop:

    for each training step:
        1. rollouts: K of each task                                                      Player.play
        2. credit: all transitions of a task make a graph; d(s) is the distance to success in it;
           A_G = z-score of omega^(d(s') + cost) among all that leave s, A = A_G + A_E   advantages
        3. update: the clipped loss with a KL penalty, each step a sequence of its own   grpo_loss
        4. the sampler gets the new weights

Steps in the same state have the same prompt, whose keys and values they share, and which they are
trained on once: the engine, below the loop. Its text is that of the other two scripts, so it has
more than is needed here (top-p, Node.tree)."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import heapq
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


# ----------------------------------------------------------------------------- GraphGPO: the method
class SUCCESS:
    """Where the last transition of a successful rollout leads. The class itself is that state, and
    equals no other."""


class Transition(NamedTuple):
    state: object  # anything hashable
    action: str
    next_state: object
    trajectory: object  # the rollout it is of, hashable; its transitions are in the order of time
    cost: float = 1.0


def goal_distances(transitions: list[Transition]) -> dict[object, float]:
    """Distance d(s) of each state to success in the graph of all transitions of a task (GraphGPO):
    the least sum of costs on a way to SUCCESS, itself at 0; where there is no way, the largest of
    these plus 1. Dijkstra, O((V + E) log V). ValueError for no transitions, costs that are not
    positive and finite, or a transition that leaves SUCCESS."""
    if not transitions:
        raise ValueError("want at least one transition")
    into = {}  # state -> (state before, cost) of each edge that leads there
    for state, _, next_state, _, cost in transitions:
        if state is SUCCESS or not 0 < cost < math.inf:
            raise ValueError(f"want 0 < cost and nothing that leaves SUCCESS: {state!r}, {cost}")
        into.setdefault(next_state, []).append((state, cost))
    d, order = {}, itertools.count()  # order: so that the heap never compares states
    heap = [(0.0, next(order), SUCCESS)]
    while heap:
        distance, _, state = heapq.heappop(heap)
        if state not in d:
            d[state] = distance  # d(s) = min of cost + d(s')
            for before, cost in into.get(state, []):
                heapq.heappush(heap, (distance + cost, next(order), before))
    beyond = max(d.values()) + 1  # d_max + 1, where there is no way
    states = [SUCCESS, *(s for t in transitions for s in (t.state, t.next_state))]
    return {state: d.get(state, beyond) for state in states}


def z_scores(values: Tensor, groups: list) -> Tensor:
    """z-score (unbiased std, no epsilon) of each value among those of its group, (n,) in float64; 0
    for a lone one, and where a group's values span no more than rounding does: 1e-9 of the
    largest."""
    x, members = values.double(), {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    z = torch.zeros_like(x)
    for index in members.values():
        own = x[index]
        own = own / own.abs().max().clamp(1e-300)  # squares of tiny values would be 0, of huge inf
        if own.max() - own.min() > 1e-9:
            z[index] = (own - own.mean()) / own.std()
    return z


def graph_advantages(transitions: list[Transition], omega: float = 0.1) -> Tensor:
    """A_G of each transition of one task's rollouts (GraphGPO): z-score of its reward
    R_G among all that leave the same state, whatever became of their rollouts. Returns
    (len(transitions),), float64; 0 without any success. ValueError as in goal_distances, and for
    omega outside (0, 1)."""
    if not 0 < omega < 1:
        raise ValueError(f"want 0 < omega < 1, got {omega}")
    d = goal_distances(transitions)
    if not any(t.next_state is SUCCESS for t in transitions):
        return torch.zeros(len(transitions), dtype=torch.float64)
    nearest = {}  # state -> the least d(s') + cost of what leaves it
    for t in transitions:
        nearest[t.state] = min(d[t.next_state] + t.cost, nearest.get(t.state, math.inf))
    # R_G(s, a, s') = 10 omega^(d(s') + cost). The factor 10 omega^nearest cancels in the z-score;
    # with it a state far from success would underflow to 0.
    further = [d[t.next_state] + t.cost - nearest[t.state] for t in transitions]
    R_G = omega ** torch.tensor(further, dtype=torch.float64)
    return z_scores(R_G, [t.state for t in transitions])  # A_G


def gigpo_advantages(transitions: list[Transition], rewards: Tensor, gamma: float = 0.95) -> Tensor:
    """The step term of GiGPO (arXiv 2505.10978): z-score of a transition's return, sum_k gamma^k
    r_(t + k) to the end of its rollout, among all that leave the same state. rewards r:
    (len(transitions),); result: the same, float64. ValueError unless there are finite rewards of
    that shape and 0 <= gamma <= 1."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    shape = (len(transitions),)
    if not transitions or rewards.shape != shape or not rewards.isfinite().all():
        raise ValueError(f"want finite rewards, one per transition, got {rewards}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"want 0 <= gamma <= 1, got {gamma}")
    later, returns = {}, []  # later: trajectory -> the return from its next step on
    for t, reward in zip(reversed(transitions), reversed(rewards.tolist())):
        later[t.trajectory] = reward + gamma * later.get(t.trajectory, 0.0)
        returns.append(later[t.trajectory])
    returns = torch.tensor(returns[::-1], dtype=torch.float64)
    return z_scores(returns, [t.state for t in transitions])


def episode_advantages(returns: Tensor) -> Tensor:
    """A_E of each rollout of one task: z-score of its return (GRPO). (rollouts,) -> the same, in
    float64. ValueError for none, another shape, or a return that is not finite."""
    returns = torch.as_tensor(returns, dtype=torch.float64)
    if returns.dim() != 1 or not len(returns) or not returns.isfinite().all():
        raise ValueError(f"want finite returns (rollouts,), got {returns}")
    return z_scores(returns, [0] * len(returns))


def advantages(task: Task, args) -> Tensor:
    """Advantage of each step of a task's rollouts: beta_graph A_G + beta_episode A_E (GraphGPO),
    less the penalty of an invalid action; with --method gigpo its step term for A_G, with grpo
    none."""
    transitions = [step.transition for step in task.steps]
    A = args.beta_episode * episode_advantages(task.returns)[[t.trajectory for t in transitions]]
    if args.method == "graph_gpo":
        A += args.beta_graph * graph_advantages(transitions, args.omega)
    elif args.method == "gigpo":
        rewards = [step.reward for step in task.steps]
        A += args.beta_graph * gigpo_advantages(transitions, rewards, args.gamma)
    invalid = torch.tensor([not step.valid for step in task.steps])
    return A - args.invalid_penalty * invalid


def credit(task: Task, tasks: int, args) -> list[Group]:
    """Each step is a sequence of its own, its action, below a prompt that it may share. The loss is
    a mean over a task's steps, and over tasks."""
    taken, first = {}, {}  # prompt -> actions taken there, and their advantages
    for step, A in zip(task.steps, advantages(task, args)):
        key = (step.node.parent, *step.node.tokens)
        node = first.setdefault(key, step.node)  # equal actions share a node
        taken.setdefault(node.parent, []).append((node, A))
    groups = []
    for pairs in taken.values():
        nodes, A = [node for node, _ in pairs], torch.stack([A for _, A in pairs])
        groups.append(Group(task.root, nodes, A[:, None], 1 / len(task.steps) / tasks))
    return groups


# ----------------------------------------------------------------------------------------- the loss
def grpo_loss(
    logp, old_logp, ref_logp, advantages, mask, clip_low=0.2, clip_high=0.2, kl_coef=0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss with a KL penalty (Tree-GRPO, Eq. 8, with its sign turned).

    logp, old_logp, ref_logp, mask: (sequences, length), mask true on sampled tokens; nothing else
    is read. advantages: (sequences,), (sequences, 1) or (sequences, length). ref_logp None: no KL,
    ValueError unless kl_coef is 0. Returns the sum over sequences of the mean over each sequence's
    own sampled tokens (0 for one without any), which the caller divides by the prompt's sequences,
    Eq. 8's G, and by the prompts; and sums over sampled tokens: their number, clipped (the clip
    takes their gradient), kl (nats)."""
    if ref_logp is None and kl_coef:
        raise ValueError("kl_coef needs ref_logp")
    mask = mask.bool()
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    advantages = advantages.to(logp.dtype).expand_as(logp).masked_fill(~mask, 0)
    ratio = (logp - old_logp).masked_fill(~mask, 0).exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -torch.minimum(plain, clipped)  # Eq. 8, with its KL below
    gap = (ref_logp if ref_logp is not None else logp.detach()) - logp
    gap = gap.masked_fill(~mask, 0)
    kl = gap.exp() - gap - 1
    if kl_coef:
        loss = loss + kl_coef * kl
    stats = {"tokens": mask.sum(), "clipped": (clipped < plain).sum(), "kl": kl.detach().sum()}
    return (loss.sum(-1) / mask.sum(-1).clamp(min=1)).sum(), stats


# ------------------------------------------------------------------------------- the training loop
def train(args, model, reference, player: Player, state: dict | None) -> None:
    """player.model samples: `model`, or its copy in bfloat16. state: a checkpoint's, or None."""
    out, tokenizer = Path(args.out), player.tokenizer
    how = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": model.device.type == "cuda"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, **how)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    first, size = (state["step"], state["metrics"]) if state else (0, 0)
    log = open_log(args, size)
    if not state:
        save_checkpoint(out, 0, model, tokenizer, optimizer, args)
    if first == 0:
        log("eval", 0, player.evaluate())
    signals, picture = catch_signals(), load_beside("pictures.py", "graph_gpo")
    bar = tqdm(range(first, args.steps), "training", initial=first, total=args.steps, unit="step")
    for step in bar:
        began = time.perf_counter()
        lr = args.lr * min(1, (step + 1) / max(1, args.warmup))
        optimizer.param_groups[0]["lr"] = lr
        rng = random.Random(f"{args.seed}/{step}")
        generator = torch.Generator(model.device).manual_seed(rng.getrandbits(60) + RANK)
        counts = Counter()

        # 1. Rollouts: K of each task.
        seeds = [rng.getrandbits(32) for _ in range(args.tasks)]
        own = seeds[RANK::RANKS]
        tasks = player.play(own, args.K, generator, args.temperature, counts)

        # 2. Credit: beta_graph A_G + beta_episode A_E.
        groups = [group for task in tasks for group in credit(task, len(seeds), args)]
        sampled = time.perf_counter()

        # 3. Update; then the sampler gets the new weights.
        row = update(model, reference, optimizer, groups, args)
        if player.model is not model:
            player.model.load_state_dict(model.state_dict())

        # 4. Log, draw, evaluate, save.
        n = args.K * len(seeds)
        counts["reward"] = sum(sum(task.returns) for task in tasks) / n
        counts["success"] = sum(sum(task.won) for task in tasks) / n
        prompts = [node for task in tasks for node in (task.root, *task.root.children)]
        counts["prompt_tokens_training"] = length(prompts)
        row |= {**over_ranks(counts), "lr": lr}
        row["entropy"] /= row["generated_tokens"]
        row["seconds"] = time.perf_counter() - began
        row["seconds_sampling"] = sampled - began
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9  # of the run
        log("train", step + 1, row)
        speed = row["generated_tokens"] / row["seconds"]
        bar.set_postfix_str(f"reward {row['reward']:.2f}, {speed:.0f} tokens/s")
        if picture and RANK == 0:
            drawn = picture(sys.modules[__name__], tasks, args)
            (out / "graph.md").write_text(drawn, "utf-8", "replace")
        last = step + 1 == args.steps
        if last or args.eval_every and (step + 1) % args.eval_every == 0:
            log("eval", step + 1, player.evaluate())
        stop = over_ranks({"signals": len(signals)})["signals"]
        if last or stop or (step + 1) % args.save_every == 0:
            save_checkpoint(out, step + 1, model, tokenizer, optimizer, args)
            if stop and not last:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; go on with --resume {out}")
    save_model(out / "final", model, tokenizer)
    print(f"model in {out / 'final'}")
    if RANKS > 1:
        over_ranks({})  # torchrun ends all when one ends badly: they wait for what rank 0 saves
        torch.distributed.destroy_process_group()
        time.sleep(1)  # a thread of gloo that was not done when Python ended has aborted a run


# ==================================================================================================
# The engine: the same text in all three scripts, to be read once. It does what tests/naive.py does
# with one forward per path, but fast: branches share the keys and values above them when they are
# sampled, and each token of a tree is trained on once.
# ==================================================================================================
@dataclass(eq=False)
class Node:
    """A run of tokens below one parent: a prompt (a root), an agent step with its observation
    (Tree-GRPO), a segment between forks (TreeRL), an action (GraphGPO).

    The first len(logps) of its tokens were drawn by the policy and carry loss; the others, a prompt
    or an observation, were not. kv[..., j, :] is of the token *before* tokens[j] on the path, whose
    forward predicts tokens[j] (of a root: of all but its last token). So what begins below a node
    finds all but the node's last token there, and runs that again."""

    parent: Node | None = None
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)  # at temperature 1
    children: list[Node] = field(default_factory=list)
    tree: int = 0  # which of the prompt's trees, that is: from whose trunk it hangs
    reward: float | None = None  # of a leaf
    kv: Tensor | None = None  # (layers, 2, KV heads, tokens, head size)

    def __post_init__(self):
        if self.parent is not None:
            self.parent.children.append(self)

    def path(self) -> list[Node]:
        """The nodes from the root to this one."""
        return [*(self.parent.path() if self.parent else []), self]

    def below(self) -> list[Node]:
        """This node and all under it, a child with all under it before the next child."""
        return [self, *(node for child in self.children for node in child.below())]

    def leaves(self) -> list[Node]:
        return [node for node in self.below() if not node.children]

    @property
    def cached(self) -> int:
        return 0 if self.kv is None else self.kv.shape[-2]


def length(nodes: list[Node]) -> int:
    return sum(len(node.tokens) for node in nodes)


def forget(nodes) -> None:  # frees memory; what is needed again is computed again
    for node in nodes:
        node.kv = None


def batches(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def padded(rows: list[list], pad=0, multiple: int = 1) -> list[list]:
    width = -(-max(map(len, rows)) // multiple) * multiple
    return [row + [pad] * (width - len(row)) for row in rows]


def alike(items: list, length) -> list[list]:
    """Items in groups of which none is more than twice as long as another: little is padded."""
    groups, left = [], sorted(items, key=length)
    while left:
        first = sum(2 * length(item) < length(left[-1]) for item in left)
        groups.append(left[first:])
        left = left[:first]
    return groups


def token_tree(module, query, key, value, attention_mask, scaling, attend, **kwargs):
    """What transformers calls in each layer: `attend`, handed through the model's arguments."""
    return attend(module.layer_idx, query, key, value, scaling), None


def full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def products(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.mT in float32; in bfloat16 scores and logits would be rounded. a: (batch, n, D),
    b: (batch, m, D). Returns (batch, n, m)."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.bmm(a, b.mT, out_dtype=torch.float32)
    return torch.bmm(full_precision(a), full_precision(b).mT)


# ---------------------------------------------------------------------------- engine: sampling
MOST_SCORES = 2**26  # elements of a score matrix
LOOK = {"cuda": 8}  # how many tokens are drawn before the host looks at them; elsewhere 1


class Lanes:
    """Branches in flight: a row per prompt, a lane per branch; lanes left over in a row stay idle.

    A prompt's keys and values are held once per row, in `shared`; what comes after is each lane's
    own, in `own`. A new token attends to both: two score matrices, one softmax. A lane has `room`
    for some more tokens. When one is full, or most lanes idle, what was computed is stored in the
    nodes, and new Lanes go on from there.

    Of lane b: grid[b] is its node (None: idle), length[b] how many of its slots are filled, new[b]
    the tokens that were not run yet. `at` and `token` are copies of length and of the last of new
    on the device, which `step` advances.

    Shapes: R rows, W lanes in each, B = R W lanes, h KV heads, g query heads on each of them, n new
    tokens, P slots of a prompt, S slots of a lane, D the size of a head."""

    def __init__(self, model, nodes: list[Node]):
        self.model, self.graph, device = model, None, model.device
        self.recorded = device.type == "cuda"
        rows = {}  # root -> the nodes to be sampled below it
        for node in nodes:
            rows.setdefault(node.path()[0], []).append(node)
        self.W = max(map(len, rows.values()))
        self.grid = [node for row in padded(list(rows.values()), None) for node in row]
        self.length, self.new, paths = [], [], []
        for node in self.grid:
            path = node.path() if node else []
            tokens = [token for above in path for token in above.tokens]
            self.new.append(tokens[sum(above.cached for above in path) :] or [0])
            paths.append(path[1:])
            self.length.append(sum(above.cached for above in path[1:]))
        longest = max(n + len(new) for n, new in zip(self.length, self.new))
        self.room = longest + max(64, longest // 2)
        # The last slot of a lane is for pads. P is 1 at least: kernels may refuse empty matrices.
        P = max(1, *(root.cached for root in rows))
        if self.recorded:  # on CUDA products of such sizes are faster
            self.room += -self.room % 8
            P += -P % 8
        S = self.room + 1
        self.shared = gather_kv(model, [[root] for root in rows], P)  # (layers, 2, h, R, P, D)
        self.own = gather_kv(model, paths, S)  # (layers, 2, h, B, S, D)
        # What a step reads and writes, in places that stay.
        prompt = torch.tensor([root.cached for root in rows], device=device)
        self.prompt = prompt.repeat_interleave(self.W)  # (B,), how long each lane's prompt is
        self.at = torch.zeros_like(self.prompt)  # (B,), the slot of the token to be run next
        self.token = torch.zeros_like(self.prompt)  # (B,), that token
        dtype = torch.promote_types(model.dtype, torch.float32)
        self.drawn = torch.zeros(3, len(self.grid), dtype=dtype, device=device)

    def catch_up(self) -> None:
        """Run what is new in each lane but for the last token, which `step` runs; in pieces, so
        that no score matrix gets too large."""
        keys = self.shared.shape[4] + self.room
        heads = self.model.config.num_attention_heads
        most = max(1, MOST_SCORES // (len(self.grid) * heads * keys))
        while max(map(len, self.new)) > 1:
            part = [tokens[:-1][:most] for tokens in self.new]
            counts = [len(tokens) for tokens in part]
            self.at.copy_(torch.tensor(self.length))
            ids, count = (torch.tensor(x, device=self.at.device) for x in (padded(part), counts))
            after = [n + more for n, more in zip(self.length, counts)]
            self.run(ids, count, seen=max(after))
            self.length = after
            self.new = [tokens[n:] for n, tokens in zip(counts, self.new)]

    def run(self, ids: Tensor, count: Tensor, seen: int) -> Tensor:
        """Run ids (B, n), of which the first count[b] are lane b's, from slot at[b] on; of a lane
        `seen` slots are looked at. Returns the last hidden states, (B, n, width). Nothing in here,
        nor in `step`, hands the device a value or asks it for one: a CUDA graph cannot hold that.
        """
        (B, n), P, device = ids.shape, self.shared.shape[4], ids.device
        column = torch.arange(n, device=device)
        slot = self.at[:, None] + column  # (B, n), where a token goes
        # It sees its prompt and, in its lane, the slots up to its own.
        prompt = torch.arange(P, device=device) < self.prompt[:, None, None]  # (B, 1, P)
        own = torch.arange(seen, device=device) <= slot[:, :, None]  # (B, n, seen)
        visible = torch.cat([prompt.expand(B, n, P), own], -1)[:, None]
        mask = self.drawn.new_zeros(()).where(visible, -torch.inf)  # (B, 1, n, P + seen)
        target = slot.where(column < count[:, None], self.room)  # a pad goes where nobody looks
        attend = functools.partial(self.attend, target, mask)
        position = slot + self.prompt[:, None]
        out = self.model.model(ids, position_ids=position, use_cache=False, attend=attend)
        return out.last_hidden_state

    def attend(self, target, mask, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float):
        """A layer's attention. q: (B, h g, n, D), k and v: (B, h, n, D). Returns (B, n, h g, D)."""
        (B, heads, n, D), h = q.shape, k.shape[1]
        shared, own = self.shared[layer], self.own[layer]
        (R, P), seen = shared.shape[2:4], mask.shape[-1] - shared.shape[3]
        lane = torch.arange(B, device=q.device)[:, None]
        own[:, :, lane, target] = torch.stack([k, v]).transpose(1, 2)
        shared_k, shared_v = shared.flatten(1, 2)  # (h R, P, D)
        own_k, own_v = own[..., :seen, :].flatten(1, 2)  # (h B, seen, D)
        # The g query heads on a KV head are folded into the queries; so are, before the prompt, the
        # lanes of a row. Nothing is repeated, and a prompt's keys are read once for all its lanes.
        gn = heads // h * n
        q = q.reshape(B, h, gn, D).transpose(0, 1).reshape(h * B, gn, D)
        on_prompt = products(q.view(h * R, -1, D), shared_k).view(h * B, gn, P)
        scores = torch.cat([on_prompt, products(q, own_k)], -1).view(h, B, -1, n, P + seen)
        torch.add(mask, scores, alpha=scaling, out=scores)
        weights = scores.softmax(-1).to(v.dtype).view(h * B, gn, P + seen)
        out = weights.view(h * R, -1, P + seen)[..., :P] @ shared_v
        out = torch.baddbmm(out.view(h * B, gn, D), weights[..., P:], own_v)
        return out.view(h, B, -1, n, D).permute(1, 3, 0, 2, 4).reshape(B, n, heads, D)

    def step(self, seen: int, temperature: float, top_p: float, generator) -> None:
        """Run each lane's `token` and draw the next. `drawn`: the latter, its log-prob, and the
        entropy of what it was drawn from, both in nats and at temperature 1."""
        hidden = self.run(self.token[:, None], torch.ones_like(self.at), seen)
        head = self.model.lm_head
        logits = products(hidden.transpose(0, 1), head.weight[None])[0]
        if head.bias is not None:
            logits = logits + head.bias
        logps = logits.log_softmax(-1)
        token = draw(logits, temperature, top_p, generator)
        logp = logps.gather(-1, token[:, None])[:, 0]
        entropy = -(logps.exp() * logps).sum(-1)
        self.drawn.copy_(torch.stack([token.to(logp.dtype), logp, entropy]))
        self.token.copy_(token)
        self.at += 1

    def decode(self, steps: int, temperature: float, top_p: float, generator):
        """Draw `steps` tokens in each lane: tokens, log-probs and entropies, lists (steps, B). On
        CUDA a step, a thousand kernels, is recorded once and then launched as one."""
        seen = self.room if self.recorded else max(self.length) + steps
        self.at.copy_(torch.tensor(self.length))
        self.token.copy_(torch.tensor([tokens[-1] for tokens in self.new]))
        step = functools.partial(self.step, seen, temperature, top_p, generator)
        drawn = []
        for _ in range(steps):
            if self.graph is not None:
                self.graph.replay()
            else:
                step()  # once as it is: what a first call sets up cannot be recorded
            if self.recorded and self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                if generator is not None:
                    self.graph.register_generator_state(generator)
                with torch.cuda.graph(self.graph):
                    step()  # this runs nothing; each replay() runs it all
            drawn.append(self.drawn.clone())
        tokens, logps, entropies = torch.stack(drawn, 1)
        return tokens.long().tolist(), logps.tolist(), entropies.tolist()

    def store(self, b: int) -> None:
        """Copy what lane b computed to its nodes, from which a later branch starts."""
        start, path = 0, self.grid[b].path()
        for node in path[1:] or path:  # a root, while its prompt is computed, is in a lane itself
            end = min(start + len(node.tokens), self.length[b])
            if node.cached < end - start:
                node.kv = self.own[:, :, :, b, start:end].clone()
            start = end


def gather_kv(model, paths: list[list[Node]], room: int) -> Tensor:
    """What nodes hold, path by path, then zeros: (layers, 2, KV heads, paths, room, head size)."""
    c = model.config
    D = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    shape = (c.num_hidden_layers, 2, c.num_key_value_heads, len(paths), room, D)
    kv = torch.zeros(shape, dtype=model.dtype, device=model.device)
    for i, path in enumerate(paths):
        start = 0
        for node in path:
            if node.cached:
                kv[:, :, :, i, start : start + node.cached] = node.kv
                start += node.cached
    return kv


@torch.inference_mode()
def compute(model, nodes: list[Node]) -> list[Node]:
    """The keys and values of prompts (roots, or nodes below computed roots) but for the last token
    of each, which each branch runs itself. Returns those for which it was not done yet."""
    missing = [node for node in dict.fromkeys(nodes) if node.kv is None]
    for part in alike(missing, lambda node: len(node.tokens)):
        lanes = Lanes(model, part)
        lanes.catch_up()
        for b, node in enumerate(lanes.grid):
            if node:
                lanes.store(b)
    return missing


def draw(logits: Tensor, temperature: float, top_p: float, generator) -> Tensor:
    """One token per row of logits (B, V): temperature first (0: the largest), then top-p, the
    fewest tokens, the likeliest first, that together have so much. Returns (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    first = token = draw_index(probs, generator)
    if top_p >= 1:
        return token[:, 0]
    # No sort of the vocabulary: a token outside the nucleus is drawn again among those before it.
    # That happens k times, k being a Poisson variable of mean -log(top_p) or less. Under 1e-9 are
    # the chances that a token needs more rounds than there are below, and that more than `most` of
    # the rows need any, each with a chance of 1 - top_p at most.
    word = torch.arange(logits.shape[-1], device=logits.device)
    recording = logits.is_cuda and torch.cuda.is_current_stream_capturing()
    for i in range(7 - int(6 * math.log(top_p))):
        p = probs.gather(-1, token)
        before = (probs > p) | (probs == p) & (word < token)
        likelier = probs.where(before, 0)
        outside = likelier.sum(-1, keepdim=True) >= top_p
        if not recording and not outside.any():  # while it records nothing can be asked for
            break
        if recording and i == 0:
            mean = len(probs) * (1 - top_p)
            most = min(len(probs), int(mean + 7 * mean**0.5) + 14)
            rows = outside[:, 0].int().topk(most).indices
            probs, likelier, outside, token = (x[rows] for x in (probs, likelier, outside, token))
        token = torch.where(outside, draw_index(likelier, generator), token)
    if recording:
        token = first.index_copy(0, rows, token)
    return token[:, 0]


def draw_index(weights: Tensor, generator) -> Tensor:
    """An index of each row of weights (B, V), drawn in proportion, (B, 1), by one or two random
    numbers; torch.multinomial would draw V of them."""
    exact = torch.float32 if weights.device.type == "mps" else torch.float64  # mps has no other
    V = weights.shape[-1]
    size = math.gcd(V, 512)
    if V > 4096 and size > 1:  # first a block of words: a running sum over all of them is slow
        blocks = weights.unflatten(-1, (-1, size))
        block = draw_index(blocks.sum(-1), generator)
        inside = blocks.take_along_dim(block[:, :, None], 1)[:, 0]
        return size * block + draw_index(inside, generator)
    ends = weights.cumsum(-1, dtype=exact)
    at = torch.rand(len(ends), 1, dtype=exact, device=ends.device, generator=generator)
    return torch.searchsorted(ends, ends[:, -1:] * at, right=True).clamp(max=ends.shape[-1] - 1)


@torch.inference_mode()
def sample(
    model, nodes: list[Node], limits, stop, eos, generator, temperature, top_p, counts, keep=True
) -> None:
    """Continue the path of each (new, empty) node, all together, until a token of the set eos,
    until stop(tokens) is true, or to its limit >= 1. Branches share what is above them; what of it
    was not run yet goes in first. keep: may something begin below the nodes later? Then they keep
    their keys and values. counts, a Counter, gets more forwarded_tokens (run; a node's last one is
    not counted), generated_tokens and entropy (their sum, in nats). FloatingPointError if a
    log-prob is not finite."""
    look = LOOK.get(model.device.type, 1)
    roots = compute(model, [node.path()[0] for node in nodes])
    lanes = Lanes(model, nodes)
    counts["forwarded_tokens"] += length(roots) - len(roots)
    counts["forwarded_tokens"] += sum(len(new) for new, node in zip(lanes.new, lanes.grid) if node)
    lanes.catch_up()
    limit = dict(zip(nodes, limits))
    live = [b for b, node in enumerate(lanes.grid) if node]
    while live:
        # New lanes if there is no room, or if most of them idle; to record a step costs more.
        rows = Counter(b // lanes.W for b in live)
        share = len(rows) * max(rows.values()) / len(lanes.grid)
        if max(lanes.length) + look > lanes.room or share <= (0.5 if lanes.recorded else 0.75):
            nodes = [lanes.grid[b] for b in live]
            for b in live:
                lanes.store(b)
            lanes = None  # its memory is free before the new ones take theirs
            lanes = Lanes(model, nodes)
            forget(nodes)
            live = [b for b, node in enumerate(lanes.grid) if node]
        tokens, logps, entropies = lanes.decode(look, temperature, top_p, generator)
        if not math.isfinite(sum(map(sum, logps))):
            raise FloatingPointError("the policy's logits are not finite")
        going = []
        for b in live:
            node, over, i = lanes.grid[b], False, 0
            while i < look and not over:  # what was drawn after the end is dropped
                node.tokens.append(tokens[i][b])
                node.logps.append(logps[i][b])
                counts["entropy"] += entropies[i][b]
                ended = tokens[i][b] in eos or stop(node.tokens)
                over = ended or len(node.tokens) >= limit[node]
                i += 1
            counts["generated_tokens"] += i
            counts["forwarded_tokens"] += i - over
            lanes.length[b] += i
            lanes.new[b] = node.tokens[-1:]
            if over and keep:
                lanes.store(b)
            if over:
                lanes.length[b], lanes.new[b] = 0, [0]  # the lane idles from now on
            else:
                going.append(b)
        live = going


# ---------------------------------------------------------------------------- engine: training
class Group(NamedTuple):
    """The sequences of one prompt, from the root to each leaf, and their part of the loss."""

    root: Node
    leaves: list[Node]
    advantages: Tensor  # (leaves, 1), or (leaves, length): one per sampled token, padded
    weight: float  # of the sum over the leaves: Eq. 8's 1 / G, over the prompts of the step


def buckets_of(segments: list[tuple[int, list[int]]]) -> tuple[list, list[int]]:
    """Segments, (tokens, path), into buckets of like length, one attention call for each. A path is
    the places in the row of all tokens from the root on, the segment's own last. Returns of each
    bucket (queries, keys), the places of the tokens of its segments and of their paths, padded; and
    of each token of the row the number of its query, counted through all buckets."""
    buckets, number, count = [], [0] * sum(own for own, _ in segments), 0
    for bucket in alike(segments, lambda segment: segment[0]):
        width = bucket[-1][0]
        for own, path in bucket:
            number[path[-own] : path[-1] + 1] = range(count, count + own)
            count += width
        queries = [path[-own:] + path[-1:] * (width - own) for own, path in bucket]
        keys = padded([path for _, path in bucket], multiple=8)  # CUDA wants such masks
        buckets.append((queries, keys))
    return buckets, number


class Packed:
    """The trees of groups as one row of their unique tokens, on a device. A node's queries see the
    keys of its path, which are gathered: slot j of a path holds the token at position j, so a query
    sees the slots up to its own position. paths: of each group, (leaves, length), where in the
    log-probs those of a leaf's sampled tokens are, and a mask."""

    def __init__(self, groups: list[Group], device):
        on_device = functools.partial(torch.tensor, dtype=torch.long, device=device)
        tokens, position, segments, read, target, logps = [], [], [], [], [], []
        path_of, logps_of = {}, {}  # node -> its path, and where its log-probs are
        for root, its_groups in itertools.groupby(groups, lambda group: group.root):
            kept = {node for group in its_groups for leaf in group.leaves for node in leaf.path()}
            for node in root.below():
                if node not in kept:
                    continue
                above, n, drawn = path_of.get(node.parent, []), len(node.tokens), len(node.logps)
                own = list(range(len(tokens), len(tokens) + n))
                path = path_of[node] = above + own
                logps_of[node] = range(len(logps), len(logps) + drawn)
                tokens += node.tokens
                position += range(len(above), len(above) + n)
                read += path[-n - 1 : -1][:drawn]  # the token before predicts each of them
                target += node.tokens[:drawn]
                logps += node.logps
                if n:
                    segments.append((n, path))
        buckets, number = buckets_of(segments)
        self.groups = groups
        self.ids, self.position = on_device([tokens]), on_device([position])
        self.read, self.target, self.number = map(on_device, (read, target, number))
        self.sampler_logps = torch.tensor(logps, device=device)
        self.old_logps = self.ref_logps = None  # the trainer's and the reference's, before a step
        self.buckets = [(on_device(queries), on_device(keys)) for queries, keys in buckets]
        self.paths = []
        for group in groups:
            rows = [[i for n in leaf.path() for i in logps_of[n]] for leaf in group.leaves]
            places = on_device(padded(rows, -1))
            self.paths.append((places.clamp(min=0), places >= 0))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q: (1, h g, tokens, D), k and v: (1, h, tokens, D). Returns (1, tokens, h g, D)."""
        heads, D, h, dtype = q.shape[1], q.shape[3], k.shape[1], v.dtype
        # A token's gradients from all segments below it are summed in float32, and by index_select,
        # whose backward adds in a fixed order on a CPU; that of x[keys] does not.
        q, k, v = (full_precision(x[0].transpose(0, 1)) for x in (q, k, v))  # (tokens, ., D)
        out = []
        for queries, keys in self.buckets:
            (segments, width), P = queries.shape, keys.shape[1]
            qs = q.index_select(0, queries.flatten()).view(segments, width, h, -1, D)
            qs = qs.movedim(1, 3).reshape(segments, h, -1, D).to(dtype)  # (segments, h, g width, D)
            ks, vs = (x.index_select(0, keys.flatten()).view(segments, P, h, D) for x in (k, v))
            ks, vs = ks.transpose(1, 2).to(dtype), vs.transpose(1, 2).to(dtype)
            visible = torch.arange(P, device=q.device) <= self.position[0, queries][:, :, None]
            mask = visible.repeat(1, heads // h, 1)[:, None]  # (segments, 1, g width, P)
            o = F.scaled_dot_product_attention(qs, ks, vs, mask, scale=scaling)
            out.append(o.view(segments, h, -1, width, D).movedim(3, 1).reshape(-1, heads, D))
        return torch.cat(out).index_select(0, self.number)[None]


def packed_logps(model, packed: Packed) -> Tensor:
    """Log-prob at temperature 1 of each sampled token of packed trees, (tokens,), in their order;
    packed.paths tells where each leaf's are. One forward over unique tokens. The head runs only
    where a sampled token is predicted, in chunks that the backward pass computes again, so that
    (tokens, vocabulary) logits never exist at once."""
    how = {"position_ids": packed.position, "use_cache": False, "attend": packed.attend}
    out = model.model(packed.ids, **how)

    def logps(hidden, target):
        logits = full_precision(model.lm_head(hidden))
        return -F.cross_entropy(logits, target, reduction="none")

    rows = max(1, 2**26 // model.config.vocab_size)
    hidden = out.last_hidden_state[0].index_select(0, packed.read)
    chunks = list(zip(hidden.split(rows), packed.target.split(rows)))
    if len(chunks) == 1:
        return logps(*chunks[0])
    again = functools.partial(torch.utils.checkpoint.checkpoint, logps, use_reentrant=False)
    return torch.cat([again(*chunk) for chunk in chunks])


def micro_batches(groups: list[Group], max_tokens: int) -> list[list[Group]]:
    """Consecutive groups that are packed into at most max_tokens tokens, or a larger one alone."""
    parts, packed = [], set()
    for group in groups:
        nodes = {node for leaf in group.leaves for node in leaf.path()}
        if not parts or length(packed | nodes) > max_tokens:
            parts.append([])
            packed = set()
        parts[-1].append(group)
        packed |= nodes
    return parts


def batch_loss(packed: Packed, logps: Tensor, args) -> tuple[Tensor, dict]:
    """The loss of packed groups from the trainer's log-probs, and sums of grpo_loss's stats."""
    loss, sums = 0.0, Counter()
    limits = args.clip_low, args.clip_high, args.kl_coef
    for group, (index, mask) in zip(packed.groups, packed.paths):
        x = []
        for values in (logps, packed.old_logps, packed.ref_logps):
            found = None if values is None else values.index_select(0, index.flatten())
            x.append(found if found is None else found.view_as(index))
        part, stats = grpo_loss(*x, group.advantages.to(logps), mask, *limits)
        loss = loss + group.weight * part
        for name, value in stats.items():
            sums[name] += value
    return loss, sums


# ----------------------------------------------------------------------------- engine: several GPUs
# torchrun starts RANKS processes, each with a share of the prompts. Rank 0 writes and prints.
RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def together(collective: str, *values) -> None:
    """One of torch.distributed's functions, which all ranks call at the same time."""
    try:
        getattr(torch.distributed, collective)(*values)
    except RuntimeError as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)  # torchrun has ended this by then, if another rank failed and said why
        raise ConnectionError(f"torch.distributed: {error}") from None


def over_ranks(counts: dict) -> Counter:
    """Sums of numbers over all ranks, for which this waits."""
    found, total = [counts] * RANKS, Counter()
    if RANKS > 1:
        together("all_gather_object", found, counts)
    for part in found:
        total.update(part)
    return total


def sum_gradients(model) -> None:
    """Sums gradients over all ranks in one all-reduce; a rank without any adds zeros."""
    gradients = []
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.nn.utils.parameters_to_vector(gradients)
    together("all_reduce", flat)
    torch.nn.utils.vector_to_parameters(flat, gradients)


def update(model, reference, optimizer, groups: list[Group], args) -> dict[str, float | None]:
    """One GRPO step per epoch on a batch. Returns loss, kl (None: no reference), clip_fraction,
    grad_norm, and sampler_gap, the mean distance of the sampler's log-probs from the trainer's
    (None: no step). FloatingPointError before a step would break the weights."""
    if not args.kl_coef:  # without KL a prompt whose advantages are all 0 has no gradient
        groups = [group for group in groups if group.advantages.any()]
    parts = [Packed(part, model.device) for part in micro_batches(groups, args.micro_tokens)]
    sums = Counter()
    autocast = functools.partial(torch.autocast, model.device.type, torch.bfloat16)
    model.train()  # gradient checkpointing asks for it; a Qwen has no dropout
    for _ in range(args.epochs if over_ranks({"parts": len(parts)})["parts"] else 0):
        for packed in parts:
            with autocast(enabled=args.dtype == "bfloat16"):
                logps = packed_logps(model, packed)
                if packed.old_logps is None:  # no step taken yet, so these are the old policy's
                    packed.old_logps = logps.detach()
                    sums["gap"] += (packed.old_logps - packed.sampler_logps).abs().sum()
                    if reference is not None:
                        with torch.no_grad():
                            packed.ref_logps = packed_logps(reference, packed)
            loss, stats = batch_loss(packed, logps, args)
            loss.backward()
            for name, value in (stats | {"loss": loss.detach() / args.epochs}).items():
                sums[name] += value
        if RANKS > 1:
            sum_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        sums["norm"] += norm / args.epochs / RANKS
        if not math.isfinite(sums["loss"] + norm):
            raise FloatingPointError(f"loss {sums['loss']:g}, gradient norm {norm:g}")
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    sums["drawn"] = sum(len(packed.target) for packed in parts)
    sums = over_ranks({name: float(value) for name, value in sums.items()})
    tokens = max(1, sums["tokens"])
    row = {"loss": sums["loss"], "kl": None, "grad_norm": sums["norm"], "sampler_gap": None}
    row["clip_fraction"] = sums["clipped"] / tokens
    if reference is not None:
        row["kl"] = sums["kl"] / tokens
    if sums["drawn"]:
        row["sampler_gap"] = sums["gap"] / sums["drawn"]
    return row


# ------------------------------------------------------------------------------ rollouts in a world
class Step(NamedTuple):
    transition: Transition
    node: Node  # the action
    reward: float
    valid: bool


@dataclass
class Task:
    """K rollouts of a task, and the tree of their tokens: at the root what all prompts begin with,
    below it each distinct rest of a prompt, below that the actions taken there."""

    text: str
    root: Node
    returns: list[float]  # of each rollout, and whether it was successful
    won: list[bool]
    steps: list[Step] = field(default_factory=list)  # in time
    envs: list = field(default_factory=list)  # of each rollout its world, the state of it,
    states: list = field(default_factory=list)
    told: list[list[str]] = field(default_factory=list)  # and what was seen and done; seen last
    prompts: dict[tuple, Node] = field(default_factory=dict)  # by the tokens of the rest


def take(env, action: str) -> tuple[str, float, bool, bool, bool, object]:
    """A step of a world: what is seen, the reward, terminated, truncated, was it an action, and the
    state. ValueError, or what the world raises, if it is none."""
    seen, reward, terminated, truncated, info = env.step(action)
    seen, reward, state = str(seen), float(reward), info.get("state", seen)
    hash(state)
    if not math.isfinite(reward):
        raise ValueError(f"a reward of {reward}")
    return seen, reward, bool(terminated), bool(truncated), bool(info.get("valid", True)), state


class Player:
    """The policy in a world: rollouts of many tasks at a time.

    A world has Gymnasium's shape, with texts. reset(seed, options) -> observation, info: the seed
    decides on the task; options["held_out"]: one never trained on. step(action) -> observation,
    reward, terminated, truncated, info: terminated is success if reward > 0, else failure.
    info["task"], from reset: what to do. info["state"]: a text, equal where states are (default:
    the observation). info["valid"], from step: was it an action (default: yes)? `instruction`: told
    to a chat model before the task. `threads`: how many of its worlds may be asked at a time
    (default: 1). For the tiny model: `words`, of one token each, and demonstrate(rng), an action.
    """

    def __init__(self, model, tokenizer, args, make_env):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.make_env, self.envs = make_env, [make_env()]
        threads = getattr(self.envs[0], "threads", 1)
        self.side_by_side = ThreadPoolExecutor(threads).map if threads > 1 else map
        self.eos = end_tokens(model, tokenizer)
        self.encode = functools.lru_cache(100_000)(functools.partial(encode, tokenizer))
        self.before, self.after = chat_template(tokenizer, args)
        if tokenizer.chat_template:
            self.before += getattr(self.envs[0], "instruction", "")

    def begin(self, seeds, K: int, held_out: bool) -> list[Task]:
        """Each seed's task, begun in K worlds."""
        with blame("--env"):
            self.envs += [self.make_env() for _ in range(len(seeds) * K - len(self.envs))]

        def reset(i: int):
            how = {"seed": seeds[i // K], "options": {"held_out": held_out}}
            try:
                return self.envs[i].reset(**how)
            except (Exception, SystemExit) as error:  # noqa: BLE001 (in any way)
                return self.replace(self.envs[i], f"at reset: {error!r}").reset(**how)

        tasks = []
        with blame("--env: reset()"):
            begun = list(self.side_by_side(reset, range(len(seeds) * K)))
            for own, envs in zip(batches(begun, K), batches(self.envs, K)):
                starts = {(info["task"], info.get("state", seen)) for seen, info in own}
                if len(starts) > 1:
                    raise ValueError(f"one seed begins in several ways: {starts}")
                text, state = starts.pop()
                root = Node(tokens=encode(self.tokenizer, f"Task: {text}\n", self.before))
                told = [[str(seen)] for seen, _ in own]
                at_start = [0.0] * K, [False] * K, [], envs, [state] * K, told
                tasks.append(Task(text, root, *at_start))
        return tasks

    def prompt(self, task: Task, k: int) -> Node:
        """A rollout's prompt: below the instruction and the task its last --history observations
        and actions, its observation, and the end of the chat template; cut from the left to fit."""
        tail = self.encode("", after=f"\n{self.after}")
        context = self.model.config.max_position_embeddings
        room = context - len(task.root.tokens) - len(tail) - self.args.max_tokens
        if room < 1:
            raise BadInput(f"--model: a context of {context} tokens is too short")
        rest = self.encode("".join(task.told[k][-1 - self.args.history :]))[-room:] + tail
        if tuple(rest) not in task.prompts:
            task.prompts[tuple(rest)] = Node(task.root, rest)
        return task.prompts[tuple(rest)]

    def action(self, node: Node) -> str:
        """What the policy wants to do: what it wrote between the last <action> tags, or else in its
        last line."""
        text = self.tokenizer.decode(node.tokens, skip_special_tokens=True).strip()
        tagged = re.findall(r"<action>(.*?)</action>", text, re.DOTALL)
        return " ".join((tagged or text.split("\n"))[-1].split())

    def act(self, live: list[tuple[Task, int]], generator, temperature: float, counts: Counter):
        """The next action of each rollout, a node below its prompt."""
        prompts = [self.prompt(task, k) for task, k in live]
        nodes = [Node(prompt) for prompt in prompts]
        counts["prompt_tokens"] += sum(length(node.path()[:-1]) for node in nodes)
        # A prompt is computed once for all its actions.
        roots = compute(self.model, [prompt.parent for prompt in prompts if prompt.kv is None])
        new = compute(self.model, prompts)
        counts["prompt_tokens_sampling"] += length(roots + new)
        counts["forwarded_tokens"] += length(roots + new) - len(roots)
        limits = [self.args.max_tokens] * len(nodes)
        draws = generator, temperature, 1.0, counts
        sample(self.model, nodes, limits, lambda tokens: False, self.eos, *draws, keep=False)
        return nodes

    def play(self, seeds, K: int, generator, temperature: float, counts: Counter, held_out=False):
        """K rollouts of each seed's task, in waves of one step each. What is computed of a prompt
        is kept for when it is met again, up to --kept-tokens. Returns the tasks."""
        tasks = self.begin(seeds, K, held_out)
        live = [(task, k) for task in tasks for k in range(K)]
        for _ in range(self.args.max_steps):
            if not live:
                break
            nodes = self.act(live, generator, temperature, counts)
            counts["env_steps"] += len(live)
            actions = [self.action(node) for node in nodes]
            outcomes = self.side_by_side(self.ask, live, actions)
            taken = zip(live, nodes, actions, outcomes)
            live = [(task, k) for (task, k), *step in taken if self.step(task, k, *step, counts)]
            forget(nodes)
            kept = [node for task in tasks for node in task.root.children if node.cached]
            if length(kept) > self.args.kept_tokens:
                forget(kept)
        forget(node for task in tasks for node in task.root.below())
        return tasks

    def ask(self, rollout: tuple[Task, int], action: str):
        """The outcome of a rollout's action in its world; if it fails, its error."""
        task, k = rollout
        try:
            return take(task.envs[k], action)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (in any way)
            return error

    def replace(self, env, error: str):
        """Another world for one that fails."""
        tqdm.write(f"the world failed {error}", file=sys.stderr)
        place = next(i for i, other in enumerate(self.envs) if other is env)
        with blame("--env"):
            self.envs[place] = self.make_env()
        return self.envs[place]

    def step(self, task: Task, k: int, node: Node, action: str, outcome, counts) -> bool:
        """What follows from a rollout's action. Does it go on? Not where the world failed, which
        counts as a valid step that changes nothing and earns 0."""
        before = task.states[k]
        if isinstance(outcome, BaseException):
            self.replace(task.envs[k], f"at {action!r}: {outcome!r}")
            outcome = "", 0.0, False, True, True, before
            counts["world_errors"] += 1
        seen, reward, terminated, truncated, valid, state = outcome
        task.returns[k] += reward
        task.won[k] = terminated and reward > 0
        after = state
        if terminated:  # no way leads on from there
            after = SUCCESS if task.won[k] else f"{state} (failed)"
        task.steps.append(Step(Transition(before, action, after, k), node, reward, valid))
        task.states[k] = state
        task.told[k][-1] += f"\n> {action}\n"
        task.told[k].append(seen)
        return not (terminated or truncated)

    def evaluate(self) -> dict[str, float | None]:
        """Success on held-out tasks, sampled (K times each, temperature 1) and greedy; and of the
        sampled rollouts, if any succeeded, how many steps of failed ones lead nearer to success,
        and of the others do not (Figure 1)."""
        steps = Counter()  # (of a successful rollout?, did it lead nearer?) -> how many
        for name, K, temperature in (("success", self.args.K, 1.0), ("greedy_success", 1, 0.0)):
            generator = torch.Generator(self.model.device).manual_seed(RANK)
            parts = batches(range(self.args.eval_tasks)[RANK::RANKS], self.args.tasks)
            for part in tqdm(parts, name, leave=False, delay=1):
                for task in self.play(part, K, generator, temperature, Counter(), held_out=True):
                    steps[name] += sum(task.won)
                    if name == "success" and any(task.won):
                        d = goal_distances([step.transition for step in task.steps])
                        for t, *_ in task.steps:
                            steps[task.won[t.trajectory], d[t.next_state] < d[t.state]] += 1
        steps = over_ranks(steps)
        n = self.args.eval_tasks
        row = {"success": steps["success"] / n / self.args.K}
        row["greedy_success"] = steps["greedy_success"] / n
        failed, successful = (steps[won, True] + steps[won, False] for won in (False, True))
        row["progress_in_failed"] = steps[False, True] / failed if failed else None
        row["waste_in_successful"] = steps[True, False] / successful if successful else None
        if RANK == 0:
            text = f"A held-out one, greedy: {task.text} Reward {task.returns[0]:g}."
            text += f"\n\n~~~~text\n{''.join(task.told[0])}\n~~~~\n"
            Path(self.args.out, "episode.md").write_text(text, "utf-8", "replace")
        return row


# ---------------------------------------------------------------------------------- models and runs
ENVS = Path(__file__).resolve().parent / "envs"


@contextlib.contextmanager
def blame(what: str):
    """Whatever fails in here becomes a BadInput, which says `what` and why."""
    try:
        yield
    except (Exception, SystemExit) as error:  # noqa: BLE001 (files of users fail in any way)
        plain = isinstance(error, (ValueError, OSError, ImportError))
        reason = str(error) if plain else f"{type(error).__name__}: {error}"
        raise BadInput(f"{what}: {reason[:300]}") from None


def load_named(flag: str, spec: str):
    """FILE.py:NAME[:TEXT] -> what the file calls NAME, and [TEXT]; it may import its neighbours."""
    path, _, name = spec.partition(".py:")
    name, *text = name.split(":", 1)
    path = Path(f"{path}.py").resolve()
    sys.path.insert(0, str(path.parent))
    with blame(f"{flag} {spec}: want FILE.py:NAME"):
        found = importlib.util.spec_from_file_location(f"file_{path.stem}", path)
        module = sys.modules[found.name] = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return getattr(module, name), text


def load_beside(file: str, name: str):
    """What a file of envs/ has for this script; None where the script was copied without it."""
    path = ENVS / file
    return load_named("--env", f"{path}:{name}")[0] if path.exists() else None


def encode(tokenizer, text: str, before: str = "", after: str = "") -> list[int]:
    """The tokens of a text, with what a chat template writes before and after it. Where the text
    names control tokens, as <|im_end|>, these are mere letters."""

    def tokens(text, split):
        text = text.encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair
        return tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]

    if tokens(text, True) == tokens(text, False):
        return tokens(before + text + after, False)
    return tokens(before, False) + tokens(text, True) + tokens(after, False)


def chat_template(tokenizer, args) -> tuple[str, str]:
    """What the model's chat template, if it has one, writes before and after a user's turn."""
    if not tokenizer.chat_template and not args.system and args.template_kwargs == "{}":
        return "", ""
    chat = [{"role": "system", "content": args.system}] if args.system else []
    chat.append({"role": "user", "content": "\0"})
    with blame("--system, --template-kwargs: the chat template fails"):
        how = {"add_generation_prompt": True, "tokenize": False, **json.loads(args.template_kwargs)}
        before, _, after = tokenizer.apply_chat_template(chat, **how).partition("\0")
    return before, after


def end_tokens(model, tokenizer) -> set[int]:
    """The tokens that end a text, or a turn of a chat."""
    eos = model.generation_config.eos_token_id
    known = eos if isinstance(eos, list) else [eos]
    return {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>"), *known}


KINDS = ("glm4", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3")


def load_model(path: str, device: torch.device, flag: str = "--model"):
    """A causal LM of KINDS (those that tests compare with plain forwards) and its tokenizer, from a
    hub id or a folder. BadInput, which blames `flag`, for others, and if weights do not fit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    how = {"dtype": torch.float32, "attn_implementation": "token_tree", "output_loading_info": True}
    with blame(f"{flag} {path}: no model that can be used"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, info = AutoModelForCausalLM.from_pretrained(path, **how)
        if not tokenizer("a")["input_ids"]:
            raise ValueError("the tokenizer is missing")
        if wrong := {name: sorted(map(str, keys))[:2] for name, keys in info.items() if keys}:
            raise ValueError(f"its weights do not fit: {wrong}")
        c = model.config
        layers = {*(getattr(c, "layer_types", None) or ["full_attention"])}
        if getattr(c, "sliding_window", None):
            layers.add("sliding_attention")
        if c.model_type not in KINDS or layers != {"full_attention"}:
            wanted = f"one of {', '.join(KINDS)} that attends to everything before"
            raise ValueError(f"it is {c.model_type} with {', '.join(sorted(layers))}, not {wanted}")
    for parameter in model.parameters():  # a copy: what is mapped to a file, Windows locks
        parameter.data = parameter.data.clone()
    return model.to(device).eval(), tokenizer


def quiet_transformers() -> None:
    from huggingface_hub.utils import enable_progress_bars
    from transformers import AttentionInterface, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()  # of downloads, which the line above switches off as well
    AttentionInterface.register("token_tree", token_tree)


def policy_and_reference(args, model, start: str):
    """The model that samples, on CUDA a copy in bfloat16, else `model` itself; and the KL term's
    reference, the model of the folder or hub id `start`, or None."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans, up to a second, for every new shape
    if args.grad_checkpointing:  # called activation checkpointing by newer versions of transformers
        old_name = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
    reference = load_model(start, model.device)[0].requires_grad_(False) if args.kl_coef else None
    if args.dtype == "float32":
        return model, reference
    policy = copy.deepcopy(model)
    for parameter in policy.parameters():  # not the buffers: RoPE needs float32
        parameter.data = parameter.data.to(torch.bfloat16)
    for norm in policy.modules():
        if type(norm).__name__.endswith("RMSNorm"):  # one kernel in place of seven
            how = {"weight": norm.weight, "eps": norm.variance_epsilon}
            norm.forward = functools.partial(F.rms_norm, normalized_shape=norm.weight.shape, **how)
    return policy, reference


def resume_run(args, given: set[str]):
    """--resume -> arguments (the run's but for those given), newest checkpoint's folder, state."""
    fixed = {"model", "env", "data", "method", "out", "eval_prompts", "skip_bad_records"}
    if own := ", ".join(sorted(given & fixed)):
        raise BadInput(f"--resume: leave out {own}; a run that is continued keeps its own")
    with blame(f"--resume {args.resume}: no run to continue"):
        newest = max(Path(args.resume).glob("checkpoint-*/state.pt"), default=None)
        if newest is None:
            raise ValueError("there is no checkpoint in it")
        state = torch.load(newest, weights_only=True, map_location="cpu")
        if state["script"] != Path(__file__).name:
            raise ValueError(f"it is a run of {state['script']}")
        kept = {name: value for name, value in state["args"].items() if name not in given}
        return dataclasses.replace(args, **kept | {"out": args.resume}), str(newest.parent), state


def save_model(folder: Path, model, tokenizer, state: dict | None = None) -> None:
    if RANK:
        return
    with blame(f"--out {folder.parent}: cannot save, is the disk full? --resume goes on"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if state:
            torch.save(state, folder / "state.pt")


def save_checkpoint(out: Path, step: int, model, tokenizer, optimizer, args) -> None:
    """Renamed when whole. Random states and the place in the data follow from `step`."""
    if RANK:
        return
    folder, temporary = out / f"checkpoint-{step:06d}", out / "checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    state = {"script": Path(__file__).name, "step": step, "args": vars(args)}
    state |= {
        "metrics": (out / "metrics.jsonl").stat().st_size,
        "optimizer": optimizer.state_dict(),
    }
    save_model(temporary, model, tokenizer, state)
    temporary.rename(folder)
    for old in set(out.glob("checkpoint-*")) - {folder}:
        shutil.rmtree(old)


def open_log(args, size: int):
    """log(event, step, row) adds to metrics.jsonl, cut to its first `size` bytes, and to --log."""
    if RANK:
        return lambda event, step, row: None
    file = open(Path(args.out, "metrics.jsonl"), "a", encoding="utf-8")
    file.truncate(size)
    tracker = importlib.import_module(args.log) if args.log else None
    if tracker:
        tracker.init(project=Path(__file__).stem, name=args.out, config=vars(args))

    def log(event: str, step: int, row: dict) -> None:
        row = {"event": event, "step": step, **row}
        print(json.dumps(row), file=file, flush=True)
        if tracker:
            tracker.log(row, step=step)
        if event == "eval":
            shown = f"{row['success']:.3f} sampled, {row['greedy_success']:.3f} greedy"
            tqdm.write(f"step {step}: held-out success {shown}")

    return log


def catch_signals() -> list:
    """The first Ctrl-C or SIGTERM from now on is put on this list; a second ends the process."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("stopping after this step", file=sys.stderr)

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return caught


# -------------------------------------------------------------------------------- command line
class BadInput(ValueError):
    """What the user gave cannot be used: the script prints this as one line and exits with 2."""


def arg(default, help: str, choices: tuple | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Args:
    model: str = arg("", "hub id or folder of a Qwen (default: a tiny one, built here)")
    env: str = arg("", "a world, FILE.py:NAME[:TEXT] (default: envs/house.py:House)")
    system: str = arg("", "a system prompt for a chat model")
    template_kwargs: str = arg("{}", "JSON for its chat template: '{\"enable_thinking\": false}'")
    method: str = arg("graph_gpo", "credit of a step", choices=("graph_gpo", "gigpo", "grpo"))
    K: int = arg(8, "rollouts per task")
    omega: float = arg(0.1, "graph_gpo: what one more unit of cost leaves of a reward")
    gamma: float = arg(0.95, "gigpo: discount of rewards per step")
    beta_graph: float = arg(1.0, "weight of the step term, A_G (or gigpo's)")
    beta_episode: float = arg(1.0, "weight of the episode term, A_E")
    invalid_penalty: float = arg(0.1, "taken from the advantage of an invalid action")
    max_steps: int = arg(25, "environment steps per rollout")
    history: int = arg(0, "earlier observations and actions in a prompt")
    steps: int = arg(60, "training steps")
    tasks: int = arg(16, "tasks per step")
    epochs: int = arg(1, "gradient steps per batch")
    lr: float = arg(0.0, "learning rate (default: 1e-6 with --model, 5e-4 without)")
    warmup: int = arg(10, "steps of linear learning rate warm-up")
    clip_low: float = arg(0.2, "the ratio, which is 1 with --epochs 1, is clipped below 1 - this")
    clip_high: float = arg(0.2, "the ratio is clipped above 1 + this")
    kl_coef: float = arg(0.01, "beta, weight of the KL to the starting model (0: none)")
    temperature: float = arg(1.0, "of the draws in training")
    max_tokens: int = arg(0, "most tokens of an answer (default: 512 with --model, 8 without)")
    sft_steps: int = arg(300, "supervised steps that warm-start the tiny model")
    eval_tasks: int = arg(32, "held-out tasks, each with K rollouts and a greedy one")
    eval_every: int = arg(0, "steps between evaluations (0: before and after only)")
    save_every: int = arg(10, "steps between checkpoints")
    kept_tokens: int = arg(200_000, "most tokens of prompts kept for when they are met again")
    micro_tokens: int = arg(16384, "most tokens per forward")
    grad_checkpointing: bool = arg(False, "recompute activations: less memory, more time")
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = arg("auto", "auto: bfloat16 on CUDA", choices=("auto", "float32", "bfloat16"))
    seed: int = arg(0, "of everything random")
    log: str = arg("", "log to trackio or wandb as well", choices=("trackio", "wandb"))
    out: str = arg("", "folder to write (default: one in runs/)")
    resume: str = arg("", "folder of a run to continue (--steps, --lr ... may be changed)")


# Names of arguments of all three scripts.
MAY_BE_0 = "N L steps warmup sft_steps clip_low clip_high kl_coef gamma".split()
MAY_BE_0 += "beta_graph beta_episode invalid_penalty kept_tokens".split()
AT_MOST_1 = ("top_p", "omega", "gamma", "clip_low")


def parse_args(cls, argv: list[str]):
    """Command line -> (an instance of the dataclass `cls`, the set of names given)."""

    def fail(message):
        raise BadInput(f"{message} (--help lists the arguments)")

    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = fail
    for f in dataclasses.fields(cls):
        flag, shown = "--" + f.name.replace("_", "-"), f.metadata["help"]
        how = {"type": type(f.default), "choices": f.metadata["choices"]}
        if f.default is False:
            how = {"action": "store_true"}
        elif f.default:
            shown += f" (default: {f.default})"
        parser.add_argument(flag, help=shown, **how)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        least = 0 if name in MAY_BE_0 or not getattr(cls, name) else 1e-12
        most = 1 if name in AT_MOST_1 else 1e15
        least = -most if name == "success" else least
        if isinstance(value, (int, float)) and not least <= value <= most:
            fail(f"--{name.replace('_', '-')} {value}: out of range")
    if "log" in given and not importlib.util.find_spec(given["log"]):
        fail(f"--log {given['log']}: pip install {given['log']}")
    return cls(**given), set(given)


def pick_device(args) -> torch.device:
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    best = cuda if torch.cuda.is_available() else "cpu"
    name = {"auto": best, "cuda": cuda}.get(args.device, args.device)
    if RANKS > 1 and args.device not in ("auto", "cuda", "cpu"):
        raise BadInput(f"--device {name}: torchrun gives each process a GPU of its own")
    with blame(f"--device {name}: not available here"):
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs and their random numbers are of the current one
    elif not args.model and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the tiny model gains little by two
    if RANKS > 1:
        backend, patience = "nccl" if device.type == "cuda" else "gloo", timedelta(hours=2)
        torch.distributed.init_process_group(backend, timeout=patience)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device


def make_folder(args) -> Path:
    now = time.strftime("%Y%m%d-%H%M%S")  # another run may begin in the same second
    args.out = args.out or f"runs/{Path(__file__).stem}-{now}-{os.getpid()}"
    if RANKS > 1:
        names = [args.out]
        together("broadcast_object_list", names)  # rank 0's
        args.out = names[0]
    out = Path(args.out)
    if RANK:
        return out
    with blame(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    if not args.resume and any(out.iterdir()):
        raise BadInput(f"--out {out}: is not empty; choose another folder, or --resume the run")
    return out


def main(argv: list[str]) -> None:
    args, given = parse_args(Args, argv)
    weights, state = args.model, None
    if args.resume:
        args, weights, state = resume_run(args, given)
    if not 0 < args.omega < 1:
        raise BadInput(f"--omega {args.omega}: give a number between 0 and 1")
    device = pick_device(args)
    args.lr = args.lr or (1e-6 if args.model else 5e-4)
    args.max_tokens = args.max_tokens or (512 if args.model else 8)
    spec = args.env or f"{ENVS}/house.py:House"
    world, text = load_named("--env", spec)
    with blame(f"--env {spec}"):
        make_env = functools.partial(world, *text)
        env = make_env()
        for held_out in (True, False):
            env.reset(seed=0, options={"held_out": held_out})[1]["task"]
            if hasattr(env, "demonstrate"):
                take(env, env.demonstrate(random.Random(0)))
    start = load_beside("tiny.py", "graph_gpo")
    if weights:
        model, tokenizer = load_model(weights, device, "--resume" if state else "--model")
        player = Player(model, tokenizer, args, make_env)
        player.prompt(player.begin([0], 1, True)[0], 0)  # raises BadInput if it does not fit
    elif not all([start, hasattr(env, "words"), hasattr(env, "demonstrate")]):
        raise BadInput("--model: needed without envs/, or if --env has no words, demonstrate()")
    out = make_folder(args)
    if not weights:
        model, tokenizer = start(sys.modules[__name__], args, make_env, device)
        save_model(out / "start", model, tokenizer)
        over_ranks({})  # the others wait for it
    policy, reference = policy_and_reference(args, model, args.model or str(out / "start"))
    player = Player(policy, tokenizer, args, make_env)
    tasks = f"tasks of {args.env or 'the house'}, {args.eval_tasks} held out"
    print(f"{model.num_parameters():,} parameters, {device}, {args.dtype}; {tasks}", flush=True)
    train(args, model, reference, player, state)


def cli(argv: list[str]) -> None:
    status, heard = 1, (sys.stdout, sys.stderr)
    if RANK:  # of other ranks only what stops them
        heard = [open(os.devnull, "w")] * 2
    try:
        with contextlib.redirect_stdout(heard[0]), contextlib.redirect_stderr(heard[1]):
            return main(argv)
    except BadInput as error:
        line, status = f"{Path(__file__).name}: {' '.join(str(error).split())}", 2
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        line = f"stopped: {error}; go on with --resume (a lower --lr, or less at once: --help)"
    except KeyboardInterrupt as stop:
        line, status = str(stop) or "stopped before the first step", 130
    if RANK:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)  # torchrun has ended this by then, if rank 0 failed as well
        line = f"\nrank {RANK}: {line}" if status != 130 else ""
    print(line, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    cli(sys.argv[1:])
