# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.0", "tqdm"]
# ///
"""Tree-GRPO: tree search for LLM agent reinforcement learning (ICLR 2026, arXiv 2509.21240).

    python tree_grpo.py                       a tiny Qwen learns to use a search tool, on a CPU
    python tree_grpo.py --model Qwen/Qwen2.5-1.5B --data hotpot.json       on one GPU

The algorithm, of which `train` is the loop:

    for each training step:
        1. search: for each prompt M chains of agent steps, the trunks of M trees; then, L times,
           in each tree N nodes at random get a new branch, played to its end   tree_search
        2. credit: A = z-score of a leaf's reward in its tree + z-score in all   tree_advantages
        3. update: the clipped loss with a KL penalty                            grpo_loss
        4. the sampler gets the new weights

Each agent step (think, search, observation) is a node. Branches share the keys and values of what
they have in common, and are trained on it once: the engine, below the loop.
Left out: several processes, mini-batches, learning rate schedules beyond a warm-up."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import string
import sys
import time
import urllib.request
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


# ---------------------------------------------------------------------------- Tree-GRPO: the method
def z_score(x: Tensor, eps: float = 1e-6) -> Tensor:
    """(x - mean) / (std + eps) with the unbiased std, in float64; 0 for a lone value, or where all
    are equal."""
    x = x.double()
    if len(x) < 2 or x.min() == x.max():
        return torch.zeros_like(x)
    return (x - x.mean()) / (x.std() + eps)


def tree_advantages(
    rewards: Tensor, tree_ids: Tensor, eps: float = 1e-6, terms: str = "both"
) -> Tensor:
    """Advantage of each leaf of one prompt (Tree-GRPO, Eq. 6 and 7).

    rewards, tree_ids: (G,), in any order. terms: "both", "intra" or "inter" (Table 4). Returns
    (G,), of the rewards' dtype if that is floating. A lone leaf, or one among equal rewards, gets 0
    from a term, so with one leaf per tree this is GRPO. ValueError for other shapes, no leaves, or
    a reward that is not finite."""
    if rewards.dim() != 1 or rewards.shape != tree_ids.shape or len(rewards) == 0:
        raise ValueError(f"want rewards (G,) and tree_ids (G,), G > 0, got {rewards}, {tree_ids}")
    if not rewards.isfinite().all():
        raise ValueError(f"want finite rewards, got {rewards}")
    A_inter = z_score(rewards, eps)  # Eq. 6: among all leaves of the prompt
    A_intra = torch.zeros_like(A_inter)
    for tree in tree_ids.unique():
        own = tree_ids == tree
        A_intra[own] = z_score(rewards[own], eps)  # Eq. 6: among those of its tree
    A_tree = A_intra + A_inter  # Eq. 7
    advantages = {"both": A_tree, "intra": A_intra, "inter": A_inter}[terms]
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    return advantages.to(dtype)


def tree_search(play, prompts: list[tuple], M: int, N: int, L: int, rng: random.Random) -> None:
    """Tree-GRPO's search (section 3.2) below each root of `prompts`, (question, root) pairs, all
    together: M (1 + N L) leaves each. N = 0 gives GRPO's chains.

    play(starts) adds below each (question, node, tree) a branch that ends in a leaf."""
    # M independent chains are the trunks of the prompt's trees.
    play([(question, root, tree) for question, root in prompts for tree in range(M)])
    for _ in range(L if N else 0):
        # In each tree N of the nodes that are no leaves, the root among them, with replacement.
        starts = []
        for question, root in prompts:
            inner = [node for node in root.below()[1:] if node.children]
            for tree in range(M):
                nodes = [root, *(node for node in inner if node.tree == tree)]
                starts += [(question, node, tree) for node in rng.choices(nodes, k=N)]
        play(starts)


def credit(root: Node, args, rng: random.Random) -> tuple[list[Node], Tensor]:
    """--keep leaves of each tree of a prompt, at random (0: all), and their advantages."""
    leaves = []
    for tree in range(args.M):
        own = [leaf for leaf in root.leaves() if leaf.tree == tree]
        leaves += rng.sample(own, min(args.keep or len(own), len(own)))
    rewards = torch.tensor([leaf.reward for leaf in leaves])
    trees = torch.tensor([leaf.tree for leaf in leaves])
    return leaves, tree_advantages(rewards, trees, terms=args.advantage)


# ----------------------------------------------------------------------------------------- the loss
def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss with a KL penalty (Tree-GRPO, Eq. 8, with its sign turned).

    Returns the sum over sequences of the mean over each sequence's own sampled tokens (0 for one
    without any), which the caller divides by the prompt's sequences, Eq. 8's G, and by the prompts;
    and sums over sampled tokens, to be added over calls: tokens, clipped (the clip takes their
    gradient), kl (nats).

    logp, old_logp, ref_logp, mask: (sequences, length), mask true on sampled tokens; nothing else
    is read. advantages: (sequences,), (sequences, 1) or (sequences, length). ref_logp None: no KL,
    ValueError unless kl_coef is 0."""
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
def train(args, model, reference, agent: Agent, state: dict | None) -> None:
    """agent.model samples: `model` itself, or its copy in bfloat16. state: a checkpoint's, to go on
    from, or None."""
    out, tokenizer = Path(args.out), agent.tokenizer
    optimizer = new_optimizer(model, args, state)
    first = state["step"] if state else 0
    log = Log(args, state["metrics"] if state else 0)
    if not state:
        save_checkpoint(out, 0, model, tokenizer, optimizer, args)
    if first == 0:
        log("eval", 0, evaluate(agent))
    signals = catch_signals()
    bar = tqdm(range(first, args.steps), "training", initial=first, total=args.steps, unit="step")
    for step in bar:
        began = time.perf_counter()
        peak_gb(model.device)  # counts from here on
        lr = args.lr * min(1, (step + 1) / max(1, args.warmup))
        optimizer.param_groups[0]["lr"] = lr
        rng = random.Random(f"{args.seed}/{step}")
        generator = torch.Generator(model.device).manual_seed(rng.getrandbits(60))
        counts = Counter(generated_tokens=0, forwarded_tokens=0, tool_calls=0, entropy=0.0)
        draws = generator, args.temperature, args.top_p, counts
        play = functools.partial(agent.play, draws)

        # 1. Search (section 3.2).
        prompts = [(question, agent.root(question)) for question in agent.questions(step, rng)]
        for part in batches(prompts, args.at_once):
            tree_search(play, part, args.M, args.N, args.L, rng)
            forget(node for _, root in part for node in root.below())

        # 2. Credit (Eq. 6 and 7). The loss is a mean over a prompt's leaves, and over prompts.
        groups, keep = [], random.Random(f"{args.seed}/{step}/keep")
        for _, root in prompts:
            leaves, advantages = credit(root, args, keep)
            groups.append(Group(root, leaves, advantages[:, None], 1 / len(leaves) / len(prompts)))
        sampled = time.perf_counter()

        # 3. Update (Eq. 8); then the sampler gets the new weights.
        row = update(model, reference, optimizer, groups, args)
        copy_weights(model, agent.model)

        # 4. Log, draw, evaluate, save.
        rewards = torch.tensor([leaf.reward for _, root in prompts for leaf in root.leaves()])
        row |= {"reward": rewards.mean().item(), "success": (rewards > 0.5).float().mean().item()}
        row |= {**counts, "entropy": counts["entropy"] / counts["generated_tokens"], "lr": lr}
        row["seconds"] = time.perf_counter() - began
        row["seconds_sampling"] = sampled - began
        row["peak_gb"] = peak_gb(model.device)
        log("train", step + 1, row)
        speed = row["generated_tokens"] / row["seconds"]
        bar.set_postfix_str(f"reward {row['reward']:.2f}, {speed:.0f} tokens/s")
        (out / "tree.md").write_text(picture(agent, prompts, groups), "utf-8", "replace")
        last = step + 1 == args.steps
        if last or args.eval_every and (step + 1) % args.eval_every == 0:
            log("eval", step + 1, evaluate(agent))
        if last or signals or (step + 1) % args.save_every == 0:
            save_checkpoint(out, step + 1, model, tokenizer, optimizer, args)
            if signals and not last:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; go on with --resume {out}")
    save_model(out / "final", model, tokenizer)
    print(f"model in {out / 'final'}")


