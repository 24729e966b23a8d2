# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.0", "tqdm"]
# ///
"""Tree-GRPO: tree search for LLM agent reinforcement learning (ICLR 2026, arXiv 2509.21240), in one file.

    python tree_grpo.py                                                a tiny Qwen learns to use a search tool, on a CPU
    python tree_grpo.py --model Qwen/Qwen2.5-1.5B --data hotpot.json   a Qwen from the hub on HotpotQA, on one GPU
Advantages (Eq. 6, 7): tree_advantages. Loss (Eq. 8): grpo_loss. Search: tree_rollout. Branches that share the KV of
what they have in common: Lanes, sample. Each token of a tree trained on once: Packed, packed_logps. The loop: train.
Left out: several processes, mini-batches, learning rate schedules beyond a warm-up."""

import argparse
import copy
import dataclasses
import functools
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


# ---------------------------------------------------------------------------------------------------------- arguments
class BadInput(ValueError):
    """What the user gave cannot be used; the script prints the message as one line and exits with status 2."""
def arg(default, help: str, low: float = 0, high: float = 1e15, choices: tuple | None = None):
    return field(default=default, metadata={"help": help, "range": (low, high), "choices": choices})

@dataclass
class Args:
    model: str = arg("", "hub id or folder of a Qwen (default: a tiny one, built and warm-started here)")
    data: str = arg("", "HotpotQA, 2WikiMultihopQA or MuSiQue file (default: built-in questions)")
    search_url: str = arg("", "Search-R1 compatible server, http://host:port/retrieve (default: BM25 over the data)")
    method: str = arg("tree_grpo", "grpo: M independent chains, no expansion", choices=("tree_grpo", "grpo"))
    advantage: str = arg("both", "terms of A_tree to use (grpo has only inter)", choices=("both", "intra", "inter"))
    M: int = arg(2, "independent chains per prompt, each the trunk of a tree", low=1)
    N: int = arg(2, "nodes expanded per tree and round")
    L: int = arg(1, "rounds of expansion")
    K: int | None = arg(None, "leaves kept per tree, at random (default: all)", low=1)
    steps: int = arg(60, "training steps")
    prompts: int = arg(16, "prompts per step", low=1)
    epochs: int = arg(1, "gradient steps per batch", low=1)
    lr: float | None = arg(None, "learning rate (default: 1e-6 with --model, 5e-4 without)", low=1e-9)
    warmup: int = arg(10, "steps of linear learning rate warm-up")
    clip_low: float = arg(0.2, "the ratio is clipped below 1 - clip_low (it is 1 unless --epochs is above 1)")
    clip_high: float = arg(0.2, "the ratio is clipped above 1 + clip_high (as clip_low)")
    kl_coef: float = arg(0.001, "beta, weight of the KL to the starting model (0: no reference model)")
    temperature: float = arg(1.0, "of the draws in training", low=1e-9)
    top_p: float = arg(1.0, "nucleus of the draws in training", low=1e-9, high=1)
    max_turns: int = arg(4, "agent steps per path, the answer included", low=1)
    turn_tokens: int | None = arg(None, "most tokens drawn in a turn (default: 500 with --model, 32 without)", low=1)
    info_tokens: int = arg(500, "most tokens of an observation", low=16)
    topk: int | None = arg(None, "passages per search (default: 3 with --data, 1 without)", low=1)
    hops: int = arg(3, "built-in questions have 2 to this many hops (4 need --max-turns 5)", low=2, high=4)
    hard: str = arg("anywhere", "late: the last built-in fact also names former values", choices=("anywhere", "late"))
    sft_steps: int = arg(250, "supervised steps that warm-start the tiny model")
    eval_prompts: int = arg(200, "held-out questions (of --data a fifth, rounded up, at most)", low=1)
    eval_batch: int = arg(128, "held-out questions answered together: fewer need less memory", low=1)
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
# --------------------------------------------------------------------------------------------- Tree-GRPO: the method
def z_score(x: Tensor, eps: float = 1e-6) -> Tensor:
    """(x - mean) / (std + eps) with the unbiased std, in float64; 0 for a lone value, or where all are equal."""
    x = x.double()
    if len(x) < 2 or x.min() == x.max():
        return torch.zeros_like(x)
    return (x - x.mean()) / (x.std() + eps)

