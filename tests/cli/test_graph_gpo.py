"""What only graph_gpo.py has, as its user sees it: its graph, its options, worlds of one's own."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli.outside import (
    NASTY,
    README,
    ROOT,
    equal_weights,
    metrics,
    refusal,
    snapshot,
    timeless,
)

SCRIPT = "graph_gpo"

# A file with worlds, as a user would write it, but for NASTY, which is put before it.
WORLDS = '''
import json


class Walk:
    """A line of places from 0 to a goal, from place 1; one can also jump, into a hole. Up to 5
    steps, each has its price. No info but the task, so the observation is the state and each action
    counts as valid."""
    instruction = "Walk to the goal. Write <action>up</action>, down, stay or jump.\\n\\n"
    words = ("Task: reach", "You are at", ".\\n", " 0", " 1", " 2", " 3", " 4")
    words += ("up", "down", "stay", "jump")
    def __init__(self, argument="3"):
        goal, _, self.file = argument.partition(":")
        self.goal = int(goal)
    def log(self, *what):
        if self.file:
            with open(self.file, "a") as file:
                print(json.dumps(what), file=file)
    def see(self):
        return f"You are at {self.at}"
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

class Flaky(Walk):
    """The seventh step of training fails."""
    count = 0
    def reset(self, seed, options):
        self.training = not options["held_out"]
        return super().reset(seed=seed, options=options)
    def step(self, action):
        Flaky.count += self.training
        if self.training and Flaky.count == 7:
            raise IndexError("no such\\nplace")
        return super().step(action)

class Unseeded(Walk):
    """Each of its episodes has a goal of its own, whatever the seed."""
    count = 0
    def reset(self, seed, options):
        Unseeded.count += 1
        self.goal = 2 + Unseeded.count % 3
        return super().reset(seed=seed, options=options)

class Odd:
    """For a policy that writes whatever it likes: an action of odd length is right, another is not
    one at all. All texts mean something in Mermaid or Markdown."""
    def reset(self, seed, options):
        self.count = 0
        return NASTY, {"task": f"{seed} {NASTY}"}
    def step(self, action):
        self.count += 1
        odd = len(action) % 2 == 1
        info = {"valid": odd, "state": f"{NASTY}{self.count}"}
        return f"{NASTY} {self.count}", float(odd), odd, self.count == 3, info

class Taught(Walk):
    demonstrate = property()  # so it has none

class Wordless(Walk):
    words = property()

class Broken(Walk):
    def reset(self, seed=0, options=None):
        raise RuntimeError("the game\\nis lost")

class Untrained(Walk):
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
LATER = """from __future__ import annotations
from dataclasses import dataclass
@dataclass
class World:
    done: bool = True
    def reset(self, seed, options):
        return "Here.", {"task": "do it"}
    def step(self, action):
        return "Here.", 0.0, False, False, {}
"""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The file of worlds, next to it files that are none."""
    folder = tmp_path_factory.mktemp("worlds")
    (folder / "my.py").write_text(f"NASTY = {NASTY!r}\n{WORLDS}")
    (folder / "syntax.py").write_text("class World:\n    def reset(self:\n")
    (folder / "later.py").write_text(LATER)
    (folder / "imports.py").write_text("raise ImportError('pip install something')\n")
    (folder / "exits.py").write_text("raise SystemExit('bye')\n")
    (folder / "zeros.py").write_bytes(bytes(100))
    (folder / "picture.py").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff" * 9)
    (folder / "empty.py").write_text("")
    (folder / "folder.py").mkdir()
    return folder


def draw(out):
    """graph.md as (label and distance by node, edges (from, action, times, A, to)), after a check
    that every line of it is Mermaid and the colors go with the numbers."""
    first, second, task, *body, last = (out / "graph.md").read_text().splitlines()
    assert (first, second, last) == ("```mermaid", "flowchart TD", "```")
    text = r"""[^"`<>\[\]{}|\\]*"""
    counts = re.fullmatch(rf'    task\["Task: {text}<br>(\d+) of (\d+) edges"\]', task)
    labels, edges = {}, []
    for line in body:
        if node := re.fullmatch(rf'    n(\d+)\["({text})<br>d = (\S+)"\]', line):
            labels[int(node[1])] = node[2], float(node[3])
        elif edge := re.fullmatch(
            rf'    n(\d+) -->\|"({text}), (\d+) x, A = ([+-]\d+\.\d\d)"\| n(\d+)', line
        ):
            edges.append((int(edge[1]), edge[2], int(edge[3]), float(edge[4]), int(edge[5])))
        elif style := re.fullmatch(r"    style n(\d+) fill:#(fff|cfc),color:#000", line):
            assert (style[2] == "cfc") == (labels[int(style[1])] == ("SUCCESS", 0))
        else:
            style = re.fullmatch(r"    linkStyle (\d+) stroke:#(2a2|c22|888)", line)
            A = edges[int(style[1])][3]
            assert style[2] == ("2a2" if A > 0 else "c22" if A < 0 else "888")
    assert len(edges) == int(counts[1]) <= int(counts[2])
    assert len(edges) <= 50
    assert {node for edge in edges for node in (edge[0], edge[4])} == set(labels)
    assert all(labels[edge[0]][1] > 0 for edge in edges)  # nothing leaves SUCCESS
    return labels, edges


