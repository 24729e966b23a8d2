"""What a reset and a step of ALFWorld cost: TextWorld as it is, and envs/alfworld_games.py, which asks it once.

    ALFWORLD_DATA=FOLDER python benchmarks/alfworld_speed.py             games of the training split, 12 by default

Each game is played along its walkthrough and on with random commands, first as TextWorld has it, in a process of its
own, then by the adapter: translated for the first time, read again (what is translated is kept in files), begun again
in the same process, and steps that are new or known. Both get the same commands. It also counts what is seen on the
way: answers and commands that differ are errors.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

TEXTWORLD = """
import json, sys, time, textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
infos = textworld.EnvInfos(won=True, admissible_commands=True, feedback=True, facts=True)
for file, commands in json.loads(sys.stdin.read()):
    times, game = [], textworld.start(file, infos, wrappers=[AlfredDemangler()])
    for load in (True, False):  # a world's first reset loads the game as well
        began = time.perf_counter()
        if load:
            game.load(file)
        state = game.reset()
        times.append(time.perf_counter() - began)
    seen, began = [], time.perf_counter()
    for command in commands:
        raw = {" ".join(c.split()): c for c in state["admissible_commands"]}
        state, *_ = game.step(raw[command])
        seen.append([state["feedback"], sorted(" ".join(c.split()) for c in state["admissible_commands"])])
    times.append((time.perf_counter() - began) / len(commands))
    print(json.dumps([times, seen]))
"""


STEPS = {
    "translated for the first time": "a new step",
    "read again": "a new step, after one of another rollout",
    "begun again": "a known step",
}


def play(module, file: Path, commands: list[str] | None, steps: int, turns: bool) -> tuple:
    """Seconds of opening a game and of its mean step; the commands, and what followed. turns: as if another rollout
    had taken a step in between."""
    began = time.perf_counter()
    game = module.open_game(file)
    opened, state, seen, rng = time.perf_counter() - began, game.start, [], random.Random(str(file))
    commands = commands or list(game.walkthrough)
    began = time.perf_counter()
    for i in range(steps):
        if i == len(commands):
            commands.append(rng.choice(sorted(state.commands)))
        if turns:
            module.Game.loaded = None
        answer, state = game.follow(state, commands[i])
        seen.append([answer, sorted(state.commands)])
    return opened, (time.perf_counter() - began) / steps, commands, seen


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--games", type=int, default=12)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()
    import alfworld_games as module

    files = module.files("train", False)[: options.games]
    rows, asked, ours = {}, [], []
    with tempfile.TemporaryDirectory() as folder:
        module.TRANSLATED = Path(folder)  # so that the first time is one
        module.open_game(files[0])  # the grammar is parsed with the first game
        for time_of, kind in STEPS.items():
            for file in files[1:]:
                known, turns = dict(asked).get(str(file)), time_of == "read again"
                opened, step, commands, seen = play(module, file, known, options.steps, turns)
                rows.setdefault(f"a game {time_of}", []).append(opened)
                rows.setdefault(kind, []).append(step)
                if time_of.startswith("translated"):
                    asked.append((str(file), commands))
                    ours.append(seen)
            if time_of.startswith("translated"):
                module.open_game.cache_clear()
                module.translated.cache_clear()
    result = subprocess.run(
        [sys.executable, "-c", TEXTWORLD], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    theirs = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[[")]
    differ = sum(mine != other for seen, (_, found) in zip(ours, theirs) for mine, other in zip(seen, found))
    for i, name in enumerate(("a world's first reset", "another reset", "a step")):
        rows[f"TextWorld: {name}"] = [times[i] for times, _ in theirs]
    print(f"{len(theirs)} games, {options.steps} steps each: {differ} answers or lists of commands differ\n")
    cells = [(name, *(f"{1000 * x:,.3f}" for x in (sum(xs) / len(xs), max(xs)))) for name, xs in rows.items()]
    print(common.table("what|ms, mean over games|ms, slowest game", cells))


if __name__ == "__main__":
    main()
