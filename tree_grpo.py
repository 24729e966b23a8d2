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
they have in common, and are trained on it once: the engine, below the loop."""

from __future__ import annotations

import argparse
import contextlib
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
from dataclasses import dataclass, field
from datetime import timedelta
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

    rewards, tree_ids: (G,), in any order, finite. terms: "both", "intra" or "inter" (Table 4).
    Returns (G,), of the rewards' dtype if that is floating. A lone leaf, or one among equals, has
    0 from a term, so with one leaf per tree this is GRPO. ValueError for other input."""
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
def train(args, model, reference, agent: Agent, state: dict | None) -> None:
    """agent.model samples: `model`, or its copy in bfloat16. state: a checkpoint's, or None."""
    out, tokenizer = Path(args.out), agent.tokenizer
    how = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": model.device.type == "cuda"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, **how)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    first, size = (state["step"], state["metrics"]) if state else (0, 0)
    log = open_log(args, size)
    if not state:
        save_checkpoint(out, 0, model, tokenizer, optimizer, args)
    if first == 0:
        log("eval", 0, evaluate(agent))
    signals, picture = catch_signals(), load_beside("pictures.py", "tree_grpo")
    bar = tqdm(range(first, args.steps), "training", initial=first, total=args.steps, unit="step")
    for step in bar:
        began = time.perf_counter()
        lr = args.lr * min(1, (step + 1) / max(1, args.warmup))
        optimizer.param_groups[0]["lr"] = lr
        rng = random.Random(f"{args.seed}/{step}")
        generator = torch.Generator(model.device).manual_seed(rng.getrandbits(60) + RANK)
        counts = Counter(generated_tokens=0, forwarded_tokens=0, tool_calls=0, entropy=0.0)
        draws = generator, args.temperature, args.top_p, counts
        play = functools.partial(agent.play, draws)

        # 1. Search (section 3.2).
        batch = batch_of(agent.task, step, args, rng)
        prompts = [(item, agent.root(item)) for item in batch[RANK::RANKS]]
        for part in batches(prompts, args.at_once):
            tree_search(play, part, args.M, args.N, args.L, rng)
            forget(node for _, root in part for node in root.below())

        # 2. Credit (Eq. 6 and 7). The loss is a mean over a prompt's leaves, and over prompts.
        groups, keep = [], random.Random(f"{args.seed}/{step}/keep")
        for _, root in prompts:
            leaves, advantages = credit(root, args, keep)
            groups.append(Group(root, leaves, advantages[:, None], 1 / len(leaves) / len(batch)))
        sampled = time.perf_counter()

        # 3. Update (Eq. 8); then the sampler gets the new weights.
        row = update(model, reference, optimizer, groups, args)
        if agent.model is not model:
            agent.model.load_state_dict(model.state_dict())

        # 4. Log, draw, evaluate, save.
        for _, root in prompts:
            rewards = [leaf.reward for leaf in root.leaves()]
            won = sum(reward > args.success for reward in rewards)
            counts.update(leaves=len(rewards), reward=sum(rewards), success=won)
        row |= {**over_ranks(counts), "lr": lr}
        row["reward"] /= row["leaves"]
        row["success"] /= row["leaves"]
        row["entropy"] /= row["generated_tokens"]
        row["seconds"] = time.perf_counter() - began
        row["seconds_sampling"] = sampled - began
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9  # of the run
        log("train", step + 1, row)
        speed = row["generated_tokens"] / row["seconds"]
        bar.set_postfix_str(f"reward {row['reward']:.2f}, {speed:.0f} tokens/s")
        if picture and RANK == 0:
            drawn = picture(sys.modules[__name__], agent, prompts, groups)
            (out / "tree.md").write_text(drawn, "utf-8", "replace")
        last = step + 1 == args.steps
        if last or args.eval_every and (step + 1) % args.eval_every == 0:
            log("eval", step + 1, evaluate(agent))
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


# ---------------------------------------------------------------------------------- the agent
INSTRUCTION = """Answer the question. In each turn, think between <think> and </think>, then search
by <search> query </search> and read in the next turn what was found between <information> and
</information>, or, when you know it, answer in a few words and nothing else:
<answer> Paris </answer>. You have {turns} turns. Question: """
HINT = "that was no action : write <search> query</search> or <answer> answer</answer>"
ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


