"""graph_gpo.py seen from outside: the command line, worlds of a user's own, what a run leaves, kill and resume."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from outside import (
    BAD_ARGUMENTS,
    BAD_FOLDERS,
    COLUMNS,
    MACHINE,
    NASTY,
    README,
    Script,
    assert_bfloat16,
    assert_loads_as_qwen3,
    assert_same_first_step,
    assert_same_run,
    assert_small_run,
    assert_stopped_before_breaking,
    assert_summary,
    assert_trained_model,
    metrics,
    snapshot,
    weights,
)

import graph_gpo
from graph_gpo import Args, House, Node, Player

SCRIPT = Script(graph_gpo)
ENVS = SCRIPT.path.parent / "envs"
ROLLOUT = {"reward", "success", "entropy", "env_steps", "generated_tokens", "forwarded_tokens", "prompt_tokens",
           "prompt_tokens_sampling", "prompt_tokens_training"}  # what is known of a step before it is trained on
KEYS = ROLLOUT | {"event", "step", "loss", "kl", "clip_fraction", "grad_norm", "sampler_gap", "lr", *MACHINE}
FIGURE_1 = {"progress_in_failed", "waste_in_successful"}
SMALL = ["--sft-steps", "12", "--K", "4", "--tasks", "3", "--max-steps", "6", "--max-tokens", "8", "--eval-tasks", "4",
         "--save-every", "1"]
FIVE = ["--steps", "5", "--epochs", "2", "--lr", "0.0005", "--warmup", "2", "--kl-coef", "0.01"]

# A file with worlds, as a user would write it; {NASTY} and what else is in braces is filled in.
WORLDS = '''
import json


class Walk:
    """A line of places from 0 to a goal, from place 1; one can also jump, into a hole. Up to 5 steps, each has its
    price. No info but the task, so the observation is the state and each action counts as valid."""
    instruction = "Walk to the goal. Write <action>up</action>, down, stay or jump.\\n\\n"
    words = ("Task: reach", "You are in a long and narrow corridor without doors and windows, at", ".\\n",
             " 0", " 1", " 2", " 3", " 4", "up", "down", "stay", "jump")
    def __init__(self, argument="3"):
        goal, _, self.file = argument.partition(":")
        self.goal = int(goal)
    def log(self, *what):
        if self.file:
            with open(self.file, "a") as file:
                print(json.dumps(what), file=file)
    def see(self):
        return f"You are in a long and narrow corridor without doors and windows, at {self.at}"
    def reset(self, *, seed=None, options=None):
        self.at, self.time = 1, 0
        self.log("reset", seed, options)
        return self.see(), {"task": f"reach {self.goal}."}
    def step(self, action):
        self.log("step", action)
        self.time += 1
        if action == "jump":
            return "You fell.", -1, True, False, {}
        self.at = max(0, self.at + {"up": 1, "down": -1}.get(action, 0))
        there = self.at == self.goal
        return self.see(), 1 if there else -0.125, there, self.time == 5, {}
    def demonstrate(self, rng):
        return rng.choice(["up"] * 5 + ["down"] * 2 + ["stay"] * 2 + ["jump"])


class Exam(Walk):
    """Held-out tasks cannot be solved, all others are solved by whatever is done."""
    def reset(self, *, seed=None, options=None):
        self.exam = options["held_out"]
        return super().reset(seed=seed, options=options)
    def step(self, action):
        return "There.", 0.0 if self.exam else 1.0, True, False, {}


class Idle(Walk):
    """Nothing ends, nothing is rewarded."""
    def step(self, action):
        return self.see(), 0, False, False, {"valid": True}


class Odd:
    """For a policy that writes whatever it likes: an action of odd length is right, another is not one at all."""
    instruction = NASTY
    def reset(self, seed, options):
        self.count = 0
        return NASTY, {"task": f"{seed} {NASTY}"}
    def step(self, action):
        self.count += 1
        odd = len(action) % 2 == 1
        info = {"valid": odd, "state": f"{NASTY}{self.count}"}
        return f"{NASTY} {self.count}", float(odd), odd, self.count == 3, info


class Nasty(Walk):
    """One action is in tags and bad for Mermaid and Markdown, as the states are; one is bare."""
    words = [f"<action>{NASTY}</action>", "leave", "Task: do it.\\n", NASTY]
    def reset(self, seed, options):
        self.time = 0
        return NASTY, {"task": NASTY}
    def step(self, action):
        assert action != NASTY and "<action>" not in action, "an action is one line, without its tags"
        self.time += 1
        done = self.time == 3 and action == "leave"
        valid = action in (" ".join(NASTY.split()), "leave")
        return NASTY * self.time, float(done), done, self.time == 3, {"valid": valid}
    def demonstrate(self, rng):
        return rng.choice([f"<action>{NASTY}</action>", "leave"])


class Taught(Walk):
    demonstrate = property()  # so it has none

class Wordless(Walk):
    words = property()

class Mute(Walk):
    instruction = property()

class Broken(Walk):
    def reset(self, seed=0, options=None):
        raise RuntimeError("the game\\nis lost")

class Untrained(Walk):
    """There are held-out tasks only."""
    def reset(self, seed, options):
        if not options["held_out"]:
            raise FileNotFoundError("no games to train on")
        return super().reset(seed=seed, options=options)

class Taskless(Walk):
    def reset(self, seed=0, options=None):
        return "You are here.", {}

class Bare(Walk):
    def reset(self, seed=0, options=None):
        return "You are here."

class Needy(Walk):
    def __init__(self, argument):
        super().__init__(argument)
'''

@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """The file of worlds, next to it files that are none."""
    folder = tmp_path_factory.mktemp("worlds")
    (folder / "my.py").write_text(f"NASTY = {NASTY!r}\n{WORLDS}")
    (folder / "syntax.py").write_text("class World:\n    def reset(self:\n")
    (folder / "later.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n" + """
