"""Sokoban in text: push the box onto the goal, in a room of 4x4 cells with a few walls inside. Every level is solvable.

    python graph_gpo.py --env envs/sokoban.py:Sokoban      one box
    python graph_gpo.py --env envs/sokoban.py:Sokoban:2    two boxes, either one on either goal

r1c1 is the cell in the upper left corner, r4c4 the one in the lower right. An observation of one box is two lines, 28
words: where the player is and what lies around him (floor, wall, a box to push, or a box that is stuck); where the box
is and what lies around it; and how far it is from the box to the goal and from the player to the box. It says in words
what a drawing would show, since a tiny model looks up words but cannot read drawings: each fact follows a word that
precedes nothing else. Goals and inner walls, which stay where they are, are told with the task.

The state's key names player, boxes, goals and inner walls, so it is equal exactly where states are. A box that can
never reach a goal does not end the episode: from such states the goal is unreachable, and a graph of states shows it.

Simplified: the levels are random, neither made by hand nor chosen for being hard, and 6x6 with the outer wall.
"""

import functools
import itertools
import random
from typing import ClassVar

MOVES = {"up": -6, "down": 6, "left": -1, "right": 1}  # cells are numbered row by row, six in a row
SIDES = dict(zip(("above", "below", "left_of", "right_of"), MOVES.values()))
INSIDE = [6 * row + column for row in range(1, 5) for column in range(1, 5)]
OUTER = frozenset(range(36)) - set(INSIDE)
ROWS = ["3_up", "2_up", "1_up", "same_row", "1_down", "2_down", "3_down"]
COLUMNS = ["3_left", "2_left", "1_left", "same_column", "1_right", "2_right", "3_right"]

def name(cell: int) -> str:
    return f"r{cell // 6}c{cell % 6}"

def names(cells) -> str:
    return " ".join(map(name, sorted(cells)))

def move(walls: frozenset, player: int, boxes: tuple, step: int) -> tuple[int, tuple] | None:
    """The player and the boxes after a move, or None if it is blocked."""
    to = player + step
    if to in boxes and to + step not in walls and to + step not in boxes:
        return to, tuple(sorted(to + step if box == to else box for box in boxes))
    return None if to in walls or to in boxes else (to, boxes)

@functools.lru_cache(20_000)  # a demonstrator asks again in each state
def solve(walls: frozenset, goals: tuple, player: int, boxes: tuple) -> tuple[str, ...] | None:
    """A shortest solution by breadth-first search, or None if there is none."""
    came = {(player, boxes): None}
    for state in (queue := [(player, boxes)]):  # it grows on the way
        if state[1] == goals:
            path = []
            while came[state]:
                action, state = came[state]
                path.append(action)
            return tuple(path[::-1])
        for action, step in MOVES.items():
            if (after := move(walls, *state, step)) and after not in came:
                came[after] = (action, state)
                queue.append(after)
    return None

@functools.lru_cache(10_000)  # all rollouts of a task ask for the same level
def level(seed: int, count: int, held_out: bool) -> tuple[frozenset, tuple, int, tuple]:
    """Walls, goals, player and boxes of a level that takes at least three moves. Of all pairs of inner walls and goals
    a fifth is held out, wherever player and boxes are: so no state of a held-out level comes up in another one."""
    rng = random.Random(seed)
    while True:
        extra = rng.randint(1, 3)  # inner walls
        player, *cells = rng.sample(INSIDE, 1 + 2 * count + extra)
        boxes, goals, inner = (tuple(sorted(part)) for part in (cells[:count], cells[count:-extra], cells[-extra:]))
        if (random.Random(f"{inner} {goals}").random() < 0.2) == held_out:
            walls = OUTER.union(inner)
            if len(solve(walls, goals, player, boxes) or ()) >= 3:
                return walls, goals, player, boxes