# --------------------------------------------------------------------------------- a run, options
def test_the_run(whole):
    for row in metrics(whole, "eval"):
        assert (row["waste_in_successful"] is None) == (row["success"] == 0)
        for name in ("progress_in_failed", "waste_in_successful"):
            assert row[name] is None or 0 <= row[name] <= 1
    for row in metrics(whole, "train"):
        assert 0 <= row["success"] == row["reward"] <= 1  # what the house pays
        assert 0 < row["env_steps"] <= 3 * 4 * 6  # --tasks x --K x --max-steps
        assert row["env_steps"] <= row["generated_tokens"] <= 8 * row["env_steps"]
        # Prompts are shared, in both halves with the task as the common part of each.
        assert row["prompt_tokens_sampling"] == row["prompt_tokens_training"] < row["prompt_tokens"]
        most = row["prompt_tokens_training"] + row["generated_tokens"]
        assert row["prompt_tokens_sampling"] < row["forwarded_tokens"] <= most
    labels, edges = draw(whole)
    assert '["Task: put a ' in (whole / "graph.md").read_text()
    state = r"\w+: (plain|hot|cold|washed) \w+ \w+, .*|SUCCESS"
    assert all(re.fullmatch(state, text) for text, _ in labels.values())
    assert sum(times for _, _, times, _, _ in edges) <= 4 * 6


def test_without_success_penalty_and_reference_nothing_is_learnt(script, run, whole, out):
    # In a single step no task of the house is done, so no credit is given to anything.
    line = f"{script.small} --max-steps 1 --invalid-penalty 0 --kl-coef 0 --steps 2 --lr 0.1"
    run.well(f"{line} --model {whole / 'start'} --out out")
    assert [(row["loss"], row["grad_norm"]) for row in metrics(out, "train")] == [(0, 0)] * 2
    assert equal_weights(out / "final", whole / "start")


@pytest.fixture(scope="module")
def walk(script, fork, worlds, tmp_path_factory):
    """(the folder of a run in a world with words and a demonstrator of its own, the arguments for
    more such runs from its warm-started model)."""
    folder = tmp_path_factory.mktemp("walk")
    line = f"--env {worlds}/my.py:Walk --K 6 --tasks 4 --eval-tasks 6 --steps 1 --lr 0.001"
    result = fork(script, folder, f"{line} --warmup 0 --sft-steps 24 --out out")
    assert result.returncode == 0, result.stderr[-3000:]
    line = f"{line} --warmup 0 --model {folder / 'out' / 'start'} --max-tokens 8"
    return folder / "out", f"{line} --eval-tasks 1"


@pytest.fixture
def step(run, walk, out):
    """step(line) -> the metrics of the one step of such a run with more arguments."""

    def step(line=""):
        shutil.rmtree(out, ignore_errors=True)
        run.well(f"{walk[1]} {line} --out out")
        return timeless(out)[1]

    return step


def test_a_world_with_words_and_a_demonstrator_warm_starts_the_tiny_model(walk):
    (before, row, after), (labels, edges) = metrics(walk[0]), draw(walk[0])
    for evaluated in (before, after):  # there are rollouts of both kinds
        for name in ("success", "progress_in_failed", "waste_in_successful"):
            assert 0 < evaluated[name] < 1
    assert 0 < row["success"] < 1
    assert row["reward"] < row["success"]
    assert row["env_steps"] <= 4 * 6 * 5  # the world ends an episode then
    # States are observations; their distances are how far it is. From the hole there is no way.
    distances = {text: d for text, d in labels.values()}
    fallen = distances.pop("You fell. (failed)", 3)
    assert fallen in (3, 4)
    assert distances["SUCCESS"] == 0
    expected = {("SUCCESS", 0), *((f"You are at {i}", 3 - i) for i in range(3))}
    assert distances.items() <= expected
    names = {node: text[-1] for node, (text, _) in labels.items()}
    ways = {(names[a], action, names[b]) for a, action, _, _, b in edges}
    assert ways >= {("1", "up", "2"), ("2", "up", "S")}