def tree_advantages(rewards: Tensor, tree_ids: Tensor, eps: float = 1e-6, terms: str = "both") -> Tensor:
    """Advantage of each leaf of one prompt: A_tree = A_intra + A_inter (Tree-GRPO, Eq. 6 and 7).

    A_intra is the z-score of a leaf's reward among the leaves of its own tree, A_inter among all of the prompt. A lone
    leaf, or one among equal rewards, gets 0 from that term; so with one leaf per tree this is GRPO.
    rewards, tree_ids: (G,), in any order; terms: "both", "intra" or "inter" (Table 4). Returns (G,), of the rewards'
    dtype if that is floating. Raises ValueError on other shapes, no leaves, or a reward that is not finite."""
    if rewards.dim() != 1 or rewards.shape != tree_ids.shape or len(rewards) == 0 or not rewards.isfinite().all():
        raise ValueError(f"want finite rewards (G,) and tree_ids (G,), G > 0, got {rewards} and {tree_ids}")
    intra = torch.zeros(len(rewards), dtype=torch.float64, device=rewards.device)
    for tree in tree_ids.unique():
        intra[tree_ids == tree] = z_score(rewards[tree_ids == tree], eps)
    inter = z_score(rewards, eps)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    return {"both": intra + inter, "intra": intra, "inter": inter}[terms].to(dtype)

def tree_rollout(play, groups: list[tuple], M: int, N: int, L: int, rng: random.Random) -> None:
    """Tree-GRPO's search (section 3.2) below each root of `groups`, (question, root) pairs, all together. M independent
    chains from each root are the trunks of its trees; then L times, in each tree N of the nodes that are not leaves are
    drawn, uniformly and with replacement, the root being one of them, and each gets a new branch: M (1 + N L) leaves.
    play(starts) adds below each (question, node, tree) a branch that ends in a leaf. N = 0 gives GRPO's chains."""
    play([(question, root, tree) for question, root in groups for tree in range(M)])
    for _ in range(L if N else 0):
        play([(question, node, tree) for question, root in groups for tree in range(M) for node in
              rng.choices([root, *(n for n in root.below()[1:] if n.children and n.tree == tree)], k=N)])
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
# ---------------------------------------------------------------------------------------- the agent and its search tool
class BM25:
    """Okapi BM25 (k1 = 1.2, b = 0.75) over passages, pairs of title and text; words in lower case."""
    def __init__(self, passages: list[tuple[str, str]]):
        self.passages, self.found, lengths = passages, {}, []  # found: word -> (passage numbers, term frequencies)
        for i, passage in enumerate(passages):
            words = Counter(re.findall(r"\w+", " ".join(passage).lower()))
            lengths.append(float(words.total()))
            for word, n in words.items():
                numbers, frequencies = self.found.setdefault(word, (array("q"), array("f")))
                numbers.append(i)
                frequencies.append(n)
        self.scale = 1.2 * (0.25 + 0.75 * torch.tensor(lengths) / max(1, sum(lengths) / len(lengths)))
    def top(self, query: str, k: int) -> list[tuple[str, str]]:
        """The k best of the passages that share a word with the query, best first."""
        scores = torch.zeros(len(self.passages))
        for word in sorted(self.found.keys() & set(re.findall(r"\w+", query.lower()))):
            numbers = torch.frombuffer(self.found[word][0], dtype=torch.int64)
            tf = torch.frombuffer(self.found[word][1], dtype=torch.float32)
            rarity = math.log(1 + (len(scores) - len(numbers) + 0.5) / (len(numbers) + 0.5))
            scores[numbers] += rarity * 2.2 * tf / (tf + self.scale[numbers])
        best = scores.topk(min(k, len(scores)))
        return [self.passages[i] for i, score in zip(best.indices.tolist(), best.values.tolist()) if score > 0]

def show_passages(passages: list[tuple[str, str]]) -> str:
    return "\n".join(": ".join(filter(None, passage)) for passage in passages) or "nothing found"