@dataclass
class World:
    done: bool = True
    def reset(self, seed, options):
        return "Here.", {"task": "do it"}
    def step(self, action):
        return "There.", 1.0, self.done, False, {}
""")
    (folder / "imports.py").write_text("raise ImportError('pip install something')\n")
    (folder / "zeros.py").write_bytes(bytes(100))
    (folder / "picture.py").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff" * 9)
    (folder / "empty.py").write_text("")
    (folder / "folder.py").mkdir()
    return folder

@pytest.fixture(scope="session")
def files(models, tmp_path_factory):
    """A folder of models, good and bad, and a file that is none; many tests use it and none changes it."""
    folder = tmp_path_factory.mktemp("data") / "files"
    shutil.copytree(models, folder)
    (folder / "one.jsonl").write_text("{}\n")
    return folder

def rows_without(out, *left_out):
    return [{name: value for name, value in row.items() if name not in left_out} for row in metrics(out)]

def draw(out):
    """graph.md as (label and distance by node, edges (from, action, times, A, to)), after a check that every line of it
    is Mermaid and the colors go with the numbers."""
    *opening, task = (lines := (out / "graph.md").read_text().splitlines())[:3]
    assert [*opening, lines[-1]] == ["```mermaid", "flowchart TD", "```"]
    text = r"""[^"`<>\[\]{}|\\]*"""
    counts = re.fullmatch(rf'    task\["Task: {text}<br>(\d+) of (\d+) edges"\]', task)
    labels, edges, filled, stroked = {}, [], [], []
    for line in lines[3:-1]:
        if node := re.fullmatch(rf'    n(\d+)\["({text})<br>d = (\S+)"\]', line):
            labels[int(node[1])] = node[2], float(node[3])
        elif edge := re.fullmatch(rf'    n(\d+) -->\|"({text}), (\d+) x, A = ([+-]\d+\.\d\d)"\| n(\d+)', line):
            edges.append((int(edge[1]), edge[2], int(edge[3]), float(edge[4]), int(edge[5])))
        elif style := re.fullmatch(r"    style n(\d+) fill:#(fff|cfc),color:#000", line):
            filled.append(int(style[1]))
            assert (style[2] == "cfc") == (labels[filled[-1]] == ("SUCCESS", 0))
        else:
            style = re.fullmatch(r"    linkStyle (\d+) stroke:#(2a2|c22|888)", line)
            assert style, line
            stroked.append(int(style[1]))
            A = edges[-1][3]  # rounded, so 0 may have any color
            assert A == 0 or style[2] == ("2a2" if A > 0 else "c22")
    assert sorted(labels) == sorted(filled) == list(range(len(labels)))
    assert stroked == list(range(len(edges))) and len(edges) == int(counts[1]) <= int(counts[2]) and len(edges) <= 50
    assert {node for edge in edges for node in (edge[0], edge[4])} == set(labels)
    assert all(labels[edge[0]][1] > 0 for edge in edges)  # nothing leaves SUCCESS
    return labels, edges


# ------------------------------------------------------------------------------------------------------ a built-in run
def test_built_in_run_leaves_its_metrics(whole):
    rows = metrics(whole[0])
    evals, steps = (metrics(whole[0], event) for event in ("eval", "train"))
    assert all(row.keys() == {"event", "step", "success", "greedy_success"} | FIGURE_1 for row in evals)
    assert all(row[name] is None or 0 <= row[name] <= 1 for row in evals for name in FIGURE_1)
    for row in evals:  # these shares are there as soon as there is a rollout to count them in
        assert (row["waste_in_successful"] is None) == (row["success"] == 0)
    assert set().union(*rows) <= COLUMNS
    finite = [{name: value for name, value in row.items() if name not in FIGURE_1} for row in rows]
    assert_small_run(finite, 5, KEYS)
    assert all(row.keys() == KEYS for row in steps)
    assert {path.name for path in whole[0].iterdir()} == {"metrics.jsonl", "graph.md", "start", "final",
                                                         "checkpoint-000005"}
    assert [row["lr"] for row in steps] == pytest.approx([0.00025, *[0.0005] * 4])
    for row in steps:
        assert 0 <= row["success"] == row["reward"] <= 1  # what the house pays
        assert 0 < row["env_steps"] <= 3 * 4 * 6  # --tasks x --K x --max-steps
        assert row["env_steps"] <= row["generated_tokens"] <= 8 * row["env_steps"]
        # Prompts are shared: less than once per action, in both halves with the task as the common part of each, once.
        assert row["prompt_tokens_sampling"] == row["prompt_tokens_training"] < row["prompt_tokens"]
        assert row["prompt_tokens_sampling"] < row["forwarded_tokens"]
        assert row["forwarded_tokens"] <= row["prompt_tokens_training"] + row["generated_tokens"]
        assert row["sampler_gap"] < 1e-5
    # What the tests of resuming stand on: the weights did move, and differently at each step.
    assert all(row["grad_norm"] > 0 for row in steps) and len({row["loss"] for row in steps}) == 5
    assert all(row["kl"] > 0 for row in steps[1:])  # from the second step on it is not the reference model any more

def test_built_in_run_draws_a_graph(whole):
    labels, edges = draw(whole[0])
    assert '["Task: put a ' in (whole[0] / "graph.md").read_text()
    state = r"\w+: (plain|hot|cold|washed) \w+ \w+, .*|SUCCESS"
    assert all(re.fullmatch(state, text) for text, _ in labels.values())
    assert sum(times for _, _, times, _, _ in edges) <= 4 * 6

def test_built_in_run_ends_with_a_summary(whole):
    assert_summary(*whole, ("env_steps", "generated_tokens", "forwarded_tokens"))

def test_built_in_run_leaves_a_model_for_transformers(whole):
    seen, info = House().reset(seed=0)
    assert_trained_model(whole[0], f"Task: {info['task']}\n{seen}", most=32)

def test_a_folder_as_model_and_recomputed_activations_change_nothing(quick_run, whole, tmp_path):
    assert_same_first_step(quick_run, tmp_path, whole[0], *SMALL, *FIVE)

def test_a_seed_decides_on_everything(quick_run, whole, tmp_path):
    told = [*SMALL, *FIVE, "--model", whole[0] / "start", "--device", "cpu"]
    for seed, out in ((0, "same"), (1, "other")):
        assert quick_run(tmp_path, *told, "--steps", "2", "--seed", seed, "--out", out).returncode == 0
    assert rows_without(tmp_path / "same", *MACHINE)[:3] == rows_without(whole[0], *MACHINE)[:3]
    ours, theirs = metrics(tmp_path / "other", "train"), metrics(whole[0], "train")
    assert all(row["loss"] != was["loss"] and row["entropy"] != was["entropy"] for row, was in zip(ours, theirs))
    before = [metrics(folder, "eval")[0] for folder in (tmp_path / "other", whole[0])]
    assert before[0] == before[1]  # held-out tasks, and the draws in them, are always the same

def test_in_bfloat16_without_a_reference(quick_run, whole, tmp_path):
    arguments = [*SMALL, "--dtype", "bfloat16", "--kl-coef", "0", "--steps", "2", "--model", whole[0] / "start"]
    result = quick_run(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    (out,) = (tmp_path / "runs").iterdir()  # where a run goes without --out
    assert out.name.startswith("graph_gpo-")
    steps = metrics(out, "train")
    assert [row["kl"] for row in steps] == [None, None] and any(row["grad_norm"] > 0 for row in steps)
    assert_bfloat16(out)

def test_no_steps(quick_run, whole, tmp_path):
    result = quick_run(tmp_path, *SMALL, "--steps", "0", "--model", whole[0] / "start", "--out", "out")
    assert result.returncode == 0 and "0 steps, 0 generated tokens, 0 forwarded tokens, 0 env steps" in result.stdout
    assert [(row["event"], row["step"]) for row in metrics(tmp_path / "out")] == [("eval", 0)]

def test_evaluations_on_the_way_change_no_step(quick_run, whole, tmp_path):
    told = [*SMALL, *FIVE, "--model", whole[0] / "start", "--eval-every", "2", "--steps", "3", "--out", "out"]
    assert quick_run(tmp_path, *told).returncode == 0
    events = [(row["event"], row["step"]) for row in metrics(tmp_path / "out")]
    assert events == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3)]
    rows, expected = (rows_without(folder, *MACHINE) for folder in (tmp_path / "out", whole[0]))
    assert [*rows[:3], rows[4]] == expected[:4]