class Agent:
    """The policy with its search tool: episodes of turns, many at a time.

    task is what --env makes: `training`, a list of questions, or an empty one if draw(rng) gives
    them; `held_out`; search([(question, query), ...]) -> a text for each; reward(question, turns),
    R(H), from the texts that the policy wrote. A question has a `text`. Optional: `instruction`,
    told before a question. For the tiny model: `words`, texts of one token each (others it spells),
    and demonstrate(question, rng) -> the turns of an episode, pairs of what the agent writes and
    what the search finds."""

    def __init__(self, model, tokenizer, args, task):
        self.model, self.tokenizer, self.args, self.task = model, tokenizer, args, task
        self.eos = end_tokens(model, tokenizer)
        self.piece = functools.cache(lambda token: tokenizer.decode([token]))
        self.before, self.after = chat_template(tokenizer, args)
        self.opened = "<think>" if self.after.rstrip().endswith("<think>") else ""
        self.own_reward = load_named("--reward", args.reward)[0] if args.reward else None

    def root(self, question) -> Node:
        text = question.text
        if self.tokenizer.chat_template or not hasattr(self.task, "demonstrate"):
            told = getattr(self.task, "instruction", INSTRUCTION)
            text = told.replace("{turns}", str(self.args.max_turns)) + text
        return Node(tokens=encode(self.tokenizer, text, self.before, self.after))

    def text(self, node: Node) -> str:  # what the policy wrote in it
        written = node.tokens[: len(node.logps)]
        return self.tokenizer.decode(written, skip_special_tokens=True)

    def stop(self, tokens: list[int]) -> bool:  # does the last one complete a closing tag?
        if ">" not in self.piece(tokens[-1]):
            return False
        return bool(re.search("</(search|answer)>", self.tokenizer.decode(tokens)))

    def observation(self, found: str) -> list[int]:
        texts = ("\n\n<information>", f" {found}", "</information>\n\n")
        head, body, tail = (encode(self.tokenizer, text) for text in texts)
        return head + body[: max(0, self.args.info_tokens - len(head) - len(tail))] + tail

    def reward(self, question, leaf: Node) -> float:
        turns = [self.text(turn) for turn in leaf.path()[1:]]
        turns[0] = self.opened + turns[0]
        with blame(f"the reward {self.args.reward or 'of the task'}"):
            if self.own_reward:
                tokens = [token for turn in leaf.path()[1:] for token in turn.tokens]
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                reward = float(self.own_reward(question, self.opened + text))
            else:
                reward = float(self.task.reward(question, turns))
            if not math.isfinite(reward):
                raise ValueError(f"{reward} is not finite")
        return reward

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
            queries = [(question, query) for question, _, query in asked]
            with blame("--env: search()"):
                found = self.task.search(queries) if queries else []
                found = dict(zip((node for _, node, _ in asked), found, strict=True))
            counts["tool_calls"] += len(asked)
            going = []
            for question, node in live:
                if node not in over:
                    observation = self.observation(found.get(node, HINT))
                    if length(node.path()) + len(observation) < context:
                        if node.tokens[-1] in self.eos:  # the turn goes on, as in Search-R1
                            node.tokens.pop()
                            node.logps.pop()
                        node.tokens += observation
                        going.append((question, Node(node, tree=node.tree)))
                        continue
                node.reward = self.reward(question, node)
                forget([node])  # nothing begins below it
            live = going


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


def evaluate(actor) -> dict[str, float]:
    """Share of the held-out that one chain each solves, at temperature 1 and greedily."""
    args, held_out, solved = actor.args, actor.task.held_out, Counter()
    for name, temperature in (("success", 1.0), ("greedy_success", 0.0)):
        generator = torch.Generator(actor.model.device).manual_seed(RANK)
        parts = batches(held_out[RANK::RANKS], args.at_once)
        for part in tqdm(parts, name, leave=False, delay=1):
            starts = [(task, actor.root(task), 0) for task in part]
            actor.play((generator, temperature, 1.0, Counter()), starts)
            leaves = [root.leaves()[0] for _, root, _ in starts]
            solved[name] += sum(leaf.reward > args.success for leaf in leaves)
    if RANK == 0:
        leaf = leaves[-1]
        text = actor.tokenizer.decode([token for node in leaf.path() for token in node.tokens])
        text = f"A held-out one, greedy. Reward {leaf.reward:g}.\n\n~~~~text\n{text}\n~~~~\n"
        Path(args.out, "episode.md").write_text(text, "utf-8", "replace")
    return {name: solved / len(held_out) for name, solved in over_ranks(solved).items()}


