"""The worlds of envs/: Sokoban against a search of its own, TextWorld on games made here, ALFWorld
with a stand-in."""

import importlib.util
import json
import random
import subprocess
import sys
import types
from collections import deque
from pathlib import Path

import pytest

ENVS = Path(__file__).parent.parent / "envs"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ENVS / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def replay(world, seed: int, actions: list[str], held_out: bool = False) -> list:
    return [world.reset(seed, {"held_out": held_out}), *(world.step(action) for action in actions)]


# ------------------------------------------------------------------------------------------ Sokoban
sokoban = load("sokoban")
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def cells(text: str) -> frozenset:
    return frozenset((int(word[1]), int(word[3])) for word in text.split()[1:])


def read(key: str):
    """Player, boxes, goals and inner walls, read from a state's key alone."""
    (player,), boxes, goals, walls = map(cells, key.split(","))
    return player, boxes, goals, walls


def after(player, boxes, walls, step):
    """The rules of Sokoban, written once more."""

    def blocked(cell):
        return cell in walls or not (1 <= cell[0] <= 4 and 1 <= cell[1] <= 4)

    ahead, behind = [(player[0] + n * step[0], player[1] + n * step[1]) for n in (1, 2)]
    if ahead in boxes and not blocked(behind) and behind not in boxes:
        return ahead, boxes - {ahead} | {behind}
    return (player, boxes) if ahead in boxes or blocked(ahead) else (ahead, boxes)


def shortest(key: str) -> int | None:
    player, boxes, goals, walls = read(key)
    seen, queue = {(player, boxes)}, deque([(0, player, boxes)])
    while queue:
        depth, player, boxes = queue.popleft()
        if boxes == goals:
            return depth
        for step in STEPS.values():
            if (new := after(player, boxes, walls, step)) not in seen:
                seen.add(new)
                queue.append((depth + 1, *new))
    return None


@pytest.mark.parametrize(("boxes", "seeds"), [("1", 400), ("2", 100)])
def test_sokoban_levels_are_solvable_and_solutions_shortest(boxes, seeds):
    world = sokoban.Sokoban(boxes)
    for seed in range(seeds):
        _, info = world.reset(seed, {"held_out": seed % 4 == 0})
        player, found, goals, walls = read(info["state"])
        assert len(found) == len(goals) == int(boxes) and not found & goals and 1 <= len(walls) <= 3
        assert len({player, *found, *goals, *walls}) == 1 + 2 * int(boxes) + len(walls)
        solution = world.solution()
        assert len(solution) == shortest(info["state"]) >= 3
        results = [world.step(action) for action in solution]
        assert [result[1:4] for result in results] == [(0.0, False, False)] * (
            len(solution) - 1
        ) + [(1.0, True, False)]
        assert all(result[4]["valid"] for result in results) and world.solution() == []


@pytest.mark.parametrize("boxes", ["1", "2"])
def test_sokoban_moves(boxes):
    """Every step is what the rules say, its key tells the whole state, and what is invalid changes
    nothing."""
    rng, world, observations = random.Random(0), sokoban.Sokoban(boxes), {}
    kinds = set()
    for seed in range(60):
        seen, info = world.reset(seed)
        for _ in range(40):
            player, found, goals, walls = read(key := info["state"])
            first = observations.setdefault((key, info.get("valid", True)), seen)
            assert (
                first == seen
            )  # an observation follows from the state, but for what an invalid action adds
            action = rng.choice([*STEPS, " UP ", "", "jump", "r1c1"])
            expected = after(player, found, walls, STEPS.get(action.strip().lower(), (0, 0)))
            seen, reward, terminated, truncated, info = world.step(action)
            kinds.add((info["valid"], expected[1] == found))
            assert read(info["state"]) == (*expected, goals, walls)
            assert info["valid"] == (expected != (player, found)) == (info["state"] != key)
            assert seen.startswith("Nothing moves. ") == (not info["valid"])
            assert (reward, terminated, truncated) == (
                float(expected[1] == goals),
                expected[1] == goals,
                False,
            )
            if terminated:
                break
    assert kinds == {
        (True, True),
        (True, False),
        (False, True),
    }  # walked, pushed, and tried in vain