def test_a_run_that_breaks_its_weights_stops_and_says_so(quick_run, whole, tmp_path):
    arguments = [*SMALL, *FIVE, "--epochs", "1", "--warmup", "0", "--lr", "1e10", "--model", whole[0] / "start"]
    assert_stopped_before_breaking(quick_run(tmp_path, *arguments, "--out", "out"), tmp_path / "out")

def test_without_success_penalty_and_reference_nothing_is_learnt(quick_run, whole, tmp_path):
    # In a single step no task of the house is done, so no credit is given to anything.
    told = [*SMALL, "--max-steps", "1", "--invalid-penalty", "0", "--kl-coef", "0", "--steps", "2", "--lr", "0.1"]
    assert quick_run(tmp_path, *told, "--model", whole[0] / "start", "--out", "out").returncode == 0
    steps = metrics(tmp_path / "out", "train")
    assert [(row["loss"], row["grad_norm"]) for row in steps] == [(0, 0)] * 2
    ours, theirs = weights(tmp_path / "out" / "final"), weights(whole[0] / "start")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------------------------------------- options
@pytest.fixture(scope="module")
def walk(quick_run, worlds, tmp_path_factory):
    """(the folder of a run in a world with words and a demonstrator of its own, the arguments for more such runs from
    its warm-started model)."""
    folder = tmp_path_factory.mktemp("walk")
    told = ["--env", worlds / "my.py:Walk", "--K", "6", "--tasks", "4", "--eval-tasks", "6", "--steps", "1",
            "--lr", "0.001", "--warmup", "0"]
    result = quick_run(folder, *told, "--sft-steps", "24", "--out", "out")
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "out", [*told, "--model", folder / "out" / "start", "--max-tokens", "8"]