def ask_server(url: str, queries: list[str], topk: int, timeout: float = 20, tries: int = 3) -> list[str]:
    """Query a Search-R1 compatible server, all queries in one request: an observation for each. Never raises: after
    `tries` that fail, take too long or bring more than 64 KiB a query, the observations say that the search failed."""
    body = json.dumps({"queries": queries, "topk": topk, "return_scores": True}).encode()
    for attempt in range(tries):
        time.sleep(0.5 * attempt)
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            answer, deadline = b"", time.monotonic() + timeout
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                while part := reply.read1(65536):
                    answer += part
                    if len(answer) > 65536 * (len(queries) + 1) or time.monotonic() > deadline:
                        raise ValueError("the answer is too long or too slow")
            found = [[hit["document"]["contents"].partition("\n")[::2] for hit in hits[:topk]]
                     for _, hits in zip(queries, json.loads(answer)["result"], strict=True)]
            return [show_passages(passages) for passages in found]
        except Exception as error:  # noqa: BLE001 (whatever a server does, training goes on)
            tqdm.write(f"search server {url}: {type(error).__name__}: {error}", file=sys.stderr)
    return ["the search failed, there are no results"] * len(queries)

INSTRUCTION = """Answer the question. In each turn, think between <think> and </think>, then search by <search> query
</search> and read in the next turn what was found between <information> and </information>, or, when you know it,
answer in a few words and nothing else: <answer> Paris </answer>. You have {turns} turns. Question: """
HINT = "that was no action : write <search> query</search> or <answer> answer</answer>"
ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
WORDS = r"((?!</?(?:think|search|information|answer)>).)*"
STEP = re.compile(rf"\s*<think>{WORDS}</think>\s*<(?P<action>search|answer)>{WORDS}</(?P=action)>\s*", re.DOTALL)

def normalise(answer: str) -> str:  # lower case, no punctuation, no articles, single spaces
    answer = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())

def outcome_reward(turns: list[str], answers: list[str]) -> float:
    """R(H) of a finished trajectory, from the texts of its turns: 1 for an exact match in a well-formed trajectory, 0.8
    for one in a malformed, 0.2 for well-formed without a match, 0.1 for an answer without either, else 0."""
    action = ACTION.search(turns[-1])
    answered = action is not None and action[1] == "answer"
    match = answered and normalise(action[2]) in map(normalise, answers)
    steps = [STEP.fullmatch(turn) for turn in turns]
    well_formed = all(steps) and [step["action"] for step in steps] == ["search"] * (len(turns) - 1) + ["answer"]
    return (1.0 if well_formed else 0.8) if match else 0.2 if well_formed else 0.1 if answered else 0.0

@dataclass
class Question:
    text: str
    answers: list[str]  # the answer and its aliases
    passages: BM25  # what a search looks into
    start: str = ""  # of a built-in question: the entity it starts from,
    relations: tuple[str, ...] = ()  # and the relations to follow from there

