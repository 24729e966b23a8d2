"""The text games of ALFWorld: pip install alfworld, then alfworld-download (into $ALFWORLD_DATA).

    python graph_gpo.py --model ... --env envs/alfworld_games.py:ALFWorld                  held out: valid_seen
    python graph_gpo.py --model ... --env envs/alfworld_games.py:ALFWorld:valid_unseen     held out: rooms never seen

Written against alfworld 0.4.2 and textworld 1.7. Run on a small game written by hand, with ALFWorld's PDDL domain,
texts and wrapper and TextWorld's PDDL engine; NOT RUN ON THE REAL DATA, and the test has a stand-in for both packages.
ALFWorld's own environment deals out the games in an order of its own; this one opens the game that the seed decides
on, with ALFWorld's wrapper that names the things. As there, games with movable receptacles or sliced things and games
not known to be solvable are left out. A reset translates the game's PDDL, which takes longer than steps do.

An observation has the game's answer and all commands that are possible; about others the game is not asked.

What ALFWorld shows does not tell its state. So the key has where one is, what one holds, and then all facts that
actions change, as the game knows them, seen or not. What was looked at is left out: no action or goal asks for it.

Simplified: a task's text is the one in the game file; the other wordings that people wrote are not used.
"""

import functools
import json
import random
import re
from pathlib import Path

try:
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from alfworld.info import ALFWORLD_DATA
except ImportError as error:
    raise ImportError(f"ALFWorld needs: pip install alfworld, then alfworld-download ({error})") from None

CHANGING = {"atlocation", "inreceptacle", "objectatlocation", "holds", "opened", "isclean", "ishot", "iscool",
            "istoggled", "issliced"}  # the actions of alfred.pddl also change checked and ison, which nothing asks for

@functools.cache  # there are thousands of files, and many worlds that ask for them
def files(split: str) -> list[Path]:
    folder = Path(ALFWORLD_DATA) / "json_2.1.1" / split
    found = sorted(folder.rglob("game.tw-pddl"))
    if found := [path for path in found if not re.search("movable|Sliced", str(path.relative_to(folder)))]:
        return found
    raise FileNotFoundError(f"no games in {folder}: run alfworld-download, and set ALFWORLD_DATA if they are elsewhere")

@functools.cache
def solvable(path: Path) -> bool:
    return bool(json.loads(path.read_text()).get("solvable"))

class ALFWorld:
    instruction = """You are in a house. Do the task by one command at a time, a command from the list you are shown,
word for word. Think briefly, then write <action>...</action>.\n\n"""
    def __init__(self, held_out: str = "valid_seen"):
        if held_out not in ("valid_seen", "valid_unseen"):
            raise ValueError(f"the games held out are valid_seen or valid_unseen, not {held_out!r}")
        self.held_out, self.game, self.file = held_out, None, None
    def reset(self, seed: int = 0, options: dict | None = None) -> tuple[str, dict]:
        games = files(self.held_out if (options or {}).get("held_out") else "train")
        file = next(filter(solvable, random.Random(seed).sample(games, len(games))))
        if self.game is None:
            infos = textworld.EnvInfos(facts=True, won=True, admissible_commands=True, feedback=True)
            self.game = textworld.start(str(file), infos, wrappers=[AlfredDemangler()])
        elif file != self.file:
            self.game.load(str(file))
        self.file, self.state = file, self.game.reset()
        seen, _, task = self.state["feedback"].partition("Your task is to:")
        return self.look(re.sub("-= Welcome.*?=-", "", seen)), {"task": task.strip(), "state": self.key()}
    def key(self) -> str:
        facts = [(fact.name, *(argument.name.strip() for argument in fact.arguments)) for fact in self.state["facts"]]
        here = {fact[2] for fact in facts if fact[0] == "atlocation"}
        at = sorted(fact[1] for fact in facts if fact[0] == "receptacleatlocation" and fact[2] in here)
        held = sorted(fact[2] for fact in facts if fact[0] == "holds")
        rest = sorted(f"{fact[0]} {', '.join(fact[1:])}" for fact in facts if fact[0] in CHANGING)
        return f"at {', '.join(at) or 'no place'}; holding {', '.join(held) or 'nothing'}; {'; '.join(rest)}"
    def look(self, answer: str) -> str:
        return f"{' '.join(answer.split())}\nCommands: {', '.join(self.state['admissible_commands'])}"
    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        commands = {" ".join(command.lower().split()): command for command in self.state["admissible_commands"]}
        command = commands.get(" ".join(action.lower().split()))
        answer = "Nothing happens."
        if command:
            self.state, _, _ = self.game.step(command)
            answer = self.state["feedback"]
        won = bool(self.state["won"])
        return self.look(answer), float(won), won, False, {"state": self.key(), "valid": bool(command)}