@pytest.fixture(scope="module")
def usual(quick_run, walk, tmp_path_factory):
    """The metrics of the one step of such a run."""
    folder = tmp_path_factory.mktemp("usual")
    assert quick_run(folder, *walk[1], "--eval-tasks", "1", "--out", "out").returncode == 0
    return metrics(folder / "out", "train")[0]

@pytest.fixture
def step(quick_run, walk, tmp_path):
    """step(arguments) -> the same with more arguments; the run is in tmp_path / "out"."""
    def step(*arguments):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        result = quick_run(tmp_path, *walk[1], "--eval-tasks", "1", *arguments, "--out", "out")
        assert result.returncode == 0, result.stderr[-3000:]
        (row,) = metrics(tmp_path / "out", "train")
        return row

    return step

def test_a_world_with_words_and_a_demonstrator_warm_starts_the_tiny_model(walk):
    (before, row, after), (labels, edges) = metrics(walk[0]), draw(walk[0])
    assert all(0 < evals["success"] < 1 for evals in (before, after)), "other tests need both kinds of rollouts"
    assert all(0 < evals[name] < 1 for evals in (before, after) for name in FIGURE_1)
    assert 0 < row["success"] < 1 and row["reward"] < row["success"]
    assert row["env_steps"] <= 4 * 6 * 5  # the world ends an episode then
    # States are observations; their distances are how far it is, and for the hole and place 0 the largest and 1 more.
    far = {text: d for text, d in labels.values()}
    assert far["SUCCESS"] == 0 and far.items() <= {
        ("SUCCESS", 0), ("You fell. (failed)", far.get("You fell. (failed)")),
        *((f"You are in a long and narrow corridor without doors and windows, at {i}", 3 - i) for i in range(3))}
    assert far.get("You fell. (failed)", 3) in (3, 4)
    names = {node: text[-1] for node, (text, _) in labels.items()}
    assert {(names[a], action, names[b]) for a, action, _, _, b in edges} >= {("1", "up", "2"), ("2", "up", "S")}
    assert '["Task: reach 3.<br>' in (walk[0] / "graph.md").read_text()

def test_credit_is_all_that_differs_between_methods(usual, step):
    rows = {"graph_gpo": usual} | {name: step(*arguments.split()) for name, arguments in {
        "gigpo": "--method gigpo", "grpo": "--method grpo", "no graph": "--beta-graph 0",
        "no episode": "--beta-episode 0", "omega": "--omega 0.7", "gamma": "--method gigpo --gamma 0.3",
        "omega in gigpo": "--method gigpo --omega 0.7", "merged": "--merge-similarity 0.95",
        "in return": "--penalty-in-return --invalid-penalty 3", "twice": "--epochs 2",
        "micro": "--micro-tokens 1",
    }.items()}
    for row in rows.values():
        assert {name: row[name] for name in ROLLOUT} == {name: usual[name] for name in ROLLOUT}
    def trained(name):
        return [rows[name][column] for column in ("grad_norm", "loss", "kl", "clip_fraction")]
    for one, other in (("no graph", "grpo"), ("omega in gigpo", "gigpo"), ("micro", "graph_gpo")):
        assert trained(one) == pytest.approx(trained(other), rel=1e-3, abs=1e-6), one
    differing = ["graph_gpo", "gigpo", "grpo", "no episode", "omega", "gamma", "merged", "in return", "twice"]
    norms = [rows[name]["grad_norm"] for name in differing]
    for i, norm in enumerate(norms):
        assert all(norm != pytest.approx(other, 1e-3) for other in norms[:i]), differing[i]
    assert usual["kl"] == usual["clip_fraction"] == 0 < rows["twice"]["clip_fraction"] and rows["twice"]["kl"] > 0

