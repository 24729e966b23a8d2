"""The worlds of envs/: Sokoban against a search of its own, TextWorld on games made here, ALFWorld
on a small game, and on its own where they are, against TextWorld itself."""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from unittest import mock

import pytest
import torch

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


# --------------------------------------------------------------------------- a process of its own
BROKEN = """
import os
class Broken:
    instruction = "Do.\\n"
    def reset(self, seed=0, options=None):
        print("not for the pipe")
        return "here", {"task": "x"}
    def step(self, action):
        if action == "raise":
            raise IndexError("no such place")
        os._exit(3)
"""


def test_a_world_in_a_process_is_the_world():
    process = load("processes").Process(f"{ENVS}/sokoban.py:Sokoban")
    world = sokoban.Sokoban()
    assert process.words == world.words and process.instruction == world.instruction
    for seed in range(3):
        assert process.reset(seed, {"held_out": True}) == world.reset(seed, {"held_out": True})
        for i in range(5):
            seeded = random.Random(random.Random(i).getrandbits(60))
            action = process.demonstrate(random.Random(i))
            assert action == world.demonstrate(seeded)
            assert process.step(action) == world.step(action)


LOUD = """
import subprocess
class Loud:
    def reset(self, seed=0, options=None):
        subprocess.run(["echo", "not for the pipe"])
        subprocess.Popen(["sleep", "600"])
        return "here", {"task": "x"}
"""


def test_what_a_world_starts_says_and_leaves_nothing(tmp_path):
    (tmp_path / "loud.py").write_text(LOUD)
    process = load("processes").Process(f"{tmp_path}/loud.py:Loud")
    assert process.reset(3) == ("here", {"task": "x"})
    group, began = process.process.pid, time.monotonic()
    del process
    assert time.monotonic() - began < 60  # it does not wait for what the world has started
    if shutil.which("ps"):
        command = ["ps", "-o", "stat=", "-g", str(group)]
        left = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        assert all(state.startswith("Z") for state in left.stdout.split())