def test_credit_is_all_that_differs_between_methods(step):
    # fmt: off
    lines = [
        "", "--method gigpo", "--method grpo", "--beta-episode 0", "--omega 0.7", "--epochs 2",
        "--method gigpo --gamma 0.3", "--invalid-penalty 3",
        "--beta-graph 0", "--method gigpo --omega 0.7", "--micro-tokens 1",
    ]
    # fmt: on
    rows = {line: step(line) for line in lines}
    usual = rows[""]
    trained = ("loss", "kl", "clip_fraction", "grad_norm", "sampler_gap")
    for row in rows.values():
        for name in usual.keys() - trained:
            assert row[name] == usual[name]
    same = [
        ("--beta-graph 0", "--method grpo"),
        ("--micro-tokens 1", ""),
        ("--invalid-penalty 3", ""),
    ]
    same.append(("--method gigpo --omega 0.7", "--method gigpo"))
    for one, other in same:  # in this world no action is invalid
        for name in trained:
            assert rows[one][name] == pytest.approx(rows[other][name], rel=1e-3, abs=1e-6), one
    norms = [rows[line]["grad_norm"] for line in lines[:7]]
    for i, norm in enumerate(norms):
        assert all(norm != pytest.approx(other, 1e-3) for other in norms[:i]), lines[i]
    assert usual["kl"] == usual["clip_fraction"] == 0 < rows["--epochs 2"]["clip_fraction"]


def test_one_rollout_and_one_task(step):
    row = step("--K 1 --tasks 1 --beta-graph 0")
    assert 0 < row["env_steps"] <= 5
    assert row["loss"] == row["grad_norm"] == 0  # there is nothing to compare it with


# ------------------------------------------------------------------------------ worlds of one's own
def test_what_a_world_is_asked(run, walk, worlds, out, tmp_path):
    env = f"--env {worlds}/my.py:Walk:2:{tmp_path / 'log'}"
    run.well(f"{walk[1]} {env} --eval-tasks 2 --K 3 --tasks 2 --steps 2 --out out")
    told = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    resets = [(line[1], line[2]["held_out"]) for line in told if line[0] == "reset"]
    # First a look whether it is a world and its task fits; then evaluations, before and after, with
    # 3 rollouts and one.
    looks = [reset for reset in resets if reset[1]]
    assert len(looks) == 2 + 2 * (2 * 3 + 2)
    assert looks[:2] == [(0, True)] * 2
    assert looks[2:10] == looks[10:]
    assert len(set(looks[2:])) == 2
    look, *trained = [seed for seed, held_out in resets if not held_out]
    assert look == 0
    assert len(trained) == 2 * 2 * 3
    assert len(set(trained)) == 4
    assert trained == sorted(trained, key=trained.index)  # K of a task, then of the next
    actions = [line[1] for line in told if line[0] == "step"]
    assert {"up", "down"} <= set(actions)
    assert len(actions) > sum(row["env_steps"] for row in metrics(out, "train")) > 0
    assert "SUCCESS<br>d = 0" in (out / "graph.md").read_text()


def test_a_world_that_fails_in_a_step(run, walk, worlds, out):
    result = run.well(f"{walk[1]} --env {worlds}/my.py:Flaky --out out --steps 2")
    errors = [row.get("world_errors", 0) for row in metrics(out, "train")]
    assert errors == [1, 0]
    assert "world_errors" in README
    (line,) = re.findall(r"[^\r\n]*IndexError[^\r\n]*", result.stderr)
    assert re.search(r"failed at '\w*.*': IndexError..no such", line)
    assert "Traceback" not in result.stderr and "IndexError" not in result.stdout


def test_a_world_that_does_not_obey_the_seed(run, walk, worlds):
    result = run(f"{walk[1]} --env {worlds}/my.py:Unseeded --out out")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.match(r"graph_gpo\.py: --env.* seed", last) and len(last) < 500


def test_a_world_is_tried_before_anything_is_made(run, out, tmp_path):
    text = (ROOT / "envs" / "line.py").read_text().replace("float(done), done, False, info", "done")
    (tmp_path / "four.py").write_text(text)
    result = run(f"--env {tmp_path}/four.py:Line --out out")
    said = refusal(result)
    assert "--env" in said and "unpack" in said
    assert not out.exists()


def test_success_is_measured_on_held_out_tasks_only(run, walk, worlds, out):
    run.well(f"{walk[1]} --env {worlds}/my.py:Exam --out out")
    before, row, after = metrics(out)
    assert row["success"] == row["reward"] == 1
    assert row["env_steps"] == 4 * 6
    for evaluated in (before, after):
        assert evaluated["success"] == evaluated["greedy_success"] == 0


