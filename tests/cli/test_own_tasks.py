"""Rewards and tasks of one's own, --reward, --success and --env, as the user of tree_grpo.py and
treerl.py sees them."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest

from cli.outside import metrics, refusal, snapshot

SCRIPT = "tree_grpo treerl"
REWARDS = '''
import json

def note(item, text):
    with open("seen.jsonl", "a") as file:
        print(json.dumps([item.text, text]), file=file)

def graded(item, text):
    """From -2 to 1 by the number of letters."""
    note(item, text)
    return len(text) % 7 * 0.5 - 2

class Quarter:
    def __call__(self, item, text):
        return 0.25
quarter = Quarter()

def zero(item, text):
    return 0

def raises(item, text):
    raise KeyError("no such\\nword")

def leaves(item, text):
    raise SystemExit("bye")

def nan(item, text): return float("nan")
def infinite(item, text): return float("-inf")
def words(item, text): return "much"
def nothing(item, text): pass
def needy(item): return 0.0
number = 3
'''


# A task for either script, from a list or drawn.
TASKS = """
import json
from dataclasses import dataclass

def note(*what):
    with open("seen.jsonl", "a") as file:
        print(json.dumps(what), file=file)

@dataclass
class Item:
    text: str

class Listed:
    instruction = "Write what you like in {turns} turns. "

    def __init__(self, args, n="3"):
        if int(n) < 2:
            raise ValueError("want two or more")
        self.training = [Item(f"item {i}") for i in range(int(n))]
        self.held_out = [Item("held out 1"), Item("held out 2")]

    def search(self, asked):
        return [f"found {query}" for _, query in asked]

    def reward(self, item, written):
        note("reward", item.text, written)
        return len("".join(written)) % 3 - 1

    def answer_start(self, item, text):
        return len(text)

class Short(Listed):  # of several queries it answers one
    def search(self, asked):
        return ["found"]

class Empty(Listed):
    held_out = property(lambda self: [], lambda self, items: None)

class Drawn(Listed):
    words = ["item", " 1", " 2", " write", " this"]

    def __init__(self, args, n="3"):
        super().__init__(args, n)
        self.training = []

    def draw(self, rng):
        return Item(f"item {rng.randint(1, 2)}")

    def demonstrate(self, item, rng):
        text = rng.choice([" write this", "item", ""])
        return [(f"{text}<answer></answer>", "")] if IN_TURNS else text
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "own.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def one(script, run, whole):
    """The command line of a run of one step from the warm-started model."""
    return f"{script.small} --steps 1 --model {whole / 'start'} --out out"


def test_a_graded_reward(script, run, one, rewards, out, tmp_path):
    run.well(f"{one} --reward {rewards}:graded --success 0.4")
    (step,) = metrics(out, "train")
    possible = {n * 0.5 - 2 for n in range(7)}
    if script.name == "treerl":
        possible.add(0)  # of a solution that does not end
    assert step["grad_norm"] > 0 and step["reward"] < 0 < step["success"] < 1
    reward = float(re.search(r"Reward (\S+)\.\n", (out / "episode.md").read_text())[1])
    assert reward in possible
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    if script.name == "tree_grpo":
        drawn = (out / script.drawing).read_text()
        assert {float(value) for value in re.findall(r"R = (\S+), ", drawn)} <= possible
        assert len(seen) == 4 * 2 + 2 * 2 * (1 + 2) + 4 * 2  # two evaluations, M (1 + N L)
        found = [text for _, text in seen if "<information>" in text]
        assert found and all("</information>" in text for text in found)
    else:
        assert any(re.match(r" \d+ [-+*]\d = ", text) for _, text in seen)
    assert not any("<|endoftext|>" in text for _, text in seen)  # the end is no part of a text
    asked = {"tree_grpo": r"(Who|Where) is .*\?", "treerl": r"Modulo 11, from .*\n"}
    assert all(re.fullmatch(asked[script.name], item) for item, _ in seen)


@pytest.mark.parametrize(("success", "share"), [("0", 1), ("0.24", 1), ("0.25", 0), ("0.5", 0)])
def test_success_is_a_reward_above_a_number(script, run, one, rewards, out, success, share):
    run.well(f"{one} --reward {rewards}:quarter --success {success}")
    for row in metrics(out):
        if script.name == "tree_grpo" or not share:
            assert row["success"] == row.get("greedy_success", share) == share
        else:  # of the solutions that end
            assert 0 < row["success"] <= 1
    (step,) = metrics(out, "train")
    most = 0.25 if share == 0 else 0.25 * step["success"]
    assert step["reward"] == pytest.approx(most) or script.name == "treerl" and not share


def test_equal_rewards_teach_nothing(script, run, one, rewards, out):
    run.well(f"{one} --reward {rewards}:zero --kl-coef 0")
    (step,) = metrics(out, "train")
    assert (step["reward"], step["success"], step["grad_norm"], step["loss"]) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "name", ["raises", "leaves", "nan", "infinite", "words", "nothing", "needy", "number"]
)
def test_a_reward_that_fails(script, run, one, rewards, name):
    result = run(f"{one} --reward {rewards}:{name}")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.match(rf"{script.name}\.py: .*reward {rewards}:{name}: ", last), last