def test_kept_prompts_only_save_work(usual, step):
    computed, rarely = step("--kept-tokens", "0"), step("--kept-tokens", "20")
    for row in (computed, rarely):
        for name in KEYS - {*MACHINE, "event", "forwarded_tokens", "prompt_tokens_sampling"}:
            assert row[name] == pytest.approx(usual[name], rel=1e-4, abs=1e-6), name
    for name in ("forwarded_tokens", "prompt_tokens_sampling"):
        assert usual[name] < rarely[name] < computed[name]
    assert computed["prompt_tokens_sampling"] < computed["prompt_tokens"]  # still once for all that are there at once

def test_history_makes_longer_prompts(usual, step):
    rows = [usual, step("--history", "1"), step("--history", "99")]
    a, b, c = (row["prompt_tokens"] / row["env_steps"] for row in rows)
    assert a < b < c
    a, b, c = (row["prompt_tokens_training"] for row in rows)
    assert a < b < c

def test_a_temperature_is_for_training_only(step, walk, tmp_path):
    hot, cold = step("--temperature", "99"), step("--temperature", "0.001", "--eval-tasks", "6")
    assert hot["generated_tokens"] / hot["env_steps"] > 4 and cold["generated_tokens"] / cold["env_steps"] == 2
    assert cold["success"] in (0, 1)  # all rollouts are one
    assert metrics(tmp_path / "out", "eval")[0] == metrics(walk[0], "eval")[0]

def test_tasks_whose_returns_are_equal_are_replaced(quick_run, walk, worlds, tmp_path):
    told = [*walk[1], "--env", worlds / "my.py:Idle", "--max-steps", "3"]
    rows = []
    for times in (0, 2):
        result = quick_run(tmp_path, *told, "--dynamic-sampling", times, "--out", times)
        assert result.returncode == 0, result.stderr[-3000:]
        rows += metrics(tmp_path / str(times), "train")
        assert [row["waste_in_successful"] for row in metrics(tmp_path / str(times), "eval")] == [None, None]
    assert [row["env_steps"] for row in rows] == [4 * 6 * 3, 3 * 4 * 6 * 3]
    assert rows[0]["prompt_tokens_training"] == rows[1]["prompt_tokens_training"]  # the last ones are trained on
    assert [row["grad_norm"] for row in rows] == pytest.approx([0, 0], abs=1e-6)

def test_tasks_whose_returns_differ_are_not_replaced(usual, step):
    assert {**step("--dynamic-sampling", "9"), **MACHINE} == {**usual, **MACHINE}

def test_one_rollout_and_one_task(step):
    row = step("--K", "1", "--tasks", "1", "--beta-graph", "0")
    assert 0 < row["env_steps"] <= 5 and row["loss"] == row["grad_norm"] == 0  # there is nothing to compare it with


# ----------------------------------------------------------------------------------------------- worlds of one's own
def test_what_a_world_is_asked(quick_run, walk, worlds, tmp_path):
    log = tmp_path / "log"
    told = [*walk[1], "--env", f"{worlds / 'my.py'}:Walk:2:{log}", "--eval-tasks", "2", "--K", "3", "--tasks", "2",
            "--steps", "2", "--out", "out"]
    result = quick_run(tmp_path, *told)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    resets = [(seed, options["held_out"]) for kind, seed, *rest in lines if kind == "reset" for options in rest]
    # First a look whether it is a world and its task fits; then evaluations, before and after, with 3 rollouts and one.
    looks = [reset for reset in resets if reset[1]]
    assert len(looks) == 2 + 2 * (2 * 3 + 2)
    assert looks[:2] == [(0, True)] * 2 and looks[2:10] == looks[10:] and len(set(looks[2:])) == 2
    look, *trained = [seed for seed, held_out in resets if not held_out]
    assert look == 0 and len(trained) == 2 * 2 * 3 and len(set(trained)) == 4
    assert trained == sorted(trained, key=trained.index)
    assert all(isinstance(seed, int) for seed, _ in resets)
    actions = [line[1] for line in lines if line[0] == "step"]
    assert all(action == " ".join(action.split()) for action in actions) and {"up", "down"} <= set(actions)
    assert len(actions) > sum(row["env_steps"] for row in metrics(tmp_path / "out", "train")) > 0
    assert "SUCCESS<br>d = 0" in (tmp_path / "out" / "graph.md").read_text()

def test_success_is_measured_on_held_out_tasks_only(quick_run, walk, worlds, tmp_path):
    result = quick_run(tmp_path, *walk[1], "--env", f"{worlds / 'my.py'}:Exam", "--out", "out")
    assert result.returncode == 0, result.stderr[-3000:]
    before, row, after = metrics(tmp_path / "out")
    assert row["success"] == row["reward"] == 1 and row["env_steps"] == 4 * 6
    assert all(evals["success"] == evals["greedy_success"] == 0 for evals in (before, after))