def test_sokoban_observation():
    world = sokoban.Sokoban()
    world.reset(0)
    world.walls, world.goals, world.player, world.boxes = sokoban.OUTER | {14}, (27,), 19, (20,)
    assert world.look() == (
        "you r3c1 above_you floor below_you floor left_of_you wall right_of_you push\n"
        "box r3c2 above_box wall below_box floor left_of_box floor right_of_box floor "
        "rows_to_goal 1_down columns_to_goal 1_right rows_to_box same_row columns_to_box 1_right"
    )
    assert world.key() == "player r3c1, box r3c2, goal r4c3, walls r2c2"
    world.boxes = (25,)  # in the lower left corner: not the end, but never solved
    assert world.solution() == [] and "below_you stuck" in world.look()
    assert world.step("right")[1:4] == (0.0, False, False)


def test_sokoban_replay_and_held_out():
    actions = [random.Random(1).choice([*STEPS]) for _ in range(25)]
    kinds, world = {}, sokoban.Sokoban()
    for held_out in (False, True):
        for seed in range(150):
            first = replay(world, seed, actions, held_out)
            assert (
                first
                == replay(world, seed, actions, held_out)
                == replay(sokoban.Sokoban(), seed, actions, held_out)
            )
            key = world.reset(seed, {"held_out": held_out})[1]["state"]
            kinds.setdefault(held_out, set()).add(key.partition("goal")[2])
    assert not kinds[False] & kinds[True] and min(map(len, kinds.values())) > 100
    path = str(ENVS / "sokoban.py")
    command = f"import runpy; print(runpy.run_path({path!r})['Sokoban']('2').reset(7))"
    other = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    ).stdout
    assert other.strip() == str(sokoban.Sokoban("2").reset(7))  # another process, another hash seed


def test_sokoban_words_and_demonstrator():
    """The tiny model's tokens cover all but signs and line ends; the words before facts are no
    facts themselves; the demonstrator is neither perfect nor hopeless."""
    rng, won, before = random.Random(0), 0, {}
    for boxes in "12":
        world = sokoban.Sokoban(boxes)
        for seed in range(150):
            seen, info = world.reset(seed)
            rest = f"Task: {info['task']}\n{seen}\n> " + " ".join(STEPS)
            for word in sorted(world.words, key=len, reverse=True):
                rest = rest.replace(word, "")
            assert not rest.translate(dict.fromkeys(map(ord, ":.>\n"))), rest
            words = seen.split()
            assert len(words) == {"1": 28, "2": 46}[boxes]
            for name, fact in zip(words[::2], words[1::2], strict=True):
                before.setdefault(name, set()).add(fact)
            for _ in range(20):
                if world.step(world.demonstrate(rng))[2]:
                    won += 1
                    break
    assert not set(before) & set().union(*before.values())
    assert before["above_you"] == {"floor", "wall", "push", "stuck"} and before["above_box"] == {
        "floor",
        "wall",
    }
    assert 0.6 < won / 300 < 0.95
    with pytest.raises(ValueError, match="1 or 2 boxes, not '3'"):
        sokoban.Sokoban("3")


# ---------------------------------------------------------------------------------------- TextWorld
@pytest.fixture(scope="module")
def games(tmp_path_factory):
    pytest.importorskip("textworld", reason="TextWorld is not installed (pip install textworld)")
    folder, make = tmp_path_factory.mktemp("games"), Path(sys.executable).with_name("tw-make")
    kinds = (
        ["tw-simple", "--rewards", "dense", "--goal", "brief", "--seed", "1"],
        ["custom", "--world-size", "2", "--nb-objects", "4", "--quest-length", "3", "--seed", "0"],
    )
    for i, kind in enumerate(kinds):
        subprocess.run(
            [sys.executable, make, *kind, "--output", folder / f"{i}.z8"],
            check=True,
            capture_output=True,
        )
    return folder


def walkthrough(game: Path) -> list[str]:
    return json.loads(game.with_suffix(".json").read_text())["metadata"]["walkthrough"]


def test_textworld_games_are_won_along_their_walkthroughs(games):
    module = load("textworld_games")
    for i in range(2):
        game = games / f"{i}.z8"
        world, way = module.TextWorld(str(game)), walkthrough(game)
        played = replay(world, 0, way)
        assert (
            played
            == replay(world, 1, way)
            == replay(module.TextWorld(str(game)), 0, way, held_out=True)
        )
        (seen, info), *results = played
        assert (
            info["task"]
            and "$" not in seen
            and "\n\n" not in seen
            and way[0] in seen.rpartition("Commands: ")[2]
        )
        assert [result[1:4] for result in results] == [(0.0, False, False)] * (len(way) - 1) + [
            (1.0, True, False)
        ]
        assert all(result[4]["valid"] for result in results)
        keys = [info["state"], *(result[4]["state"] for result in results)]
        assert len(set(keys)) == len(keys)


