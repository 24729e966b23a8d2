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
    """What the user gave cannot be used; the script prints the message as one line and exits with status 2."""
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
    """The KV and hidden states of nodes below roots, in one forward, once for all that will begin below them."""
    if roots := [root for root in dict.fromkeys(node.parent for node in nodes) if root.kv is None]:
        prefill(model, roots)
    lanes = Lanes(model, nodes)
    counts.update(prompt_tokens_sampling=length(roots + nodes))
    counts["forwarded_tokens"] += length(roots) + lanes.forward(lanes.new)
    for b in (b for b, node in enumerate(lanes.grid) if node):
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
                       generator, temperature, 1.0, counts)
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
        sampled, greedy = ([group for seeds in batches for group in self.play(seeds, K, True, generator, T, Counter())]
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
    return tokenizer(text.encode("utf-8", "replace").decode(), add_special_tokens=False)["input_ids"]
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
    args.lr = args.lr or (1e-6 if args.model else 5e-4)
    args.max_tokens = args.max_tokens or (512 if args.model else 8)
    out, make_env = Path(args.out), load_env(args.env) if args.env else House
    if folder:
        model, tokenizer = load_model(folder, device, "--resume" if state else "--model")
        player = Player(model, tokenizer, args, make_env)  # the next line raises BadInput if a prompt does not fit
        player.prompt(player.group(player.envs[0].reset(seed=0, options={"held_out": True})[1]["task"], 1), [""])
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
    if args.grad_checkpointing:  # newer versions of transformers call it activation checkpointing
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    reference = load_model(args.model or str(out / "start"), device)[0].requires_grad_(False) if args.kl_coef else None
    policy = model if args.dtype == "float32" else copy.deepcopy(model)
    for parameter in policy.parameters() if policy is not model else ():  # not the buffers: RoPE needs float32
        parameter.data = parameter.data.to(torch.bfloat16)
    p = Player(policy, tokenizer, args, make_env)
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
