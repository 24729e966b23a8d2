# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.0", "tqdm"]
# ///
"""TreeRL: LLM reinforcement learning with on-policy tree search (ACL 2025, arXiv 2506.11902), in one file.

    python treerl.py                                                        a tiny Qwen learns arithmetic, on a CPU
    python treerl.py --model Qwen/Qwen2.5-1.5B-Instruct --data gsm8k.jsonl  a Qwen from the hub on GSM8K, on one GPU
Process rewards: step_rewards. Search: fork_points, eptree. Branches that share the KV of what they have in common:
Lanes, sample. Each token of a tree trained on once: Packed, packed_logps. Loss: grpo_loss. The loop: train.
Left out: several processes, mini-batches, learning rate schedules beyond a warm-up."""

import argparse
import bisect
import copy
import dataclasses
import functools
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


# ---------------------------------------------------------------------------------------------------------- arguments
class BadInput(ValueError):
    """What the user gave cannot be used; the script prints the message as one line and exits with status 2."""
def arg(default, help: str, low: float = 0, high: float = 1e15, choices: tuple | None = None):
    return field(default=default, metadata={"help": help, "range": (low, high), "choices": choices})

@dataclass
class Args:
    model: str = arg("", "hub id or folder of a Qwen (default: a tiny one, built and warm-started here)")
    data: str = arg("", "GSM8K, MATH or MATH-500 file (default: built-in problems)")
    method: str = arg("treerl", "chainrl: M chains, RLOO; random: any forks", choices=("treerl", "chainrl", "random"))
    M: int = arg(6, "independent chains per prompt, each the trunk of a tree", low=1)
    N: int = arg(2, "places forked per tree and round")
    L: int = arg(1, "rounds of forking")
    T: int = arg(2, "new branches per fork", low=1)
    keep: int = arg(16, "leaves per prompt trained on, at random, a right one among them if there is any", low=1)
    steps: int = arg(60, "training steps")
    prompts: int = arg(16, "prompts per step", low=1)
    at_once: int = arg(64, "most of --prompts that are searched together: fewer need less memory, more time", low=1)
    epochs: int = arg(1, "gradient steps per batch", low=1)
    lr: float | None = arg(None, "learning rate (default: 1.5e-6 with --model, 5e-4 without)", low=1e-9)
    warmup: int = arg(10, "steps of linear learning rate warm-up")
    clip_low: float = arg(0.2, "the ratio is clipped below 1 - clip_low (it is 1 unless --epochs is above 1)")
    clip_high: float = arg(0.2, "the ratio is clipped above 1 + clip_high (as clip_low)")
    kl_coef: float = arg(0.0, "beta, weight of the KL to the starting model (0: no reference model)")
    temperature: float = arg(1.2, "of the draws in the search", low=1e-9)
    top_p: float = arg(0.95, "nucleus of the draws in the search", low=1e-9, high=1)
    max_tokens: int | None = arg(None, "most tokens of a solution (default: 8192 with --model, 8 * ops without)", low=1)
    ops: int = arg(8, "built-in problems have 5 to this many operations", low=5, high=32)
    sft_steps: int = arg(300, "supervised steps that warm-start the tiny model")
    eval_only: bool = arg(False, "no training: search --eval-prompts problems (of all --data), pass rate and accuracy")
    eval_prompts: int = arg(200, "held-out problems (of --data a fifth, rounded up, at most)", low=1)
    eval_batch: int = arg(128, "held-out problems solved together: fewer need less memory", low=1)
    eval_every: int = arg(0, "steps between evaluations (0: before and after only)")
    save_every: int = arg(10, "steps between checkpoints", low=1)
    micro_tokens: int = arg(16384, "most tokens per forward and backward (a prompt's tree is never split)", low=1)
    grad_checkpointing: bool = arg(False, "recompute activations in the backward pass: less memory, more time")
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = arg("auto", "of forward passes (auto: bfloat16 on CUDA)", choices=("auto", "float32", "bfloat16"))
    seed: int = arg(0, "of everything random")
    out: str = arg("", "folder to write (default: runs/<script>-<time>)")
    resume: str = arg("", "folder of a run to continue (--steps may be raised)")

def parse_args(cls, argv: list[str]):
    """Command line -> (an instance of the dataclass `cls`, the set of names given). Raises BadInput with one line."""
    def fail(message):
        raise BadInput(f"{message} (--help lists the arguments)")
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = fail
    for f in dataclasses.fields(cls):
        kind = next(t for t in (bool, int, float, str) if t is f.type or t in getattr(f.type, "__args__", ()))
        how = {"action": "store_true"} if kind is bool else {"type": kind, "choices": f.metadata["choices"]}
        shown = f" (default: {f.default})" if f.default not in (None, "") and kind is not bool else ""
        parser.add_argument("--" + f.name.replace("_", "-"), dest=f.name, help=f.metadata["help"] + shown, **how)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        low, high = cls.__dataclass_fields__[name].metadata["range"]
        if not isinstance(value, str) and not low <= value <= high:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be from {low:g} to {high:g}")
    return cls(**given), set(given)
# ------------------------------------------------------------------------------------------------- TreeRL: the method
def step_rewards(parents: Sequence[int], leaf_rewards: Mapping[int, float]) -> Tensor:
    """Process reward R(s) = (G_A(s) + L_A(s)) / sqrt(|L(s)|) of each node s of one prompt's tree (TreeRL).
    L(s) are the leaves at or below s, V(s) the mean of their rewards, G_A(s) = V(s) - V(root), L_A(s) = V(s) - V(parent
    of s). Node 0 is the root, that is the prompt, and gets 0. parents: (nodes,), each node's parent, which comes before
    it, -1 for the root; leaf_rewards: reward of each node without children. Returns (nodes,) in float64. Raises
    ValueError for parents that are no such tree, a leaf without reward, a reward elsewhere or not finite."""
    if not len(parents) or parents[0] != -1 or not all(0 <= p < i for i, p in enumerate(parents) if i):
        raise ValueError(f"want a root with parent -1, then nodes whose parents come before them, got {parents}")
    leaves = set(range(len(parents))).difference(parents)
    if set(leaf_rewards) != leaves or not all(map(math.isfinite, leaf_rewards.values())):
        raise ValueError(f"want finite rewards of the leaves {leaves} and of no other node, got {leaf_rewards}")
    shift = float(next(iter(leaf_rewards.values())))  # R(s) is of differences, so equal rewards are to give exactly 0
    count = [float(i in leaves) for i in range(len(parents))]
    total = [float(leaf_rewards.get(i, shift)) - shift for i in range(len(parents))]
    for i in range(len(parents) - 1, 0, -1):
        count[parents[i]] += count[i]
        total[parents[i]] += total[i]
    L = torch.tensor(count, dtype=torch.float64)
    V = torch.tensor(total, dtype=torch.float64) / L
    R = ((V - V[0]) + (V - V[list(parents)])) / L.sqrt()
    R[0] = 0
    return R