def test_a_process_says_what_failed_and_that_it_ended(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    process = load("processes").Process(f"{tmp_path}/broken.py:Broken")
    assert process.instruction == "Do.\n" and not hasattr(process, "demonstrate")
    assert process.reset(3) == ("here", {"task": "x"})
    with pytest.raises(RuntimeError, match="^IndexError: no such place$"):
        process.step("raise")
    assert process.reset(3) == ("here", {"task": "x"})  # it goes on
    for action in ("end", "go"):
        with pytest.raises(RuntimeError, match="the process of the world has ended"):
            process.step(action)
    with pytest.raises(RuntimeError, match="No such file"):
        load("processes").Process(f"{tmp_path}/none.py:World")


# ----------------------------------------------------------------------------------------- ALFWorld
PLACES = {  # a place -> what is on it, can it be opened?
    "Cabinet": (["Mug"], True),
    "Fridge": (["Apple"], True),
    "SinkBasin": ([], False),
    "SideTable": (["Apple", "DeskLamp"], False),
    "Shelf": ([], False),
}
CLEAN_MUG = """(exists (?r - receptacle ?o - object) (and (inReceptacle ?o ?r)
    (objectType ?o MugType) (receptacleType ?r ShelfType) (isClean ?o)))"""


def alfworld_game(task: str, goal: str, walkthrough: list[str]) -> str:
    """A game file for one small room, with ALFWorld's own actions and texts."""
    info = pytest.importorskip("alfworld.info")
    kinds = {thing for things, _ in PLACES.values() for thing in things}
    objects = ["agent1 - agent", "loc_bar_0 - location"]
    objects += [f"{kind}Type - otype" for kind in sorted(kinds)]
    objects += [f"{place}Type - rtype" for place in PLACES]
    # What the domain names has to be there.
    objects += [f"{kind}Type - otype" for kind in ("Knife", "ButterKnife")]
    objects += [f"{kind}Type - rtype" for kind in ("Sink", "Microwave")]
    facts = ["atLocation agent1 loc_bar_0"]
    for i, (place, (things, lid)) in enumerate(PLACES.items(), 1):
        at = f"{place.removesuffix('Basin')}_bar_{i}{'_bar_SinkBasin' * place.endswith('Basin')}"
        objects += [f"loc_bar_{i} - location", f"{at} - receptacle"]
        facts += [f"receptacleType {at} {place}Type", f"receptacleAtLocation {at} loc_bar_{i}"]
        facts += [f"openable {at}"] * lid
        facts += [f"canContain {place}Type {kind}Type" for kind in sorted(kinds)]
        for thing in things:
            name = f"{thing}_bar_{i}"
            objects.append(f"{name} - object")
            facts += [f"objectType {name} {thing}Type", f"inReceptacle {name} {at}"]
            facts.append(f"objectAtLocation {name} loc_bar_{i}")
            able = "toggleable" if thing == "DeskLamp" else "pickupable"
            facts += [f"{able} {name}", f"cleanable {name}", f"coolable {name}"]
    problem = f"""(define (problem small)\n(:domain alfred)\n(:objects\n{chr(10).join(objects)}\n)
(:init\n{chr(10).join(f"({fact})" for fact in facts)}\n)\n(:goal (and {goal}))\n)"""
    grammar = Path(info.ALFRED_TWL2_PATH).read_text().replace("UNKNOWN GOAL", task)
    game = {"pddl_domain": Path(info.ALFRED_PDDL_PATH).read_text(), "grammar": grammar}
    game |= {"pddl_problem": problem, "solvable": True, "walkthrough": walkthrough}
    return json.dumps(game)


WALKTHROUGH = """go to cabinet 1|open cabinet 1|take mug 1 from cabinet 1|go to sinkbasin 1|
clean mug 1 with sinkbasin 1|go to shelf 1|move mug 1 to shelf 1""".replace("\n", "").split("|")


@pytest.fixture(scope="module")
def alfworld(tmp_path_factory):
    """envs/alfworld_games.py, with games of two kinds in several rooms."""
    pytest.importorskip("alfworld.info")
    folder = tmp_path_factory.mktemp("alfworld")
    game = alfworld_game("put a clean mug in shelf", CLEAN_MUG, WALKTHROUGH)
    for split, scenes in (("train", range(10)), ("valid_seen", range(3)), ("valid_unseen", [7])):
        for scene in scenes:
            for kind in ("pick_clean_then_place_in_recep", "pick_and_place_simple"):
                trial = folder / "json_2.1.1" / split / f"{kind}-Mug-None-Shelf-{scene}" / "trial_1"
                trial.mkdir(parents=True)
                (trial / "game.tw-pddl").write_text(game)
        left_out = {"pick_clean_then_place_in_recep-MugSliced-None-Shelf-1": game}
        left_out["pick_and_place_with_movable_recep-Mug-Cup-Shelf-1"] = game
        left_out["pick_and_place_simple-Pen-None-Shelf-1"] = game.replace("true", "false")
        for name, text in left_out.items():
            trial = folder / "json_2.1.1" / split / name / "trial_1"
            trial.mkdir(parents=True)
            (trial / "game.tw-pddl").write_text(text)
    with mock.patch("alfworld.info.ALFWORLD_DATA", str(folder)):
        yield load("alfworld_games")


TEXTWORLD = """
import json, sys, textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
infos = textworld.EnvInfos(won=True, admissible_commands=True, feedback=True, facts=True)
def shown(state):
    commands = sorted(" ".join(command.split()) for command in state["admissible_commands"])
    return [state["feedback"], commands, bool(state["won"])]
for file, plays in json.loads(sys.stdin.read()):
    game = textworld.start(file, infos, wrappers=[AlfredDemangler()])
    for commands in plays:
        state = game.reset()
        found = [shown(state)]
        for command in commands:
            raw = {" ".join(c.split()): c for c in state["admissible_commands"]}
            state, *_ = game.step(raw[command])
            found.append(shown(state))
        print(json.dumps(found))
"""


def assert_plays_as_textworld(module, files: list[Path], plays: int, steps: int):
    """Of each game the walkthrough, and random commands, with what TextWorld itself says to them,
    in a process of its own, as the adapter changes TextWorld's functions."""
    ours, asked = [], []
    for file in files:
        game, asked_here = module.Game(file), []
        for play in range(plays):
            rng, state, commands = random.Random(f"{file.parent}/{play}"), game.start, []
            said = [[game.seen, sorted(state.commands), state.won]]
            for i in range(steps):
                known = play == 0 and i < len(game.walkthrough)
                command = game.walkthrough[i] if known else rng.choice(sorted(state.commands))
                answer, state = game.follow(state, command)
                said.append([answer, sorted(state.commands), state.won])
                commands.append(command)
            assert play > 0 or any(won for *_, won in said)
            ours.append(said)
            asked_here.append(commands)
        asked.append((str(file), asked_here))
    how = {"input": json.dumps(asked), "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "-c", TEXTWORLD], check=True, **how)
    theirs = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[[")]
    assert len(theirs) == len(ours)
    for mine, other in zip(ours, theirs):
        start, task = other[0][0].removeprefix("-= Welcome to TextWorld, ALFRED! =-\n\n"), mine[0]
        assert start.startswith(task[0] + "\n\nYour task is to: ")
        assert mine[0][1:] == other[0][1:]
        assert mine[1:] == other[1:]


def test_alfworld_is_as_textworld_plays_it(alfworld):
    file = alfworld.files("train", False)[0]
    assert_plays_as_textworld(alfworld, [file], plays=4, steps=40)


@pytest.mark.skipif("ALFWORLD_DATA" not in os.environ, reason="no real games: $ALFWORLD_DATA")
def test_real_games_of_alfworld():
    pytest.importorskip("alfworld.info")
    module = load("alfworld_games")
    assert_plays_as_textworld(module, module.files("train", False)[:2], plays=2, steps=20)
    world = module.ALFWorld("train")
    for seed in range(3):
        world.reset(seed)
        results = []
        while not any(result[2] for result in results) and len(results) < 20:
            results.append(world.step(world.demonstrate()))
        assert results[-1][1:4] == (1.0, True, False)


def test_alfworld_plays(alfworld):
    world = alfworld.ALFWorld()
    seen, info = world.reset(3)
    assert seen == (
        "You are in the middle of a room.\nCommands: go to ..., examine ..., inventory, look"
    )
    assert info["task"] == (
        "put a clean mug in shelf. Looking quickly around you, you see a cabinet 1, a fridge 1, a "
        "shelf 1, a sidetable 1, and a sinkbasin 1."
    )
    start = info["state"]
    assert start.startswith("at no place; holding nothing; atlocation agent1, loc")
    assert "inreceptacle mug 1, cabinet 1" in start  # not seen, but so
    assert world.step("look")[4] == {"state": start, "valid": True}
    seen, *result, info = world.step("dance")
    assert seen.startswith("Nothing happens.\n") and result == [0.0, False, False]
    assert info == {"state": start, "valid": False}
    seen, *_, info = world.step("go to  Cabinet 1")
    assert info["valid"] and info["state"].startswith("at cabinet 1; holding nothing; ")
    assert seen == (
        "You arrive at cabinet 1. The cabinet 1 is closed.\n"
        "Commands: go to ..., examine ..., inventory, look, open cabinet 1"
    )
    for command in WALKTHROUGH[1:-1]:
        *_, reward, terminated, truncated, info = world.step(command)
        assert info["valid"] and not (reward or terminated or truncated)
    assert "; isclean mug 1; " in info["state"] and "; holding mug 1; " in info["state"]
    _, *result, info = world.step(WALKTHROUGH[-1])
    assert result == [1.0, True, False] and info["valid"]
    assert world.reset(3)[1]["state"] == start


def test_alfworlds_worlds_share_a_game_and_not_its_state(alfworld):
    one, other = alfworld.ALFWorld(), alfworld.ALFWorld()
    assert one.reset(0) == other.reset(0) and one.game is other.game
    one.step("go to fridge 1")
    seen, *_ = other.step("go to shelf 1")
    assert "shelf 1, you see nothing" in seen
    assert one.step("open fridge 1")[0].startswith("You open the fridge 1. The fridge 1 is open.")
    assert other.state.key.startswith("at shelf 1; ")


def test_alfworlds_demonstrator(alfworld):
    """Without mistakes it wins in as few steps as the walkthrough; with them it still often does."""
    world = alfworld.ALFWorld()
    world.reset(0)
    commands = []
    while not world.state.won:
        commands.append(world.demonstrate())
        world.step(commands[-1])
    assert len(commands) == len(WALKTHROUGH)
    rng, won = random.Random(0), 0
    for _ in range(20):
        world.reset(0)
        for _ in range(30):
            command = world.demonstrate(rng)
            assert world.step(command)[4]["valid"]
            if world.state.won:
                won += 1
                break
    assert 5 <= won <= 20


def test_alfworld_chooses_games(alfworld):
    def games(text, held_out):
        return {path.parts[-3] for path in alfworld.files(text, held_out)}

    both = games("valid_seen", True)
    assert len(both) == 6 and not any("Sliced" in name or "Pen" in name for name in both)
    assert games("valid_seen", False) == games("valid_unseen", False)
    assert len(games("valid_seen,clean", True)) == 3
    assert len(games("train", False)) == 16 and len(games("train", True)) == 4
    assert not games("train", False) & games("train", True)
    # Seeds 0 to n - 1 are all of the n games that are held out.
    world, found = alfworld.ALFWorld("train"), []
    opened = mock.patch.object(alfworld, "open_game", side_effect=alfworld.open_game)
    with opened as opened:
        for seed in range(4):
            world.reset(seed, {"held_out": True})
        found = [call.args[0] for call in opened.call_args_list]
    assert sorted(found) == sorted(alfworld.files("train", True))
    for wrong in ("test", "train,clan", ""):
        with pytest.raises(ValueError, match="want valid_seen, valid_unseen or train"):
            alfworld.ALFWorld(wrong)


def test_alfworlds_words_are_tokens(alfworld):
    world = alfworld.ALFWorld("train")
    _, tokenizer = load("tiny").tiny_model(world.words, torch.device("cpu"), 0)
    for command in (*WALKTHROUGH, "inventory", "look"):
        assert len(tokenizer(command)["input_ids"]) <= 4
    seen, info = world.reset(0)
    assert len(tokenizer(f"Task: {info['task']}\n{seen}")["input_ids"]) < 40


def test_alfworld_without_its_games(alfworld, tmp_path):
    elsewhere = mock.patch.object(alfworld, "ALFWORLD_DATA", str(tmp_path / "elsewhere"))
    with elsewhere, pytest.raises(FileNotFoundError, match="run alfworld-download") as caught:
        alfworld.files("valid_seen,heat", True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"), [("textworld_games", "textworld"), ("alfworld_games", "alfworld")]
)
def test_missing_package(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "fast_downward", None)
    with pytest.raises(ImportError, match=f"pip install {package}") as caught:
        load(name)
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__
