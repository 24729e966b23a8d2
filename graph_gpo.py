# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.0", "tqdm"]
# ///
"""GraphGPO: graph-based credit assignment for agentic RL (ICML 2026, arXiv 2605.26684), in one file.

    python graph_gpo.py                                          a tiny Qwen learns to tidy up a house, on a CPU
    python graph_gpo.py --model Qwen/Qwen2.5-1.5B-Instruct --env envs/alfworld_games.py:ALFWorld    on one GPU
Advantages: graph_advantages, by goal_distances; of baselines gigpo_advantages, episode_advantages. A world: House.
Rollouts that share prompts: Player, Lanes, sample. Each token trained on once: Packed, packed_logps. Loss: grpo_loss.
The loop: train. Left out: several processes, mini-batches, learning rate schedules beyond a warm-up."""

import argparse
import copy
import dataclasses
import difflib
import functools
import heapq
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
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
    env: str = arg("", "a world of your own, FILE.py:NAME or FILE.py:NAME:ARGUMENT (default: the built-in house)")
    method: str = arg("graph_gpo", "credit of a step", choices=("graph_gpo", "gigpo", "grpo"))
    K: int = arg(8, "rollouts per task", low=1)
    omega: float = arg(0.1, "graph_gpo: what one more unit of cost leaves of a reward", low=1e-9, high=0.999)
    gamma: float = arg(0.95, "gigpo: discount of rewards per step", high=1)
    beta_graph: float = arg(1.0, "weight of the step term, A_G (or gigpo's)")
    beta_episode: float = arg(1.0, "weight of the episode term, A_E")
    invalid_penalty: float = arg(0.1, "taken from the advantage of an invalid action")
    penalty_in_return: bool = arg(False, "take it before the z-scores, as the authors' code does (tutorial, 3.7)")
    merge_similarity: float = arg(1.0, "states at least so alike are merged (1: none)", high=1)
    dynamic_sampling: int = arg(0, "times per step that tasks whose returns are all equal are replaced")
    max_steps: int = arg(25, "environment steps per rollout", low=1)
    history: int = arg(0, "earlier observations and actions in a prompt")
    steps: int = arg(60, "training steps")
    tasks: int = arg(16, "tasks per step", low=1)
    epochs: int = arg(1, "gradient steps per batch", low=1)
    lr: float | None = arg(None, "learning rate (default: 1e-6 with --model, 5e-4 without)", low=1e-9)
    warmup: int = arg(10, "steps of linear learning rate warm-up")
    clip_low: float = arg(0.2, "the ratio is clipped below 1 - clip_low (it is 1 unless --epochs is above 1)")
    clip_high: float = arg(0.2, "the ratio is clipped above 1 + clip_high (as clip_low)")
    kl_coef: float = arg(0.01, "beta, weight of the KL to the starting model (0: no reference model)")
    temperature: float = arg(1.0, "of the draws in training", low=1e-9)
    max_tokens: int | None = arg(None, "most tokens of an answer (default: 512 with --model, 8 without)", low=1)
    sft_steps: int = arg(300, "supervised steps that warm-start the tiny model")
    eval_tasks: int = arg(32, "held-out tasks, each with K rollouts at temperature 1 and a greedy one", low=1)
    eval_every: int = arg(0, "steps between evaluations (0: before and after only)")
    save_every: int = arg(10, "steps between checkpoints", low=1)
    kept_tokens: int = arg(200_000, "most tokens of prompts whose KV is kept for when they are met again")
    micro_tokens: int = arg(16384, "most tokens per forward and backward", low=1)
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


# ----------------------------------------------------------------------------------------------- GraphGPO: the method
class SUCCESS:
    """Where the last transition of a successful rollout leads. The class itself is that state, and equals no other."""
class Transition(NamedTuple):
    state: object  # anything hashable
    action: str
    next_state: object
    trajectory: object  # the rollout it is of, hashable; a rollout's transitions are in the order of time
    cost: float = 1.0