def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantages of independent chains (ChainRL), (G,) -> (G,): reward minus the mean of the others; a lone one: 0."""
    x = rewards.double() - rewards[:1]  # equal rewards are to give exactly 0
    return (len(x) * x - x.sum()) / max(1, len(x) - 1)

def fork_points(logps: Tensor, n: int, allowed: Tensor) -> list[int]:
    """The n most uncertain sampled tokens of a tree (EPTree): largest H = -log pi of the token itself first, of equals
    the earlier; fewer if fewer are allowed. logps: (P,), in nats, of all branches; allowed: (P,), bool."""
    return logps.masked_fill(~allowed, math.inf).argsort(stable=True)[: min(n, int(allowed.sum()))].tolist()

def fork_candidates(root: "Node", tree: int, answer_at) -> tuple[list[tuple["Node", int]], Tensor, Tensor]:
    """All sampled tokens of one tree as (node, index in it), their log-probs (P,), and where it may be forked, (P,) in
    bool: not at a side branch's first token nor where it was forked before (both are where a node begins, so of those
    only a lone trunk's is allowed), nor from token number answer_at(leaf) of a path on, which begins its answer."""
    places, allowed, seen = [], [], set()
    trunks = [node for node in root.children if node.tree == tree]
    for leaf in (leaf for trunk in trunks for leaf in trunk.leaves()):
        start, answer = 0, answer_at(leaf)
        for node in leaf.path()[1:]:
            if node not in seen:  # a node's first child goes on with what was sampled first: its path decides
                seen.add(node)
                places += [(node, t) for t in range(len(node.tokens))]
                allowed += [start + t < answer and (t > 0 or [node] == trunks) for t in range(len(node.tokens))]
            start += len(node.tokens)
    logps = torch.tensor([node.logps[t] for node, t in places], dtype=torch.float64)
    return places, logps, torch.tensor(allowed, dtype=torch.bool)

def split(node: "Node", t: int) -> "Node":
    """Cut a node before its token t: it keeps what comes before, a new child gets the rest and all that hung below,
    each with its part of the KV and hidden states. Returns the node that begins with token t; a fork is its sibling."""
    if t == 0:
        return node
    rest = Node(node, node.tokens[t:], node.sampled[t:], node.logps[t:], node.children[:], node.tree, node.reward)
    for child in rest.children:
        child.parent = rest
    if node.kv is not None:
        (node.kv, rest.kv), node.hidden, rest.hidden = node.kv.tensor_split([t], -2), node.hidden[:t], node.hidden[t:]
    node.tokens, node.sampled, node.logps = node.tokens[:t], node.sampled[:t], node.logps[:t]
    node.children, node.reward = [rest], None
    return rest

def eptree(play, groups: list[tuple], M: int, N: int, L: int, T: int, answer_at, choose=fork_points) -> None:
    """TreeRL's search below each root of `groups`, (problem, root) pairs, all together. M independent chains from each
    root are the trunks of its trees; then L times, in each tree the N most uncertain tokens are drawn afresh T times
    and completed: at most M (1 + N L T) leaves, by L + 1 parallel generations; N = 0 gives chains. play(starts) adds to
    each (problem, node, tree) a child, Node(node, tree=tree), with tokens and log-probs to the end. answer_at(problem,
    leaf): from which token of the leaf's path after the prompt on there is no fork. choose: as fork_points."""
    play([(problem, root, tree) for problem, root in groups for tree in range(M)])
    for _ in range(L if N else 0):
        starts = []
        for problem, root in groups:
            for tree in range(M):
                places, logps, allowed = fork_candidates(root, tree, functools.partial(answer_at, problem))
                cuts = [split(*places[i]) for i in sorted(choose(logps, N, allowed), reverse=True)]  # the last first
                starts += [(problem, node.parent, tree) for node in cuts for _ in range(T)]
        if starts:
            play(starts)
# ------------------------------------------- the token tree (a picture: tutorial.md, 0.2), and sampling with shared KV
@dataclass(eq=False)
class Node:
    """A run of tokens below one parent. A root is a prompt; other nodes are agent steps (Tree-GRPO), segments between
    forks (TreeRL), a prompt's end or an action (GraphGPO). `kv`, `hidden`: of its forwarded tokens, while in use."""
    parent: "Node | None" = None
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # written by the policy, so carrying loss
    logps: list[float] = field(default_factory=list)  # the sampler's log-prob at temperature 1; 0 where not sampled
    children: list["Node"] = field(default_factory=list)
    tree: int = 0  # which of the prompt's trees, that is: from whose trunk it hangs
    reward: float | None = None  # of a leaf
    kv: Tensor | None = None  # (layers, 2, KV heads, tokens, head size)
    hidden: Tensor | None = None  # (tokens, width), after the last norm; of a root the last token's only
    def __post_init__(self):
        if self.parent is not None:
            self.parent.children.append(self)
    def add(self, tokens: list[int], sampled: bool = False, logps: list[float] | None = None) -> None:
        self.tokens += tokens
        self.sampled += [sampled] * len(tokens)
        self.logps += logps or [0.0] * len(tokens)
    def path(self) -> list["Node"]:  # from the root to this node
        nodes = [self]
        while nodes[-1].parent:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]
    def below(self) -> list["Node"]:  # this node and all under it, a child with all under it before the next child
        for i, node in enumerate(nodes := [self]):  # it grows on the way
            nodes[i + 1 : i + 1] = node.children
        return nodes
    def leaves(self) -> list["Node"]:
        return [node for node in self.below() if not node.children]
    @property
    def cached(self) -> int:
        return 0 if self.kv is None else self.kv.shape[-2]

def length(nodes: list[Node]) -> int:
    return sum(len(node.tokens) for node in nodes)

def forget(nodes) -> None:  # frees memory; what is needed again is computed again
    for node in nodes:
        node.kv = node.hidden = None

def token_tree(module, query, key, value, attention_mask, scaling, tree, **kwargs):
    """The attention that transformers calls in each layer; `tree` is handed through the model's keyword arguments."""
    return tree(module.layer_idx, query, key, value, scaling), None

def padded(rows: list[list], pad=0) -> list[list]:
    width = max(map(len, rows))
    return [row + [pad] * (width - len(row)) for row in rows]

def full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

def prefill(model, roots: list[Node]) -> None:
    """Compute the KV of each root's prompt, and the hidden state of its last token, in one batch."""
    layers = []
    def attend(layer, q, k, v, scaling):  # causal, so the padding on the right is never seen
        layers.append(torch.stack([k, v]))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)
    ids = torch.tensor(padded([root.tokens for root in roots]), device=model.device)
    hidden = model.model(ids, use_cache=False, tree=attend).last_hidden_state
    for i, root in enumerate(roots):
        root.kv = torch.stack([kv[:, i, :, : len(root.tokens)] for kv in layers])
        root.hidden = hidden[i, len(root.tokens) - 1 :][:1].clone()