def test_textworld_state(games):
    """In a game that begins in a locked room. What one undoes is undone in the key, but quests stay
    done."""
    world = load("textworld_games").TextWorld(str(games / "0.z8"))
    _, info = world.reset()
    assert walkthrough(games / "0.z8")[:2] == [
        "open antique trunk",
        "take old key from antique trunk",
    ]
    start = info["state"]
    assert start.startswith("bedroom; carrying nothing; done []; ")

    def key(action: str) -> str:
        seen, reward, terminated, truncated, info = world.step(action)
        assert (reward, terminated, truncated, info["valid"]) == (
            0.0,
            False,
            False,
            True,
        ) and "\n>" not in seen
        return info["state"]

    opened = key("open antique trunk")
    shut = key("close antique trunk")
    assert shut == start.replace("done []", "done [0]")
    assert key("Open  Antique TRUNK") == opened != shut
    taken = key("take old key from antique trunk")
    assert taken.startswith("bedroom; carrying old key; ")
    assert key("look") == key("inventory") == key("examine old key") == taken
    returned = key("insert old key into antique trunk")
    assert returned.startswith("bedroom; carrying nothing; ") and returned != taken
    assert key("take old key from antique trunk") == taken
    for action in ("go east", "jump", "", "quit", "undo", "take unicorn"):  # the door is locked
        seen, *result, info = world.step(action)
        assert seen.startswith("Nothing happens.\n") and result == [0.0, False, False]
        assert info == {"state": taken, "valid": False}
    for action in walkthrough(games / "0.z8")[2:4]:
        key(action)
    there = key("go east")
    assert there.startswith("kitchen; carrying old key; ")
    bedroom = key("go west")
    assert bedroom.startswith("bedroom; ") and key("go east") == there and key("go west") == bedroom


def test_textworld_folder(games):
    module = load("textworld_games")
    world = module.TextWorld(str(games))
    tasks = {
        held_out: {world.reset(seed, {"held_out": held_out})[1]["state"] for seed in range(12)}
        for held_out in (False, True)
    }
    assert len(tasks[False]) == len(tasks[True]) == 1 and not tasks[False] & tasks[True]
    way = walkthrough(games / "1.z8")
    assert replay(world, 3, way) == replay(
        module.TextWorld(str(games)), 3, way
    )  # whatever was played before
    with pytest.raises(FileNotFoundError, match="no game file or folder nowhere"):
        module.TextWorld("nowhere")
    (games / "none").mkdir()
    for wrong in (games / "none", games / "0.json"):
        with pytest.raises(ValueError, match="give a .z8 file made by tw-make"):
            module.TextWorld(str(wrong))


# ----------------------------------------------------------------------------------------- ALFWorld
class Fact:
    def __init__(self, name, *names):
        self.name, self.arguments = (
            name,
            [types.SimpleNamespace(name=name, type="?") for name in names],
        )


class Game:
    """What the adapter uses of textworld.start()'s environment for .tw-pddl games: take the mug,
    put it into a fridge. As in PddlEnv, a fact that becomes false is there as not_..., which it is
    not at first; and as ALFWorld's wrapper has it, a name without a number ends with a space."""

    def __init__(self, path, infos, wrappers):
        assert (
            infos == dict.fromkeys(("facts", "won", "admissible_commands", "feedback"), True)
            and len(wrappers) == 1
        )
        self.load(path)

    def load(self, path):
        self.goal = json.loads(Path(path).read_text())["goal"]

    def state(self, feedback):
        commands = [
            "examine fridge 1",
            "go to desk 1",
            "go to fridge 1",
            "help",
            "inventory",
            "look",
        ]
        commands += {"desk 1": ["take mug 1 from desk 1"], "hand": ["move mug 1 to fridge 1"]}.get(
            self.mug, []
        )
        facts = [
            Fact("receptacleatlocation", "desk 1", "loc 1"),
            Fact("receptacleatlocation", "fridge 1", "loc 2"),
            Fact("atlocation", "agent ", self.at),
            Fact("cancontain", "desktype ", "mugtype "),
            *self.extra,
            Fact("holds", "agent ", "mug 1")
            if self.mug == "hand"
            else Fact("inreceptacle", "mug 1", self.mug),
        ]
        random.shuffle(facts)
        self.now = {
            "facts": facts,
            "admissible_commands": sorted(commands),
            "feedback": feedback,
            "won": self.mug == "fridge 1",
        }
        return self.now

    def reset(self):
        self.at, self.mug, self.extra = "loc 0", "desk 1", []
        return self.state(
            "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking"
            " quickly around you, you see a desk 1, and a fridge 1.\n\n"
            f"Your task is to: {self.goal}."
        )

    def step(self, command):
        assert command in self.now["admissible_commands"]
        if command.startswith("go to"):
            self.at = {"desk 1": "loc 1", "fridge 1": "loc 2"}[command[6:]]
        elif command.startswith("take"):
            self.mug = "hand"
            self.extra.append(Fact("not_inreceptacle", "mug 1", "desk 1"))
        elif command.startswith("move"):
            self.mug = "fridge 1"
        self.extra.append(Fact("checked", "agent "))
        return self.state(f"You {command}."), 0, self.now["won"]


