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
import inspect
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
    """What the user gave cannot be used: the script prints this as one line and exits with 2."""


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
    at_once: int = arg(64, "most of --prompts that are searched together: fewer need less memory, more time", low=1)
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
    """Command line -> (an instance of the dataclass `cls`, the set of names given). BadInput with
    one line if it is none."""

    def fail(message):
        raise BadInput(f"{message} (--help lists the arguments)")

    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = fail
    for f in dataclasses.fields(cls):
        kind = next(
            t
            for t in (bool, int, float, str)
            if t is f.type or t in getattr(f.type, "__args__", ())
        )
        how = (
            {"action": "store_true"}
            if kind is bool
            else {"type": kind, "choices": f.metadata["choices"]}
        )
        shown = (
            f" (default: {f.default})" if f.default not in (None, "") and kind is not bool else ""
        )
        parser.add_argument(
            "--" + f.name.replace("_", "-"), dest=f.name, help=f.metadata["help"] + shown, **how
        )
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
# ---------------------------------------------------------------------------------- the token tree
@dataclass(eq=False)
class Node:
    """A run of tokens below one parent.

    A root is a prompt; other nodes are agent steps (Tree-GRPO), segments between forks (TreeRL), a
    prompt's end or an action (GraphGPO). `kv`, while in use: kv[..., j, :] is of the token *before*
    tokens[j] on the path, whose forward predicts tokens[j] (of a root: of all but its last token).
    So what begins below a node finds all but the node's last token there, and runs that again."""

    parent: "Node | None" = None
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # written by the policy, so carrying loss
    logps: list[float] = field(default_factory=list)  # at temperature 1; 0 where not sampled
    children: list["Node"] = field(default_factory=list)
    tree: int = 0  # which of the prompt's trees, that is: from whose trunk it hangs
    reward: float | None = None  # of a leaf
    kv: Tensor | None = None  # (layers, 2, KV heads, tokens, head size)

    def __post_init__(self):
        if self.parent is not None:
            self.parent.children.append(self)

    def add(self, tokens: list[int], sampled: bool = False, logps: list[float] | None = None):
        self.tokens += tokens
        self.sampled += [sampled] * len(tokens)
        self.logps += logps or [0.0] * len(tokens)

    def path(self) -> list["Node"]:
        """The nodes from the root to this one."""
        nodes = [self]
        while nodes[-1].parent:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]

    def below(self) -> list["Node"]:
        """This node and all under it, a child with all under it before the next child."""
        nodes, stack = [], [self]
        while stack:
            nodes.append(stack.pop())
            stack += reversed(nodes[-1].children)
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
        node.kv = None