def test_a_reward_that_is_not_there(script, run, one, rewards, tmp_path):
    for spec in (f"{rewards}:missing", "missing.py:graded", "own", f"{rewards.parent}:graded"):
        assert f"--reward {spec}: " in refusal(run(f"{one} --reward {spec}"))
    assert not snapshot(tmp_path)


# --------------------------------------------------------------------------------- tasks of one's own
@pytest.fixture
def tasks(script, tmp_path_factory):
    """The file of tasks, in which a demonstration is what the script wants."""
    path = tmp_path_factory.mktemp("tasks") / "own.py"
    path.write_text(f"IN_TURNS = {script.name == 'tree_grpo'}\n{TASKS}")
    return path


def test_a_task_of_ones_own_from_a_list(script, run, files, tasks, out, tmp_path):
    few = {"tree_grpo": "--turn-tokens 8 --max-turns 2", "treerl": "--max-tokens 300"}[script.name]
    line = f"--env {tasks}:Listed:5 --model {files / 'chat'} --prompts 3 --steps 2 --M 2 {few}"
    result = run.well(f"{line} --out out")
    assert re.search("; 5 (questions|problems), 2 held out\n", result.stdout)
    told = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    items = [item for _, item, _ in told]
    assert {*items} <= {*(f"item {i}" for i in range(5)), "held out 1", "held out 2"}
    episode = (out / "episode.md").read_text()
    assert "held out 2" in episode
    turns = {"tree_grpo": "2", "treerl": "{turns}"}[script.name]
    assert f"Write what you like in {turns} turns. held out 2" in episode
    if script.name == "tree_grpo":  # each path's turns, two of them
        assert len({*items}) == 7  # all have been asked
        assert all(len(written) == 2 for _, _, written in told)
    assert all(-1 <= row["reward"] <= 1 for row in metrics(out, "train"))


def test_a_task_of_ones_own_that_draws_warm_starts_the_tiny_model(
    script, run, tasks, out, tmp_path
):
    line = f"--env {tasks}:Drawn --sft-steps 30 --prompts 3 --steps 1 --eval-prompts 2 --out out"
    run.well(line)
    told = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    items = {item for _, item, _ in told}
    assert {"held out 1", "held out 2"} < items <= {"item 1", "item 2", "held out 1", "held out 2"}
    texts = ["".join(written) for _, _, written in told]
    assert any(text.startswith((" write this", "item")) for text in texts)  # it has learnt to
    episode = (out / "episode.md").read_text()
    assert "~~~~text\nheld out 2" in episode  # without the instruction, as in the warm start


def test_a_script_that_was_copied_alone(script, fork, files, tasks, out, tmp_path):
    # Without envs/ there is nothing built in, and no picture; a task of one's own is all it needs.
    alone = SimpleNamespace(path=tmp_path / script.path.name)
    shutil.copy(script.path, alone.path)
    shutil.copy(tasks, tmp_path / "own.py")
    few = {"tree_grpo": "--turn-tokens 8 --max-turns 2", "treerl": "--max-tokens 40"}[script.name]
    line = f"--model {files / 'chat'} --prompts 2 --M 2 {few} --steps 1 --out out"
    message = refusal(fork(alone, tmp_path, line))
    assert message.startswith(f"{script.name}.py: --env ") and "envs" in message
    result = fork(alone, tmp_path, f"{line} --env own.py:Listed")
    assert result.returncode == 0, result.stderr[-3000:]
    written = {"metrics.jsonl", "episode.md", "final", "checkpoint-000001"}
    assert {path.name for path in out.iterdir()} == written


def test_tasks_that_cannot_be_used(run, script, files, tasks, tmp_path):
    message = refusal(run(f"--env {tasks}:Listed"))
    assert "--model" in message and "demonstrate" in message
    wrong = {"Empty": "held out", "Listed:1": "want two or more", "Listed:x": "int()", "Missing": "NAME", "json": "call"}
    for name, words in wrong.items():
        message = refusal(run(f"--env {tasks}:{name} --model {files / 'chat'}"))
        assert message.startswith(f"{script.name}.py: --env {tasks}:{name}: ") and words in message
    assert not snapshot(tmp_path)


def test_a_renamed_script_beside_a_foreign_envs(script, fork, files, tasks, tmp_path):
    """It looks for its files by their own names, and goes on without those that are not there."""
    alone = SimpleNamespace(path=tmp_path / "mine.py")
    shutil.copy(script.path, alone.path)
    (tmp_path / "envs").mkdir()
    shutil.copy(tasks, tmp_path / "own.py")
    few = {"tree_grpo": "--turn-tokens 8 --max-turns 2", "treerl": "--max-tokens 40"}[script.name]
    line = f"--model {files / 'chat'} --env own.py:Listed --prompts 2 --M 2 {few} --steps 1 --out out"
    result = fork(alone, tmp_path, line)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not (tmp_path / "out" / "tree.md").exists()
    shutil.copy(script.path.parent / "envs" / "pictures.py", tmp_path / "envs")
    result = fork(alone, tmp_path, line.replace("--out out", "--out drawn"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "drawn" / "tree.md").exists()