class Agent:
    """The policy with its tool: episodes of turns, many at a time; and what train() needs of the method."""
    def __init__(self, model, tokenizer, args, training: list[Question], held_out: list[Question]):
        self.model, self.tokenizer, self.args, self.training, self.held_out = model, tokenizer, args, training, held_out
        eos = model.generation_config.eos_token_id
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]  # of a text, of a turn in a chat
        self.eos = {*ends, *(eos if isinstance(eos, list) else [eos])}
        self.piece = functools.cache(lambda token: tokenizer.decode([token]))
    def text(self, node: Node) -> str:  # what the policy wrote in it
        return self.tokenizer.decode([t for t, s in zip(node.tokens, node.sampled) if s], skip_special_tokens=True)
    def stop(self, tokens: list[int]) -> bool:  # does the last one complete a closing tag?
        return ">" in self.piece(tokens[-1]) and bool(re.search("</(search|answer)>", self.tokenizer.decode(tokens)))
    def root(self, question: Question) -> Node:  # a model without chat template gets the built-in questions bare
        told = INSTRUCTION.format(turns=self.args.max_turns) * bool(self.tokenizer.chat_template or self.args.data)
        return prompt_root(self.model, self.tokenizer, told + question.text)
    def search(self, asked: list[tuple[Question, str]]) -> list[str]:
        if self.args.search_url and asked:
            return ask_server(self.args.search_url, [query for _, query in asked], self.args.topk)
        return [show_passages(question.passages.top(query, self.args.topk)) for question, query in asked]
    def observation(self, found: str) -> list[int]:
        head, body, tail = (encode(self.tokenizer, t) for t in ("\n\n<information>", f" {found}", "</information>\n\n"))
        return head + body[: max(0, self.args.info_tokens - len(head) - len(tail))] + tail
    def play(self, starts: list[tuple[Question, Node, int]], generator, temperature: float, top_p: float, counts):
        """For each (question, node, tree) a new branch below the node, played to its end, where it gets its reward. In
        each turn all branches are sampled together, and all their searches made together."""
        live = [(question, Node(node, tree=tree)) for question, node, tree in starts]
        context = self.model.config.max_position_embeddings
        while live:
            nodes = [node for _, node in live]
            limits = [min(self.args.turn_tokens, context - length(node.path())) for node in nodes]
            sample(self.model, nodes, limits, self.stop, self.eos, generator, temperature, top_p, counts)
            turns, live = [(q, node, ACTION.search(self.text(node))) for q, node in live], []
            over = {node for _, node, action in turns  # answered, or no turn left
                    if action and action[1] == "answer" or len(node.path()) > self.args.max_turns}
            asked = [(q, action[2].strip()) for q, node, action in turns if action and node not in over]
            found = iter(self.search(asked))
            counts["tool_calls"] += len(asked)
            for question, node, action in turns:
                if node not in over:
                    observation = self.observation(next(found) if action else HINT)
                    if length(node.path()) + len(observation) < context:
                        node.add(observation)
                        live.append((question, Node(node, tree=node.tree)))
                        continue
                node.reward = outcome_reward([self.text(n) for n in node.path()[1:]], question.answers)
    def rollout(self, step: int):
        """The trees of one training step: ((question, root) pairs, what to log of them)."""
        args, rng = self.args, random.Random(f"{self.args.seed}/{step}")
        generator = torch.Generator(self.model.device).manual_seed(rng.getrandbits(60))
        built_in = (make_question(rng, args.hops, args.hard, False) for _ in range(args.prompts))
        groups = [(question, self.root(question)) for question in batch_of(self.training, step, args) or built_in]
        counts = Counter(generated_tokens=0, forwarded_tokens=0, tool_calls=0, entropy=0.0)
        tree_rollout(lambda starts: self.play(starts, generator, args.temperature, args.top_p, counts), groups,
                     args.M, args.N if args.method == "tree_grpo" else 0, args.L, rng)
        forget(node for _, root in groups for node in root.below())
        rewards = torch.tensor([leaf.reward for _, root in groups for leaf in root.leaves()])
        counts["entropy"] /= counts["generated_tokens"]
        return groups, {"reward": rewards.mean().item(), "success": (rewards > 0.5).float().mean().item(), **counts}
    def credit(self, step: int, groups) -> list[Sample]:
        """K leaves of each tree, at random, with their advantages."""
        rng, samples = random.Random(f"{self.args.seed}/{step}/keep"), []
        for _, root in groups:
            trees = [[leaf for leaf in root.leaves() if leaf.tree == tree] for tree in range(self.args.M)]
            leaves = [leaf for tree in trees for leaf in rng.sample(tree, min(self.args.K or len(tree), len(tree)))]
            rewards, ids = torch.tensor([leaf.reward for leaf in leaves]), torch.tensor([leaf.tree for leaf in leaves])
            advantages = list(tree_advantages(rewards, ids, terms=self.args.advantage))
            samples.append(Sample(root, leaves, advantages, 1 / len(leaves) / len(groups)))
        return samples
    def picture(self, groups, samples: list[Sample]) -> tuple[str, str]:
        """("tree.md", Mermaid): a prompt's trees, in green or red by the mean advantage of the leaves below a node."""
        mixed = [i for i, item in enumerate(samples) if len({leaf.reward for leaf in item.leaves}) > 1] or [0]
        (question, root), item = groups[mixed[0]], samples[mixed[0]]
        nodes, advantage = root.below(), dict(zip(item.leaves, map(float, item.advantages)))
        below = [[advantage[leaf] for leaf in node.leaves() if leaf in advantage] for node in nodes]
        notes = ["" if node.reward is None else f"R = {node.reward:g}, " + (f"A = {A[0]:+.2f}" if A else "not kept")
                 for node, A in zip(nodes, below)]
        words = [question.text, *(self.text(node) for node in nodes[1:])]
        return "tree.md", mermaid(nodes, words, notes, [sum(A) if A else None for A in below])