def batch_of(task, step: int, args, rng: random.Random) -> list:
    """A training step's part of the data, in an order of its own in each pass over it; or, without
    data, as many that are drawn."""
    if not task.training:
        return [task.draw(rng) for _ in range(args.prompts)]
    batch, n = [], len(task.training)
    for i in range(step * args.prompts, (step + 1) * args.prompts):
        if not batch or i % n == 0:
            order = random.Random(f"{args.seed}/{i // n}/data").sample(task.training, n)
        batch.append(order[i % n])
    return batch


# -------------------------------------------------------------------------------- command line
class BadInput(ValueError):
    """What the user gave cannot be used: the script prints this as one line and exits with 2."""


def arg(default, help: str, choices: tuple | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Args:
    model: str = arg("", "hub id or folder of a Qwen (default: a tiny one, built here)")
    env: str = arg("", "questions, FILE.py:NAME[:TEXT] (default: envs/facts.py:Facts)")
    data: str = arg("", "file or folder of HotpotQA, 2Wiki, MuSiQue ...: see envs/questions.py")
    skip_bad_records: bool = arg(False, "of --data: leave them out instead of stopping")
    search_url: str = arg("", "Search-R1 server, http://host:port/retrieve (default: BM25)")
    search_timeout: float = arg(20.0, "seconds that a request of 32 queries may take")
    reward: str = arg("", "one's own reward, FILE.py:NAME: (question, text of a path) -> number")
    success: float = arg(0.5, "a reward above this counts as success")
    system: str = arg("", "a system prompt for a chat model")
    template_kwargs: str = arg("{}", "JSON for its chat template: '{\"enable_thinking\": false}'")
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
    if args.method == "grpo":
        args.N = 0
    if args.advantage == "intra" and (args.N * args.L == 0 or args.keep == 1):
        raise BadInput("--advantage intra: it is 0 for one leaf per tree; leave it out")
    if args.search_url and not args.data:
        raise BadInput("--search-url: it is for questions of a file; give --data as well")
    device = pick_device(args)
    args.lr = args.lr or (1e-6 if args.model else 5e-4)
    args.turn_tokens = args.turn_tokens or (500 if args.model else 32)
    spec = args.env or f"{ENVS}/{'questions.py:Questions' if args.data else 'facts.py:Facts'}"
    make, text = load_named("--env", spec)
    with blame(f"--data {args.data}" if args.data else f"--env {spec}"):
        task = make(args, *text)
        if not task.held_out:
            raise ValueError("nothing is held out")
    start = load_beside("tiny.py", "tree_grpo")
    if weights:
        model, tokenizer = load_model(weights, device, "--resume" if state else "--model")
        agent, context = Agent(model, tokenizer, args, task), model.config.max_position_embeddings
        for items in (task.held_out, task.training):
            count = len(items)
            items[:] = [item for item in items if len(agent.root(item).tokens) < context]
            if len(items) < count:
                print(f"{count - len(items)} of {count} prompts are left out, as they are too long")
            if count and not items:
                raise BadInput(f"--model: a context of {context} tokens is too short")
    elif not all([start, hasattr(task, "words"), hasattr(task, "demonstrate")]):
        raise BadInput(
            "--model: needed with --data, without envs/, or if --env has no words, demonstrate()"
        )
    out = make_folder(args)
    if not weights:
        model, tokenizer = start(sys.modules[__name__], args, task, device)
        save_model(out / "start", model, tokenizer)
        over_ranks({})  # the others wait for it
    policy, reference = policy_and_reference(args, model, args.model or str(out / "start"))
    items = f"{len(task.training) or 'drawn'} questions, {len(task.held_out)} held out"
    print(f"{model.num_parameters():,} parameters, {device}, {args.dtype}; {items}", flush=True)
    train(args, model, reference, Agent(policy, tokenizer, args, task), state)


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