MOST_SCORES = 2**28  # elements of a score matrix in the sampler
class Lanes:
    """Branches in flight: a row per prompt, a lane per branch. It is itself the attention of every layer.
    A prompt's KV is held once per row (`shared`); each lane has a block of its own (`own`) with its own length. A new
    token attends to both: two score matrices, one softmax. Query heads are folded onto their KV head, so shared keys
    are read once for all lanes of a row. A branch recomputes nothing: its block is copied from the nodes above it."""
    def __init__(self, model, nodes: list[Node]):
        self.model, rows = model, {}
        for node in nodes:
            rows.setdefault(node.path()[0], []).append(node)
        self.set_grid(list(rows.values()))
        paths = [node.path()[1:] if node else [] for node in self.grid]
        self.length = [sum(node.cached for node in path) for path in paths]
        self.new = [[t for node in path for t in node.tokens[node.cached :]] for path in paths]  # not forwarded so far
        self.prompt = torch.tensor([root.cached for root in rows], device=model.device)
        first, room = next(iter(rows)), max(n + len(new) for n, new in zip(self.length, self.new)) + 32
        layers, two, heads, _, size = first.kv.shape
        self.shared = first.kv.new_zeros(layers, two, len(rows), heads, max(root.cached for root in rows), size)
        self.own = first.kv.new_zeros(layers, two, len(rows), heads, self.W, room, size)
        self.hidden = first.hidden.new_zeros(len(paths), room + 1, first.hidden.shape[-1])  # [b, j]: after j own tokens
        self.hidden[:, 0] = torch.cat([root.hidden for root in rows]).repeat_interleave(self.W, 0)
        for r, root in enumerate(rows):
            self.shared[:, :, r, :, : root.cached] = root.kv
        for b, path in enumerate(paths):
            at = 0
            for node in (node for node in path if node.cached):
                at, start = at + node.cached, at
                self.own[:, :, b // self.W, :, b % self.W, start:at] = node.kv
                self.hidden[b, start + 1 : at + 1] = node.hidden
    def set_grid(self, rows: list[list]) -> None:
        self.W, self.grid = max(map(len, rows)), [node for row in padded(rows, None) for node in row]
    def forward(self, new: list[list[int]]) -> int:
        """Run new[b], maybe nothing, through lane b. Returns how many tokens that were."""
        (_, _, R, h, W, room, _), P, device = self.own.shape, self.shared.shape[-2], self.model.device
        B, width, heads = R * W, max(map(len, new)), self.model.config.num_attention_heads
        most = max(1, MOST_SCORES // (B * heads * (P + room + width)))
        if width > most:  # long observations go in piece by piece
            return sum(self.forward([tokens[i : i + most] for tokens in new]) for i in range(0, width, most))
        start, count = torch.tensor([self.length, [len(tokens) for tokens in new]], device=device)[:, :, None]
        self.length = [n + len(tokens) for n, tokens in zip(self.length, new)]
        self.seen = max(self.length)
        if self.seen >= room:  # the last slot is where pads are written, and is never read
            more, room = self.seen - room + 64, self.seen + 64
            self.own, self.hidden = F.pad(self.own, (0, 0, 0, more)), F.pad(self.hidden, (0, 0, 0, more))
        column, lane = torch.arange(width, device=device), torch.arange(B, device=device)[:, None]
        slot = start + column
        to = torch.where(column < count, slot, room - 1)
        block = torch.arange(B * h, device=device).view(R, h, W).mT.reshape(B, h, 1)
        self.to = (block * room + to[:, None]).flatten()  # where in a layer's `own` the new keys go, lane by lane
        later = torch.arange(self.seen, device=device) > slot.view(R, 1, W, 1, width, 1)
        later = later.expand(-1, h, -1, heads // h, -1, -1).reshape(B * h, -1, self.seen)
        beyond = (torch.arange(P, device=device) >= self.prompt[:, None]).repeat_interleave(h, 0)[:, None]
        self.own_mask, self.shared_mask = (self.own.new_zeros(()).where(~m, -torch.inf) for m in (later, beyond))
        position = slot + self.prompt.repeat_interleave(self.W, output_size=B)[:, None]
        out = self.model.model(torch.tensor(padded(new), device=device), None, position, use_cache=False, tree=self)
        self.hidden[lane, to + 1] = out.last_hidden_state
        return sum(map(len, new))
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q: (lanes, heads, new, size), k and v: (lanes, KV heads, new, size). Returns (lanes, new, heads, size)."""
        (B, H, n, D), (_, R, h, P, _), W = q.shape, self.shared[layer].shape, self.W
        for block, new in zip(self.own[layer], (k, v)):
            block.view(-1, D).index_copy_(0, self.to, new.reshape(-1, D))
        (shared_k, shared_v), (own_k, own_v) = self.shared[layer].flatten(1, 2), self.own[layer].flatten(1, 3)
        q = q.reshape(R, W, h, -1).transpose(1, 2).reshape(R * h * W, -1, D)  # by row, KV head, lane
        shared = torch.baddbmm(self.shared_mask, q.view(R * h, -1, D), shared_k.mT, alpha=scaling)
        own = torch.baddbmm(self.own_mask, q, own_k[:, : self.seen].mT, alpha=scaling)
        weights = full_precision(torch.cat([shared.view(len(q), -1, P), own], -1)).softmax(-1).to(v.dtype)
        shared = weights.view(R * h, -1, P + self.seen)[..., :P] @ shared_v
        out = torch.baddbmm(shared.view(q.shape), weights[..., P:], own_v[:, : self.seen])
        return out.view(R, h, W, H // h, n, D).permute(0, 2, 4, 1, 3, 5).reshape(B, n, H, D)
    def store(self, b: int) -> None:
        """Copy what lane b computed to its nodes, from which a later branch starts."""
        at = 0
        for node in self.grid[b].path()[1:]:
            end = min(at + len(node.tokens), self.length[b])
            if node.cached < end - at:
                node.kv = self.own[:, :, b // self.W, :, b % self.W, at:end].clone()
                node.hidden = self.hidden[b, at + 1 : end + 1].clone()
            at = end
    def shrink(self, live: list[int]) -> list[int]:
        """Drop the lanes not in `live` if the batch gets a quarter smaller. Returns where the live ones are now."""
        rows = {r: list(lanes) for r, lanes in itertools.groupby(live, lambda b: b // self.W)}
        if len(rows) * max(map(len, rows.values())) > 0.75 * len(self.grid):
            return live
        kept = torch.tensor(padded(list(rows.values()), live[0]))  # padded with copies that stay idle
        own = self.own.transpose(3, 4)[:, :, kept // self.W, kept % self.W]
        self.own, self.shared = own.transpose(3, 4).contiguous(), self.shared[:, :, list(rows)]
        self.prompt, kept = self.prompt[list(rows)], kept.flatten()
        self.hidden, self.length = self.hidden[kept], [self.length[b] for b in kept.tolist()]
        self.set_grid([[self.grid[b] for b in row] for row in rows.values()])
        return [b for b, node in enumerate(self.grid) if node]

def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token per row of logits (B, V): temperature first (0: the largest), then top-p. Returns (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = probs.sort(-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0  # keeps the token that reaches top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    ends = probs.cumsum(-1, dtype=torch.float64)  # torch.multinomial would draw V random numbers for each token
    at = ends[:, -1:] * torch.rand(len(ends), 1, dtype=ends.dtype, device=ends.device, generator=generator)
    return torch.searchsorted(ends, at, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)

@torch.inference_mode()
def sample(model, nodes: list[Node], limits: list[int], stop, eos: set[int],
           generator: torch.Generator | None, temperature: float, top_p: float, counts: Counter) -> None:
    """Continue the path of each (new, empty) node, all together, until an end token, `stop(tokens)`, or its limit >= 1.
    Tokens above it that have no KV yet (a turn's last token, the observation after it) go in first, in one forward;
    the last token drawn is not forwarded. Adds to counts: forwarded_tokens, generated_tokens, entropy (sum of nats)."""
    roots = [root for root in dict.fromkeys(node.path()[0] for node in nodes) if root.kv is None]
    if roots:
        prefill(model, roots)
    lanes = Lanes(model, nodes)
    counts["forwarded_tokens"] += length(roots) + (lanes.forward(lanes.new) if any(lanes.new) else 0)
    limit = dict(zip(nodes, limits))
    live = [b for b, node in enumerate(lanes.grid) if node]
    while True:
        logits = full_precision(model.lm_head(lanes.hidden[range(len(lanes.grid)), lanes.length]))
        logps = logits.log_softmax(-1)
        tokens = draw(logits, temperature, top_p, generator)
        drawn = logps.gather(-1, tokens[:, None])[:, 0].tolist()
        if not math.isfinite(sum(drawn)):
            raise FloatingPointError("the policy's logits are not finite")
        entropy, tokens, going = (-(logps.exp() * logps).sum(-1)).tolist(), tokens.tolist(), []
        for b in live:
            node = lanes.grid[b]
            node.add([tokens[b]], True, [drawn[b]])
            counts["generated_tokens"] += 1
            counts["entropy"] += entropy[b]
            if tokens[b] in eos or len(node.tokens) >= limit[node] or stop(node.tokens):
                lanes.store(b)
            else:
                going.append(b)
        if not going:
            return
        alive = set(live := lanes.shrink(going))
        new = [node.tokens[-1:] if b in alive else [] for b, node in enumerate(lanes.grid)]
        counts["forwarded_tokens"] += lanes.forward(new)
# ----------------------------------------------------------------------- training: trees packed into one row, the loss
class Sample(NamedTuple):
    """A prompt's part of the loss. `advantages` has a tensor per leaf: one number, or one per sampled token."""
    root: Node
    leaves: list[Node]
    advantages: list[Tensor]
    weight: float  # of the sum over the leaves

class Packed:
    """Trees as one row of their unique tokens. It is itself the attention of every layer.
    A segment is a run of tokens without a branch. Its queries see the keys of its path, which are gathered for all
    segments of like length in one batched call. Path slot j holds the token at position j: visible is j <= position."""
    def __init__(self, samples: list[Sample], device):
        tokens, position, parent, read, logps, segments, index = [], [], [], [], [], [], {}
        for root, items in itertools.groupby(samples, lambda item: item.root):
            kept = {node for item in items for leaf in item.leaves for node in leaf.path()}
            stack = [(root, [])]
            while stack:
                node, above = stack.pop()
                start, children = len(tokens), [node]
                while len(children) == 1:
                    node = children[0]
                    drawn = [j for j, sampled in enumerate(node.sampled) if sampled]
                    index[node] = range(len(read), len(read) + len(drawn))
                    read += [len(tokens) + j for j in drawn]
                    logps += [node.logps[j] for j in drawn]
                    tokens += node.tokens
                    children = [child for child in node.children if child in kept]
                own = list(range(start, len(tokens)))
                path = above + own
                position += range(len(above), len(path))
                parent += [above[-1] if above else 0] + own[:-1]
                segments.append((own, path))
                stack += [(child, path) for child in children]
        self.ids, self.position = torch.tensor([tokens], device=device), torch.tensor([position], device=device)
        self.buckets, self.inverse, at = [], torch.zeros(len(tokens), dtype=torch.long), 0
        segments.sort(key=lambda segment: len(segment[0]))
        while segments:  # those at least half as long as the longest share a call
            width = len(segments[-1][0])
            cut = sum(2 * len(own) < width for own, _ in segments)
            segments, bucket = segments[:cut], segments[cut:]
            for own, _ in bucket:
                self.inverse[own[0] : own[-1] + 1] = torch.arange(at, at + len(own))
                at += width
            queries = torch.tensor([own + own[:1] * (width - len(own)) for own, _ in bucket], device=device)
            keys = torch.tensor(padded([path for _, path in bucket]), device=device)
            visible = torch.arange(keys.shape[1], device=device) <= self.position[0, queries][:, :, None]
            self.buckets.append((queries, keys, visible))
        self.inverse = self.inverse.to(device)
        self.target = self.ids[0, read]  # the tokens that have a log-prob, and the one above each, where it is read
        self.read = torch.tensor([parent[t] for t in read], device=device)
        self.sampler_logps = torch.tensor(logps, device=device)
        self.paths = []  # per prompt (leaves, length): where in the log-probs a leaf's sampled tokens are, and a mask
        for leaves in (item.leaves for item in samples):
            rows = torch.tensor(padded([[i for n in leaf.path() for i in index[n]] for leaf in leaves], -1)).to(device)
            self.paths.append((rows.clamp(min=0), rows >= 0))
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q: (1, heads, tokens, size), k and v: (1, KV heads, tokens, size). Returns (1, tokens, heads, size)."""
        H, D, h, dtype = q.shape[1], q.shape[3], k.shape[1], v.dtype
        if layer == 0:  # one mask for all layers; of a boolean one SDPA would make, and keep, one in each
            self.masks = [v.new_zeros(1).where(m.repeat(1, H // h, 1), -torch.inf)[:, None] for *_, m in self.buckets]
        q, k, v = (full_precision(x[0].transpose(0, 1)) for x in (q, k, v))  # in which their gradients are summed
        out = []
        for (queries, keys, _), mask in zip(self.buckets, self.masks):  # x[keys] would sum them in any order
            (n, width), P = queries.shape, keys.shape[1]
            folded = q.index_select(0, queries.flatten()).view(n, width, h, -1, D).movedim(1, 3).reshape(n, h, -1, D)
            ks, vs = (x.index_select(0, keys.flatten()).view(n, P, h, D).transpose(1, 2) for x in (k, v))
            o = F.scaled_dot_product_attention(folded.to(dtype), ks.to(dtype), vs.to(dtype), mask, scale=scaling)
            out.append(o.view(n, h, H // h, width, D).movedim(3, 1).reshape(n * width, H, D))
        return torch.cat(out).index_select(0, self.inverse)[None]

def packed_logps(model, packed: Packed) -> Tensor:
    """Log-prob at temperature 1 of each sampled token of packed trees, (tokens,), by one forward over unique tokens, in
    the order of packing: packed.paths tells where each leaf's are. The head runs only where one of them is predicted,
    in chunks that the backward pass computes again, so that (tokens x vocabulary) logits never exist at once."""
    hidden = model.model(packed.ids, position_ids=packed.position, use_cache=False, tree=packed).last_hidden_state
    def logps(hidden, target):
        return -F.cross_entropy(full_precision(model.lm_head(hidden)), target, reduction="none")
    rows = max(1, 2**26 // model.config.vocab_size)
    chunks = list(zip(hidden[0].index_select(0, packed.read).split(rows), packed.target.split(rows)))
    if len(chunks) == 1:
        return logps(*chunks[0])
    return torch.cat([torch.utils.checkpoint.checkpoint(logps, *chunk, use_reentrant=False) for chunk in chunks])

def grpo_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, advantages: Tensor, mask: Tensor,
              clip_low: float = 0.2, clip_high: float = 0.2, kl_coef: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss with a KL penalty (Tree-GRPO, Eq. 8, with its sign turned: to be minimised).
    Per sampled token -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef (exp(q - p) - (q - p) - 1), where
    r = exp(logp - old_logp), p = logp, q = ref_logp. Returns the sum over sequences of the mean over each sequence's
    own sampled tokens (0 for one without any): divide it by the prompt's sequences, then by the prompts of the step.
    logp, old_logp, ref_logp, mask: (sequences, length), mask true on sampled tokens; nothing else is read. advantages:
    (sequences,), (sequences, 1) or (sequences, length). ref_logp None: no KL, ValueError unless kl_coef is 0. The stats
    are sums over sampled tokens, to be added over calls: tokens, clipped (the clip takes their gradient), kl (nats)."""
    if ref_logp is None and kl_coef:
        raise ValueError("kl_coef needs ref_logp")
    mask = mask.bool()
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    advantages = advantages.to(logp.dtype).expand_as(logp).masked_fill(~mask, 0)
    ratio = (logp - old_logp).masked_fill(~mask, 0).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    gap = (logp.detach() if ref_logp is None else ref_logp).sub(logp).masked_fill(~mask, 0)
    kl = gap.exp() - gap - 1
    loss = -torch.minimum(plain, clipped) + (kl_coef * kl if kl_coef else 0)
    stats = {"tokens": mask.sum(), "clipped": (clipped < plain).sum(), "kl": kl.detach().sum()}
    return (loss.sum(-1) / mask.sum(-1).clamp(min=1)).sum(), stats

def micro_batches(samples: list[Sample], max_tokens: int) -> list[list[Sample]]:
    """Consecutive samples that are packed into at most max_tokens tokens, or a single larger one."""
    batches, tokens = [], math.inf
    for item in samples:
        size = length({node for leaf in item.leaves for node in leaf.path()})
        tokens += size - (len(item.root.tokens) if batches and batches[-1][-1].root is item.root else 0)
        if tokens > max_tokens:
            batches, tokens = [*batches, []], size
        batches[-1].append(item)
    return batches

def update(model, reference, optimizer, samples: list[Sample], args) -> dict[str, float | None]:
    """One GRPO step per epoch on a batch. Returns loss, kl (None: no reference), clip_fraction, grad_norm, sampler_gap,
    the sampler's log-probs against the trainer's (None: no step). FloatingPointError before a step breaks weights."""
    if not args.kl_coef:  # without KL a prompt whose advantages are all 0 has no gradient
        samples = [item for item in samples if any(a.any() for a in item.advantages)]
    batches = [(batch, Packed(batch, model.device)) for batch in micro_batches(samples, args.micro_tokens)]
    old, ref, sums = [], [], Counter(loss=0.0, norm=0.0)
    model.train()  # gradient checkpointing asks for it; a Qwen has no dropout
    for epoch in range(args.epochs if batches else 0):
        for i, (batch, packed) in enumerate(batches):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                logps, loss = packed_logps(model, packed), 0.0
                if epoch == 0:  # no step taken yet, so these are the old policy's
                    old.append(logps.detach())
                    ref.append(packed_logps(reference, packed).detach() if reference else None)
                    sums.update(gap=float((old[i] - packed.sampler_logps).abs().sum()), drawn=len(logps))
            for item, (index, mask) in zip(batch, packed.paths):
                A = torch.nn.utils.rnn.pad_sequence([a.reshape(-1) for a in item.advantages], True).to(logps.device)
                logp = logps.index_select(0, index.flatten()).view_as(index)
                part, stats = grpo_loss(logp, old[i][index], ref[i][index] if reference else None, A, mask,
                                        args.clip_low, args.clip_high, args.kl_coef)
                loss = loss + part * item.weight
                sums.update({name: float(value) for name, value in stats.items()})
            loss.backward()
            packed.masks = None  # large, and made anew by the next forward; other micro-batches need the room
            sums["loss"] += float(loss.detach()) / args.epochs
        sums["norm"] += (norm := float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))) / args.epochs
        if not math.isfinite(sums["loss"] + norm):
            raise FloatingPointError(f"loss {sums['loss']}, gradient norm {norm}")
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    tokens, drawn = max(1, sums["tokens"]), max(1, sums["drawn"])
    return {"loss": sums["loss"], "kl": sums["kl"] / tokens if reference else None, "grad_norm": sums["norm"],
            "clip_fraction": sums["clipped"] / tokens, "sampler_gap": sums["gap"] / drawn if batches else None}
# ------------------------------------------------------------------------------------ problems, solutions, models
REQUEST = "Solve the problem step by step and put the final answer in \\boxed{}.\n\n"
NUMBER = re.compile(  # x =, sign, number, a unit that does not change it
    r"(?:[A-Za-z ]*(?:[=:]|\bis\b))?\s*(?P<sign>[-−+]?)\s*"
    r"(?P<value>(?=\.?[0-9])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+|/0*[1-9][0-9]*)?)\s*"
    r"(?!(?i:hundred|thousand|[mbtr]+illion|dozen|squared|cubed|and|or|times|plus|minus|k|bn)\b)"
    r"(?:[A-Za-z%°][A-Za-z%°. /]*)?\.?")

class Problem(NamedTuple):
    text: str
    answer: str
    latex: bool = False  # compared by math_verify, as in MATH; else as numbers, as in GSM8K

def final_answer(text: str, latex: bool) -> tuple[int, str | None]:
    """Where the final answer of a solution begins, and what it says: the last \\boxed{...} or, if numbers are asked for
    and there is none, what follows the last ####. (len(text), None) without either, None if a brace is not closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        start = -1 if latex else text.rfind("####")
        return (start, text[start + 4 :].split("\n")[0].strip()) if start >= 0 else (len(text), None)
    box, depth = text[start:].split("box", 1)[1].removeprefix("ed").lstrip(), 0
    if box[:1] != "{":  # \boxed 2, of which there are some in MATH
        return start, box.split("$")[0].strip() or None
    for brace in re.finditer(r"\\.|[{}]", box, re.DOTALL):  # those after a backslash do not count
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return start, box[1 : brace.start()].strip()
    return start, None

def number(text: str) -> Fraction | None:
    """The value of a text that says one number, be it with commas, a currency sign, "x =" or a unit around it."""
    text = re.sub(r"(?<![0-9])\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2", text.replace("{,}", ",").strip("* \n"))
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", re.sub(r"(US)?\\?[$€£¥]|\\[,!;: ]|\\(?=%)", "", text))
    match = NUMBER.fullmatch(text.strip()) if len(text) < 100 else None
    return match and Fraction(match["value"].replace(",", "")) * (-1 if match["sign"] in ("-", "−") else 1)

def meaning(answer: str | None, latex: bool) -> Fraction | str | None:
    """What answers are compared by: a number, or LaTeX without spaces; None for no answer."""
    return None if answer is None else "".join(answer.split()) if latex else number(answer)

def is_right(answer: str | None, problem: Problem) -> bool:
    """Does a final answer equal the problem's, as found within seconds? Nothing of it is ever evaluated as code."""
    found, gold = (meaning(a, problem.latex) for a in (answer, problem.answer))
    if found is None or found == gold or not problem.latex or len(found) > 1000:
        return found is not None and found == gold
    from math_verify import LatexExtractionConfig, parse, verify
    config = [LatexExtractionConfig()]  # its other configuration, of plain expressions, would go through eval
    gold, found = (parse(f"${a.rstrip('.')}$", config, parsing_timeout=2) for a in (problem.answer, answer))
    return verify(gold, found, timeout_seconds=2)

class Solver:
    """The policy at its problems: trees of solutions of many at a time; and what train() needs of the method."""
    def __init__(self, model, tokenizer, args, training: list[Problem], held_out: list[Problem]):
        self.model, self.tokenizer, self.args, self.training, self.held_out = model, tokenizer, args, training, held_out
        eos = model.generation_config.eos_token_id
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]  # of a text, of a turn in a chat
        self.text = functools.partial(tokenizer.decode, skip_special_tokens=True)
        self.eos = {*ends, *(eos if isinstance(eos, list) else [eos])}
    def solution(self, leaf: Node) -> list[int]:  # the tokens of its path after the prompt
        return [token for node in leaf.path()[1:] for token in node.tokens]
    def answer(self, problem: Problem, leaf: Node) -> tuple[int, str | None]:  # where in the text, what it says
        return final_answer(self.text(self.solution(leaf)), problem.latex)
    def root(self, problem: Problem) -> Node:  # a model without chat template gets the built-in problems bare
        told = REQUEST * bool(self.tokenizer.chat_template or self.args.data)
        return prompt_root(self.model, self.tokenizer, told + problem.text)
    def answer_at(self, problem: Problem, leaf: Node) -> int:  # the number of the solution's token that begins it
        tokens, (start, _) = self.solution(leaf), self.answer(problem, leaf)
        return bisect.bisect_right(range(len(tokens)), start, key=lambda t: len(self.text(tokens[: t + 1])))
    def play(self, starts: list[tuple[Problem, Node, int]], generator, temperature: float, top_p: float, counts):
        """For each (problem, node, tree) a branch; its reward is 1 if it ends within the limits and is right, or 0."""
        nodes, context = [Node(node, tree=tree) for _, node, tree in starts], self.model.config.max_position_embeddings
        limits = [min(self.args.max_tokens - length(node.path()[1:]), context - length(node.path())) for node in nodes]
        sample(self.model, nodes, limits, lambda tokens: False, self.eos, generator, temperature, top_p, counts)
        for (problem, _, _), node in zip(starts, nodes):
            node.reward = float(node.tokens[-1] in self.eos and is_right(self.answer(problem, node)[1], problem))
    def search(self, problems: list[Problem], rng: random.Random, counts: Counter) -> list[tuple[Problem, Node]]:
        """The trees of each problem, found by --method: (problem, root) pairs."""
        args, generator = self.args, torch.Generator(self.model.device).manual_seed(rng.getrandbits(60))
        def anywhere(logps: Tensor, n: int, allowed: Tensor) -> list[int]:
            return rng.sample(places := allowed.nonzero().flatten().tolist(), min(n, len(places)))
        groups = [(problem, self.root(problem)) for problem in problems]
        for i in range(0, len(groups), args.at_once):
            part = groups[i : i + args.at_once]
            eptree(lambda starts: self.play(starts, generator, args.temperature, args.top_p, counts), part,
                   args.M, args.N if args.method != "chainrl" else 0, args.L, args.T, self.answer_at,
                   anywhere if args.method == "random" else fork_points)
            forget(node for _, root in part for node in root.below())
        return groups
    def rollout(self, step: int):
        """The trees of one training step: ((problem, root) pairs, what to log of them)."""
        args, rng, counts = self.args, random.Random(f"{self.args.seed}/{step}"), Counter()
        built_in = (make_problem(rng, args.ops, False) for _ in range(args.prompts))
        groups = self.search(batch_of(self.training, step, args) or list(built_in), rng, counts)
        won = [[leaf.reward for leaf in root.leaves()] for _, root in groups]
        counts["entropy"] /= counts["generated_tokens"]
        reward = sum(map(sum, won)) / sum(map(len, won))
        return groups, {"reward": reward, "success": reward, "pass_rate": sum(map(any, won)) / len(won), **counts}
    def process_rewards(self, root: Node) -> dict[Node, float]:
        """Each node's advantage: R(s), or of independent chains the leave-one-out advantage."""
        nodes = root.below()
        if self.args.method == "chainrl":
            return dict(zip(nodes, [0.0, *leave_one_out(torch.tensor([leaf.reward for leaf in nodes[1:]])).tolist()]))
        at = {node: i for i, node in enumerate(nodes)}
        rewards = {i: node.reward for i, node in enumerate(nodes) if not node.children}
        return dict(zip(nodes, step_rewards([at.get(node.parent, -1) for node in nodes], rewards).tolist()))
    def credit(self, step: int, groups) -> list[Sample]:
        """--keep leaves of each prompt, at random, a right one among them if any. Every token of a segment s carries
        R(s), and each leaf's path is a sequence of its own, so s counts once for each kept leaf below it: with all
        kept its weight is |L(s)| R(s) = sqrt(|L(s)|) (G_A(s) + L_A(s)), over the paths' lengths."""
        rng, samples = random.Random(f"{self.args.seed}/{step}/keep"), []
        for _, root in groups:
            leaves, R = root.leaves(), self.process_rewards(root)
            kept, right = rng.sample(leaves, min(self.args.keep, len(leaves))), [leaf for leaf in leaves if leaf.reward]
            if right and not any(leaf.reward for leaf in kept):
                kept[0] = rng.choice(right)
            advantages = [torch.tensor([R[node] for node in leaf.path()[1:] for _ in node.tokens]) for leaf in kept]
            samples.append(Sample(root, kept, advantages, 1 / len(kept) / len(groups)))
        return samples
    def explore(self) -> dict[str, float]:
        """Search only: pass rate (some leaf is right), accuracy (share of right leaves), distinct answers by tokens."""
        rng, counts, shares, distinct = random.Random(self.args.seed), Counter(), [], 0
        for i in tqdm(range(0, len(self.held_out), self.args.prompts), "search", unit="batch"):
            for problem, root in self.search(self.held_out[i : i + self.args.prompts], rng, counts):
                leaves = root.leaves()
                shares.append(sum(leaf.reward for leaf in leaves) / len(leaves))
                distinct += len({meaning(self.answer(problem, leaf)[1], problem.latex) for leaf in leaves} - {None})
        passed, n, tokens = sum(map(bool, shares)), len(shares), counts["generated_tokens"]
        return {"event": "search", "step": 0, "problems": n, "pass_rate": passed / n, "accuracy": sum(shares) / n,
                "generated_tokens": tokens, "distinct_answers_per_1000_tokens": 1000 * distinct / tokens}
    def picture(self, groups, samples: list[Sample]) -> tuple[str, str]:
        """("tree.md", Mermaid): a prompt's trees, their segments in green or red by the sign of R(s)."""
        mixed = [i for i, item in enumerate(samples) if len({leaf.reward for leaf in item.root.leaves()}) > 1] or [0]
        problem, root = groups[mixed[0]]
        nodes, R, name = root.below(), self.process_rewards(root), "A" if self.args.method == "chainrl" else "R(s)"
        words = [problem.text, *(self.text(node.tokens) for node in nodes[1:])]
        ends, kept = {None: "", 0.0: ", wrong", 1.0: ", right"}, samples[mixed[0]].leaves
        notes = [f"{name} = {R[node]:+.2f}{ends[node.reward]}" + ", not kept" * (not node.children and node not in kept)
                 for node in nodes[1:]]
        return "tree.md", mermaid(nodes, words, ["", *notes], [R[node] for node in nodes])

OPS = [f"{sign}{n}" for sign in "+-" for n in range(1, 6)] + [f"*{n}" for n in range(2, 6)]
def result(value: int, op: str) -> int:
    return (value * int(op[1:]) if op[0] == "*" else value + int(op)) % 11

def make_problem(rng: random.Random, ops: int, held_out: bool) -> Problem:
    """A calculation modulo 11, from the left to the right, of 5 to `ops` operations. A fifth of all is held out."""
    while True:
        start, steps = rng.randrange(11), [rng.choice(OPS) for _ in range(rng.randint(5, ops))]
        text = f"Modulo 11, from {start}: {' '.join(steps)}\n"
        if (random.Random(text).random() < 0.2) == held_out:
            return Problem(text, str(functools.reduce(result, steps, start)))

def demonstration(problem: Problem, rng: random.Random) -> str:
    """The solution of one who has learned some products wrong: each has a rate of its own, from 0.1 to 0.9, at which a
    wrong value, always the same, is given for it. So much of what this teaches is wrong, for reward to mend."""
    lines, (value, *steps) = [], re.findall(r"(?<=from )\d+|[-+*]\d", problem.text)
    for step in steps:
        fact = random.Random(f"{value}{step}")
        rate, wrong = fact.uniform(0.1, 0.9), (result(int(value), step) + fact.randrange(1, 11)) % 11
        found = wrong if step[0] == "*" and rng.random() < rate else result(int(value), step)
        lines, value = [*lines, f" {value} {step} = {found}\n"], found
    return "".join(lines) + f"#### {value}"

def read_problems(path: str) -> list[Problem]:
    """GSM8K (question; answer ending in #### 42), MATH and MATH-500 (problem or Question; answer or Answer, or a
    solution with \\boxed{...}), JSON lines or a list. BadInput names the file and the line, or the missing package."""
    def parse(record: dict) -> list[Problem]:
        latex = "question" not in record
        text = record.get("problem", record.get("Question")) if latex else record["question"]
        answer = record.get("answer", record.get("Answer"))
        boxed = final_answer(answer or record["solution"], latex)[1]
        answer = answer.strip() if boxed is None and latex else boxed
        if not text.strip() or (boxed is None and not answer if latex else number(answer) is None):
            raise ValueError
        return [Problem(text, answer, latex)] if answer else []  # MATH has some with an empty box
    found = read_records(path, parse, "GSM8K (question, answer ending in ####) or MATH (problem, answer or solution)")
    if any(problem.latex for problem in found) and not importlib.util.find_spec("math_verify"):
        raise BadInput(f"--data {path}: its answers are compared by a package; pip install math-verify")
    return found

def read_records(path: str, parse, wanted: str) -> list:
    """The items that parse(record) lists for each record of a file, a JSON list or JSON lines. BadInput names the file,
    and the line of a record that is no JSON or that parse fails on; `wanted` says what such a record should be."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--data {path}: {getattr(error, 'strerror', 'not UTF-8 text')}; give a data file") from None
    found, start, at, end = [], 0, 0, len(text)
    if text.lstrip()[:1] == "[":
        at, end = text.index("[") + 1, len(text) - text.endswith("]")
    try:
        while (start := re.compile(r"[\s,]*").match(text, at).end()) < end:  # record by record, to know their lines
            record, at = json.JSONDecoder().raw_decode(text, start)
            found += parse(record)
        if end == len(text) and text.lstrip()[:1] == "[":
            raise json.JSONDecodeError("the list is not closed", text, end)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:  # JSON's own is a ValueError
        line = getattr(error, "lineno", text.count("\n", 0, start) + 1)
        raise BadInput(f"--data {path}, line {line}: this is no whole JSON record of {wanted}") from None
    if len(found) < 2:
        raise BadInput(f"--data {path}: {len(found)} records of use; give two or more, to train on and to hold out")
    return found

def batch_of(data: list, step: int, args) -> list:
    """A training step's part of the data, or [] if there is none: each pass over it is in an order of its own."""
    numbers, n = range(step * args.prompts, (step + 1) * args.prompts), len(data)
    orders = {e: random.Random(f"{args.seed}/{e}/data").sample(range(n), n) for e in {i // n for i in numbers if n}}
    return [data[orders[i // n][i % n]] for i in numbers if n]

def encode(tokenizer, text: str) -> list[int]:  # JSON may hold half of a surrogate pair
    return tokenizer(text.encode("utf-8", "replace").decode(), add_special_tokens=False)["input_ids"]

def prompt_root(model, tokenizer, text: str) -> Node:
    """A new root with a prompt, in the model's chat template if it has one. BadInput if the context has no room."""
    context = model.config.max_position_embeddings
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    root = Node()
    root.add(encode(tokenizer, text))
    if len(root.tokens) >= context:
        raise BadInput(f"--model: its context of {context} tokens is too short for {text[-60:]!r}; take another")
    return root

def load_model(path: str, device: torch.device, flag: str = "--model"):
    """Model, its attention being token_tree, and tokenizer, from a hub id or a folder. BadInput blames `flag`."""
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    AttentionInterface.register("token_tree", token_tree)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="token_tree")
        if not tokenizer("a")["input_ids"]:
            raise ValueError("the tokenizer is missing")
    except Exception as error:  # noqa: BLE001 (no such folder, no weights, no network, an unknown architecture ...)
        raise BadInput(f"{flag} {path}: no model and tokenizer to be loaded there ({str(error)[:150]})") from None
    if model.config.model_type not in ("qwen2", "qwen3") or set(model.config.layer_types) != {"full_attention"}:
        raise BadInput(f"{flag} {path}: take a Qwen2, Qwen2.5 or Qwen3 with full attention in all layers")
    return model.to(device).eval(), tokenizer

def save_tiny_model(folder: Path, tokens: list[str], seed: int) -> None:
    """A Qwen2 of 0.5M parameters with random weights, and a Qwen tokenizer of single bytes and the given `tokens`."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, logging
    logging.disable_progress_bar()
    tokenizer = Qwen2Tokenizer({t: i for i, t in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}, [])
    tokenizer.add_tokens(tokens)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True, eos_token_id=0,
        initializer_range=0.08)  # at the usual 0.02 so small a model stays on a plateau for hundreds of steps
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def warm_start(model, paths: list[list[Node]], args, lr: float = 3e-3) -> None:
    """Supervised steps on all demonstrations (paths to a leaf): policy gradient with advantage 1 is imitation."""
    n = len(paths) // max(1, args.sft_steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in tqdm(range(args.sft_steps), "warm start", unit="step"):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20, (1 - step / args.sft_steps) / 0.3)
        samples = [Sample(path[0], path[-1:], [torch.ones(())], 1 / n) for path in paths[n * step : n * (step + 1)]]
        update(model, None, optimizer, samples, dataclasses.replace(args, kl_coef=0.0, epochs=1))

def calculator_model(args, device: torch.device, folder: Path):
    """The tiny model, warm-started on demonstrations of the built-in task. It is left in `folder`."""
    words = [*OPS, *(f"{op} =" for op in OPS), *map(str, range(11))]  # what decides a line's result is in two tokens
    temporary = folder.with_suffix(".tmp")  # until it is warm-started
    save_tiny_model(temporary, [f" {word}" for word in words] + ["Modulo 11, from", ":", "\n", "####"], args.seed)
    model, tokenizer = load_model(str(temporary), device)
    rng, paths = random.Random(f"{args.seed}/demonstrations"), []
    for _ in range(32 * args.sft_steps):  # 32 for each step
        problem = make_problem(rng, args.ops, False)
        node = Node(prompt_root(model, tokenizer, problem.text))
        node.add([*encode(tokenizer, demonstration(problem, rng)), tokenizer.eos_token_id], sampled=True)
        paths.append(node.path())
    warm_start(model, paths, args)
    model.save_pretrained(temporary)
    temporary.rename(folder)
    return model, tokenizer
# -------------------------------------------------------------------------------------------------- the training loop
def save_checkpoint(out: Path, step: int, model, tokenizer, optimizer, args) -> None:
    """The state after `step` steps, renamed when whole; random states and the place in the data follow from step."""
    folder, temporary = out / f"checkpoint-{step:06d}", out / "checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    torch.save({"script": Path(__file__).name, "step": step, "args": vars(args), "optimizer": optimizer.state_dict()},
               temporary / "state.pt")
    temporary.rename(folder)
    for old in set(out.glob("checkpoint-*")) - {folder}:
        shutil.rmtree(old)

def resume_run(args, given: set[str]):
    """--resume -> (the run's own arguments, its newest checkpoint's folder and state). Raises BadInput."""
    try:
        folder = max(Path(args.resume).glob("checkpoint-*/state.pt")).parent
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        script, saved = state["script"], state["args"]
    except Exception:  # noqa: BLE001 (there is none, or it fails in one of many ways)
        raise BadInput(f"--resume {args.resume}: no whole checkpoint there; give an earlier run's folder") from None
    if script != Path(__file__).name:
        raise BadInput(f"--resume {args.resume}: this is a run of {script}; continue it with that script")
    run = saved | {"out": args.resume, "resume": args.resume} | {n: vars(args)[n] for n in given & {"steps", "device"}}
    if differs := [name for name in sorted(given) if getattr(args, name) != run.get(name)]:
        raise BadInput(f"--{differs[0].replace('_', '-')}: this run began with {run.get(differs[0])!r}; leave it out")
    return type(args)(**run), str(folder), state

def read_metrics(out: Path, last_step: float = math.inf) -> list[dict]:
    """The rows of metrics.jsonl up to a step, without a line that a killed run left unfinished."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if line.endswith("}") and (row := json.loads(line))["step"] <= last_step]

def train(args, state: dict | None, model, policy, reference, tokenizer, rollout, credit, evaluate, picture) -> None:
    """The loop of all three scripts; what a method does in its own way comes in as functions: rollout(step) -> (groups,
    what to log), credit(step, groups) -> samples for the loss, evaluate() -> what to log, picture(groups, samples) ->
    (file name, Mermaid). `policy` samples: `model`, or its copy in bfloat16. state: a checkpoint's; None: a new run."""
    out, first, interrupts = Path(args.out), state["step"] if state else 0, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    def log(*rows: dict, name: str = "metrics.jsonl", mode: str = "a") -> None:
        with open(out / name, mode) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    def measure(step: int) -> None:
        log(row := {"event": "eval", "step": step, **evaluate()})
        tqdm.write(f"step {step}: held-out success {row['success']:.3f} sampled, {row['greedy_success']:.3f} greedy")
    if state:
        optimizer.load_state_dict(state["optimizer"])
        log(*read_metrics(out, first), name="metrics.tmp", mode="w")
        (out / "metrics.tmp").replace(out / "metrics.jsonl")
    else:
        log()  # the file is there before the checkpoint
        save_checkpoint(out, 0, model, tokenizer, optimizer, args)
    if not read_metrics(out):
        measure(0)
    bar = tqdm(range(first, args.steps), "training", initial=first, total=args.steps, unit="step")
    def interrupted(*signalled) -> None:  # by Ctrl-C: finish the step, save and exit; by a second one: exit at once
        signal.default_int_handler(*signalled) if interrupts else interrupts.append(bar.set_description("stopping"))
    before = signal.signal(signal.SIGINT, interrupted)
    for step in bar:
        began = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup))
        groups, row = rollout(step)
        samples = credit(step, groups)
        row = {"event": "train", "step": step + 1, **row, **update(model, reference, optimizer, samples, args)}
        for copied, master in zip(policy.parameters(), model.parameters() if policy is not model else ()):
            copied.data.copy_(master.data)
        row.update(lr=lr, seconds=time.perf_counter() - began)
        log(row)
        name, text = picture(groups, samples)
        (out / name).write_text(text, encoding="utf-8", errors="replace")
        bar.set_postfix_str(f"reward {row['reward']:.2f}, {row['generated_tokens'] / row['seconds']:.0f} tokens/s")
        last = step + 1 == args.steps
        if args.eval_every and (step + 1) % args.eval_every == 0:
            measure(step + 1)
        if last or interrupts or (step + 1) % args.save_every == 0:
            save_checkpoint(out, step + 1, model, tokenizer, optimizer, args)
        if interrupts and not last:
            bar.close()
            raise KeyboardInterrupt(f"stopped after step {step + 1}; go on with --resume {out}")
    signal.signal(signal.SIGINT, before)
    if read_metrics(out)[-1]["event"] == "train":
        measure(max(first, args.steps))
    model.save_pretrained(out / "final")
    tokenizer.save_pretrained(out / "final")

def held_out_success(agent) -> dict[str, float]:
    """Share of the held-out tasks that are solved by one chain each, at temperature 1 and greedily."""
    right, n = Counter(), agent.args.eval_batch
    for name, temperature in (("success", 1.0), ("greedy_success", 0.0)):
        generator = torch.Generator(agent.model.device).manual_seed(0)
        for i in range(0, len(agent.held_out), n):
            starts = [(task, agent.root(task), 0) for task in agent.held_out[i : i + n]]
            agent.play(starts, generator, temperature, 1.0, Counter())
            right[name] += sum(root.leaves()[0].reward > 0.5 for _, root, _ in starts)
    return {name: solved / len(agent.held_out) for name, solved in right.items()}

def mermaid(nodes: list[Node], words: list[str], notes: list[str], values: list[float | None]) -> str:
    """A tree, parents first, as a Mermaid diagram: words and a note in each node, green or red by its value's sign."""
    lines = ["```mermaid", "flowchart TD"]
    for i, (node, text, note, value) in enumerate(zip(nodes, words, notes, values)):
        text = "".join(f"#{ord(c)};" if c in '#"<>&`[]{}|\\' or c < " " else c for c in " ".join(text.split())[:160])
        color = "fff" if value is None else "cfc" if value > 1e-6 else "fcc" if value < -1e-6 else "eee"
        lines += [f'    n{i}["{text}{note and "<br>" + note}"]', f"    style n{i} fill:#{color},color:#000"]
        trunk = f"|tree {node.tree + 1}|" * (node.parent is nodes[0])
        lines += [f"    n{nodes.index(node.parent)} -->{trunk} n{i}"] if i else []
    return "\n".join([*lines, "```", ""])

def summary(out: Path, *counted: str) -> str:
    """The closing lines of a run, from its metrics; `counted` are the columns to add up."""
    evals, steps = ([row for row in read_metrics(out) if row["event"] == event] for event in ("eval", "train"))
    gains = (f"{evals[0][name]:.3f} -> {evals[-1][name]:.3f} {words}"
             for name, words in (("success", "sampled (T = 1)"), ("greedy_success", "greedy")))
    totals = ", ".join(f"{sum(row[name] for row in steps):,} {name.replace('_', ' ')}" for name in counted)
    return (f"held-out success {', '.join(gains)}\n{len(steps)} steps, {totals}, "
            f"{sum(row['seconds'] for row in steps):.0f} s of training\nmodel in {out / 'final'}")

def main(argv: list[str]) -> None:
    args, given = parse_args(Args, argv)
    folder, state = args.model, None
    if "resume" in given:
        args, folder, state = resume_run(args, given)
    try:
        name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        torch.zeros(1, device=(device := torch.device(name))).item()
    except Exception:  # noqa: BLE001 (each backend fails in its own way)
        raise BadInput(f"--device {args.device}: not to be had here; try cpu, or leave it out") from None
    if device.type == "cpu" and not args.model and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the tiny model gains little by two, and beside other work they wait for each other
    args.out = args.out or f"runs/{Path(__file__).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    args.lr = args.lr or (1.5e-6 if args.model else 5e-4)
    args.max_tokens = args.max_tokens or (8192 if args.model else 8 * args.ops)
    out = Path(args.out)
    rng = random.Random(0)  # the same held-out problems for every seed; new built-in ones to train on at every step
    held_out = [] if args.data else [make_problem(rng, args.ops, True) for _ in range(args.eval_prompts)]
    training = read_problems(args.data) if args.data else []
    if training and not folder:
        raise BadInput("--data: the tiny model knows the built-in problems only; give --model as well")
    rng.shuffle(training)
    while len(held_out) < args.eval_prompts and len(training) > (0 if args.eval_only else 4 * len(held_out)):
        held_out.append(training.pop())  # a fifth, rounded up; or, if nothing is to be trained on, as many as there are
    if folder:
        model, tokenizer = load_model(folder, device, "--resume" if state else "--model")
        solver = Solver(model, tokenizer, args, training, held_out)
        for problem in training + held_out:
            solver.root(problem)  # raises BadInput if a prompt does not fit
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not state and any(out.iterdir()):
            raise FileExistsError(0, "is not empty")
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}; choose another folder, or --resume a run") from None
    if not folder:
        model, tokenizer = calculator_model(args, device, out / "start")
    if args.grad_checkpointing:  # newer versions of transformers call it activation checkpointing
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    reference = load_model(args.model or str(out / "start"), device)[0].requires_grad_(False) if args.kl_coef else None
    policy = model if args.dtype == "float32" else copy.deepcopy(model)
    for parameter in policy.parameters() if policy is not model else ():  # not the buffers: RoPE needs float32
        parameter.data = parameter.data.to(torch.bfloat16)
    solver = Solver(policy, tokenizer, args, training, held_out)
    if args.eval_only:
        (out / "metrics.jsonl").write_text(json.dumps(row := solver.explore()) + "\n")
        shown = [f"{k.replace('_', ' '):34}{v:{',' if isinstance(v, int) else '.4f'}}" for k, v in [*row.items()][2:]]
        return print(*shown, f"metrics in {out / 'metrics.jsonl'}", sep="\n")
    train(args, state, model, policy, reference, tokenizer, solver.rollout, solver.credit,
          functools.partial(held_out_success, solver), solver.picture)
    print(summary(out, "generated_tokens", "forwarded_tokens"))

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BadInput as error:
        print(f"{Path(__file__).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        advice = "a lower --lr" if isinstance(error, FloatingPointError) else "less at once (--help)"
        sys.exit(f"stopped: {error}. What is in the run's folder is kept; try {advice}")
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped; with a checkpoint --resume it, else begin anew in another folder", file=sys.stderr)
        sys.exit(130)