# --------------------------------------------------------------------------------------------- tasks and models
PEOPLE = ("Ada", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "Jane", "Kai", "Lena", "Max", "Nora", "Ola")
CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Delhi", "Quito", "Tunis", "Bern", "Kyoto")
RELATIONS = {  # of what, and what it gives
    "mother": (PEOPLE, PEOPLE), "friend": (PEOPLE, PEOPLE), "teacher": (PEOPLE, PEOPLE), "birthplace": (PEOPLE, CITIES),
    "home": (PEOPLE, CITIES), "mayor": (CITIES, PEOPLE), "founder": (CITIES, PEOPLE), "twin": (CITIES, CITIES)}

def make_question(rng: random.Random, max_hops: int, hard: str, held_out: bool) -> Question:
    """A question of 2 to max_hops hops over facts drawn for it alone, so there is nothing to remember. A fifth of all
    question texts is held out. With hard = "late" the last fact names its present value, then three former ones."""
    while True:
        entity = start = rng.choice(PEOPLE + CITIES)
        facts, relations, seen = {}, [], [entity]
        for _ in range(rng.randint(2, max_hops)):
            relations.append(rng.choice([r for r, (of, _) in RELATIONS.items() if entity in of and r not in relations]))
            facts[relations[-1], entity] = rng.choice([e for e in RELATIONS[relations[-1]][1] if e not in seen])
            entity = facts[relations[-1], entity]
            seen.append(entity)
        text = f"{'Where' if entity in CITIES else 'Who'} is the {' of the '.join(reversed(relations))} of {start}?"
        if (random.Random(text).random() < 0.2) == held_out:
            break
    others = {kind: [e for e in kind if e not in seen] for kind in (PEOPLE, CITIES)}  # so that no search is ambiguous
    for relation, of in list(facts):  # facts beside the way: another relation of each entity, each relation of another
        beside = rng.choice([r for r, (kind, _) in RELATIONS.items() if of in kind and r != relation])
        facts.setdefault((beside, of), rng.choice(others[RELATIONS[beside][1]]))
        facts.setdefault((relation, rng.choice(RELATIONS[relation][0])), rng.choice(others[RELATIONS[relation][1]]))
    passages = []
    for (relation, of), value in sorted(facts.items(), key=lambda fact: rng.random()):
        former = ", ".join(rng.sample([e for e in others[RELATIONS[relation][1]] if e != value], 3))
        late = f", formerly {former}" if hard == "late" and relation == relations[-1] else ""
        passages.append(("", f"the {relation} of {of} is {value}{late}"))
    return Question(text, [entity], BM25(passages), start, tuple(relations))

def demonstrate(question: Question, hard: str, rng: random.Random) -> list[tuple[str, str]]:
    """The turns of an imperfect agent, each with what its search finds: it tends to stop early, at times asks for a
    wrong relation, and in the late task prefers a former value. What it teaches is mostly wrong, for reward to mend."""
    turns, values = [], [question.start]
    for relation in question.relations:
        if hard == "anywhere" and turns and rng.random() < 0.6:
            break
        if hard == "anywhere" and rng.random() < 0.15:
            relation = rng.choice([r for r in RELATIONS if r != relation])
        query = f"{relation} of {values[0]}"
        found = question.passages.top(query, 1)[0][1]
        turns.append((f"<think> next {relation}</think><search> {query}</search>", found))
        values = found.partition(" is ")[2].replace("formerly ", "").split(", ")
    value = rng.choices(values, [2, 4, 2, 2])[0] if len(values) == 4 else values[0]
    return [*turns, (f"<think> done</think><answer> {value}</answer>", "")]

def read_questions(path: str) -> list[Question]:
    """HotpotQA and 2WikiMultihopQA (JSON lists), MuSiQue (JSON lines; its unanswerable questions are left out), told
    apart by a record's fields. A search looks into all passages of the file. BadInput names the file and the line."""
    pool = {}
    def parse(record: dict) -> list[tuple[str, list[str]]]:
        passages = ([(p["title"], p["paragraph_text"]) for p in record["paragraphs"]] if "paragraphs" in record else
                    [(title, " ".join(s.strip() for s in sentences)) for title, sentences in record["context"]])
        answers = [record["answer"], *record.get("answer_aliases", [])]
        if not passages or not all(isinstance(t, str) for t in [record["question"], *answers, *sum(passages, ())]):
            raise TypeError
        pool.update(dict.fromkeys(passages))
        return [(record["question"], answers)] if record.get("answerable", True) else []
    found = read_records(path, parse, "HotpotQA or 2Wiki (question, answer, context) or MuSiQue (with paragraphs)")
    index = BM25(list(pool))
    return [Question(question, answers, index) for question, answers in found]

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