def goal_distances(transitions: list[Transition]) -> dict[object, float]:
    """Distance d(s) of each state to success in the graph of all transitions of a task (GraphGPO): the least sum of
    costs on a way to SUCCESS, itself at 0; the largest of these plus 1 where there is no way. Dijkstra, O((V + E) log
    V). ValueError for no transitions, costs that are not positive and finite, or a transition that leaves SUCCESS."""
    number, into = {SUCCESS: 0}, [[]]  # states are numbered, so that the heap never compares them
    for state, _, next_state, _, cost in transitions:
        if state is SUCCESS or not 0 < cost < math.inf:
            raise ValueError(f"want positive finite costs and nothing that leaves SUCCESS, got {state!r}, cost {cost}")
        for s in (state, next_state):
            if s not in number:
                number[s] = len(into)
                into.append([])
        into[number[next_state]].append((number[state], cost))
    if len(into) == 1:
        raise ValueError("want at least one transition")
    distance, heap = [0.0] + [math.inf] * (len(into) - 1), [(0.0, 0)]
    while heap:
        d, at = heapq.heappop(heap)
        for before, cost in into[at] if d == distance[at] else ():  # else a shorter way was found since
            if d + cost < distance[before]:
                distance[before] = d + cost
                heapq.heappush(heap, (d + cost, before))
    beyond = max(d for d in distance if d < math.inf) + 1
    return {state: min(distance[i], beyond) for state, i in number.items()}
def per_group(groups: list):
    """A function (values (n,), how) -> for each value "sum", "mean", "amin" or "amax" of its group's values, (n,)."""
    number = {}
    index = torch.tensor([number.setdefault(group, len(number)) for group in groups])
    return lambda x, how: x.new_zeros(len(number)).scatter_reduce(
        0, index.to(x.device), x, how, include_self=False)[index.to(x.device)]
def z_scores(values: Tensor, groups: list) -> Tensor:
    """z-score (unbiased std, no epsilon) of each value among those of its group, (n,) in float64; 0 for a lone one, and
    where a group's values span no more than rounding does: 1e-9 of the largest."""
    among, x = per_group(groups), values.double()
    x = x / among(x.abs(), "amax").clamp(1e-300)  # the largest is 1: squares of tiny ones would be 0, of huge ones inf
    x = x - among(x, "mean")
    std = (among(x * x, "sum") / (among(torch.ones_like(x), "sum") - 1)).sqrt()
    return torch.where(among(x, "amax") - among(x, "amin") <= 1e-9, 0, x / std)
def graph_advantages(transitions: list[Transition], omega: float = 0.1,
                     penalties: Tensor | None = None, similarity: float = 1.0) -> Tensor:
    """A_G of each transition of one task's group: z-score of R_G(s, a, s') = 10 omega^(d(s') + cost) among all that
    leave s, whatever became of their rollouts (GraphGPO). The scale cancels, so steps far from the goal get their full
    credit. Returns (len(transitions),), float64. ValueError as in goal_distances, and for omega outside (0, 1). All 0
    without any success, unless there are `penalties`, of that shape, to be taken from R_G. With `similarity` below 1 the
    distances are those of merge_states. Both are in the authors' code (tutorial, 3.7)."""
    if not 0 < omega < 1:
        raise ValueError(f"want 0 < omega < 1, got {omega}")
    merged, states = merge_states(transitions, similarity), [t.state for t in transitions]
    distances = goal_distances(merged)
    ahead = torch.tensor([distances[t.next_state] + t.cost for t in merged], dtype=torch.float64)
    if penalties is not None:
        return z_scores(10 * omega**ahead - penalties, states)
    if not any(t.next_state is SUCCESS for t in transitions):
        return torch.zeros_like(ahead)
    return z_scores(omega ** (ahead - per_group(states)(ahead, "amin")), states)  # a state's largest is 1, never 0