def test_a_world_is_looked_for_from_where_one_is(run, walk, worlds, out, tmp_path):
    shutil.copy(worlds / "my.py", tmp_path / "own.py")
    run.well(f"{walk[1]} --env own.py:Walk:4 --out out")
    assert '["Task: reach 4.<br>' in (out / "graph.md").read_text()
    run.well("--resume out --steps 2")
    assert [row["step"] for row in metrics(out, "train")] == [1, 2]


def test_a_chat_model_in_a_world_of_nasty_texts(run, files, worlds, out):
    line = f"--model {files / 'chat'} --env {worlds}/my.py:Odd --K 8 --tasks 2 --eval-tasks 2"
    run.well(f"{line} --max-tokens 8 --history 2 --steps 2 --out out")
    for row in metrics(out, "train"):
        assert 0 < row["success"] == row["reward"]
        assert row["grad_norm"] > 0
        assert 2 * 8 <= row["env_steps"] <= 2 * 8 * 3
    labels, edges = draw(out)
    assert "SUCCESS" in [text for text, _ in labels.values()]
    assert any(text.startswith("Who wrote #34;A ") for text, _ in labels.values())
    for state in labels:  # what leads to success is better than what does not
        kinds = {True: [], False: []}
        for a, _, _, A, b in edges:
            if a == state:
                kinds[labels[b][0] == "SUCCESS"].append(A)
        assert min(kinds[True], default=9) > max(kinds[False], default=-9)


def test_the_world_of_the_readme(run, out):
    (line,) = re.findall(r"`python graph_gpo.py (--env envs/line.py:Line .*?)`", README)
    run.well(f"{line.replace('envs', str(ROOT / 'envs'))} --out out")
    before, after = metrics(out, "eval")
    assert after["success"] > before["success"] + 0.2


def test_sokoban_warm_starts_the_tiny_model(run, out):
    line = f"--env {ROOT / 'envs' / 'sokoban.py'}:Sokoban --sft-steps 4 --K 4 --tasks 2"
    run.well(f"{line} --eval-tasks 2 --max-steps 6 --steps 2 --out out")
    labels, _ = draw(out)
    assert all(text.startswith(("player r", "SUCCESS")) for text, _ in labels.values())


def test_a_game_of_textworld(run, files, out, tmp_path):
    pytest.importorskip("textworld", reason="pip install textworld: a game is made and played")
    make = Path(sys.executable).with_name("tw-make")
    game = f"{make} custom --world-size 2 --nb-objects 3 --quest-length 1 --seed 1"
    game = [*game.split(), "--output", tmp_path / "games" / "1.z8"]
    subprocess.run(game, check=True, capture_output=True, timeout=60)
    line = f"--env {ROOT / 'envs' / 'textworld_games.py'}:TextWorld:{tmp_path / 'games'}"
    line += f" --model {files / 'chat'} --K 2 --tasks 1 --eval-tasks 1 --max-steps 3"
    run.well(f"{line} --max-tokens 8 --steps 2 --out out")
    assert all(0 < row["env_steps"] <= 6 for row in metrics(out, "train"))
    assert any("; carrying " in text for text, _ in draw(out)[0].values())


# fmt: off
BAD_WORLDS = [
    ("missing.py:World", "missing.py"), ("my.py:Missing", "Missing"), ("my.py", "NAME"),
    ("syntax.py:World", "SyntaxError"), ("imports.py:World", "pip install something"),
    ("exits.py:World", "bye"), ("my.py:Broken", "RuntimeError: the game is lost"), ("", "NAME"),
    ("my.py:Untrained", "no games to train on"), (":Walk", "NAME"), ("my.py:", "NAME"),
    ("my.py::", "NAME"), ("my:Walk", "NAME"), ("folder.py:World", "folder.py"),
    ("my.py:Walk:three", "three"), ("my.py:Walk:", "int()"), ("my.py:NASTY", "callable"),
    ("my.py:json", "callable"), ("my.py:Taskless", "task"), ("my.py:Bare", "TypeError"),
    ("my.py:Needy", "argument"), ("zeros.py:World", "NAME"), ("picture.py:World", "NAME"),
    ("empty.py:World", "World"), ("my.py:Taught", "no words"), ("my.py:Odd", "no words"),
    ("my.py:Wordless", "words"), ("later.py:World", "demonstrate"),  # worlds, but without demonstrators
]
# fmt: on


def test_bad_worlds(run, worlds, tmp_path):
    wrong = []
    for world, words in BAD_WORLDS:
        result = run(f"--env {worlds}/{world}")
        good = re.fullmatch(
            rf"graph_gpo\.py: --(env|model)[^\n]*{re.escape(words)}[^\n]*\n", result.stderr
        )
        if not good or result.returncode != 2 or result.stdout or snapshot(tmp_path):
            wrong.append((world, words, result.returncode, result.stderr[-300:]))
    assert wrong == []