def padded(rows: list[list], pad=0, multiple: int = 1) -> list[list]:
    width = -(-max(map(len, rows)) // multiple) * multiple
    return [row + [pad] * (width - len(row)) for row in rows]


def token_tree(module, query, key, value, attention_mask, scaling, tree, **kwargs):
    """The attention that transformers calls in each layer. `tree`, which is handed through the
    model's keyword arguments, does it: tree(layer, q, k, v, scaling)."""
    return tree(module.layer_idx, query, key, value, scaling), None


def full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def products(a: Tensor, b: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """scale a @ b.mT + mask (without a mask a @ b.mT), in float32 also of bfloat16, to which scores
    and logits would be rounded otherwise. a: (batch, n, D), b: (batch, m, D), mask: (batch, n or 1,
    m). Returns (batch, n, m)."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        out = torch.bmm(a, b.mT, out_dtype=torch.float32)
        return out if mask is None else torch.add(mask, out, alpha=scale)
    a, b = full_precision(a), full_precision(b)
    if mask is None:
        return torch.bmm(a, b.mT)
    return torch.baddbmm(mask, a, b.mT, alpha=scale)


# ------------------------------------------------------------------------ sampling with shared KV
# What follows computes what tests/naive.py does by one forward per path, but fast. Read that first.
def prefill(model, nodes: list[Node]) -> int:
    """Compute the KV of the roots above the nodes, where they have none, but for each root's last
    token, which each branch runs itself. Returns how many tokens that were."""
    roots = [root for root in dict.fromkeys(node.path()[0] for node in nodes) if root.kv is None]
    if not roots:
        return 0
    layers = []

    def attend(layer, q, k, v, scaling):  # causal, so the padding on the right is never seen
        layers.append(torch.stack([k, v]))
        how = {"is_causal": True, "scale": scaling, "enable_gqa": True}
        return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2)

    at_once = max(1, MOST_PROMPT_TOKENS // max(len(root.tokens) for root in roots))
    for start in range(0, len(roots), at_once):
        part = roots[start : start + at_once]
        ids = torch.tensor(padded([root.tokens[:-1] for root in part]), device=model.device)
        model.model(ids.long(), use_cache=False, tree=attend)
        for i, root in enumerate(part):
            root.kv = torch.stack([kv[:, i, :, : len(root.tokens) - 1] for kv in layers])
        layers.clear()
    return length(roots) - len(roots)


def gather_kv(like: Tensor, paths: list[list[Node]], room: int) -> list[Tensor]:
    """For each layer the keys and values that the nodes of each path hold, one after the other and
    zeros after them, (2, KV heads, paths, room, head size). like: some node's kv."""
    held, slots = [], []
    for i, path in enumerate(paths):
        nodes = [node for node in path if node.cached]
        held += nodes
        slots += range(i * room, i * room + sum(node.cached for node in nodes))
    slots = torch.tensor(slots, device=like.device)
    layers = []
    for layer in range(len(like)):
        kv = like.new_zeros(2, like.shape[2], len(paths) * room, like.shape[-1])
        if held:
            kv.index_copy_(2, slots, torch.cat([node.kv[layer] for node in held], 2))
        layers.append(kv.unflatten(2, (len(paths), room)))
    return layers


MOST_SCORES = 2**26  # elements of a score matrix in the sampler
MOST_PROMPT_TOKENS = 2**14  # of a forward that computes prompts, padding included
LOOK = {"cuda": 8}  # how many tokens are drawn before the host looks at them; elsewhere 1


class Lanes:
    """Branches in flight: a row per prompt, a lane per branch; lanes left over in a row stay idle.

    A prompt's keys and values are held once per row, in `shared`; what comes after is each lane's
    own, in `own`. A new token attends to both: two score matrices, one softmax.

    Of lane b: grid[b] is its node (None: idle), length[b] how many of its slots are filled, new[b]
    the tokens that were not run yet. `at` and `token` are length and the last of new on the device,
    where `step` counts them on.

    Letters in shapes: R rows, W lanes in each, B = R W lanes, h KV heads, g query heads on each of
    them, n new tokens, P slots of a prompt, S slots of a lane, D the size of a head."""

    def __init__(self, model, nodes: list[Node]):
        self.model, self.on_cuda = model, model.device.type == "cuda"
        experts = any(hasattr(model.config, x) for x in ("num_experts", "num_local_experts"))
        self.recorded = self.on_cuda and not experts  # these are chosen with the host's help
        rows = {}  # root -> the nodes to be sampled below it
        for node in nodes:
            rows.setdefault(node.path()[0], []).append(node)
        self.set_grid(list(rows.values()))

        roots, paths = list(rows), [node.path() if node else [] for node in self.grid]
        self.length = [sum(node.cached for node in path[1:]) for path in paths]
        self.new = []
        for path in paths:
            tokens = [token for node in path for token in node.tokens]
            self.new.append(tokens[sum(node.cached for node in path) :] or [0])
        P = max(root.cached for root in roots)
        S = max(n + len(new) for n, new in zip(self.length, self.new)) + 32
        self.shared = gather_kv(roots[0].kv, [[root] for root in roots], P)  # (2, h, R, P, D)
        self.own = gather_kv(roots[0].kv, [path[1:] for path in paths], S)  # (2, h, B, S, D)
        prompt = torch.tensor([root.cached for root in roots], device=model.device)
        self.set_buffers(prompt.repeat_interleave(self.W))

    def set_grid(self, rows: list[list]) -> None:
        self.W = max(map(len, rows))
        self.grid = [node for row in padded(rows, None) for node in row]

    def set_buffers(self, prompt: Tensor) -> None:
        """What a step reads and writes, in places that stay; a new recording is due."""
        self.prompt = prompt  # (B,), how long each lane's prompt is
        self.at = torch.zeros_like(prompt)  # (B,), the slot of the token to be run next
        self.token = torch.zeros_like(prompt)  # (B,), that token
        dtype = torch.promote_types(self.own[0].dtype, torch.float32)
        self.drawn = torch.zeros(3, len(prompt), dtype=dtype, device=prompt.device)
        _, h, _, P, _ = self.shared[0].shape
        beyond = torch.arange(P, device=prompt.device) >= prompt[:: self.W, None]  # (R, P)
        mask = self.drawn.new_zeros(()).where(~beyond, -torch.inf)
        self.prompt_mask = mask.repeat(h, 1)[:, None]  # (h R, 1, P)
        self.graph = None

    def make_room(self, slots: int) -> int:
        """Room in each lane for so many slots, and one for pads. Returns how many to look at."""
        S = self.own[0].shape[3]
        if slots >= S:
            more = slots + 1 + max(64, S // 2) - S
            for layer, kv in enumerate(self.own):  # one by one, so that one is there twice at most
                self.own[layer] = F.pad(kv, (0, 0, 0, more))
            self.graph = None
        return self.own[0].shape[3] if self.on_cuda else slots  # what is recorded sees them all

    def catch_up(self) -> None:
        """Run what is new in each lane but for the last token, which `step` runs; in pieces, as a
        score matrix must not get too large."""
        keys = self.shared[0].shape[3] + self.own[0].shape[3]
        heads = self.model.config.num_attention_heads
        most = max(1, MOST_SCORES // (len(self.grid) * heads * keys))
        while max(map(len, self.new)) > 1:
            part = [tokens[:-1][:most] for tokens in self.new]
            counts = [len(tokens) for tokens in part]
            seen = self.make_room(max(self.length) + max(counts))
            self.at.copy_(torch.tensor(self.length))
            ids, count = (torch.tensor(x, device=self.at.device) for x in (padded(part), counts))
            self.run(ids, count, seen)
            self.length = [n + more for n, more in zip(self.length, counts)]
            self.new = [tokens[n:] for n, tokens in zip(counts, self.new)]

    def run(self, ids: Tensor, count: Tensor, seen: int) -> Tensor:
        """Run ids (B, n), of which the first count[b] are lane b's, from slot at[b] on; of a lane
        `seen` slots are looked at. Returns the last hidden states, (B, n, width).

        Nothing in here, nor in `step` while it is recorded, hands the device a value or asks it for
        one: a CUDA graph cannot hold that."""
        (B, n), (_, h, _, S, _), device = ids.shape, self.own[0].shape, ids.device
        g = self.model.config.num_attention_heads // h

        # Token j of lane b goes to slot at[b] + j; a pad to the last slot, which is never seen.
        column = torch.arange(n, device=device)
        slot = self.at[:, None] + column  # (B, n)
        target = torch.where(column < count[:, None], slot, S - 1)
        block = torch.arange(h * B, device=device).view(h, B).T[:, :, None]
        target = (block * S + target[:, None]).flatten()  # of (B, h, n) keys in (h B S)

        # It sees its prompt and, in its lane, the slots up to its own.
        visible = torch.arange(seen, device=device) <= slot[:, :, None]  # (B, n, seen)
        mask = self.drawn.new_zeros(()).where(visible, -torch.inf)
        mask = mask[:, None].expand(h, B, g, n, seen).reshape(h * B, g * n, seen)

        attend = functools.partial(self.attend, target, mask)
        position = slot + self.prompt[:, None]
        out = self.model.model(ids, position_ids=position, use_cache=False, tree=attend)
        return out.last_hidden_state

    def attend(self, target, mask, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float):
        """A layer's attention. q: (B, h g, n, D), k and v: (B, h, n, D). Returns (B, n, h g, D)."""
        (B, heads, n, D), h, R = q.shape, k.shape[1], self.shared[layer].shape[2]
        for block, new in zip(self.own[layer], (k, v)):
            block.view(-1, D).index_copy_(0, target, new.reshape(-1, D))
        shared_k, shared_v = self.shared[layer].flatten(1, 2)  # (h R, P, D)
        P, seen = shared_k.shape[1], mask.shape[2]
        own_k, own_v = self.own[layer][..., :seen, :].flatten(1, 2)  # (h B, seen, D)

        # The g query heads on a KV head are folded into the queries; so are, before the prompt, the
        # lanes of a row. Nothing is repeated, and a prompt's keys are read once for all its lanes.
        q = q.reshape(B, h, -1, D).transpose(0, 1).reshape(h * B, -1, D)
        shared = products(q.view(h * R, -1, D), shared_k, self.prompt_mask, scaling)
        own = products(q, own_k, mask, scaling)
        scores = torch.cat([shared.view(h * B, -1, P), own], -1)  # (h B, g n, P + seen)
        weights = scores.softmax(-1).to(v.dtype)
        out = weights.view(h * R, -1, P + seen)[..., :P] @ shared_v
        out = torch.baddbmm(out.view(h * B, -1, D), weights[..., P:], own_v)
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
        seen = self.make_room(max(self.length) + steps)
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
        start = 0
        for node in self.grid[b].path()[1:]:
            end = min(start + len(node.tokens), self.length[b])
            if node.cached < end - start:
                node.kv = torch.stack([kv[:, :, b, start:end] for kv in self.own])
            start = end

    def shrink(self, live: list[int]) -> list[int]:
        """Drop lanes that are not in `live` if the batch gets a quarter smaller (on CUDA a half, as
        a step is recorded anew). Returns where the live ones are now."""
        rows = {}  # row -> its live lanes
        for b in live:
            rows.setdefault(b // self.W, []).append(b)
        size = len(rows) * max(map(len, rows.values()))
        if size > (0.5 if self.on_cuda else 0.75) * len(self.grid):
            return live
        grid = [[self.grid[b] for b in row] for row in rows.values()]
        kept = [b for row in padded(list(rows.values()), live[0]) for b in row]
        self.set_grid(grid)
        self.length = [self.length[b] if node else 0 for b, node in zip(kept, self.grid)]
        self.new = [self.new[b] if node else [0] for b, node in zip(kept, self.grid)]
        kept, left = (torch.tensor(x, device=self.at.device) for x in (kept, list(rows)))
        for layer in range(len(self.own)):
            self.own[layer] = self.own[layer].index_select(2, kept)
            self.shared[layer] = self.shared[layer].index_select(2, left)
        self.set_buffers(self.prompt[kept])
        return [b for b, node in enumerate(self.grid) if node]


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
    counts["forwarded_tokens"] += prefill(model, nodes)
    lanes = Lanes(model, nodes)
    live = [b for b, node in enumerate(lanes.grid) if node]
    counts["forwarded_tokens"] += sum(len(lanes.new[b]) for b in live)
    lanes.catch_up()
    limit = dict(zip(nodes, limits))
    while live:
        tokens, logps, entropies = lanes.decode(look, temperature, top_p, generator)
        if not math.isfinite(sum(map(sum, logps))):
            raise FloatingPointError("the policy's logits are not finite")
        going = []
        for b in live:
            node, over, i = lanes.grid[b], False, 0
            while i < look and not over:  # what was drawn after the end is dropped
                token = tokens[i][b]
                node.add([token], True, [logps[i][b]])
                counts["entropy"] += entropies[i][b]
                over = token in eos or len(node.tokens) >= limit[node] or stop(node.tokens)
                i += 1
            counts["generated_tokens"] += i
            counts["forwarded_tokens"] += i - over
            lanes.length[b] += i
            lanes.new[b] = [token]
            if over and keep:
                lanes.store(b)
            if over:
                lanes.length[b], lanes.new[b] = 0, [0]  # it idles there until the batch shrinks
            else:
                going.append(b)
        live = lanes.shrink(going) if going else []


# ---------------------------------------------------------- training: trees packed into one row
class Sample(NamedTuple):
    """A prompt's part of the loss."""

    root: Node
    leaves: list[Node]
    advantages: list[Tensor]  # of each leaf: one number, or one per sampled token
    weight: float  # of the sum over the leaves


@dataclass
class Flat:
    """The unique tokens of some trees, by segments: runs of tokens without a branch."""

    tokens: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)  # the place of the token above each
    segments: list[tuple[int, list[int]]] = field(default_factory=list)  # (tokens, their path)
    read: list[int] = field(default_factory=list)  # the places of the sampled tokens
    logps: list[float] = field(default_factory=list)  # the sampler's, one for each of `read`
    index: dict[Node, range] = field(default_factory=dict)  # node -> its range in `read`


def flatten(samples: list[Sample]) -> Flat:
    """The trees of the samples as a row: of each tree all that leads to a leaf of a sample. A
    segment's path are the places of all tokens from the root to its last."""
    flat = Flat()
    for root, items in itertools.groupby(samples, lambda item: item.root):
        kept = {node for item in items for leaf in item.leaves for node in leaf.path()}
        stack = [(root, [])]  # the node that begins a segment, and the path above it
        while stack:
            node, above = stack.pop()
            start, children = len(flat.tokens), [node]
            while len(children) == 1:  # no branch: the segment goes on
                node = children[0]
                first = len(flat.read)
                flat.read += [len(flat.tokens) + j for j, drawn in enumerate(node.sampled) if drawn]
                flat.logps += [logp for logp, drawn in zip(node.logps, node.sampled) if drawn]
                flat.index[node] = range(first, len(flat.read))
                flat.tokens += node.tokens
                children = [child for child in node.children if child in kept]
            own = list(range(start, len(flat.tokens)))
            path = above + own
            flat.position += range(len(above), len(path))
            flat.parent += [above[-1] if above else 0] + own[:-1]
            flat.segments.append((len(own), path))
            stack += [(child, path) for child in children]
    return flat


def place(segments: list[tuple[int, list[int]]]) -> tuple[list, list[int]]:
    """Segments of like length into buckets, one attention call for each. Returns the buckets,
    (queries, keys) with the places of the tokens of each segment and of its path, padded; and for
    each token of the row the number of its query, counted through all buckets."""
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


def leaf_paths(samples: list[Sample], index: dict[Node, range], device) -> list[tuple]:
    """Of each sample, (leaves, length): where in the log-probs a leaf's are, and a mask."""
    paths = []
    for item in samples:
        rows = [[i for node in leaf.path() for i in index[node]] for leaf in item.leaves]
        places = torch.tensor(padded(rows, -1), device=device).long()
        paths.append((places.clamp(min=0), places >= 0))
    return paths


class Packed:
    """The trees of samples as one row of their unique tokens, on a device.

    A segment's queries see the keys of its path, which are gathered; slot j of a path holds the
    token at position j, so a query sees the slots up to its own position."""

    def __init__(self, samples: list[Sample], device):
        def on_device(numbers):
            return torch.tensor(numbers, device=device).long()

        flat = flatten(samples)
        self.samples = samples
        self.ids, self.position = on_device([flat.tokens]), on_device([flat.position])
        self.target = on_device([flat.tokens[t] for t in flat.read])  # the sampled tokens
        self.read = on_device([flat.parent[t] for t in flat.read])  # the one that predicts each
        self.sampler_logps = torch.tensor(flat.logps, device=device)
        self.paths = leaf_paths(samples, flat.index, device)

        buckets, number = place(flat.segments)
        self.buckets = [(on_device(queries), on_device(keys)) for queries, keys in buckets]
        self.number = on_device(number)
        self.segments = flat.segments

    @functools.cached_property
    def sequences(self) -> tuple[Tensor, list[Tensor], list[int]]:
        """What the kernel takes: the keys of all segments' paths, one path after the other; where
        the queries and the keys of each segment begin; and the most that one has of either."""
        device = self.ids.device
        lengths = list(zip(*((own, len(path)) for own, path in self.segments)))
        keys = torch.tensor([place for _, path in self.segments for place in path], device=device)
        starts = [torch.tensor([0, *itertools.accumulate(n)], device=device).int() for n in lengths]
        return keys, starts, [max(n) for n in lengths]

    def attention(self, dtype: torch.dtype, groups: int):
        """The layers' attention, attend(layer, q, k, v, scaling), in this dtype and with so many
        query heads on a KV head."""
        kernel = varlen_kernel() if dtype == torch.bfloat16 and self.ids.is_cuda else None
        if kernel is not None:
            return functools.partial(self.attend_without_masks, kernel)
        masks = []
        for queries, keys in self.buckets:  # for all layers
            slot = torch.arange(keys.shape[1], device=keys.device)
            visible = slot <= self.position[0, queries][:, :, None]
            mask = torch.zeros(1, dtype=dtype, device=keys.device).where(visible, -torch.inf)
            masks.append(mask.repeat(1, groups, 1)[:, None])  # (segments, 1, g width, path)
        return functools.partial(self.attend, masks)

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

    def attend_without_masks(self, kernel, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling):
        """The same by one kernel: a segment's queries are neighbours, and are its path's last."""
        keys, starts, longest = self.sequences
        q = q[0].transpose(0, 1).to(v.dtype).contiguous()
        k, v = (
            full_precision(x[0].transpose(0, 1)).index_select(0, keys).to(v.dtype) for x in (k, v)
        )
        how = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": True}  # causal
        return kernel(q, k, v, *starts, *longest, **how)[None]


@functools.cache
def varlen_kernel():
    """torch's attention over sequences of any lengths, or None before torch 2.12, where it lacks
    an argument."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


def packed_logps(model, packed: Packed) -> Tensor:
    """Log-prob at temperature 1 of each sampled token of packed trees, (tokens,), in their order;
    packed.paths tells where each leaf's are. One forward over unique tokens. The head runs only
    where a sampled token is predicted, in chunks that the backward pass computes again, so that
    (tokens, vocabulary) logits never exist at once."""
    device = model.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else model.dtype
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    attend = packed.attention(dtype, groups)
    out = model.model(packed.ids, position_ids=packed.position, use_cache=False, tree=attend)

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

    Per sampled token -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
    + kl_coef (exp(q - p) - (q - p) - 1), where r = exp(logp - old_logp), p = logp, q = ref_logp.
    Returns the sum over sequences of the mean over each sequence's own sampled tokens (0 for one
    without any): divide it by the prompt's sequences, then by the prompts of the step.
    logp, old_logp, ref_logp, mask: (sequences, length), mask true on sampled tokens; nothing else
    is read. advantages: (sequences,), (sequences, 1) or (sequences, length). ref_logp None: no KL,
    ValueError unless kl_coef is 0. The stats are sums over sampled tokens, to be added over calls:
    tokens, clipped (the clip takes their gradient), kl (nats)."""
    if ref_logp is None and kl_coef:
        raise ValueError("kl_coef needs ref_logp")
    mask = mask.bool()
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    advantages = advantages.to(logp.dtype).expand_as(logp).masked_fill(~mask, 0)

    ratio = (logp - old_logp).masked_fill(~mask, 0).exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -torch.minimum(plain, clipped)

    gap = (ref_logp if ref_logp is not None else logp.detach()) - logp
    gap = gap.masked_fill(~mask, 0)
    kl = gap.exp() - gap - 1
    if kl_coef:
        loss = loss + kl_coef * kl
    stats = {"tokens": mask.sum(), "clipped": (clipped < plain).sum(), "kl": kl.detach().sum()}
    return (loss.sum(-1) / mask.sum(-1).clamp(min=1)).sum(), stats


def micro_batches(samples: list[Sample], max_tokens: int) -> list[list[Sample]]:
    """Consecutive samples that are packed into at most max_tokens tokens, or a larger one alone."""
    batches, tokens = [], 0
    for item in samples:
        size = length({node for leaf in item.leaves for node in leaf.path()})
        same_root = bool(batches) and batches[-1][-1].root is item.root
        added = size - len(item.root.tokens) if same_root else size
        if not batches or tokens + added > max_tokens:
            batches.append([])
            tokens, added = 0, size
        batches[-1].append(item)
        tokens += added
    return batches


def batch_loss(logps, old_logps, ref_logps, packed: Packed, args) -> tuple[Tensor, dict]:
    """The loss of packed samples, and the sums of grpo_loss's stats; the log-probs as packed."""
    loss, sums = 0.0, {}
    for item, (index, mask) in zip(packed.samples, packed.paths):
        of_leaves = [
            None if x is None else x.index_select(0, index.flatten()).view_as(index)
            for x in (logps, old_logps, ref_logps)
        ]
        given = [a.reshape(-1) for a in item.advantages]
        advantages = torch.nn.utils.rnn.pad_sequence(given, batch_first=True).to(logps.device)
        limits = args.clip_low, args.clip_high, args.kl_coef
        part, stats = grpo_loss(*of_leaves, advantages, mask, *limits)
        loss = loss + item.weight * part
        for name, value in stats.items():
            sums[name] = sums.get(name, 0) + value
    return loss, sums


def update(model, reference, optimizer, samples: list[Sample], args) -> dict[str, float | None]:
    """One GRPO step per epoch on a batch. Returns loss, kl (None: no reference), clip_fraction,
    grad_norm, and sampler_gap, the mean distance of the sampler's log-probs from the trainer's
    (None: no step). FloatingPointError before a step would break the weights."""
    if not args.kl_coef:  # without KL a prompt whose advantages are all 0 has no gradient
        samples = [item for item in samples if any(a.any() for a in item.advantages)]
    batches = [Packed(batch, model.device) for batch in micro_batches(samples, args.micro_tokens)]
    old_logps, ref_logps = [], []
    sums = dict.fromkeys(("loss", "norm", "tokens", "clipped", "kl", "gap"), 0.0)
    autocast = functools.partial(torch.autocast, model.device.type, torch.bfloat16)
    model.train()  # gradient checkpointing asks for it; a Qwen has no dropout
    for epoch in range(args.epochs if batches else 0):
        for i, packed in enumerate(batches):
            with autocast(enabled=args.dtype == "bfloat16"):
                logps = packed_logps(model, packed)
                if epoch == 0:  # no step taken yet, so these are the old policy's
                    old_logps.append(logps.detach())
                    ref_logps.append(None)
                    sums["gap"] += (old_logps[i] - packed.sampler_logps).abs().sum()
                if epoch == 0 and reference is not None:
                    with torch.no_grad():
                        ref_logps[i] = packed_logps(reference, packed)
            loss, stats = batch_loss(logps, old_logps[i], ref_logps[i], packed, args)
            loss.backward()
            sums["loss"] += loss.detach() / args.epochs
            for name, value in stats.items():
                sums[name] += value
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        sums["norm"] += norm / args.epochs
        if not math.isfinite(sums["loss"] + norm):
            raise FloatingPointError(f"loss {sums['loss']:g}, gradient norm {norm:g}")
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    sums = {name: float(value) for name, value in sums.items()}
    tokens, drawn = max(1, sums["tokens"]), max(1, sum(map(len, old_logps)))
    return {
        "loss": sums["loss"],
        "kl": sums["kl"] / tokens if reference is not None else None,
        "grad_norm": sums["norm"],
        "clip_fraction": sums["clipped"] / tokens,
        "sampler_gap": sums["gap"] / drawn if batches else None,
    }


# ---------------------------------------------------------------------------------------- the agent and its search tool
class BM25:
    """Okapi BM25 (k1 = 1.2, b = 0.75) over passages, pairs of title and text; words in lower case."""
    def __init__(self, passages: list[tuple[str, str]]):
        self.passages, self.found, lengths = passages, {}, []  # found: word -> (passage numbers, term frequencies)
        for i, passage in enumerate(tqdm(passages, "index", unit="passage", leave=False, delay=1)):
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
                forget([node])  # nothing begins below a leaf
    def rollout(self, step: int):
        """The trees of one training step: ((question, root) pairs, what to log of them)."""
        args, rng = self.args, random.Random(f"{self.args.seed}/{step}")
        generator = torch.Generator(self.model.device).manual_seed(rng.getrandbits(60))
        built_in = (make_question(rng, args.hops, args.hard, False) for _ in range(args.prompts))
        groups = [(question, self.root(question)) for question in batch_of(self.training, step, args) or built_in]
        counts = Counter(generated_tokens=0, forwarded_tokens=0, tool_calls=0, entropy=0.0)
        for i in range(0, len(groups), args.at_once):
            part = groups[i : i + args.at_once]
            tree_rollout(lambda starts: self.play(starts, generator, args.temperature, args.top_p, counts), part,
                         args.M, args.N if args.method == "tree_grpo" else 0, args.L, rng)
            forget(node for _, root in part for node in root.below())
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
    """The items that parse(record) lists for each record of a file, a JSON list or JSON lines.
    BadInput names the file, and the line of a record that is no JSON or that parse fails on;
    `wanted` says what such a record should be."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"--data {path}: {getattr(error, 'strerror', 'not UTF-8 text')}; give a data file"
        ) from None
    found, start, at, end = [], 0, 0, len(text)
    between = re.compile(r"[\s,]*")
    if text.lstrip()[:1] == "[":
        at, end = text.index("[") + 1, len(text) - text.endswith("]")
    try:
        while (start := between.match(text, at).end()) < end:  # one by one, to know their lines
            record, at = json.JSONDecoder().raw_decode(text, start)
            found += parse(record)
        if end == len(text) and text.lstrip()[:1] == "[":
            raise json.JSONDecodeError("the list is not closed", text, end)
    # JSON's own error is a ValueError.
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        line = getattr(error, "lineno", text.count("\n", 0, start) + 1)
        raise BadInput(
            f"--data {path}, line {line}: this is no whole JSON record of {wanted}"
        ) from None
    if len(found) < 2:
        raise BadInput(
            f"--data {path}: {len(found)} records of use; give two or more, as one is held out"
        )
    return found


def batch_of(data: list, step: int, args) -> list:
    """A training step's part of the data, or [] if there is none. Each pass over it has an order of
    its own."""
    numbers, n = range(step * args.prompts, (step + 1) * args.prompts), len(data)
    orders = {
        e: random.Random(f"{args.seed}/{e}/data").sample(range(n), n)
        for e in {i // n for i in numbers if n}
    }
    return [data[orders[i // n][i % n]] for i in numbers if n]


def encode(tokenizer, text: str) -> list[int]:  # JSON may hold half of a surrogate pair
    text = text.encode("utf-8", "replace").decode()
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_root(model, tokenizer, text: str) -> Node:
    """A new root with a prompt, in the model's chat template if it has one. BadInput if the context
    has no room."""
    context = model.config.max_position_embeddings
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    root = Node()
    root.add(encode(tokenizer, text))
    if len(root.tokens) >= context:
        raise BadInput(
            f"--model: a context of {context} tokens is too short for {text[-60:]!r}; take another"
        )
    return root


def load_model(path: str, device: torch.device, flag: str = "--model"):
    """A causal LM whose layers all attend to everything before, by token_tree, and its tokenizer,
    from a hub id or a folder. BadInput, which blames `flag`, for anything else, and for weights
    that do not fit the model, which would be random numbers instead."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()  # of downloads, which the line above switches off as well
    AttentionInterface.register("token_tree", token_tree)
    how = {"dtype": torch.float32, "attn_implementation": "token_tree", "output_loading_info": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, info = AutoModelForCausalLM.from_pretrained(path, **how)
        if not tokenizer("a")["input_ids"]:
            raise ValueError("the tokenizer is missing")
    except Exception as error:  # noqa: BLE001 (no folder, no weights, no network, unknown kind ...)
        reason = f"no model and tokenizer to be loaded there ({str(error)[:150]})"
        raise BadInput(f"{flag} {path}: {reason}") from None
    for kind in ("missing", "unexpected", "mismatched"):
        if names := info[f"{kind}_keys"]:
            reason = f"weights are {kind}: {len(names)}, such as {min(map(str, names))}"
            raise BadInput(f"{flag} {path}: {reason}; give a whole checkpoint")
    kinds = {*(getattr(model.config, "layer_types", None) or ["full_attention"])}
    if getattr(model.config, "sliding_window", None):
        kinds.add("sliding_attention")
    if others := " and ".join(sorted(kinds - {"full_attention"})):
        reason = f"its {others} keeps no keys and values that branches could share"
        raise BadInput(f"{flag} {path}: {reason}; take a Qwen2.5 or Qwen3")
    model = model.to(device).eval()
    try:
        gap = engine_gap(model)
    except Exception as error:  # noqa: BLE001 (it is not built as a Qwen or a Llama is)
        gap = f"{type(error).__name__}: {str(error)[:100]}"
    if not isinstance(gap, float) or not gap < 1e-3:
        reason = f"with shared keys and values its log-probs are others ({gap})"
        raise BadInput(f"{flag} {path}: {reason}; take a Qwen2.5 or Qwen3")
    return model, tokenizer


@torch.no_grad()
def engine_gap(model) -> float:
    """How far the log-probs of the sampler and of the packed trainer are from those that the model
    gives by an attention of transformers, for a few tokens."""
    root = Node()
    root.add([i % model.config.vocab_size for i in range(8)])
    leaf, how = Node(root), (lambda tokens: False, set(), None, 0.0, 1.0, Counter())
    sample(model, [leaf], [4], *how, keep=False)
    packed = Packed([Sample(root, [leaf], [], 1.0)], model.device)
    ours = torch.tensor([leaf.logps, packed_logps(model, packed).tolist()])
    model.set_attn_implementation("eager")
    ids = torch.tensor([root.tokens + leaf.tokens], device=model.device)
    logps = model(ids, use_cache=False).logits[0, 7:-1].log_softmax(-1)
    model.set_attn_implementation("token_tree")
    return (ours - logps.gather(-1, ids[0, 8:, None])[:, 0].cpu()).abs().max().item()


def in_bfloat16(model):
    """The model with its parameters in bfloat16; not its buffers, as RoPE needs float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def linear_in_bfloat16(model):
    """The model with those weights in bfloat16 that autocast would cast at each step; the head's
    may be the embedding's, which it does not cast."""
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)
    return model


def memory_needed(
    model, args, prompts: int, prompt: int, lanes: int, leaves: int, tokens: int
) -> float:
    """About how many GB a run takes at its peak if all rollouts get as long as they may.

    prompts: sampled from together, `prompt` tokens long; lanes: in flight below them; leaves: of
    their trees, whose keys and values are kept; tokens: the most of a path below its prompt."""
    c, size = model.config, 2 if args.dtype == "bfloat16" else 4
    W, layers, heads = c.hidden_size, c.num_hidden_layers, c.num_attention_heads
    groups, D = heads // c.num_key_value_heads, getattr(c, "head_dim", None) or W // heads
    parameters = sum(p.numel() for p in model.parameters())
    copies = (size == 2) + bool(args.kl_coef)  # the one that samples, the reference
    weights = (12 + size * copies) * parameters  # float32, with AdamW's two averages

    kv = 2 * layers * c.num_key_value_heads * D * size  # of a token
    room = 33
    while room <= tokens:  # as Lanes.make_room does
        room += 1 + max(64, room // 2)
    sampling = kv * (2 * prompts * prompt + lanes * room + leaves * tokens)
    sampling += 16 * min(MOST_SCORES, lanes * heads * tokens)  # pieces, or a token at a time
    sampling += 28 * lanes * c.vocab_size  # logits, what is drawn from, its running sum

    packed = min(args.micro_tokens, prompts * prompt + leaves * tokens)
    layer = 58 * W + (11 if size == 2 else 16) * c.intermediate_size  # kept of a token for backward
    if args.grad_checkpointing:
        layer = layer / layers + 4 * W
    training = packed * (layer * layers + groups * size * (prompt + tokens))  # and masks
    training += 16 * min(2**26, packed * c.vocab_size)  # a chunk of the head
    training += (6 if size == 2 else 4) * parameters  # gradients, and the weights cast by autocast
    return (weights + max(sampling, training)) / 1e9 + 0.1  # workspaces


def opening(model, args, data: str, **shape: int) -> str:
    """A run's first line. shape: as memory_needed takes it."""
    where = model.device.type
    where = torch.cuda.get_device_name(model.device) if where == "cuda" else where
    parameters = sum(p.numel() for p in model.parameters())
    gb = memory_needed(model, args, **shape)
    return f"{parameters:,} parameters, {where}, {args.dtype}; {data}; at most about {gb:.1f} GB"


def save_tiny_model(folder: Path, tokens: list[str], seed: int) -> None:
    """A Qwen2 of 0.5M parameters with random weights, and a Qwen tokenizer of single bytes and the
    given `tokens`."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, logging

    logging.disable_progress_bar()
    tokenizer = Qwen2Tokenizer(
        {t: i for i, t in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}, []
    )
    tokenizer.add_tokens(tokens)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        eos_token_id=0,
        initializer_range=0.08,  # at the usual 0.02 so small a model does not leave its plateau
    )
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def warm_start(model, paths: list[list[Node]], args, lr: float = 3e-3) -> None:
    """Supervised steps on all demonstrations (paths to a leaf): a policy gradient with advantage 1
    is imitation."""
    n = len(paths) // max(1, args.sft_steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in tqdm(range(args.sft_steps), "warm start", unit="step"):
        optimizer.param_groups[0]["lr"] = lr * min(
            1, (step + 1) / 20, (1 - step / args.sft_steps) / 0.3
        )
        samples = [
            Sample(path[0], path[-1:], [torch.ones(())], 1 / n)
            for path in paths[n * step : n * (step + 1)]
        ]
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
    """The state after `step` steps, renamed when whole; random states and the place in the data
    follow from step."""
    folder, temporary = out / f"checkpoint-{step:06d}", out / "checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    torch.save(
        {
            "script": Path(__file__).name,
            "step": step,
            "args": vars(args),
            "optimizer": optimizer.state_dict(),
        },
        temporary / "state.pt",
    )
    temporary.rename(folder)
    for old in set(out.glob("checkpoint-*")) - {folder}:
        shutil.rmtree(old)


def resume_run(args, given: set[str]):
    """--resume -> (the run's own arguments, its newest checkpoint's folder and state). BadInput if
    there is no such run, or one that cannot go on like this."""
    try:
        folder = max(Path(args.resume).glob("checkpoint-*/state.pt")).parent
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        script, saved = state["script"], state["args"]
    except Exception:  # noqa: BLE001 (there is none, or it fails in one of many ways)
        raise BadInput(
            f"--resume {args.resume}: no whole checkpoint there; give an earlier run's folder"
        ) from None
    if script != Path(__file__).name:
        raise BadInput(
            f"--resume {args.resume}: this is a run of {script}; continue it with that script"
        )
    run = (
        saved
        | {"out": args.resume, "resume": args.resume}
        | {n: vars(args)[n] for n in given & {"steps", "device"}}
    )
    if differs := [name for name in sorted(given) if getattr(args, name) != run.get(name)]:
        flag, began = differs[0].replace("_", "-"), run.get(differs[0])
        raise BadInput(f"--{flag}: this run began with {began!r}; leave it out")
    return type(args)(**run), str(folder), state


def read_metrics(out: Path, last_step: float = math.inf) -> list[dict]:
    """The rows of metrics.jsonl up to a step, without a line that a killed run left unfinished."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [
        row
        for line in lines
        if line.endswith("}") and (row := json.loads(line))["step"] <= last_step
    ]


def train(
    args,
    state: dict | None,
    model,
    policy,
    reference,
    tokenizer,
    rollout,
    credit,
    evaluate,
    picture,
) -> None:
    """The loop of all three scripts. What a method does in its own way comes in as functions:
    rollout(step) -> (groups, what to log), credit(step, groups) -> samples for the loss,
    evaluate() -> what to log, picture(groups, samples) -> (file name, Mermaid). `policy` samples:
    `model`, or its copy in bfloat16. state: a checkpoint's; None: a new run."""
    out, first, interrupts = Path(args.out), state["step"] if state else 0, []
    how = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": model.device.type == "cuda"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, **how)

    def log(*rows: dict, name: str = "metrics.jsonl", mode: str = "a") -> None:
        with open(out / name, mode) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def measure(step: int) -> None:
        row = {"event": "eval", "step": step, **evaluate()}
        log(row)
        sampled, greedy = row["success"], row["greedy_success"]
        tqdm.write(f"step {step}: held-out success {sampled:.3f} sampled, {greedy:.3f} greedy")

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

    def interrupted(*signalled) -> None:
        """Ctrl-C: finish the step, save and exit; by a second one exit at once."""
        if interrupts:
            signal.default_int_handler(*signalled)
        interrupts.append(signalled)
        bar.set_description("stopping")

    before = signal.signal(signal.SIGINT, interrupted)
    for step in bar:
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        began = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup))
        groups, row = rollout(step)
        samples = credit(step, groups)
        sampled = time.perf_counter()
        row.update(update(model, reference, optimizer, samples, args), lr=lr)
        if policy is not model:
            for copied, master in zip(policy.parameters(), model.parameters()):
                copied.data.copy_(master.data)
        ended = time.perf_counter()
        row["seconds"] = ended - began
        row["seconds_sampling"], row["seconds_training"] = sampled - began, ended - sampled
        row["peak_gb"] = None  # known on CUDA only
        if model.device.type == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated(model.device) / 1e9
        log({"event": "train", "step": step + 1, **row})
        name, text = picture(groups, samples)
        (out / name).write_text(text, encoding="utf-8", errors="replace")
        speed = row["generated_tokens"] / row["seconds"]
        bar.set_postfix_str(f"reward {row['reward']:.2f}, {speed:.0f} tokens/s")
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
    """Share of the held-out tasks that are solved by one chain each, at temperature 1 and
    greedily."""
    right, n, tasks = Counter(), agent.args.eval_batch, agent.held_out
    bar = tqdm(total=2 * len(tasks), desc="evaluation", unit="task", leave=False, delay=1)
    for name, temperature in (("success", 1.0), ("greedy_success", 0.0)):
        generator = torch.Generator(agent.model.device).manual_seed(0)
        for i in range(0, len(tasks), n):
            starts = [(task, agent.root(task), 0) for task in tasks[i : i + n]]
            agent.play(starts, generator, temperature, 1.0, Counter())
            right[name] += sum(root.leaves()[0].reward > 0.5 for _, root, _ in starts)
            bar.update(len(starts))
    bar.close()
    return {name: solved / len(tasks) for name, solved in right.items()}


def mermaid(
    nodes: list[Node], words: list[str], notes: list[str], values: list[float | None]
) -> str:
    """A tree, parents first, as a Mermaid diagram: words and a note in each node, green or red by
    its value's sign."""
    lines = ["```mermaid", "flowchart TD"]
    for i, (node, text, note, value) in enumerate(zip(nodes, words, notes, values)):
        text = "".join(
            f"#{ord(c)};" if c in '#"<>&`[]{}|\\' or c < " " else c
            for c in " ".join(text.split())[:160]
        )
        color = (
            "fff" if value is None else "cfc" if value > 1e-6 else "fcc" if value < -1e-6 else "eee"
        )
        lines += [
            f'    n{i}["{text}{note and "<br>" + note}"]',
            f"    style n{i} fill:#{color},color:#000",
        ]
        trunk = f"|tree {node.tree + 1}|" * (node.parent is nodes[0])
        lines += [f"    n{nodes.index(node.parent)} -->{trunk} n{i}"] if i else []
    return "\n".join([*lines, "```", ""])


def summary(out: Path, *counted: str) -> str:
    """The closing lines of a run, from its metrics; `counted` are the columns to add up."""
    evals, steps = (
        [row for row in read_metrics(out) if row["event"] == event] for event in ("eval", "train")
    )
    gains = (
        f"{evals[0][name]:.3f} -> {evals[-1][name]:.3f} {words}"
        for name, words in (("success", "sampled (T = 1)"), ("greedy_success", "greedy"))
    )
    totals = ", ".join(
        f"{sum(row[name] for row in steps):,} {name.replace('_', ' ')}" for name in counted
    )
    return (
        f"held-out success {', '.join(gains)}\n{len(steps)} steps, {totals}, "
        f"{sum(row['seconds'] for row in steps):.0f} s of training\nmodel in {out / 'final'}"
    )


def main(argv: list[str]) -> None:
    args, given = parse_args(Args, argv)
    folder, state = args.model, None
    if "resume" in given:
        args, folder, state = resume_run(args, given)
    if args.search_url and not args.data:
        raise BadInput("--search-url: the built-in questions bring their own facts; give --data as well")
    try:
        name = args.device if args.device != "auto" else "cuda:0" if torch.cuda.is_available() else "cpu"
        torch.zeros(1, device=(device := torch.device(name))).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # graphs and their random numbers are of the current one
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
        for question in tqdm(training + held_out, "prompts", unit="prompt", leave=False, delay=1):
            agent.root(question)  # raises BadInput if a prompt does not fit
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not state and any(out.iterdir()):
            raise FileExistsError(0, "is not empty")
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}; choose another folder, or --resume a run") from None
    if not folder:
        model, tokenizer = built_in_model(args, device, out / "start")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan, up to a second, for every new shape
    if args.grad_checkpointing:  # newer versions of transformers call it activation checkpointing
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    reference = load_model(args.model or str(out / "start"), device)[0].requires_grad_(False) if args.kl_coef else None
    policy = model if args.dtype == "float32" else in_bfloat16(copy.deepcopy(model))
    if reference is not None and policy is not model:
        reference = linear_in_bfloat16(reference)
    agent = Agent(policy, tokenizer, args, training, held_out)
    data = f"{len(training) or 'built-in'} questions to train on, {len(held_out)} held out"
    prompts, N = min(args.prompts, args.at_once), args.N if args.method == "tree_grpo" else 0
    print(opening(
        model, args, data, prompts=max(args.eval_batch, prompts),
        prompt=max(len(agent.root(question).tokens) for question in held_out),
        lanes=max(args.eval_batch, prompts * args.M * max(1, N)),
        leaves=max(args.eval_batch, prompts * args.M * (1 + N * args.L)),
        tokens=args.max_turns * (args.turn_tokens + args.info_tokens) - args.info_tokens), flush=True)
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