@pytest.fixture
def alfworld(monkeypatch, tmp_path):
    def module(name, **content):
        monkeypatch.setitem(sys.modules, name, made := types.ModuleType(name))
        vars(made).update(content)

    module("textworld", EnvInfos=dict, start=Game)
    for name in ("alfworld", "alfworld.agents", "alfworld.agents.environment"):
        module(name)
    module("alfworld.agents.environment.alfred_tw_env", AlfredDemangler=object)
    module("alfworld.info", ALFWORLD_DATA=str(tmp_path))
    for split in ("train", "valid_seen", "valid_unseen"):
        for i, kind in enumerate(
            ["pick", "pick", "pick", "movable", "unsolvable", "Sliced", "unknown"]
        ):
            folder = tmp_path / "json_2.1.1" / split / f"{kind}-{i}" / "trial"
            folder.mkdir(parents=True)
            known = {} if kind == "unknown" else {"solvable": kind != "unsolvable"}
            (folder / "game.tw-pddl").write_text(
                json.dumps({"goal": f"{split} {kind} {i}", **known})
            )
    return load("alfworld_games")


def test_alfworld_plays(alfworld):
    world = alfworld.ALFWorld()
    seen, info = world.reset(3)
    assert seen == (
        "You are in the middle of a room. Looking quickly around you, you see a desk 1, and a "
        "fridge 1.\nCommands: examine fridge 1, go to desk 1, go to fridge 1, help, inventory, "
        "look, take mug 1 from desk 1"
    )
    assert (
        info["state"]
        == "at no place; holding nothing; atlocation agent, loc 0; inreceptacle mug 1, desk 1"
    )
    start = info["state"]
    assert world.step("look")[4] == {"state": start, "valid": True}
    seen, *result, info = world.step("dance")
    assert seen.startswith("Nothing happens.\n") and result == [0.0, False, False]
    assert info == {"state": start, "valid": False}
    *_, info = world.step("go to  Desk 1")
    assert info["valid"] and info["state"].startswith("at desk 1; holding nothing; ")
    *_, info = world.step("take mug 1 from desk 1")
    assert info["state"] == "at desk 1; holding mug 1; atlocation agent, loc 1; holds agent, mug 1"
    _, *result, info = world.step("move mug 1 to fridge 1")
    assert result == [1.0, True, False] and info["valid"]
    assert world.reset(3)[1]["state"] == start


def test_alfworld_chooses_games(alfworld):
    def tasks(world, held_out):
        return [world.reset(seed, {"held_out": held_out})[1]["task"] for seed in range(30)]

    world = alfworld.ALFWorld("valid_unseen")
    for split, wanted, held_out in (
        ("train", world, False),
        ("valid_seen", alfworld.ALFWorld(), True),
        ("valid_unseen", world, True),
    ):
        assert set(found := tasks(wanted, held_out)) == {f"{split} pick {i}." for i in range(3)}
        assert (
            found == tasks(wanted, held_out) == tasks(alfworld.ALFWorld(wanted.held_out), held_out)
        )
    with pytest.raises(ValueError, match="valid_seen or valid_unseen, not 'train'"):
        alfworld.ALFWorld("train")


def test_alfworld_without_its_games(alfworld, monkeypatch, tmp_path):
    monkeypatch.setattr(alfworld, "ALFWORLD_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="run alfworld-download") as caught:
        alfworld.ALFWorld().reset()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"), [("textworld_games", "textworld"), ("alfworld_games", "alfworld")]
)
def test_missing_package(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}") as caught:
        load(name)
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__
