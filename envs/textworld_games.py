"""Games of TextWorld (pip install textworld): one game, or a folder of them.

    tw-make custom --world-size 3 --nb-objects 6 --quest-length 4 --seed 1 --output games/1.z8      makes a game
    python graph_gpo.py --model ... --env envs/textworld_games.py:TextWorld:games

A game is a .z8 file with the .json that tw-make puts next to it, which tells the facts. In the order of their paths the
first of every five games is held out; one game alone serves for both.

An observation has the game's answer, what the place looks like, what one carries, and all commands that are possible.
The game is not asked about others (its parser knows abbreviations, and "undo" and "quit"): nothing happens then.

The state's key begins with the place and what one carries; then follow the quests done so far, since the game remembers
them, and all facts that TextWorld tells. The number of moves is left out: nothing in such a game depends on it.

Simplified: only winning is rewarded, not the points on the way to it.
"""

import random
import re
from pathlib import Path

try:
    import textworld
except ImportError:
    raise ImportError("games of TextWorld need a package: pip install textworld") from None

INFOS = dict.fromkeys(("facts", "win_facts", "admissible_commands", "won", "lost", "description", "inventory",
                       "objective", "feedback"), True)

def clean(text: str | None) -> str:
    """Without the prompt and status line at the end, and without blank lines."""
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"\n>[^\n]*\Z", "", text or "")).strip()

class TextWorld:
    instruction = """You play a text adventure. Do the task by one command at a time, a command from the list you are
shown, word for word. Think briefly, then write <action>...</action>.\n\n"""
    def __init__(self, games: str):
        path = Path(games).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"there is no game file or folder {games}")
        self.games = sorted(path.rglob("*.z8")) if path.is_dir() else [path]
        if not self.games or any(game.suffix != ".z8" or not game.with_suffix(".json").exists() for game in self.games):
            raise ValueError(f"{games}: give a .z8 file made by tw-make, its .json next to it, or a folder of such")
        self.game = self.file = None
    def reset(self, seed: int = 0, options: dict | None = None) -> tuple[str, dict]:
        held_out = bool((options or {}).get("held_out"))
        games = [game for i, game in enumerate(self.games) if (i % 5 == 0) == held_out]
        file = random.Random(seed).choice(games or self.games)
        if file != self.file:
            if self.game:  # its load() would keep the old game in memory
                self.game.close()
            self.game = textworld.start(str(file), textworld.EnvInfos(**INFOS))
        self.file, self.done = file, set()
        self.state = self.game.reset()
        self.remember()
        return self.look(""), {"task": " ".join(self.state["objective"].split()), "state": self.key()}
    def remember(self) -> None:
        """Which quests are done: one whose facts were all true once is done for good."""
        facts, quests = set(self.state["facts"]), enumerate(self.state["win_facts"])
        self.done |= {i for i, quest in quests if any(facts.issuperset(event) for event in quest)}
    def key(self) -> str:
        facts = [(fact.name, *(argument.name for argument in fact.arguments)) for fact in self.state["facts"]]
        place = [fact[2] for fact in facts if fact[:2] == ("at", "P")]
        carried = sorted(fact[1] for fact in facts if fact[0] == "in" and fact[2] == "I")
        rest = sorted(f"{fact[0]} {', '.join(fact[1:])}" for fact in facts)
        return (f"{', '.join(place)}; carrying {', '.join(carried) or 'nothing'}; done {sorted(self.done)}; "
                f"{'; '.join(rest)}")
    def look(self, answer: str) -> str:
        place = clean(self.state["description"])
        parts = [answer.replace(place, "").strip(), place, clean(self.state["inventory"]),
                 f"Commands: {', '.join(self.state['admissible_commands'])}"]
        return "\n".join(dict.fromkeys(part for part in parts if part))  # the inventory may be the answer, too
    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        commands = {command.lower(): command for command in self.state["admissible_commands"]}
        command = commands.get(" ".join(action.lower().split()))
        answer = "Nothing happens."
        if command:
            self.state, _, _ = self.game.step(command)
            self.remember()
            answer = clean(self.state["feedback"])
        won, lost = bool(self.state["won"]), bool(self.state["lost"])
        return self.look(answer), float(won), won or lost, False, {"state": self.key(), "valid": bool(command)}