def gigpo_advantages(transitions: list[Transition], rewards: Tensor, gamma: float = 0.95,
                     penalties: Tensor | None = None, similarity: float = 1.0) -> Tensor:
    """The step term of GiGPO (arXiv 2505.10978): z-score of a transition's return, sum_k gamma^k r_(t + k) to the end
    of its rollout, among all that leave the same state. rewards r: (len(transitions),); result: the same, float64.
    penalties: as in graph_advantages. similarity: below 1 what leaves states that merge_states
    merges is compared. ValueError unless there are finite rewards of that shape and 0 <= gamma <= 1."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    if not transitions or rewards.shape != (len(transitions),) or not rewards.isfinite().all() or not 0 <= gamma <= 1:
        raise ValueError(f"want finite rewards, one per transition, and 0 <= gamma <= 1, got {rewards}, {gamma}")
    later, returns = {}, []
    for t, reward in zip(reversed(transitions), reversed(rewards.tolist())):
        later[t.trajectory] = reward + gamma * later.get(t.trajectory, 0.0)
        returns.append(later[t.trajectory])
    returns = torch.tensor(returns[::-1], dtype=torch.float64)
    if similarity < 1:
        left = [t._replace(next_state=t.state) for t in transitions]  # where a rollout ended is no group
        transitions = merge_states(left, similarity)
    return z_scores(returns if penalties is None else returns - penalties, [t.state for t in transitions])
def episode_advantages(returns: Tensor) -> Tensor:
    """A_E of each rollout of one task's group: z-score of its return (GRPO). (trajectories,) -> the same, in float64.
    ValueError for none, another shape, or a return that is not finite."""
    returns = torch.as_tensor(returns, dtype=torch.float64)
    if returns.dim() != 1 or not len(returns) or not returns.isfinite().all():
        raise ValueError(f"want finite returns (trajectories,), got {returns}")
    return z_scores(returns, [0] * len(returns))
def merge_states(transitions: list[Transition], similarity: float) -> list[Transition]:
    """The same transitions, but each state is replaced by the first earlier one whose text is at
    least `similarity` (difflib's ratio, 0 to 1) like its own and which stays. At 1 none is."""
    def like(one: str, other: str) -> bool:
        match = difflib.SequenceMatcher(None, one, other)  # two bounds are cheaper than the ratio
        bounds = (match.real_quick_ratio, match.quick_ratio)
        return all(ratio() >= similarity for ratio in (*bounds, match.ratio))
    if similarity >= 1:
        return transitions
    merged, kept = {SUCCESS: SUCCESS}, {}  # kept: a state that stays -> its text
    for state in (s for t in transitions for s in (t.state, t.next_state)):
        if state not in merged:
            merged[state] = next((s for s, text in kept.items() if like(str(state), text)), state)
            kept.setdefault(merged[state], str(state))
    return [t._replace(state=merged[t.state], next_state=merged[t.next_state]) for t in transitions]
# ----------------------------------------------------------------------------------- the house, a world of its own
ROOMS = {"hall": ("bench", "rack"), "kitchen": ("counter", "fridge", "microwave", "sink", "cabinet"),
         "lounge": ("sofa", "table", "shelf", "chest"), "bedroom": ("bed", "desk", "drawer", "wardrobe"),
         "bathroom": ("basin", "bathtub", "hamper")}  # the hall leads to each of the others
PLACES = {place: room for room, places in ROOMS.items() for place in places}
LIDDED = ("fridge", "microwave", "cabinet", "chest", "drawer", "wardrobe", "hamper")  # shut at the beginning
TREATED = {"clean": ("sink", "washed"), "heat": ("microwave", "hot"), "cool": ("fridge", "cold")}  # where, and then
THINGS, VERBS = ("mug", "plate", "apple", "bread", "towel", "cup", "pan"), ("go", "open", "take", "put", *TREATED)

class House:
    """A household in the manner of ALFWorld, deterministic: find a thing, take it, clean, heat or cool it, and put it
    somewhere; 4 to 14 steps if none is wasted. A world is whatever has this shape, Gymnasium's, with texts:
    reset(seed, options) -> observation, info: the seed decides on the task; options["held_out"]: one never trained on.
    step(action) -> observation, reward, terminated, truncated, info: terminated is success if reward > 0, else failure.
    info["task"], from reset: what to do. info["state"]: the key, text, equal where states are (default: observation).
    info["valid"], from step: was it an action (default: yes)? `instruction`: what a chat model is told before the task.
    For the tiny model `words`, texts of one token each (others it spells), and demonstrate(rng), an action."""
    instruction = """You are in a house. Do the task, one action at a time: go <room or place>, open <place>,
take <thing>, put <thing>, clean, heat or cool <thing> (at sink, microwave, fridge). The hall leads to kitchen, lounge,
bedroom and bathroom. Think briefly, then write <action>...</action>.\n\n"""
    words = (*(f" {word}" for word in (*ROOMS, *PLACES, *THINGS, "washed", "hot", "cold", "plain", "door", "hand")),
        "Task: put a", " into the", " of the", ".\n", "You are in the", " at the", ". It is", " open", " shut",
        " nothing", ". You see:", ". You hold:", ". The", " is in the", ", in the", "Nothing happens. ", *VERBS)
    def reset(self, seed: int = 0, options: dict | None = None) -> tuple[str, dict]:
        rng, held_out, told = random.Random(seed), bool((options or {}).get("held_out")), ""
        while not told or self.where[self.thing] == self.goal or (random.Random(told).random() < 0.2) != held_out:
            self.verb, self.goal, things = rng.choice(["", *TREATED]), rng.choice([*PLACES]), rng.sample(THINGS, 3)
            self.thing, self.where = things[0], {thing: rng.choice([*PLACES]) for thing in things}
            told = f"{self.verb} {self.thing} {self.goal} {self.where[self.thing]}"  # a fifth of these is held out
        self.at, self.open, self.how = rng.choice([*ROOMS]), set(), dict.fromkeys(things, "plain")
        self.want = TREATED[self.verb][1] if self.verb else ""
        task = f"put a {self.want} {self.thing} into the {self.goal} of the {PLACES[self.goal]}.".replace("  ", " ")
        return self.look(), {"task": task, "state": self.key()}
    def held(self) -> str:
        return next((thing for thing, place in self.where.items() if place == "hand"), "nothing")
    def shut(self) -> bool:
        return self.at in LIDDED and self.at not in self.open
    def key(self) -> str:
        things = ", ".join(f"{how} {thing} {self.where[thing]}" for thing, how in self.how.items())
        return f"{self.at}: {things}" + f"; open: {' '.join(sorted(self.open))}" * bool(self.open)
    def look(self) -> str:
        seen = [thing for thing, at in self.where.items() if at == self.at and not self.shut()] or ["nothing"]
        here, where = PLACES.get(self.at, self.at), self.where[self.thing]
        return (f"You are in the {here} at the {'door' if self.at in ROOMS else self.at}. It is "
                f"{'shut' if self.shut() else 'open'}. You see: {' '.join(seen)}. You hold: {self.held()}. The "
                f"{self.how[self.thing]} {self.thing} is in the {PLACES.get(where, here)}, in the {where}.")
    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        verb, _, what = action.lower().rpartition(" ")
        room, held, valid = PLACES.get(self.at, self.at), what == self.held() != "nothing", True
        if verb == "go" and what != self.at and (PLACES.get(what) == room or what in ROOMS and "hall" in (room, what)):
            self.at = what
        elif verb == "open" and what == self.at and self.shut():
            self.open.add(what)
        elif verb == "take" and self.where.get(what) == self.at and not self.shut() and self.held() == "nothing":
            self.where[what] = "hand"
        elif verb == "put" and held and self.at in PLACES and not self.shut():
            self.where[what] = self.at
        elif verb in TREATED and held and self.at == TREATED[verb][0]:
            self.how[what] = TREATED[verb][1]
        else:
            valid = False
        done = self.where[self.thing] == self.goal and self.want in (self.how[self.thing], "")
        seen = "Nothing happens. " * (not valid) + self.look()
        return seen, float(done), done, False, {"state": self.key(), "valid": valid}
    def demonstrate(self, rng: random.Random | None = None) -> str:
        """The next action of one who often forgets lids and treatments, takes the bedroom for the bathroom, and now
        and then does anything at all: habits for reward to mend. Without rng: of one without mistakes."""
        def wrong(rate: float) -> bool:
            return rng is not None and rng.random() < rate
        here = PLACES.get(self.at, self.at)
        if wrong(0.2):
            verb = rng.choice(VERBS)
            return f"{verb} {rng.choice([*ROOMS, *ROOMS[here]] if verb in ('go', 'open') else [*self.where])}"
        place, action = self.goal, f"put {self.thing}"
        if self.held() not in (self.thing, "nothing"):  # it is in the way
            place, action = ROOMS[here][0], f"put {self.held()}"
        elif self.held() == "nothing":
            place, action = self.where[self.thing], f"take {self.thing}"
        elif self.want not in (self.how[self.thing], "") and not wrong(0.5):
            place, action = TREATED[self.verb][0], f"{self.verb} {self.thing}"
        room = PLACES[place]
        if here == "hall" != room and wrong(0.7 if room == "bathroom" else 0.02):
            room = "bedroom" if room == "bathroom" else "bathroom"
        way = place if here == room else room if "hall" in (here, room) else "hall"
        if self.at != way:
            return f"go {way}"
        return f"open {place}" if self.shut() and action.startswith(("take", "put")) and not wrong(0.6) else action
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


# ----------------------------------------------------------------------------------- rollouts in a world, their credit
@dataclass
class Group:
    """K rollouts of a task, and the tree of their tokens: at the root what all prompts begin with, below it each
    distinct rest of a prompt, below that the actions taken there."""
    task: str
    root: Node
    returns: list[float]  # of each rollout, and whether it was successful
    won: list[bool]
    steps: list[tuple] = field(default_factory=list)  # in time: (Transition, the action's node, its reward, valid?)
    prompts: dict[tuple, Node] = field(default_factory=dict)  # by the tokens of the rest
@torch.inference_mode()
def compute(model, nodes: list[Node], counts: Counter) -> None:
    """The keys and values of nodes below roots, once for all that will begin below them. Each of these runs the last
    token again."""
    roots = {node.parent for node in nodes if node.parent.kv is None}
    counts["prompt_tokens_sampling"] += length([*roots, *nodes])
    counts["forwarded_tokens"] += prefill(model, nodes) + length(nodes)
    lanes = Lanes(model, nodes)
    lanes.catch_up()
    for b, node in enumerate(lanes.grid):
        if node:
            lanes.store(b)

class Player:
    """The policy in a world: rollouts of many tasks at a time; and what train() needs of the method."""
    def __init__(self, model, tokenizer, args, make_env):
        self.model, self.tokenizer, self.args, self.make_env, self.envs = model, tokenizer, args, make_env, [make_env()]
        eos = model.generation_config.eos_token_id
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]  # of a text, of a turn in a chat
        self.eos = {*ends, *(eos if isinstance(eos, list) else [eos])}
        self.encode = functools.lru_cache(100_000)(functools.partial(encode, tokenizer))
        text = "Task: \0\n"
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": getattr(self.envs[0], "instruction", "") + text}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        self.before, self.after = text.split("\0")  # of a prompt, around what differs
    def group(self, task: str, K: int) -> Group:
        group = Group(task, Node(), [0.0] * K, [False] * K)
        group.root.add(encode(self.tokenizer, f"{self.before}{task}\n"))
        return group
    def prompt(self, group: Group, told: list[str]) -> Node:
        """A prompt: below the instruction and the task the last --history of the earlier observations and actions of
        `told`, the observation, which is its last, and the end of the chat template; cut from the left to fit."""
        tail, context = self.encode(self.after), self.model.config.max_position_embeddings
        room = context - len(group.root.tokens) - len(tail) - self.args.max_tokens
        if room < 1:
            raise BadInput(f"--model: a context of {context} is too short for {group.task[-40:]!r} and --max-tokens")
        rest = (*self.encode("".join(told[-1 - self.args.history :]))[-room:], *tail)
        if rest not in group.prompts:
            group.prompts[rest] = Node(group.root, [*rest], [False] * len(rest), [0.0] * len(rest))
        return group.prompts[rest]
    def action(self, node: Node) -> str:
        """What the policy wants to do: what it wrote between the last <action> tags, or else in its last line."""
        told = self.tokenizer.decode(node.tokens, skip_special_tokens=True).strip()
        return " ".join((told.rpartition("</action>")[0].rpartition("<action>")[2] or told.rpartition("\n")[2]).split())
    def play(self, seeds: list[int], K: int, held_out: bool, generator, temperature: float, counts: Counter):
        """Groups of K rollouts of each seed's task, in waves of one step each; by the policy, or by the demonstrator if
        the generator is a random.Random. A prompt is computed once for all its actions, if --kept-tokens has room."""
        self.envs += [self.make_env() for _ in range(len(seeds) * K - len(self.envs))]
        groups, live = [], []
        for i, env in enumerate(self.envs[: len(seeds) * K]):
            seen, info = env.reset(seed=seeds[i // K], options={"held_out": held_out})
            groups += [self.group(info["task"], K)] if i % K == 0 else []
            live.append((env, groups[-1], i % K, info.get("state", seen), [seen]))
        for _ in range(self.args.max_steps):
            prompts = [self.prompt(group, told) for _, group, _, _, told in live]
            nodes = [Node(prompt) for prompt in prompts]
            if isinstance(generator, random.Random):
                for node, (env, *_) in zip(nodes, live):
                    node.add([*self.encode(env.demonstrate(generator)), self.tokenizer.eos_token_id], sampled=True)
            else:
                if new := [prompt for prompt in dict.fromkeys(prompts) if prompt.kv is None]:
                    compute(self.model, new, counts)
                sample(self.model, nodes, [self.args.max_tokens] * len(nodes), lambda tokens: False, self.eos,
                       generator, temperature, 1.0, counts, keep=False)
            counts.update(env_steps=len(live), prompt_tokens=sum(length(node.path()[:-1]) for node in nodes))
            going = []
            for (env, group, k, state, told), node in zip(live, nodes):
                seen, reward, terminated, truncated, info = env.step(action := self.action(node))
                after, group.won[k] = info.get("state", seen), bool(terminated and reward > 0)
                end = SUCCESS if group.won[k] else f"{after} (failed)" if terminated else after  # no way leads on
                transition = Transition(state, action, end, k)
                group.steps.append((transition, node, float(reward), bool(info.get("valid", True))))
                group.returns[k] += float(reward)
                if not (terminated or truncated):
                    going.append((env, group, k, after, [*told[:-1], f"{told[-1]}\n> {action}\n", seen]))
            forget(nodes)
            kept = [prompt for group in groups for prompt in group.root.children if prompt.kv is not None]
            if length(kept) > self.args.kept_tokens:
                forget(kept)
            if not (live := going):
                break
        forget(node for group in groups for node in group.root.below())
        return groups
    def rollout(self, step: int):
        """The groups of one training step, and what to log of them."""
        args, rng, counts, groups = self.args, random.Random(f"{self.args.seed}/{step}"), Counter(), []
        generator = torch.Generator(self.model.device).manual_seed(rng.getrandbits(60))
        for _ in range(1 + args.dynamic_sampling):
            groups = [group for group in groups if len(set(group.returns)) > 1]  # the last ones stay as they are
            if seeds := [rng.getrandbits(32) for _ in range(args.tasks - len(groups))]:
                groups += self.play(seeds, args.K, False, generator, args.temperature, counts)
        counts["entropy"] /= counts["generated_tokens"]
        counts["prompt_tokens_training"] = sum(length([group.root, *group.root.children]) for group in groups)
        reward, success = (sum(map(sum, x)) / args.K / len(groups) for x in zip(*((g.returns, g.won) for g in groups)))
        return groups, {"reward": reward, "success": success, **counts}
    def advantages(self, group: Group) -> Tensor:
        """Advantage of each step: beta_graph A_G + beta_episode A_E, less the penalty of an invalid action; or, with
        --penalty-in-return, as in the authors' code (tutorial, 3.7): the penalty before the z-scores, and A_E a z-score
        over steps."""
        args, (transitions, _, rewards, valid) = self.args, zip(*group.steps)
        number, returns = [t.trajectory for t in transitions], torch.tensor(group.returns, dtype=torch.float64)
        penalties, early = args.invalid_penalty * (1 - torch.tensor(valid, dtype=torch.float64)), None
        A = episode_advantages(returns)[number]
        if args.penalty_in_return:
            A, penalties, early = episode_advantages(returns[number] - penalties), 0, penalties
        how, A_G = (early, args.merge_similarity), 0
        if args.method == "graph_gpo":
            A_G = graph_advantages(transitions, args.omega, *how)
        elif args.method == "gigpo":
            A_G = gigpo_advantages(transitions, rewards, args.gamma, *how)
        return args.beta_graph * A_G + args.beta_episode * A - penalties
    def credit(self, step: int, groups: list[Group]) -> list[Sample]:
        """Each step is a sequence of its own, its action, below a prompt that it may share; a task's are averaged."""
        samples = []
        for group in groups:
            taken, first = {}, {}  # prompt -> actions taken there with their advantages; equal ones share a node
            for (_, action, *_), A in zip(group.steps, self.advantages(group)):
                action = first.setdefault((action.parent, *action.tokens), action)
                taken.setdefault(action.parent, []).append((action, A))
            samples += [Sample(group.root, *map(list, zip(*pairs)), 1 / len(group.steps) / len(groups))
                        for pairs in taken.values()]
        return samples
    def evaluate(self) -> dict[str, float | None]:
        """Success on held-out tasks, sampled (K times each, temperature 1) and greedy; and of the sampled rollouts, if
        any succeeded, how many steps of failed ones lead nearer to success, and of the others do not (Figure 1)."""
        args, generator = self.args, torch.Generator(self.model.device).manual_seed(0)
        batches = [[*range(i, min(i + args.tasks, args.eval_tasks))] for i in range(0, args.eval_tasks, args.tasks)]
        sampled, greedy = ([group for seeds in tqdm(batches, "evaluation", unit="batch", leave=False, delay=1)
                            for group in self.play(seeds, K, True, generator, T, Counter())]
                           for K, T in ((args.K, 1.0), (1, 0.0)))
        rows = {"success": [x for group in sampled for x in group.won], "greedy_success": [x.won[0] for x in greedy],
                "progress_in_failed": [], "waste_in_successful": []}
        for group in (group for group in sampled if any(group.won)):
            d = goal_distances([t for t, *_ in group.steps])
            for nearer, won in ((d[t.next_state] < d[t.state], group.won[t.trajectory]) for t, *_ in group.steps):
                rows["waste_in_successful" if won else "progress_in_failed"].append(nearer != won)
        return {name: sum(row) / len(row) if row else None for name, row in rows.items()}
    def picture(self, groups: list[Group], samples: list[Sample]) -> tuple[str, str]:
        """("graph.md", Mermaid): the smallest graph of a task with success and failure, if any, never merged."""
        group = min(groups, key=lambda group: (len(set(group.won)) < 2, len(group.root.children)))
        return "graph.md", graph_mermaid(group.task, [t for t, *_ in group.steps], self.advantages(group))
def graph_mermaid(task: str, transitions: list[Transition], advantages: Tensor, most: int = 50) -> str:
    """The graph of a task as a Mermaid diagram: states with their distance to success; edges with the action, how often
    it was taken and its mean advantage, green or red by its sign. Of more than `most` edges those nearest to it."""
    edges, number, distance = {}, {}, goal_distances(transitions)
    for t, A in zip(transitions, advantages.tolist()):
        edges.setdefault(t[:3], []).append(A)
    def text(x) -> str:
        return "".join(f"#{ord(c)};" if c in '#"<>&`[]{}|\\' or c < " " else c for c in " ".join(str(x).split())[:100])
    shown = sorted(edges, key=lambda edge: distance[edge[2]] + distance[edge[0]])[:most]
    lines = ["```mermaid", "flowchart TD", f'    task["Task: {text(task)}<br>{len(shown)} of {len(edges)} edges"]']
    for state in (state for before, _, after in shown for state in (before, after) if state not in number):
        number[state], (name, color) = len(number), ("SUCCESS", "cfc") if state is SUCCESS else (text(state), "fff")
        lines += [f'    n{number[state]}["{name}<br>d = {distance[state]:g}"]',
                  f"    style n{number[state]} fill:#{color},color:#000"]
    for i, (before, action, after) in enumerate(shown):
        A, n = round(sum(x := edges[before, action, after]) / len(x), 2) + 0.0, len(x)  # + 0.0: no -0.00
        lines += [f'    n{number[before]} -->|"{text(action)}, {n} x, A = {A:+.2f}"| n{number[after]}',
                  f"    linkStyle {i} stroke:#{'2a2' if A > 0 else 'c22' if A < 0 else '888'}"]
    return "\n".join([*lines, "```", ""])
# ---------------------------------------------------------------------------------- worlds, models, the training loop
def load_env(spec: str):
    """--env -> a function that makes such a world. BadInput says what is wrong with it."""
    path, _, name = spec.removesuffix(".py").partition(".py:")
    name, *argument = name.split(":", 1)
    try:
        described = importlib.util.spec_from_file_location(f"env_{Path(path).name}", f"{path}.py")
        module = sys.modules[described.name] = importlib.util.module_from_spec(described)
        described.loader.exec_module(module)
        make = functools.partial(getattr(module, name), *argument)
        [env.reset(seed=0, options={"held_out": held_out})[1]["task"] for env in [make()] for held_out in (True, False)]
    except (Exception, SystemExit) as error:  # noqa: BLE001 (what a user's file does may fail in any way)
        raise BadInput(f"--env {spec}: want a world FILE.py:NAME[:ARGUMENT]; {type(error).__name__}: {error}") from None
    return make


def encode(tokenizer, text: str) -> list[int]:  # JSON may hold half of a surrogate pair
    text = text.encode("utf-8", "replace").decode()
    return tokenizer(text, add_special_tokens=False)["input_ids"]


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


def tiny_model(args, make_env, device: torch.device, folder: Path):
    """The tiny model, warm-started on single steps of the world's demonstrator. It is left in `folder`."""
    save_tiny_model(temporary := folder.with_suffix(".tmp"), [*make_env().words], args.seed)
    model, tokenizer = load_model(str(temporary), device)
    player, rng, paths = Player(model, tokenizer, args, make_env), random.Random(f"{args.seed}/demonstrations"), []
    while len(paths) < 128 * args.sft_steps:
        groups = player.play([rng.getrandbits(32) for _ in range(64)], 1, False, rng, 1.0, Counter())
        paths += [action.path() for group in groups for _, action, *_ in group.steps]
    warm_start(model, rng.sample(paths, 128 * args.sft_steps), args)
    model.save_pretrained(temporary)
    temporary.rename(folder)
    return model, tokenizer


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
    try:
        name = args.device if args.device != "auto" else "cuda:0" if torch.cuda.is_available() else "cpu"
        torch.zeros(1, device=(device := torch.device(name))).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # graphs and their random numbers are of the current one
    except Exception:  # noqa: BLE001 (each backend fails in its own way)
        raise BadInput(f"--device {args.device}: not to be had here; try cpu, or leave it out") from None
    if device.type == "cpu" and not args.model and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the tiny model gains little by two, and beside other work they wait for each other
    args.out = args.out or f"runs/{Path(__file__).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    args.lr = args.lr or (1e-6 if args.model else 5e-4)
    args.max_tokens = args.max_tokens or (512 if args.model else 8)
    out, make_env = Path(args.out), load_env(args.env) if args.env else House
    if folder:
        model, tokenizer = load_model(folder, device, "--resume" if state else "--model")
        player = Player(model, tokenizer, args, make_env)
        seen, info = player.envs[0].reset(seed=0, options={"held_out": True})
        player.prompt(player.group(info["task"], 1), [""])  # raises BadInput if it does not fit
    elif not all(hasattr(make_env(), name) for name in ("words", "demonstrate")):
        raise BadInput(f"--env {args.env}: without words and demonstrate() it needs a model; give --model as well")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not state and any(out.iterdir()):
            raise FileExistsError(0, "is not empty")
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}; choose another folder, or --resume a run") from None
    if not folder:
        model, tokenizer = tiny_model(args, make_env, device, out / "start")
        seen, info = make_env().reset(seed=0, options={"held_out": True})
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan, up to a second, for every new shape
    if args.grad_checkpointing:  # newer versions of transformers call it activation checkpointing
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    reference = load_model(args.model or str(out / "start"), device)[0].requires_grad_(False) if args.kl_coef else None
    policy = model if args.dtype == "float32" else in_bfloat16(copy.deepcopy(model))
    if reference is not None and policy is not model:
        reference = linear_in_bfloat16(reference)
    p = Player(policy, tokenizer, args, make_env)
    group = p.group(info["task"], 1)
    tokens = len(p.prompt(group, [seen]).tokens) * (1 + args.history) + args.max_tokens
    steps, kept = args.tasks * args.K * args.max_steps, args.kept_tokens // tokens
    data = f"tasks of {args.env or 'the house'}, {args.eval_tasks} held out"
    print(opening(model, args, data, prompts=args.tasks, prompt=len(group.root.tokens), lanes=args.tasks * args.K,
                  leaves=min(steps, kept), tokens=tokens), flush=True)
    train(args, state, model, policy, reference, tokenizer, p.rollout, p.credit, p.evaluate, p.picture)
    print(summary(out, "generated_tokens", "forwarded_tokens", "env_steps"))

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