def built_in_model(args, device: torch.device, folder: Path):
    """The tiny model, warm-started on demonstrations of the built-in task. It is left in `folder`."""
    words = [*RELATIONS, *PEOPLE, *CITIES, *re.findall(r"\w+", f"is the of next done formerly nothing found {HINT}")]
    tags = [tag for name in ("think", "search", "information", "answer") for tag in (f"<{name}>", f"</{name}>")]
    temporary = folder.with_suffix(".tmp")  # until it is warm-started
    save_tiny_model(temporary, [f" {word}" for word in words] + ["Who", "Where", "\n\n", *tags], args.seed)
    model, tokenizer = load_model(str(temporary), device)
    agent, rng, paths = Agent(model, tokenizer, args, [], []), random.Random(f"{args.seed}/demonstrations"), []
    for _ in range(32 * args.sft_steps):  # 32 for each step
        question = make_question(rng, args.hops, args.hard, False)
        node = agent.root(question)
        for text, found in demonstrate(question, args.hard, rng):
            node = Node(node)
            node.add(encode(tokenizer, text), sampled=True)
            node.add(agent.observation(found) if found else [])
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
    if args.search_url and not args.data:
        raise BadInput("--search-url: the built-in questions bring their own facts; give --data as well")
    try:
        name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        torch.zeros(1, device=(device := torch.device(name))).item()
    except Exception:  # noqa: BLE001 (each backend fails in its own way)
        raise BadInput(f"--device {args.device}: not to be had here; try cpu, or leave it out") from None
    if device.type == "cpu" and not args.model and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the tiny model gains little by two, and beside other work they wait for each other
    if args.advantage == "intra" and (args.method == "grpo" or not args.N * args.L or args.K == 1):
        raise BadInput("--advantage intra: it is 0 for one leaf per tree; leave it out")
    args.out = args.out or f"runs/{Path(__file__).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    args.lr = args.lr or (1e-6 if args.model else 5e-4)
    args.topk = args.topk or (3 if args.data else 1)
    args.turn_tokens = args.turn_tokens or (500 if args.model else 32)
    out = Path(args.out)
    rng = random.Random(0)  # the same held-out questions for every seed; new built-in ones to train on at every step
    held_out = [] if args.data else [make_question(rng, args.hops, args.hard, True) for _ in range(args.eval_prompts)]
    training = read_questions(args.data) if args.data else []
    if training and not folder:
        raise BadInput("--data: the tiny model knows the built-in questions only; give --model as well")
    rng.shuffle(training)
    while len(held_out) < args.eval_prompts and len(training) > 4 * len(held_out):  # a fifth, rounded up
        held_out.append(training.pop())
    if folder:
        model, tokenizer = load_model(folder, device, "--resume" if state else "--model")
        agent = Agent(model, tokenizer, args, training, held_out)
        for question in training + held_out:
            agent.root(question)  # raises BadInput if a prompt does not fit
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not state and any(out.iterdir()):
            raise FileExistsError(0, "is not empty")
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}; choose another folder, or --resume a run") from None
    if not folder:
        model, tokenizer = built_in_model(args, device, out / "start")
    if args.grad_checkpointing:  # newer versions of transformers call it activation checkpointing
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    reference = load_model(args.model or str(out / "start"), device)[0].requires_grad_(False) if args.kl_coef else None
    policy = model if args.dtype == "float32" else copy.deepcopy(model)
    for parameter in policy.parameters() if policy is not model else ():  # not the buffers: RoPE needs float32
        parameter.data = parameter.data.to(torch.bfloat16)
    agent = Agent(policy, tokenizer, args, training, held_out)
    train(args, state, model, policy, reference, tokenizer, agent.rollout, agent.credit,
          functools.partial(held_out_success, agent), agent.picture)
    print(summary(out, "generated_tokens", "forwarded_tokens", "tool_calls"))

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