# ==================================================================================================
# The engine: the same text in all three scripts, to be read once. It computes what tests/naive.py
# does with one forward per path, but fast: branches share the keys and values above them when they
# are sampled, and each token of a tree is trained on once.
# ==================================================================================================
@dataclass(eq=False)
class Node:
    """A run of tokens below one parent: a prompt (a root), an agent step with its observation
    (Tree-GRPO), a segment between forks (TreeRL), an action (GraphGPO).

    The first len(logps) of its tokens were drawn by the policy and carry loss; the others, a prompt
    or an observation, were not. `kv`, while in use: kv[..., j, :] is of the token *before*
    tokens[j] on the path, whose forward predicts tokens[j] (of a root: of all but its last token).
    So what begins below a node finds all but the node's last token there, and runs that again."""

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
        nodes = [self]
        while nodes[-1].parent:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]

    def below(self) -> list[Node]:
        """This node and all under it, a child with all under it before the next child."""
        nodes, stack = [], [self]
        while stack:
            nodes.append(stack.pop())
            stack += reversed(nodes[-1].children)
        return nodes

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


def token_tree(module, query, key, value, attention_mask, scaling, attend, **kwargs):
    """The attention that transformers calls in each layer. `attend`, which is handed through the
    model's keyword arguments, does it."""
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
    for some more tokens. When one is full, or when most lanes idle, what was computed is stored in
    the nodes, and new Lanes go on from there.

    Of lane b: grid[b] is its node (None: idle), length[b] how many of its slots are filled, new[b]
    the tokens that were not run yet. `at` and `token` are copies of length and of the last of new
    on the device, which `step` advances.

    Letters in shapes: R rows, W lanes in each, B = R W lanes, h KV heads, g query heads on each of
    them, n new tokens, P slots of a prompt, S slots of a lane, D the size of a head."""

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
        P, S = max(1, *(root.cached for root in rows)), self.room + 1
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
        """Run what is new in each lane but for the last token, which `step` runs; in pieces, as a
        score matrix must not get too large."""
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
        `seen` slots are looked at. Returns the last hidden states, (B, n, width).

        Nothing in here, nor in `step` while it is recorded, hands the device a value or asks it for
        one: a CUDA graph cannot hold that."""
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
        """Draw `steps` tokens in each lane. On CUDA a step, a thousand kernels, is recorded once
        and then launched as one. Returns tokens, log-probs and entropies, lists (steps, B)."""
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
                self.graph = record(step, generator) if self.recorded else None
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

    def serve(self, live: list[int], steps: int) -> bool:
        """Can these lanes go on for so many tokens? Not if there is no room, nor if they would fit
        into three quarters of the lanes (into half of them where a step has to be recorded)."""
        rows = Counter(b // self.W for b in live)
        share = len(rows) * max(rows.values()) / len(self.grid)
        enough = share > (0.5 if self.recorded else 0.75)
        return enough and max(self.length) + steps <= self.room


def gather_kv(model, paths: list[list[Node]], room: int) -> Tensor:
    """The keys and values that the nodes of each path hold, one after the other and zeros after
    them: (layers, 2, KV heads, paths, room, head size)."""
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
def compute(model, nodes: list[Node]) -> None:
    """The keys and values of prompts, roots or nodes below computed roots, but for the last token
    of each, which each branch runs itself."""
    lanes = Lanes(model, nodes)
    lanes.catch_up()
    for b, node in enumerate(lanes.grid):
        if node:
            lanes.store(b)


def compute_roots(model, nodes: list[Node]) -> list[Node]:
    """compute() for the roots above the nodes where it was not done yet. Returns these."""
    roots = dict.fromkeys(node.path()[0] for node in nodes)
    missing = [root for root in roots if root.kv is None]
    if missing:
        compute(model, missing)
    return missing


def record(step, generator):
    """A CUDA graph of step(). Recording runs nothing; each replay() runs it all, with other random
    numbers."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    return graph


def draw(logits: Tensor, temperature: float, top_p: float, generator) -> Tensor:
    """One token per row of logits (B, V): temperature first (0: the largest), then top-p, the
    fewest tokens, the likeliest first, that together have so much. Returns (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    token = draw_index(probs, generator)
    # No sort of the vocabulary: a token outside the nucleus is drawn again among those before it.
    # How often this happens in a row is a Poisson variable of mean -log(top_p), or fewer times: the
    # rounds below do not suffice with a probability under 1e-9.
    word = torch.arange(logits.shape[-1], device=logits.device)
    for _ in range(8 - int(6 * math.log(top_p)) if top_p < 1 else 0):
        p = probs.gather(-1, token)
        before = (probs > p) | (probs == p) & (word < token)
        likelier = probs.where(before, 0)
        outside = likelier.sum(-1, keepdim=True) >= top_p
        if not recording(logits) and not outside.any():
            break
        token = torch.where(outside, draw_index(likelier, generator), token)
    return token[:, 0]


def recording(x: Tensor) -> bool:  # a CUDA graph, in which nothing can be asked for
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def draw_index(weights: Tensor, generator) -> Tensor:
    """An index of each row of weights (B, V), drawn in proportion, (B, 1), by one random number;
    torch.multinomial would draw V of them."""
    exact = torch.float32 if weights.device.type == "mps" else torch.float64  # mps has no other
    ends = weights.cumsum(-1, dtype=exact)
    at = torch.rand(len(ends), 1, dtype=exact, device=ends.device, generator=generator)
    return torch.searchsorted(ends, ends[:, -1:] * at, right=True).clamp(max=ends.shape[-1] - 1)


@torch.inference_mode()
def sample(
    model, nodes: list[Node], limits, stop, eos, generator, temperature, top_p, counts, keep=True
) -> None:
    """Continue the path of each (new, empty) node, all together, until a token of the set eos,
    until stop(tokens) is true, or to its limit >= 1. Branches share what is above them.

    Tokens above a node that were not run yet (a turn's last and the observation after it; at a fork
    the last one above it, again) go in first. keep: may something begin below the nodes later? Then
    they keep their keys and values. counts, a Counter, gets more forwarded_tokens (run; a node's
    last one is not counted), generated_tokens and entropy (their sum, in nats).
    FloatingPointError if a log-prob is not finite."""
    look = LOOK.get(model.device.type, 1)
    roots = compute_roots(model, nodes)
    lanes = Lanes(model, nodes)
    counts["forwarded_tokens"] += length(roots) - len(roots)
    counts["forwarded_tokens"] += sum(len(new) for new, node in zip(lanes.new, lanes.grid) if node)
    lanes.catch_up()
    limit = dict(zip(nodes, limits))
    live = [b for b, node in enumerate(lanes.grid) if node]
    while live:
        if not lanes.serve(live, look):
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
    """Segments of like length, (tokens, path), into buckets, one attention call for each.

    A path is the list of the places in the row of all tokens from the root on; the segment's own
    come last. Returns the buckets, (queries, keys) with the places of the tokens of each segment
    and of its path, padded; and of each token of the row the number of its query, counted through
    all buckets."""
    buckets, number, count = [], [0] * sum(own for own, _ in segments), 0
    left = sorted(segments, key=lambda segment: segment[0])
    while left:
        width = left[-1][0]  # those at least half as long as the longest share a bucket
        first = sum(2 * own < width for own, _ in left)
        left, bucket = left[:first], left[first:]
        for own, path in bucket:
            number[path[-own] : path[-1] + 1] = range(count, count + own)
            count += width
        queries = [path[-own:] + path[-1:] * (width - own) for own, path in bucket]
        keys = padded([path for _, path in bucket], multiple=8)  # CUDA wants such masks
        buckets.append((queries, keys))
    return buckets, number


class Packed:
    """The trees of groups as one row of their unique tokens, on a device: of each tree all that
    leads to a leaf of a group.

    A node's queries see the keys of its path, which are gathered; slot j of a path holds the token
    at position j, so a query sees the slots up to its own position. paths: of each group, (leaves,
    length), where in the log-probs those of a leaf's sampled tokens are, and a mask."""

    def __init__(self, groups: list[Group], device):
        def on_device(numbers):
            return torch.tensor(numbers, device=device).long()

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
        self.read, self.target = on_device(read), on_device(target)
        self.sampler_logps = torch.tensor(logps, device=device)
        self.old_logps = self.ref_logps = None  # the trainer's and the reference's, before a step
        self.buckets = [(on_device(queries), on_device(keys)) for queries, keys in buckets]
        self.number = on_device(number)
        self.paths = []
        for group in groups:
            rows = [[i for n in leaf.path() for i in logps_of[n]] for leaf in group.leaves]
            places = on_device(padded(rows, -1))
            self.paths.append((places.clamp(min=0), places >= 0))

    def masks(self, dtype: torch.dtype, g: int) -> list[Tensor]:
        """Of each bucket, for all layers, with g query heads on a KV head: (segments, 1, g width,
        path)."""
        masks = []
        for queries, keys in self.buckets:
            slot = torch.arange(keys.shape[1], device=keys.device)
            visible = slot <= self.position[0, queries][:, :, None]
            mask = torch.zeros(1, dtype=dtype, device=keys.device).where(visible, -torch.inf)
            masks.append(mask.repeat(1, g, 1)[:, None])
        return masks

    def attend(self, masks, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q: (1, h g, tokens, D), k and v: (1, h, tokens, D). Returns (1, tokens, h g, D)."""
        heads, D, h, dtype = q.shape[1], q.shape[3], k.shape[1], v.dtype
        # A token's gradients from all segments below it are summed in float32, and by index_select,
        # whose backward adds in a fixed order on a CPU; that of x[keys] does not.
        q, k, v = (full_precision(x[0].transpose(0, 1)) for x in (q, k, v))  # (tokens, ., D)
        out = []
        for (queries, keys), mask in zip(self.buckets, masks):
            (segments, width), P = queries.shape, keys.shape[1]
            qs = q.index_select(0, queries.flatten()).view(segments, width, h, -1, D)
            qs = qs.movedim(1, 3).reshape(segments, h, -1, D)  # (segments, h, g width, D)
            ks, vs = (
                x.index_select(0, keys.flatten()).view(segments, P, h, D).transpose(1, 2)
                for x in (k, v)
            )
            qs, ks, vs = qs.to(dtype), ks.to(dtype), vs.to(dtype)
            o = F.scaled_dot_product_attention(qs, ks, vs, mask, scale=scaling)
            out.append(o.view(segments, h, -1, width, D).movedim(3, 1).reshape(-1, heads, D))
        return torch.cat(out).index_select(0, self.number)[None]


def packed_logps(model, packed: Packed) -> Tensor:
    """Log-prob at temperature 1 of each sampled token of packed trees, (tokens,), in their order;
    packed.paths tells where each leaf's are. One forward over unique tokens. The head runs only
    where a sampled token is predicted, in chunks that the backward pass computes again, so that
    (tokens, vocabulary) logits never exist at once."""
    device, config = model.device.type, model.config
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else model.dtype
    masks = packed.masks(dtype, config.num_attention_heads // config.num_key_value_heads)
    attend = functools.partial(packed.attend, masks)
    out = model.model(packed.ids, position_ids=packed.position, use_cache=False, attend=attend)

    def logps(hidden, target):
        logits = full_precision(model.lm_head(hidden))
        return -F.cross_entropy(logits, target, reduction="none")

    rows = max(1, 2**26 // config.vocab_size)
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


def gathered(logps: Tensor | None, index: Tensor) -> Tensor | None:
    return None if logps is None else logps.index_select(0, index.flatten()).view_as(index)


def batch_loss(packed: Packed, logps: Tensor, args) -> tuple[Tensor, dict]:
    """The loss of packed groups, from the trainer's log-probs, and the sums of grpo_loss's
    stats."""
    loss, sums = 0.0, Counter()
    limits = args.clip_low, args.clip_high, args.kl_coef
    for group, (index, mask) in zip(packed.groups, packed.paths):
        x = [gathered(x, index) for x in (logps, packed.old_logps, packed.ref_logps)]
        part, stats = grpo_loss(*x, group.advantages.to(logps.device), mask, *limits)
        loss = loss + group.weight * part
        for name, value in stats.items():
            sums[name] += value
    return loss, sums


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
    for _ in range(args.epochs if parts else 0):
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
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        sums["norm"] += norm / args.epochs
        if not math.isfinite(sums["loss"] + norm):
            raise FloatingPointError(f"loss {sums['loss']:g}, gradient norm {norm:g}")
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    sums = Counter({name: float(value) for name, value in sums.items()})
    tokens = max(1, sums["tokens"])
    drawn = sum(len(packed.target) for packed in parts)
    return {
        "loss": sums["loss"],
        "kl": sums["kl"] / tokens if reference is not None else None,
        "grad_norm": sums["norm"],
        "clip_fraction": sums["clipped"] / tokens,
        "sampler_gap": sums["gap"] / drawn if drawn else None,
    }


# -------------------------------------------------------------------- the agent and its search tool
class BM25:
    """Okapi BM25 (k1 = 1.2, b = 0.75) over passages, pairs of title and text; words in lower
    case."""

    def __init__(self, passages: list[tuple[str, str]]):
        self.passages, self.postings, lengths = passages, {}, []
        for i, passage in enumerate(tqdm(passages, "index", unit="passage", leave=False, delay=1)):
            words = Counter(re.findall(r"\w+", " ".join(passage).lower()))
            lengths.append(float(words.total()))
            for word, n in words.items():  # a posting: the passage's number, how often it is there
                self.postings.setdefault(word, array("q")).extend((i, n))
        mean = max(1, sum(lengths) / len(lengths))
        self.scale = 1.2 * (0.25 + 0.75 * torch.tensor(lengths) / mean)

    def top(self, query: str, k: int) -> list[tuple[str, str]]:
        """The k best of the passages that share a word with the query, best first."""
        scores = torch.zeros(len(self.passages))
        for word in sorted(self.postings.keys() & set(re.findall(r"\w+", query.lower()))):
            postings = torch.frombuffer(self.postings[word], dtype=torch.int64).view(-1, 2)
            numbers, tf = postings[:, 0], postings[:, 1].float()
            rarity = math.log(1 + (len(scores) - len(numbers) + 0.5) / (len(numbers) + 0.5))
            scores[numbers] += rarity * 2.2 * tf / (tf + self.scale[numbers])
        best = scores.topk(min(k, len(scores)))
        ranked = zip(best.indices.tolist(), best.values.tolist())
        return [self.passages[i] for i, score in ranked if score > 0]


def show_passages(passages: list[tuple[str, str]]) -> str:
    lines = [": ".join(filter(None, passage)) for passage in passages]
    return "\n".join(lines) or "nothing found"


def ask_server(url: str, queries: list[str], topk: int, timeout: float = 20, tries: int = 3):
    """Query a Search-R1 compatible server, all queries in one request: an observation for each.
    Never raises: after `tries` that fail the observations say that the search failed."""
    body = json.dumps({"queries": queries, "topk": topk, "return_scores": True}).encode()
    for attempt in range(tries):
        time.sleep(0.5 * attempt)
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                results = json.loads(reply.read(65536 * (len(queries) + 1)))["result"]
            observations = []
            for _, hits in zip(queries, results, strict=True):
                texts = [hit["document"]["contents"] for hit in hits[:topk]]
                observations.append(show_passages([text.partition("\n")[::2] for text in texts]))
            return observations
        except Exception as error:  # noqa: BLE001 (whatever a server does, training goes on)
            message = f"search server {url}: {type(error).__name__}: {error}"
            tqdm.write(message, file=sys.stderr)
    return ["the search failed, there are no results"] * len(queries)


INSTRUCTION = """Answer the question. In each turn, think between <think> and </think>, then search
by <search> query </search> and read in the next turn what was found between <information> and
</information>, or, when you know it, answer in a few words and nothing else:
<answer> Paris </answer>. You have {turns} turns. Question: """
HINT = "that was no action : write <search> query</search> or <answer> answer</answer>"
ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
WORDS = r"((?!</?(?:think|search|information|answer)>).)*"
STEP = re.compile(
    rf"\s*<think>{WORDS}</think>\s*<(?P<action>search|answer)>{WORDS}</(?P=action)>\s*", re.DOTALL
)


def normalise(answer: str) -> str:  # lower case, no punctuation, no articles, single spaces
    answer = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def outcome_reward(turns: list[str], answers: list[str]) -> float:
    """R(H) of a finished trajectory, from the texts of its turns."""
    action = ACTION.search(turns[-1])
    answered = action is not None and action[1] == "answer"
    match = answered and normalise(action[2]) in map(normalise, answers)
    steps = [STEP.fullmatch(turn) for turn in turns]
    actions = [step["action"] if step else None for step in steps]
    well_formed = actions == ["search"] * (len(turns) - 1) + ["answer"]
    if match:
        return 1.0 if well_formed else 0.8
    if well_formed:
        return 0.2
    return 0.1 if answered else 0.0


@dataclass
class Question:
    text: str
    answers: list[str]  # the answer and its aliases
    passages: BM25  # what a search looks into
    start: str = ""  # of a built-in question: the entity it starts from,
    relations: tuple[str, ...] = ()  # and the relations to follow from there


class Agent:
    """The policy with its tool: episodes of turns, many at a time."""

    def __init__(self, model, tokenizer, args, training: list[Question], held_out: list[Question]):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.training, self.held_out = training, held_out
        self.eos = end_tokens(model, tokenizer)
        self.piece = functools.cache(lambda token: tokenizer.decode([token]))

    def questions(self, step: int, rng: random.Random) -> list[Question]:
        if self.training:
            return batch_of(self.training, step, self.args)
        return [make_question(rng, self.args.hops, False) for _ in range(self.args.prompts)]

    def root(self, question: Question) -> Node:
        text = question.text
        if self.tokenizer.chat_template or self.args.data:  # else it knows what it is to do
            text = INSTRUCTION.format(turns=self.args.max_turns) + text
        return prompt_root(self.model, self.tokenizer, text)

    def text(self, node: Node) -> str:  # what the policy wrote in it
        written = node.tokens[: len(node.logps)]
        return self.tokenizer.decode(written, skip_special_tokens=True)

    def stop(self, tokens: list[int]) -> bool:  # does the last one complete a closing tag?
        if ">" not in self.piece(tokens[-1]):
            return False
        return bool(re.search("</(search|answer)>", self.tokenizer.decode(tokens)))

    def search(self, asked: list[tuple[Question, Node, str]]) -> list[str]:
        """An observation for each question's query."""
        if self.args.search_url and asked:
            return ask_server(self.args.search_url, [query for *_, query in asked], self.args.topk)
        found = [question.passages.top(query, self.args.topk) for question, _, query in asked]
        return [show_passages(passages) for passages in found]

    def observation(self, found: str) -> list[int]:
        texts = ("\n\n<information>", f" {found}", "</information>\n\n")
        head, body, tail = (encode(self.tokenizer, text) for text in texts)
        return head + body[: max(0, self.args.info_tokens - len(head) - len(tail))] + tail

    def play(self, draws: tuple, starts: list[tuple]) -> None:
        """For each (question, node, tree) a new branch below the node, played to its end, where it
        gets its reward. In each turn all branches are sampled together, and all searches made
        together. draws: generator, temperature, top-p and a Counter, as sample takes them."""
        args, context, (*_, counts) = self.args, self.model.config.max_position_embeddings, draws
        live = [(question, Node(node, tree=tree)) for question, node, tree in starts]
        while live:
            nodes = [node for _, node in live]
            limits = [min(args.turn_tokens, context - length(node.path())) for node in nodes]
            sample(self.model, nodes, limits, self.stop, self.eos, *draws)
            over, asked = set(), []  # whose episode is over; who searches, and for what
            for question, node in live:
                action = ACTION.search(self.text(node))
                if action and action[1] == "answer" or len(node.path()) > args.max_turns:
                    over.add(node)
                elif action:
                    asked.append((question, node, action[2].strip()))
            found = dict(zip((node for _, node, _ in asked), self.search(asked)))
            counts["tool_calls"] += len(asked)
            going = []
            for question, node in live:
                if node not in over:
                    observation = self.observation(found.get(node, HINT))
                    if length(node.path()) + len(observation) < context:
                        node.tokens += observation
                        going.append((question, Node(node, tree=node.tree)))
                        continue
                turns = [self.text(turn) for turn in node.path()[1:]]
                node.reward = outcome_reward(turns, question.answers)
                forget([node])  # nothing begins below it
            live = going


def picture(agent: Agent, prompts: list[tuple], groups: list[Group]) -> str:
    """The trees of a prompt, whose rewards differ if possible, in green or red by the mean
    advantage of the leaves below a node."""
    mixed = [group for group in groups if len({leaf.reward for leaf in group.leaves}) > 1]
    group = (mixed or groups)[0]
    advantages = dict(zip(group.leaves, map(float, group.advantages)))
    nodes, notes, values = group.root.below(), [], []
    for node in nodes:
        below = [advantages[leaf] for leaf in node.leaves() if leaf in advantages]
        values.append(sum(below) if below else None)
        note = ""
        if node.reward is not None:
            note = f"R = {node.reward:g}, " + (f"A = {below[0]:+.2f}" if below else "not kept")
        notes.append(note)
    words = [question.text for question, root in prompts if root is group.root]
    words += [agent.text(node) for node in nodes[1:]]
    return mermaid(nodes, words, notes, values)


# ---------------------------------------------------------------------------- built-in questions
PEOPLE = "Ada Bob Cleo Dan Eve Finn Gus Hana Ivo Jane Kai Lena Max Nora Ola".split()
CITIES = "Rome Oslo Lima Cairo Paris Delhi Quito Tunis Bern Kyoto".split()
RELATIONS = {  # of what, and what it gives
    "mother": (PEOPLE, PEOPLE),
    "friend": (PEOPLE, PEOPLE),
    "teacher": (PEOPLE, PEOPLE),
    "birthplace": (PEOPLE, CITIES),
    "home": (PEOPLE, CITIES),
    "mayor": (CITIES, PEOPLE),
    "founder": (CITIES, PEOPLE),
    "twin": (CITIES, CITIES),
}


def make_question(rng: random.Random, max_hops: int, held_out: bool) -> Question:
    """A question of 2 to max_hops hops over facts drawn for it alone, so there is nothing to
    remember. A fifth of all question texts is held out."""
    while True:
        entity = start = rng.choice(PEOPLE + CITIES)
        facts, seen = {}, [start]  # (relation, of) -> entity
        for _ in range(rng.randint(2, max_hops)):
            used = [relation for relation, _ in facts]
            fitting = [r for r, (of, _) in RELATIONS.items() if entity in of and r not in used]
            relation, of = rng.choice(fitting), entity
            entity = rng.choice([e for e in RELATIONS[relation][1] if e not in seen])
            facts[relation, of] = entity
            seen.append(entity)
        relations = tuple(relation for relation, _ in facts)
        text = f"{'Where' if entity in CITIES else 'Who'} is the {' of the '.join(relations[::-1])}"
        text += f" of {start}?"
        if (random.Random(text).random() < 0.2) == held_out:
            break

    def other(kind: list[str]) -> str:  # so that no search is ambiguous
        return rng.choice([e for e in kind if e not in seen])

    # Facts beside the way: another relation of each entity, each relation of another entity.
    for relation, of in list(facts):
        kinds = [r for r, (kind, _) in RELATIONS.items() if of in kind and r != relation]
        beside = rng.choice(kinds)
        facts.setdefault((beside, of), other(RELATIONS[beside][1]))
        facts.setdefault(
            (relation, rng.choice(RELATIONS[relation][0])), other(RELATIONS[relation][1])
        )
    passages = [
        ("", f"the {relation} of {of} is {value}") for (relation, of), value in facts.items()
    ]
    rng.shuffle(passages)
    return Question(text, [entity], BM25(passages), start, relations)


def demonstrate(question: Question, rng: random.Random) -> list[tuple[str, str]]:
    """The turns of an imperfect agent, each with what its search finds: it tends to stop early, and
    at times asks for a wrong relation. What it teaches is mostly wrong, for reward to mend."""
    turns, entity = [], question.start
    for relation in question.relations:
        if turns and rng.random() < 0.6:
            break
        if rng.random() < 0.15:
            relation = rng.choice([r for r in RELATIONS if r != relation])
        query = f"{relation} of {entity}"
        found = question.passages.top(query, 1)[0][1]
        turns.append((f"<think> next {relation}</think><search> {query}</search>", found))
        entity = found.partition(" is ")[2]
    return [*turns, (f"<think> done</think><answer> {entity}</answer>", "")]


def built_in_model(args, device: torch.device):
    """The tiny model, warm-started on demonstrations of the built-in task."""
    words = [*RELATIONS, *PEOPLE, *CITIES]
    words += re.findall(r"\w+", f"is the of next done nothing found {HINT}")
    names = ("think", "search", "information", "answer")
    tags = [tag for name in names for tag in (f"<{name}>", f"</{name}>")]
    spaced = [f" {word}" for word in words]
    model, tokenizer = tiny_model([*spaced, "Who", "Where", "\n\n", *tags], device, args.seed)
    agent, paths = Agent(model, tokenizer, args, [], []), []
    rng = random.Random(f"{args.seed}/demonstrations")
    for _ in range(32 * args.sft_steps):  # 32 for each step
        question = make_question(rng, args.hops, False)
        node = agent.root(question)
        for text, found in demonstrate(question, rng):
            tokens = encode(tokenizer, text)
            node = Node(node, tokens, [0.0] * len(tokens))
            if found:
                node.tokens += agent.observation(found)
        paths.append(node.path())
    warm_start(model, paths, args)
    return model, tokenizer


def read_questions(path: str) -> list[Question]:
    """HotpotQA and 2WikiMultihopQA (JSON lists), MuSiQue (JSON lines; its unanswerable questions
    are left out), told apart by a record's fields. A search looks into all passages of the file."""
    pool = {}

    def parse(record: dict) -> tuple[str, list[str]] | None:
        if "paragraphs" in record:
            passages = [(p["title"], p["paragraph_text"]) for p in record["paragraphs"]]
        else:
            passages = []
            for title, sentences in record["context"]:
                passages.append((title, " ".join(s.strip() for s in sentences)))
        answers = [record["answer"], *record.get("answer_aliases", [])]
        texts = [record["question"], *answers, *itertools.chain(*passages)]
        if not passages or not all(isinstance(text, str) for text in texts):
            raise TypeError("question, answers and passages are texts")
        pool.update(dict.fromkeys(passages))
        return (record["question"], answers) if record.get("answerable", True) else None

    wanted = "HotpotQA or 2Wiki (question, answer, context) or MuSiQue (with paragraphs)"
    found = read_records(path, parse, wanted)
    index = BM25(list(pool))
    return [Question(question, answers, index) for question, answers in found]


# ---------------------------------------------------------------------------------- models and runs
def encode(tokenizer, text: str) -> list[int]:  # JSON may hold half of a surrogate pair
    text = text.encode("utf-8", "replace").decode()
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_tokens(model, tokenizer) -> set[int]:
    """The tokens that end a text, or a turn of a chat."""
    eos = model.generation_config.eos_token_id
    known = eos if isinstance(eos, list) else [eos]
    return {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>"), *known}


# Kinds of models for which the tests compare sampler and trainer with plain forwards.
KINDS = ("glm4", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3")


def load_model(path: str, device: torch.device, flag: str = "--model"):
    """A causal LM of a kind in KINDS whose layers all attend to everything before, and its
    tokenizer, from a hub id or a folder. BadInput, which blames `flag`, for anything else, and for
    weights that do not fit the model, which would be random numbers instead."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    how = {"dtype": torch.float32, "attn_implementation": "token_tree", "output_loading_info": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, info = AutoModelForCausalLM.from_pretrained(path, **how)
        if not tokenizer("a")["input_ids"]:
            raise ValueError("the tokenizer is missing")
        if wrong := {name: sorted(map(str, keys))[:2] for name, keys in info.items() if keys}:
            raise ValueError(f"its weights do not fit: {wrong}")
        kind = model.config.model_type
        layers = {*(getattr(model.config, "layer_types", None) or ["full_attention"])}
        if getattr(model.config, "sliding_window", None):
            layers.add("sliding_attention")
        if kind not in KINDS or layers != {"full_attention"}:
            wanted = f"one of {', '.join(KINDS)} with full attention"
            raise ValueError(f"it is {kind} with {', '.join(sorted(layers))}, not {wanted}")
    except Exception as error:  # noqa: BLE001 (no folder, no weights, no network, unknown kind ...)
        raise BadInput(f"{flag} {path}: no model that can be used ({str(error)[:200]})") from None
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
    # cuDNN's attention would plan, up to a second, for every new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if args.grad_checkpointing:  # called activation checkpointing by newer versions of transformers
        old_name = model.gradient_checkpointing_enable
        enable = getattr(model, "activation_checkpointing_enable", old_name)
        enable({"use_reentrant": False})
    reference = load_model(start, model.device)[0].requires_grad_(False) if args.kl_coef else None
    if args.dtype == "float32":
        return model, reference
    policy = copy.deepcopy(model)
    for parameter in policy.parameters():  # not the buffers: RoPE needs float32
        parameter.data = parameter.data.to(torch.bfloat16)
    return policy, reference


def tiny_model(words, device: torch.device, seed: int):
    """A Qwen2 of 0.5M parameters with random weights, and a Qwen tokenizer of single bytes and the
    given words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    quiet_transformers()
    alphabet = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer({token: i for i, token in enumerate(alphabet)}, [])
    tokenizer.add_tokens(list(words))
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    room = {"vocab_size": len(tokenizer), "max_position_embeddings": 32768, "eos_token_id": 0}
    # At the usual initializer_range, 0.02, so small a model does not leave its plateau.
    config = Qwen2Config(**size, **heads, **room, initializer_range=0.08)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation("token_tree")
    return model.to(device).eval(), tokenizer


def warm_start(model, paths: list[list[Node]], args, lr: float = 3e-3) -> None:
    """Supervised steps on demonstrations (paths to a leaf): a policy gradient with advantage 1 is
    imitation."""
    args = dataclasses.replace(args, kl_coef=0.0, epochs=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    parts = batches(paths, max(1, len(paths) // max(1, args.sft_steps)))
    for step, part in enumerate(tqdm(parts, "warm start", unit="step")):
        slope = min(1, (step + 1) / 20, (1 - step / len(parts)) / 0.3)
        optimizer.param_groups[0]["lr"] = lr * slope
        groups = [Group(path[0], path[-1:], torch.ones(1, 1), 1 / len(part)) for path in part]
        update(model, None, optimizer, groups, args)


def resume_run(args, given: set[str]):
    """--resume -> the run's own arguments but for those that may change, its newest checkpoint's
    folder, and its state. BadInput if there is none, or if other arguments are given."""
    try:
        found = sorted(Path(args.resume).glob("checkpoint-*/state.pt"))
        if not found:
            raise ValueError("there is no checkpoint in it")
        folder = found[-1].parent
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        if state["script"] != Path(__file__).name:
            raise ValueError(f"it is a run of {state['script']}")
        saved = type(args)(**state["args"])
    except Exception as error:  # noqa: BLE001 (there is none, or it fails in one of many ways)
        raise BadInput(f"--resume {args.resume}: no run to continue ({str(error)[:150]})") from None
    changeable = {"steps", "lr", "kl_coef", "save_every", "device", "log"}
    if extra := given - changeable - {"resume"}:
        flag = min(extra).replace("_", "-")
        raise BadInput(f"--{flag}: a run that is continued keeps its own; leave it out")
    changed = {name: getattr(args, name) for name in given & changeable}
    changed |= {"out": args.resume, "resume": args.resume}
    return dataclasses.replace(saved, **changed), str(folder), state


def new_optimizer(model, args, state: dict | None):
    how = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": model.device.type == "cuda"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, **how)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    return optimizer


def save_model(folder: Path, model, tokenizer) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_checkpoint(out: Path, step: int, model, tokenizer, optimizer, args) -> None:
    """The state after `step` steps, renamed when whole; random states and the place in the data
    follow from step."""
    folder, temporary = out / f"checkpoint-{step:06d}", out / "checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_model(temporary, model, tokenizer)
    state = {"script": Path(__file__).name, "step": step, "args": vars(args)}
    state["metrics"] = (out / "metrics.jsonl").stat().st_size
    torch.save(state | {"optimizer": optimizer.state_dict()}, temporary / "state.pt")
    temporary.rename(folder)
    for old in set(out.glob("checkpoint-*")) - {folder}:
        shutil.rmtree(old)


class Log:
    """metrics.jsonl, of which the first `size` bytes are kept, and the run of --log."""

    def __init__(self, args, size: int):
        self.path = Path(args.out, "metrics.jsonl")
        self.path.touch()
        os.truncate(self.path, size)
        self.tracker = importlib.import_module(args.log) if args.log else None
        if self.tracker:
            self.tracker.init(project=Path(__file__).stem, name=args.out, config=vars(args))

    def __call__(self, event: str, step: int, row: dict) -> None:
        row = {"event": event, "step": step, **row}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.tracker:
            self.tracker.log(row, step=step)
        if event == "eval":
            shown = f"{row['success']:.3f} sampled, {row['greedy_success']:.3f} greedy"
            tqdm.write(f"step {step}: held-out success {shown}")


def catch_signals() -> list:
    """The first Ctrl-C or SIGTERM from now on is added to this list; a second one ends the process,
    which does no harm: a run goes on from its last checkpoint."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("stopping after this step", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


def copy_weights(model, policy) -> None:
    if policy is not model:
        for copied, master in zip(policy.parameters(), model.parameters()):
            copied.data.copy_(master.data)


def peak_gb(device: torch.device) -> float | None:
    """The most memory in use since the last call; None if that is not known."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def mermaid_text(text: str) -> str:
    """A text as part of a Mermaid label."""
    words = " ".join(text.split())[:160]
    return "".join(f"#{ord(c)};" if c in '#"<>&`[]{}|\\' or c < " " else c for c in words)


def evaluate(actor) -> dict[str, float]:
    """Share of the held-out tasks that are solved by one chain each, at temperature 1 and
    greedily."""
    row = {}
    for name, temperature in (("success", 1.0), ("greedy_success", 0.0)):
        generator, solved = torch.Generator(actor.model.device).manual_seed(0), 0
        for part in tqdm(batches(actor.held_out, actor.args.at_once), name, leave=False, delay=1):
            starts = [(task, actor.root(task), 0) for task in part]
            actor.play((generator, temperature, 1.0, Counter()), starts)
            solved += sum(root.leaves()[0].reward > 0.5 for _, root, _ in starts)
        row[name] = solved / len(actor.held_out)
    return row


def mermaid(nodes: list[Node], words: list[str], notes: list[str], values: list) -> str:
    """A tree, parents first, as a Mermaid diagram: words and a note in each node, green or red by
    its value's sign; white without a value."""
    lines = ["```mermaid", "flowchart TD"]
    for i, (node, text, note, value) in enumerate(zip(nodes, words, notes, values)):
        color = "fff"
        if value is not None:
            color = "cfc" if value > 1e-6 else "fcc" if value < -1e-6 else "eee"
        label = "<br>".join(filter(None, [mermaid_text(text), note]))
        lines += [f'    n{i}["{label}"]', f"    style n{i} fill:#{color},color:#000"]
        if i > 0:
            trunk = f"|tree {node.tree + 1}|" if node.parent is nodes[0] else ""
            lines.append(f"    n{nodes.index(node.parent)} -->{trunk} n{i}")
    return "\n".join([*lines, "```", ""])


def read_records(path: str, parse, wanted: str) -> list:
    """parse(record), unless it is None, of each record of a file, a JSON list or JSON lines.
    BadInput names the file, and the record that is no JSON or that parse fails on."""
    found, number = [], 0
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
        if text[:1] == "[":
            records = json.loads(text)
        else:
            records = [line for line in text.split("\n") if line.strip()]
        for number, record in enumerate(records, 1):
            item = parse(json.loads(record) if isinstance(record, str) else record)
            if item is not None:
                found.append(item)
    except OSError as error:
        raise BadInput(f"--data {path}: {error.strerror}; give a data file") from None
    except Exception as error:  # noqa: BLE001 (a file may hold anything)
        where = f"record {number}: " if number else ""
        reason = f"{type(error).__name__}: {str(error)[:150]}"
        raise BadInput(f"--data {path}: {where}want JSON of {wanted} ({reason})") from None
    if len(found) < 2:
        raise BadInput(f"--data {path}: want two records of use or more, as one is held out")
    return found


def split_data(items: list, most: int) -> tuple[list, list]:
    """To train on, and held out: a fifth, rounded up, at most so many; the same for every seed."""
    items = random.Random(0).sample(items, len(items))
    held_out = min(most, -(-len(items) // 5))
    return items[held_out:], items[:held_out]


def batch_of(data: list, step: int, args) -> list:
    """A training step's part of the data, in an order of its own in each pass over it."""
    batch, orders = [], {}
    for i in range(step * args.prompts, (step + 1) * args.prompts):
        epoch, place = divmod(i, len(data))
        if epoch not in orders:
            orders[epoch] = random.Random(f"{args.seed}/{epoch}/data").sample(data, len(data))
        batch.append(orders[epoch][place])
    return batch


def prompt_root(model, tokenizer, text: str) -> Node:
    """A new root with a prompt, in the model's chat template if it has one. BadInput if the context
    has no room."""
    context = model.config.max_position_embeddings
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    root = Node(tokens=encode(tokenizer, text))
    if len(root.tokens) >= context:
        raise BadInput(f"--model: a context of {context} tokens is too short for {text[-60:]!r}")
    return root


# -------------------------------------------------------------------------------- command line
class BadInput(ValueError):
    """What the user gave cannot be used: the script prints this as one line and exits with 2."""


def arg(default, help: str, choices: tuple | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Args:
    model: str = arg("", "hub id or folder of a Qwen (default: a tiny one, built here)")
    data: str = arg("", "HotpotQA, 2WikiMultihopQA or MuSiQue file (default: built-in questions)")
    search_url: str = arg("", "Search-R1 server, http://host:port/retrieve (default: BM25)")
    method: str = arg("tree_grpo", "grpo: M independent chains", choices=("tree_grpo", "grpo"))
    advantage: str = arg("both", "terms of Eq. 7 (Table 4)", choices=("both", "intra", "inter"))
    M: int = arg(2, "independent chains per prompt, each the trunk of a tree")
    N: int = arg(2, "nodes expanded per tree and round")
    L: int = arg(1, "rounds of expansion")
    keep: int = arg(0, "leaves kept per tree, at random (0: all)")
    steps: int = arg(60, "training steps")
    prompts: int = arg(16, "prompts per step")
    at_once: int = arg(128, "most prompts sampled together: fewer need less memory")
    epochs: int = arg(1, "gradient steps per batch")
    lr: float = arg(0.0, "learning rate (default: 1e-6 with --model, 5e-4 without)")
    warmup: int = arg(10, "steps of linear learning rate warm-up")
    clip_low: float = arg(0.2, "the ratio, which is 1 with --epochs 1, is clipped below 1 - this")
    clip_high: float = arg(0.2, "the ratio is clipped above 1 + this")
    kl_coef: float = arg(0.001, "beta, weight of the KL to the starting model (0: none)")
    temperature: float = arg(1.0, "of the draws in training")
    top_p: float = arg(1.0, "nucleus of the draws in training")
    max_turns: int = arg(4, "agent steps per path, the answer included")
    turn_tokens: int = arg(0, "most tokens of a turn (default: 500 with --model, 32 without)")
    info_tokens: int = arg(500, "most tokens of an observation")
    topk: int = arg(0, "passages per search (default: 3 with --data, 1 without)")
    hops: int = arg(3, "most hops of built-in questions (4: --max-turns 5)")
    sft_steps: int = arg(250, "supervised steps that warm-start the tiny model")
    eval_prompts: int = arg(200, "held-out questions (of --data a fifth at most)")
    eval_every: int = arg(0, "steps between evaluations (0: before and after only)")
    save_every: int = arg(10, "steps between checkpoints")
    micro_tokens: int = arg(16384, "most tokens per forward (a prompt's tree is never split)")
    grad_checkpointing: bool = arg(False, "recompute activations: less memory, more time")
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = arg("auto", "auto: bfloat16 on CUDA", choices=("auto", "float32", "bfloat16"))
    seed: int = arg(0, "of everything random")
    log: str = arg("", "log to trackio or wandb as well", choices=("trackio", "wandb"))
    out: str = arg("", "folder to write (default: runs/<script>-<time>)")
    resume: str = arg("", "folder of a run to continue (--steps, --lr ... may be changed)")


# Names of arguments of all three scripts.
MAY_BE_0 = "N L steps warmup sft_steps clip_low clip_high kl_coef gamma".split()
MAY_BE_0 += "beta_graph beta_episode invalid_penalty kept_tokens".split()
AT_MOST_1 = ("top_p", "omega", "gamma")


def parse_args(cls, argv: list[str]):
    """Command line -> (an instance of the dataclass `cls`, the set of names given). BadInput with
    one line if it is none."""

    def fail(message):
        raise BadInput(f"{message} (--help lists the arguments)")

    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = fail
    for f in dataclasses.fields(cls):
        flag, how, shown = "--" + f.name.replace("_", "-"), {}, f.metadata["help"]
        if f.default is False:
            how = {"action": "store_true"}
        else:
            how = {"type": type(f.default), "choices": f.metadata["choices"]}
            shown += f" (default: {f.default})" if f.default else ""
        parser.add_argument(flag, help=shown, **how)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, (int, float)):
            least_0 = name in MAY_BE_0 or not getattr(cls, name)
            most = 1 if name in AT_MOST_1 else 1e15
            if not (0 <= value if least_0 else 0 < value) or not value <= most:
                fail(f"--{name.replace('_', '-')} {value}: out of range")
    args = cls(**given)
    if args.log and not importlib.util.find_spec(args.log):
        fail(f"--log {args.log}: pip install {args.log}")
    return args, set(given)


def pick_device(args) -> torch.device:
    name = args.device
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception:  # noqa: BLE001 (each backend fails in its own way)
        raise BadInput(f"--device {name}: not available here; leave it out") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs and their random numbers are of the current one
    elif not args.model and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the tiny model gains little by two
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device


def make_folder(args) -> Path:
    args.out = args.out or f"runs/{Path(__file__).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}; choose another folder") from None
    if not args.resume and any(out.iterdir()):
        raise BadInput(f"--out {out}: is not empty; choose another folder, or --resume the run")
    return out


def main(argv: list[str]) -> None:
    args, given = parse_args(Args, argv)
    weights, state = args.model, None
    if args.resume:
        args, weights, state = resume_run(args, given)
    if not 2 <= args.hops <= 4:
        raise BadInput(f"--hops {args.hops}: give 2, 3 or 4")
    if args.method == "grpo":
        args.N = 0
    if args.advantage == "intra" and (args.N * args.L == 0 or args.keep == 1):
        raise BadInput("--advantage intra: it is 0 for one leaf per tree; leave it out")
    if args.search_url and not args.data:
        raise BadInput(
            "--search-url: the built-in questions bring their facts; give --data as well"
        )
    if args.data and not weights:
        raise BadInput("--data: the tiny model knows the built-in questions only; give --model")
    device = pick_device(args)
    args.lr = args.lr or (1e-6 if args.model else 5e-4)
    args.topk = args.topk or (3 if args.data else 1)
    args.turn_tokens = args.turn_tokens or (500 if args.model else 32)
    if args.data:
        training, held_out = split_data(read_questions(args.data), args.eval_prompts)
    else:
        rng, training = random.Random(0), []  # the same held-out questions for every seed
        held_out = [make_question(rng, args.hops, True) for _ in range(args.eval_prompts)]
    if weights:
        model, tokenizer = load_model(weights, device, "--resume" if state else "--model")
        agent = Agent(model, tokenizer, args, training, held_out)
        for question in tqdm(training + held_out, "prompts", leave=False, delay=1):
            agent.root(question)  # raises BadInput if a prompt does not fit
    out = make_folder(args)
    if not weights:
        model, tokenizer = built_in_model(args, device)
        save_model(out / "start", model, tokenizer)
    policy, reference = policy_and_reference(args, model, args.model or str(out / "start"))
    agent = Agent(policy, tokenizer, args, training, held_out)
    what = f"{len(training) or 'built-in'} questions to train on, {len(held_out)} held out"
    print(f"{model.num_parameters():,} parameters, {device}, {args.dtype}; {what}", flush=True)
    train(args, model, reference, agent, state)


def cli(argv: list[str]) -> None:
    """main(), but what stops it is said in a line."""
    try:
        main(argv)
    except BadInput as error:
        print(f"{Path(__file__).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"stopped: {error}; go on with --resume and a lower --lr")
    except torch.OutOfMemoryError as error:
        sys.exit(f"stopped: {error}; begin again with less at once (--help)")
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped before the first step", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    cli(sys.argv[1:])