def test_a_world_is_looked_for_from_where_one_is(quick_run, walk, worlds, tmp_path):
    shutil.copy(worlds / "my.py", tmp_path / "own.py")
    told = [argument for argument in walk[1] if "my.py" not in str(argument)]
    told[told.index("--env") + 1 : told.index("--env") + 1] = ["own.py:Walk:4"]
    result = quick_run(tmp_path, *told, "--out", "out")
    assert result.returncode == 0, result.stderr[-3000:]
    assert '["Task: reach 4.<br>' in (tmp_path / "out" / "graph.md").read_text()
    assert quick_run(tmp_path, "--resume", "out", "--steps", "2").returncode == 0
    assert [row["step"] for row in metrics(tmp_path / "out", "train")] == [1, 2]

def test_a_world_may_be_a_dataclass_with_annotations_for_later(quick_run, worlds, tmp_path):
    result = quick_run(tmp_path, "--env", worlds / "later.py:World")
    SCRIPT.assert_refused(result, "--env")
    assert "--model" in result.stderr  # it is a world; what is missing is a demonstrator

def test_texts_and_actions_that_mean_something_elsewhere(quick_run, worlds, tmp_path):
    told = ["--env", worlds / "my.py:Nasty", "--K", "6", "--tasks", "2", "--eval-tasks", "2", "--steps", "1",
            "--sft-steps", "24", "--max-tokens", "4", "--out", "out"]
    result = quick_run(tmp_path, *told)
    assert result.returncode == 0, result.stderr[-3000:]
    labels, edges = draw(tmp_path / "out")
    texts = [text for text, _ in labels.values()]
    assert any(text.startswith("Who wrote #34;A ") for text in texts) and "SUCCESS" in texts
    assert {"leave"} < {action for _, action, *_ in edges} and any("Who wrote #34;A " in edge[1] for edge in edges)

def test_a_qwen3_with_a_chat_template_in_the_house(quick_run, files, tmp_path):
    arguments = ["--model", files / "qwen3", "--K", "2", "--tasks", "2", "--eval-tasks", "2", "--max-steps", "3",
                 "--max-tokens", "8", "--steps", "1", "--out", "out"]
    process = quick_run(tmp_path, *arguments)
    assert process.returncode == 0, process.stderr[-3000:]
    (row,), evals = metrics(tmp_path / "out", "train"), metrics(tmp_path / "out", "eval")
    assert row.keys() == KEYS and 0 < row["generated_tokens"] <= 2 * 2 * 3 * 8
    assert row["lr"] == pytest.approx(1e-7)  # 1e-6 in 10 steps
    assert [evaluation["step"] for evaluation in evals] == [0, 1] and "held-out success" in process.stdout
    draw(tmp_path / "out")
    assert_loads_as_qwen3(tmp_path / "out" / "final")
    assert not (tmp_path / "out" / "start").exists()

