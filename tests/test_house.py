"""The house: its tasks are solvable, its rules by a search of its own, its keys are its states."""

import copy
import random
from collections import deque

from house import LIDDED, PLACES, ROOMS, THINGS, House


def deciding(house) -> tuple:
    """All of it that steps change."""
    return house.at, tuple(house.where.items()), tuple(house.how.items()), frozenset(house.open)


def put_back(house, state) -> None:
    at, where, how, opened = state
    house.at = at
    house.where = dict(where)
    house.how = dict(how)
    house.open = set(opened)


def shortest(house, actions) -> int:
    """Steps of the shortest solution with actions(house), by breadth-first search."""
    start = deciding(house)
    seen = {start}
    queue = deque([(start, 0)])
    while queue:
        state, steps = queue.popleft()
        put_back(house, state)
        for action in actions(house):
            put_back(house, state)
            _, reward, terminated, _, info = house.step(action)
            if terminated:
                assert reward == 1
                put_back(house, start)
                return steps + 1
            after = deciding(house)
            if info["valid"] and after not in seen:
                seen.add(after)
                queue.append((after, steps + 1))
    raise AssertionError("no solution")


def all_actions(house) -> list[str]:
    found = [f"go {where}" for where in (*ROOMS, *PLACES)]
    found += [f"open {place}" for place in LIDDED]
    for verb in ("take", "put", "clean", "heat", "cool"):
        found += [f"{verb} {thing}" for thing in house.where]
    return found


def actions_that_matter(house) -> list[str]:
    """Without other things, other treatments than the task's, and other lids and places to put
    something than those of the thing's place and the goal: they lead to no shorter solution."""
    room = PLACES.get(house.at, house.at)
    found = [f"go {where}" for where in (*ROOMS, *ROOMS[room])]
    if house.at in (house.start, house.goal):
        found += [f"open {house.at}", f"put {house.thing}"]
    return [*found, f"take {house.thing}", f"{house.verb} {house.thing}"]


def test_tasks_are_solvable_and_the_demonstrator_wastes_no_step():
    house = House()
    taken = set()
    for seed in range(500):
        house.reset(seed, {"held_out": seed % 2})
        house.start = house.where[house.thing]
        least = shortest(house, actions_that_matter) if seed < 100 else None
        if least and least <= 5:  # small enough to try everything
            assert shortest(house, all_actions) == least
        steps, over = 0, False
        while not over:
            _, reward, over, truncated, info = house.step(house.demonstrate())
            steps += 1
            assert (info["valid"], truncated, reward) == (True, False, float(over))
            assert steps <= 14
        assert steps == (least or steps)
        taken.add(steps)
    assert (min(taken), max(taken)) == (4, 14)  # as House says

    rng = random.Random(0)  # with its habits it errs
    acts = [house.step(house.demonstrate(rng))[4]["valid"] for _ in range(1000)]
    assert 100 < acts.count(False) < 900


def test_the_same_seed_and_actions_give_the_same():
    rng = random.Random(0)
    one = House()
    other = House()
    for seed in range(50):
        how = {"held_out": seed % 2}
        told = [one.reset(seed, how)]
        actions = [rng.choice([one.demonstrate(rng), *all_actions(one)]) for _ in range(20)]
        told += [one.step(action) for action in actions]
        other.reset(rng.randrange(99))  # whatever was there before
        other.step("go hall")
        assert [other.reset(seed, how), *(other.step(action) for action in actions)] == told
        twin = copy.deepcopy(other)
        assert twin.step("go hall") == other.step("go hall")
    assert House().reset(3) == House().reset(seed=3, options={"held_out": False})
    assert House().reset(3) != House().reset(4)


def test_held_out_tasks_are_others():
    house = House()
    seen = {True: set(), False: set()}
    for held_out in (True, False):
        for seed in range(3000):
            _, info = house.reset(seed, {"held_out": held_out})
            where = house.where[house.thing]
            seen[held_out].add((house.verb, house.thing, where, house.goal))
            assert where != house.goal
            assert house.thing in info["task"]
            assert house.goal in info["task"]
            assert house.held() == "nothing"
            assert not house.open
            assert set(house.how.values()) == {"plain"}
    assert not seen[True] & seen[False]
    tasks = 4 * len(THINGS) * 18 * 17  # a fifth of them is held out
    assert 0.7 * tasks / 5 < len(seen[True]) < tasks / 4
    assert 2000 < len(seen[False])


# fmt: off
STRANGE = [
    "", " ", "go", "go ", " kitchen", "take  mug", "go\tkitchen", "\n", "gö küche", "🙂", "go 🙂",
    "take nothing", "put nothing", "clean nothing", "open hall", "go door", "go hand", "take hand",
    "put", "go go", "x" * 9999, "open", "<action>go kitchen</action>", "\ud800", "go kitchen.",
    "please go kitchen", "take mug egg", "heat",
]
# fmt: on


def test_invalid_actions_change_nothing_and_a_key_is_a_state():
    rng = random.Random(1)
    house = House()
    invalid = 0
    of_key = {}
    of_state = {}
    for seed in range(60):
        house.reset(seed)
        for _ in range(40):
            action = rng.choice([*STRANGE, *all_actions(house), house.demonstrate()])
            before, key, look = deciding(house), house.key(), house.look()
            assert of_key.setdefault(key, before) == before
            assert of_state.setdefault(before, key) == key
            seen, _, terminated, truncated, info = house.step(action)
            assert info["state"] == house.key()
            assert not truncated
            if info["valid"]:
                assert action not in STRANGE
                assert deciding(house) != before
                assert house.key() != key
                assert seen == house.look()
            else:
                invalid += 1
                assert deciding(house) == before
                assert seen == "Nothing happens. " + look
            if terminated:
                break
    assert invalid > 1000


def test_a_hand_holds_one_thing_and_case_does_not_matter():
    house = House()
    house.reset(0)
    first, second, _ = house.where
    house.at = house.where[first] = house.where[second] = "bed"
    assert house.step(f"take {first}")[4]["valid"]
    assert not house.step(f"take {second}")[4]["valid"]
    assert house.held() == first
    assert house.where[second] == "bed"
    house.at = "hall"
    assert house.step("GO KITCHEN")[4] == {"state": house.key(), "valid": True}
    assert house.at == "kitchen"