class Sokoban:
    instruction = """You play Sokoban in a room of 4x4 cells; r1c1 is in the upper left corner, r4c4 in the lower right.
Push every box onto a goal. You move one cell at a time: up, down, left or right. Moving against a box pushes it, if the
cell behind it is floor; boxes cannot be pulled, so keep them out of corners. Think briefly, then write
<action>...</action>.\n\n"""
    words: ClassVar = [
        "Task", " push", " the", " box", " onto", " goal", " two", " boxes", " goals", " Walls", "Nothing", " moves",
        "you", "box", "box2", *(f" {side}_{who}" for side in SIDES for who in ("you", "box", "box2")),
        *(f" {way}_to_{what}" for way in ("rows", "columns") for what in ("goal", "box", "goal2", "box2")),
        *(f" {word}" for word in ("floor", "wall", "stuck", *map(name, INSIDE), *ROWS, *COLUMNS, *MOVES)), *MOVES]
    def __init__(self, boxes: str = "1"):
        if boxes not in ("1", "2"):
            raise ValueError(f"Sokoban has 1 or 2 boxes, not {boxes!r}")
        self.count = int(boxes)
    def reset(self, seed: int = 0, options: dict | None = None) -> tuple[str, dict]:
        held_out = bool((options or {}).get("held_out"))
        self.walls, self.goals, self.player, self.boxes = level(seed, self.count, held_out)
        what = "the box onto the goal" if self.count == 1 else "the two boxes onto the goals"
        task = f"push {what} {names(self.goals)}. Walls: {names(self.walls - OUTER)}."
        return self.look(), {"task": task, "state": self.key()}
    def key(self) -> str:
        return (f"player {name(self.player)}, box {names(self.boxes)}, goal {names(self.goals)}, "
                f"walls {names(self.walls - OUTER)}")
    def around(self, who: str, at: int) -> str:
        def what(step: int) -> str:
            if at + step in self.walls:
                return "wall"
            if at + step in self.boxes:
                return "push" if who == "you" and move(self.walls, at, self.boxes, step) else "stuck"
            return "floor"
        return f"{who} {name(at)} " + " ".join(f"{side}_{who} {what(step)}" for side, step in SIDES.items())
    def look(self) -> str:
        def far(what: str, start: int, end: int) -> str:
            rows, columns = end // 6 - start // 6, end % 6 - start % 6
            return f" rows_to_{what} {ROWS[rows + 3]} columns_to_{what} {COLUMNS[columns + 3]}"
        def total(goals: tuple) -> int:
            return sum(abs(a // 6 - b // 6) + abs(a % 6 - b % 6) for a, b in zip(self.boxes, goals))
        lines = [self.around("you", self.player)]  # each box is told how far the goal is that suits all boxes best
        for i, (box, goal) in enumerate(zip(self.boxes, min(itertools.permutations(self.goals), key=total))):
            n = "2" * i
            lines.append(self.around(f"box{n}", box) + far(f"goal{n}", box, goal) + far(f"box{n}", self.player, box))
        return "\n".join(lines)
    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        after = move(self.walls, self.player, self.boxes, MOVES.get(action.strip().lower(), 0))
        valid = bool(after) and after[0] != self.player  # no step at all stays where it is
        if valid:
            self.player, self.boxes = after
        done = self.boxes == self.goals
        info = {"state": self.key(), "valid": valid}
        return "Nothing moves. " * (not valid) + self.look(), float(done), done, False, info
    def solution(self) -> list[str]:
        """A shortest solution from here, empty if there is none."""
        return [*(solve(self.walls, self.goals, self.player, self.boxes) or ())]
    def demonstrate(self, rng: random.Random) -> str:
        """The next action of one who knows the way, but in a fifth of his steps moves at random. (With half of them at
        random, the tiny model learned hardly anything from him.)"""
        way = self.solution() if rng.random() < 0.8 else []
        return way[0] if way else rng.choice([*MOVES])