def test_a_qwen3_with_a_chat_template_in_a_world_of_ones_own(quick_run, files, worlds, tmp_path):
    arguments = ["--model", files / "qwen3", "--env", worlds / "my.py:Odd", "--K", "8", "--tasks", "2",
                 "--eval-tasks", "2", "--max-tokens", "8", "--history", "2", "--steps", "2", "--out", "out"]
    result = quick_run(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    steps, (labels, edges) = metrics(tmp_path / "out", "train"), draw(tmp_path / "out")
    assert all(0 < row["success"] == row["reward"] for row in steps) and all(row["grad_norm"] > 0 for row in steps)
    assert all(2 * 8 <= row["env_steps"] <= 2 * 8 * 3 for row in steps)
    assert any(text == "SUCCESS" for text, _ in labels.values())
    for state in labels:  # what leads to success is better than what does not, whatever followed
        won, lost = ([A for a, *_, A, to in edges if a == state and (labels[to][0] == "SUCCESS") == kind]
                     for kind in (True, False))
        assert not won or not lost or min(won) > max(lost)
    assert_loads_as_qwen3(tmp_path / "out" / "final")

def test_the_world_of_the_readme(quick_run, tmp_path):
    world, = re.findall(r"```python\n(import random\n\nclass Line:.*?)```", README, re.DOTALL)
    command, = re.findall(r"`python graph_gpo.py (--env line.py:Line .*?)`", README)
    (tmp_path / "line.py").write_text(world)
    result = quick_run(tmp_path, *command.split(), "--out", "out")
    assert result.returncode == 0, result.stderr[-3000:]
    before, after = metrics(tmp_path / "out", "eval")
    assert after["success"] > before["success"] + 0.2

def test_sokoban_warm_starts_the_tiny_model(quick_run, tmp_path):
    told = ["--env", ENVS / "sokoban.py:Sokoban", "--sft-steps", "4", "--K", "4", "--tasks", "2", "--eval-tasks", "2",
            "--max-steps", "6", "--steps", "2", "--out", "out"]
    result = quick_run(tmp_path, *told)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [row["step"] for row in metrics(tmp_path / "out", "train")] == [1, 2]
    assert all(text.startswith("player r") or text == "SUCCESS" for text, _ in draw(tmp_path / "out")[0].values())

def test_a_game_of_textworld(quick_run, files, tmp_path):
    pytest.importorskip("textworld", reason="pip install textworld: a game is made and played")
    make = Path(sys.executable).with_name("tw-make")
    if not make.exists():
        pytest.skip("tw-make, which makes a game, is not next to this Python")
    game = [make, "custom", "--world-size", "2", "--nb-objects", "3", "--quest-length", "1", "--seed", "1"]
    subprocess.run([*game, "--output", tmp_path / "games" / "1.z8"], check=True, capture_output=True, timeout=60)
    told = ["--env", f"{ENVS / 'textworld_games.py'}:TextWorld:{tmp_path / 'games'}", "--model", files / "qwen3",
            "--K", "2", "--tasks", "1", "--eval-tasks", "1", "--max-steps", "3", "--max-tokens", "8", "--steps", "2"]
    result = quick_run(tmp_path, *told, "--out", "out")
    assert result.returncode == 0, result.stderr[-3000:]
    rows = metrics(tmp_path / "out", "train")
    assert [row["step"] for row in rows] == [1, 2] and all(0 < row["env_steps"] <= 6 for row in rows)
    assert any("; carrying " in text for text, _ in draw(tmp_path / "out")[0].values())

@pytest.fixture(scope="module")
def players(files, whole):
    """player(folder, arguments): a player in the house, of the model there."""
    def player(folder, **arguments):
        model, tokenizer = graph_gpo.load_model(str(folder), torch.device("cpu"))
        return Player(model, tokenizer, Args(**{"max_tokens": 8} | arguments), House)

    return player

def test_the_prompt(files, whole, players):
    told = ["A.\n> go hall\n", "B.\n> open chest\n", f"{NASTY}\n> x\n", "D."]
    for folder, template in ((files / "qwen3", True), (whole[0] / "start", False)):
        for history in range(5):
            player = players(folder, history=history)
            group = player.group(f"do it {NASTY}", 1)
            text = player.tokenizer.decode([t for node in player.prompt(group, told).path() for t in node.tokens])
            seen = "".join(told[-1 - history :])
            end = "\n<|im_end|>\n<|im_start|>assistant\n" if template else "\n"
            assert text.endswith(f"do it {NASTY}\n{seen}{end}"), text
            assert text.startswith("<|im_start|>user\nYou are in a house." if template else "Task: do it")

def test_a_prompt_that_is_too_long_loses_its_beginning(files, players):
    player = players(files / "qwen3", history=999)
    group = player.group("do it", 1)
    path = player.prompt(group, [f"observation {i}\n" for i in range(999)]).path()
    ids = [t for node in path for t in node.tokens]
    assert len(ids) == 2048 - 8
    text = player.tokenizer.decode(ids)
    assert "<action>" in text and "Task: do it\n" in text and text.rstrip().endswith("assistant")
    assert "observation 998\n" in text and "observation 799\n" not in text

@pytest.mark.parametrize("text, action", [
    ("go hall", "go hall"), ("  go   hall \n", "go hall"), ("I think.\ngo hall", "go hall"), ("", ""), ("\n \n", ""),
    ("<action>go hall</action>", "go hall"), ("Well.\n<action> go\n hall </action>\nDone.", "go hall"),
    ("<action>go hall</action> no, <action>open chest</action>", "open chest"), ("<action>go hall", "<action>go hall"),
    ("<action></action>go hall", "<action></action>go hall"), ("go <action>", "go <action>"),
    (f"<action>{NASTY}</action>", " ".join(NASTY.split())),
])
def test_the_action_is_in_its_tags_or_the_last_line(files, players, text, action):
    player = players(files / "qwen3")
    end = player.tokenizer("<|im_end|>")["input_ids"]
    for tail in ([], end):
        node = Node()
        node.add([*player.encode(text), *tail])
        assert player.action(node) == action


# ------------------------------------------------------------------------------------------------ kill, stop and resume
def test_a_killed_run_that_is_resumed_equals_one_that_was_not(quick_run, whole, tmp_path):
    SCRIPT.assert_resumes_after_a_kill(quick_run, tmp_path, whole[0], *SMALL, *FIVE)

def test_a_run_stopped_by_ctrl_c_saves_and_can_be_resumed(quick_run, whole, tmp_path):
    # Its model is the folder that `whole` warm-started, so it is to be the same run.
    SCRIPT.assert_resumes_after_ctrl_c(quick_run, tmp_path, whole[0], *SMALL, *FIVE, "--model", whole[0] / "start")

def test_a_finished_run_can_be_given_more_steps(quick_run, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    same = quick_run(tmp_path, "--resume", "out", "--K", "4")  # given again as it was
    assert same.returncode == 0 and same.stdout.splitlines()[-3:] == whole[1].stdout.splitlines()[-3:]
    assert_same_run(tmp_path / "out", whole[0])
    assert quick_run(tmp_path, "--resume", "out", "--steps", "6").returncode == 0
    rows = metrics(tmp_path / "out")
    assert [(row["event"], row["step"]) for row in rows[-3:]] == [("eval", 5), ("train", 6), ("eval", 6)]
    assert rows[:-2] == metrics(whole[0])


# ----------------------------------------------------------------------------------------------------------- bad input
OWN_BAD_ARGUMENTS = re.split(r"\||\n\s*", """
    --method ppo|--method GraphGPO|--K 0|--K -1|--K 1.5|--K all|--omega 0|--omega 1|--omega -0.1|--omega nan
    --gamma 1.1|--gamma -0.1|--gamma nan|--beta-graph -1|--beta-graph inf|--beta-episode -1|--beta-episode nan
    --invalid-penalty -0.1|--invalid-penalty nan|--penalty-in-return=yes|--penalty 1
    --merge-similarity 1.1|--merge-similarity -0.1|--merge-similarity nan|--dynamic-sampling -1|--dynamic-sampling 0.5
    --max-steps 0|--max-steps -1|--history -1|--history all|--tasks 0|--tasks 1.5|--eval-tasks 0|--eval-every -1
    --max-tokens 0|--sft-steps -1|--kept-tokens -1|--kept-tokens 1.5|--eval-only|--turn-tokens 4|--max-turns 3
    --env|--env House|--env missing.py:World|--env missing.py|--env :World|--env .py:World|--env .
""".strip())

@pytest.mark.parametrize("line", BAD_ARGUMENTS + OWN_BAD_ARGUMENTS)
def test_bad_argument(quick_run, tmp_path, line):
    SCRIPT.assert_refused_and_nothing_written(quick_run, tmp_path, re.split("[ =]", line)[0], line)

@pytest.mark.parametrize("flag, line", [
    ("--model", "--model {files}/short"), ("--max-tokens", "--model {files}/qwen3 --max-tokens 2048"),
    ("--K", "--resume {runs}/good --K 5"), ("--method", "--resume {runs}/good --method gigpo"),
    ("--env", "--resume {runs}/good --env my.py:World"), ("--omega", "--resume {runs}/good --omega 0.2"),
    ("--tasks", "--resume {runs}/good --tasks 4"), ("--penalty-in-return", "--resume {runs}/good --penalty-in-return"),
    ("--kl-coef", "--resume {runs}/good --steps 9 --kl-coef 0"), *BAD_FOLDERS,
])
def test_bad_file_or_folder(quick_run, files, runs, tmp_path, flag, line):
    line = line.format(files=files, runs=runs)
    SCRIPT.assert_refused_and_nothing_written(quick_run, tmp_path, flag, line, files, runs)

@pytest.mark.parametrize("world, words", [
    ("missing.py:World", "missing.py"), ("my.py:Missing", "Missing"), ("syntax.py:World", "SyntaxError"),
    ("imports.py:World", "pip install something"), ("my.py:Broken", "RuntimeError: the game is lost"),
    ("my.py:Untrained", "no games to train on"),
    ("my.py", "NAME"), ("", "NAME"), (":Walk", "NAME"), ("my.py:", "NAME"), ("my.py::", "NAME"), ("my:Walk", "NAME"),
    ("folder.py:World", "folder.py"), ("my.py:Walk:three", "three"), ("my.py:Walk:", "int()"),
    ("my.py:NASTY", "callable"), ("my.py:json", "callable"), ("my.py:Taskless", "task"), ("my.py:Bare", "NAME"),
    ("my.py:Needy", "argument"), ("zeros.py:World", "NAME"), ("picture.py:World", "NAME"), ("empty.py:World", "World"),
    ("my.py:Taught", "--model"), ("my.py:Odd", "--model"), ("my.py:Wordless", "words"),
])
def test_bad_world(quick_run, worlds, tmp_path, world, words):
    result = quick_run(tmp_path, "--env", f"{worlds}/{world}")
    SCRIPT.assert_refused(result, "--env")
    assert words in result.stderr and not snapshot(tmp_path)

def test_a_world_without_system_text(quick_run, files, worlds, tmp_path):
    result = quick_run(tmp_path, "--env", f"{worlds}/my.py:Mute", "--model", files / "qwen3", "--steps", "0",
                       "--max-tokens", "4", "--max-steps", "2", "--eval-tasks", "1", "--K", "2", "--out", "out")
    assert result.returncode == 0, result.stderr[-3000:]

def test_a_process_of_its_own_is_as_quiet(worlds, tmp_path):
    # The cases above run in copies of one process, where all imports are done; so once without that help.
    SCRIPT.assert_refused(SCRIPT.run(tmp_path, "--env", worlds / "imports.py:World"), "--env")
    assert not snapshot(tmp_path)

def test_nothing_slow_is_imported_before_the_arguments_are_right(tmp_path):
    SCRIPT.assert_refused_before_slow_imports(tmp_path, "--env", "missing.py:World")
