"""The text games of ALFWorld: pip install alfworld, then alfworld-download (into $ALFWORLD_DATA).

    --env envs/alfworld_games.py:ALFWorld                      held out: valid_seen
    --env envs/alfworld_games.py:ALFWorld:valid_unseen         held out: rooms never seen in training
    --env envs/alfworld_games.py:ALFWorld:train,clean,two      two kinds of tasks, a fifth held out

The third needs the training games alone: held out are a fifth of the pairs of a thing and a place.
The words after the comma choose among pick, look, clean, heat, cool and two (default: all). As in
ALFWorld, games with movable receptacles or sliced things, and those not known to be solvable, are
left out. Held-out games are numbered in a fixed order, and seed s is number s: so --eval-tasks 134
is all of valid_unseen, in every run.

Written for alfworld 0.4.2 and textworld 1.7.0, whose engine, texts and names it uses; a test plays
games in both ways. That engine is slow, so it is asked little: a game is translated once and not
four times, templates and rules are parsed once, and as games are deterministic, a game remembers
the states it was in and what followed there. A step takes milliseconds when it is new and
microseconds ever after (benchmarks/alfworld.py).

The game's first sentence, which names all places, is told with the task, as it stays true. An
observation has the game's answer and the commands that are possible, with "go to ..." for all
places and "examine ..." for all things in sight. Of other commands the game is not asked.

What ALFWorld shows does not tell its state. So the key has where one is, what one holds, and then
all facts that actions change, as the game knows them, seen or not. What was looked at is left out:
no action or goal asks for it.

Simplified: a task's text is the one in the game file; the other wordings that people wrote are not
used."""

import contextlib
import copy
import functools
import gzip
import hashlib
import io
import json
import os
import random
import re
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from unittest import mock

try:
    import fast_downward
    from alfworld.agents.utils.misc import Demangler
    from alfworld.info import ALFWORLD_DATA
    from textworld.envs.pddl import logic, textgen
    from textworld.generator.game import EntityInfo
    from textworld.logic import Rule

    with mock.patch.object(sys, "argv", ["translate", "domain", "problem"]):  # it reads these
        from fast_downward.translate import normalize
        from fast_downward.translate.pddl_parser import lisp_parser, parsing_functions
except ImportError as error:
    how = "pip install alfworld, then alfworld-download"
    raise ImportError(f"ALFWorld needs: {how} ({error})") from None

KINDS = {
    "pick": "pick_and_place_simple",
    "look": "look_at_obj_in_light",
    "clean": "pick_clean_then_place_in_recep",
    "heat": "pick_heat_then_place_in_recep",
    "cool": "pick_cool_then_place_in_recep",
    "two": "pick_two_obj_and_place",
}
# The actions of alfred.pddl also change `checked` and `ison`, which nothing asks for.
CHANGING = "atlocation inreceptacle objectatlocation holds opened isclean ishot iscool istoggled"
CHANGING = (*CHANGING.split(), "issliced")
KEPT_GAMES = 400  # a few megabytes each
IN_TEXTS = (*CHANGING, "holdsany", "not_inreceptacle", "not_istoggled")  # what the grammar asks for

TASK = r'Your task is to: ([^"\\]*)'
# What demonstrate() calls done.
DONE = {"clean": "isclean {}", "heat": "ishot {}", "cool": "iscool {}", "use": "istoggled {}"}
DONE |= {"move": "inreceptacle {}, {}", "take": "holds agent1, {}"}
WORDS = """go to|take|move|open|close|use|clean|heat|cool|examine|inventory|look| from| to| with|, |
Commands: go to ..., examine ...|You are in the middle of a room.|Looking quickly around you, you see|
 a| and a|, a|, and a|, you see| nothing|.|You arrive at|. On the|. The|. In it, you see| is closed.|
 is open|You open the|You close the|You pick up the| from the|You move the| to the|You clean the|
You heat the|You cool the| using the|You turn on the|You are facing the|. Next to it, you see|
You are carrying:|You are not carrying anything.|There's nothing special about|This is a|
Nothing happens. |Task:""".replace("|\n", "|").split("|")

# TextWorld parses a template whenever it writes and a rule whenever it asks, and copies what does
# not change. These are its own functions, with a memory.
parse_template = functools.cache(textgen._parse_and_convert)
textgen._parse_and_convert = lambda *text, **how: copy.deepcopy(parse_template(*text, **how))
textgen.copy_context = lambda context: {
    **context,
    "variables": dict(context["variables"]),
    "mapping": dict(context["mapping"]),
}
Rule.parse_conjunctive_query = functools.cache(Rule.parse_conjunctive_query)
game_logic = functools.cache(logic.GameLogic)


pddl2sas = fast_downward.pddl2sas


@functools.lru_cache(1)
def translated_once(domain: str, problem: str):
    """A game in the planner's form. That takes most of a second, so it is kept in a file."""
    name = hashlib.sha1(f"{domain}{problem}".encode()).hexdigest()
    path = Path(ALFWORLD_DATA, "translated", f"{name}.sas.gz")
    with mock.patch.object(sys, "argv", []), contextlib.redirect_stdout(io.StringIO()):
        if path.exists():
            parts = (lisp_parser.parse_nested_list(text.split("\n")) for text in (domain, problem))
            task = parsing_functions.parse_task(*parts)
            normalize.normalize(task)
            return task, gzip.decompress(path.read_bytes()).decode()
        task, sas = pddl2sas(domain, problem)
    with contextlib.suppress(OSError):  # in a folder that is only read it is not kept
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(gzip.compress(sas.encode(), 1))
        temporary.replace(path)
    return task, sas


def translated(domain, problem, verbose=False, optimize=False):
    return translated_once(domain, problem)  # optimized it would serve a planner, which is not used


class State(NamedTuple):
    path: tuple  # the operators that lead there
    facts: frozenset  # those that texts ask for
    won: bool
    key: str
    commands: dict  # command -> TextWorld's action, its operator
    after: dict  # command -> answer, state; as far as it was asked


class Game:
    """A game file, and what was met of it. TextWorld's engine is a library that holds one state of
    one game; it gets to another by beginning again and following its path."""

    lock, library, loaded = threading.RLock(), None, None  # loaded: the state the library holds

    def __init__(self, file: Path):
        data = json.loads(file.read_text())
        self.walkthrough = data["walkthrough"]
        self.task = re.search(TASK, data["grammar"])[1]
        # But for the task all games have the same grammar.
        self.logic = game_logic(data["pddl_domain"], data["grammar"].replace(self.task, ""))
        with Game.lock, mock.patch.object(fast_downward, "pddl2sas", translated):
            Game.library = Game.library or fast_downward.load_lib()
            self.engine = logic.PddlState(Game.library, data["pddl_problem"], self.logic)
            self.sas = self.engine.sas.encode()
            self.engine.task.init = self.engine.sas = self.engine.sas_replan = None  # megabytes
            facts = list(self.engine.facts)
            types = {v.name: v.type for fact in facts for v in fact.arguments}
            self.things = {name: EntityInfo(name, type) for name, type in types.items()}
            demangler = Demangler(game_infos=self.things)
            for name, thing in self.things.items():
                thing.name, thing.indefinite = demangler.demangle_alfred_name(name), "a"
            self.names = {name: thing.name for name, thing in self.things.items()}
            self.facts = frozenset(fact for fact in facts if fact.name in IN_TEXTS)
            self.at = {}  # a location -> the places there
            for place, location in (f.arguments for f in facts if f.name == "receptacleatlocation"):
                self.at.setdefault(location.name, []).append(self.names[place.name].strip())
            self.templates, self.states = {}, {}
            self.start = self.state(())
            self.seen = self.write("#look.feedback#", {})

    def write(self, text: str, mapping: dict) -> str:
        """What the grammar makes of a text. mapping: its placeholders -> things."""
        variables = {p.name: self.things[thing.name] for p, thing in mapping.items()}
        context = {"state": self.engine, "facts": [], "entity_infos": self.things}
        context |= {"mapping": mapping, "variables": variables}
        return self.logic.grammar.derive(text, context)

    def command(self, action) -> str:
        """What one types for an action; it does not depend on the state."""
        template = action.command_template
        named = {p.name: thing.name for p, thing in action.mapping.items()}
        key = (template, *(named.get(word) for word in re.findall(r"\w+", template)))
        if key not in self.templates:
            action.command_template = self.write(template, action.mapping)
            self.templates[key] = " ".join(action.format_command(self.names).split())
        return self.templates[key]

    def state(self, path: tuple) -> State:
        """The state that the engine is in."""
        if self.facts not in self.states:
            commands = {}
            for action in self.engine.all_applicable_actions():
                effects = self.engine._operators[action.id].nb_effect_atoms
                commands.setdefault(self.command(action), (action, (action.id, effects)))
            won = self.engine.check_goal()
            self.states[self.facts] = State(path, self.facts, won, self.key(), commands, {})
        Game.loaded = self.states[self.facts]
        return Game.loaded

    def key(self) -> str:
        facts = [(f.name, *(self.names[v.name].strip() for v in f.arguments)) for f in self.facts]
        locations = [f.arguments[1].name for f in self.facts if f.name == "atlocation"]
        at = sorted(place for location in locations for place in self.at.get(location, []))
        held = sorted(of[1] for name, *of in facts if name == "holds")
        rest = sorted(f"{name} {', '.join(of)}" for name, *of in facts if name in CHANGING)
        at, held = ", ".join(at) or "no place", ", ".join(held) or "nothing"
        return f"at {at}; holding {held}; {'; '.join(rest)}"

    def run(self, operator: tuple[int, int]) -> list:
        """Run an operator in the library. Returns the facts that are true then."""
        number, effects = operator
        atoms = (logic.Atom * effects)()
        Game.library.apply_operator(number, atoms)
        return [atom.get_fact(self.engine.name2type) for atom in atoms]

    def change(self, facts: frozenset) -> None:
        for fact in self.facts - facts:
            self.engine._facts[fact.signature].discard(fact)
        for fact in facts - self.facts:
            self.engine._facts[fact.signature].add(fact)
        self.facts = facts

    def follow(self, state: State, command: str) -> tuple[str, State]:
        """What is answered to one of a state's commands, and the state that it leads to."""
        with Game.lock:
            if command not in state.after:
                if Game.loaded is not state:
                    Game.library.load_sas(self.sas)
                    for operator in state.path:
                        self.run(operator)
                action, operator = state.commands[command]
                true = self.run(operator)
                new = {fact for fact in true if fact.name in IN_TEXTS}
                self.change(state.facts - {fact.negate() for fact in true} | new)
                answer = self.write(action.feedback_rule, action.mapping)
                state.after[command] = answer, self.state((*state.path, operator))
            return state.after[command]


# ------------------------------------------------------------------------------------- the world
open_game = functools.lru_cache(KEPT_GAMES)(Game)


@functools.cache  # there are thousands of files, and many worlds that ask for them
def files(games: str, held_out: bool) -> list[Path]:
    """The games of a kind, shuffled, but in the same way in every run."""
    split, *kinds = games.split(",")
    folder = Path(ALFWORLD_DATA, "json_2.1.1", split if held_out else "train")
    wanted, found = tuple(KINDS[kind] for kind in kinds or KINDS), {}
    for path in sorted(folder.glob("*/*/game.tw-pddl")):
        left_out = re.search("movable|Sliced", str(path.relative_to(folder)))
        if path.parts[-3].startswith(wanted) and not left_out:
            if re.search(r'"solvable": *true', path.read_text()):
                found.setdefault(path.parts[-3], []).append(path)
    groups = list(found.values())  # of one task in one room
    if split == "train":
        groups = [paths for i, paths in enumerate(groups) if (i % 5 == 0) == held_out]
    found = sum(groups, [])
    if not found:
        where = "run alfworld-download, and set ALFWORLD_DATA if they are elsewhere"
        raise FileNotFoundError(f"no games in {folder}: {where}")
    random.Random(0).shuffle(found)
    return found


class ALFWorld:
    instruction = """You are in a house. Do the task, one command at a time, as in the list that you
are shown. For "go to ..." and "examine ..." name a place or a thing. Think briefly, then write
<action>...</action>.\n\n"""

    def __init__(self, games: str = "valid_seen"):
        split, *kinds = games.split(",")
        if split not in ("valid_seen", "valid_unseen", "train") or {*kinds} - {*KINDS}:
            wanted = f"valid_seen, valid_unseen or train, then any of {', '.join(KINDS)}"
            raise ValueError(f"want {wanted}, with commas between, not {games!r}")
        self.games = games

    def reset(self, seed: int = 0, options: dict | None = None) -> tuple[str, dict]:
        held_out = bool((options or {}).get("held_out"))
        found = files(self.games, held_out)
        number = seed if held_out else random.Random(seed).randrange(len(found))
        self.game = open_game(found[number % len(found)])
        self.state = self.game.start
        seen, _, rest = self.game.seen.partition(". ")
        return self.look(f"{seen}."), {"task": f"{self.game.task} {rest}", "state": self.state.key}

    def look(self, answer: str) -> str:
        shown = [c for c in sorted(self.state.commands) if not c.startswith(("go to", "examine"))]
        shown = ["go to ...", "examine ...", *(c for c in shown if c != "help")]
        return f"{' '.join(answer.split())}\nCommands: {', '.join(shown)}"

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        command, answer = " ".join(action.lower().split()), "Nothing happens."
        valid = command in self.state.commands
        if valid:
            answer, self.state = self.game.follow(self.state, command)
        won = self.state.won
        return self.look(answer), float(won), won, False, {"state": self.state.key, "valid": valid}

    # For the tiny model: what it says and sees in few tokens, and one who shows how it is done.
    @functools.cached_property
    def words(self) -> list[str]:
        most, words = Counter(), {*WORDS}  # most: name -> how many of its kind a game has
        for path in files(self.games, True) + files(self.games, False):
            text = path.read_text()
            words |= {f" {word}" for word in re.search(TASK, text)[1].strip(" .").split()}
            things = re.findall(r"\\n *((\w+?)_bar_\w+) - (?:object|receptacle)", text)
            most |= Counter(f"{name}{'basin' * ('Basin' in id)}" for id, name in things)
        numbered = (f" {name} {i + 1}" for name in most for i in range(most[name]))
        return sorted({*words, *map(str.lower, numbered)})

    def demonstrate(self, rng: random.Random | None = None) -> str:
        """The next command of one who knows where things are, but now and then does anything, and
        often forgets to clean, heat and cool. Without rng: of one without mistakes."""
        if rng and rng.random() < 0.2:
            return rng.choice(sorted(self.state.commands.keys() - {"help"}))
        here, held, *facts = self.state.key.split("; ")
        held = held.removeprefix("holding ")
        where = dict(
            fact[len("inreceptacle ") :].split(", ") for fact in facts if fact[:3] == "inr"
        )
        for command in self.game.walkthrough:
            verb, thing, _, place = re.fullmatch(
                r"(\w+) (.+?)( (?:to|with|from) (.+))?", command
            ).groups()
            looking = "use" in {c.split()[0] for c in self.game.walkthrough}
            if verb not in DONE or verb == "take" and not looking:
                continue
            if DONE[verb].format(thing, place) in facts:
                continue
            if rng and verb in ("clean", "heat", "cool") and rng.random() < 0.5:
                continue
            break
        else:
            return "look"
        if verb != "use" and held not in (thing, "nothing"):  # it is in the way
            away = [c for c in sorted(self.state.commands) if c.startswith(f"move {held} to")]
            go = [c for c in sorted(self.state.commands) if c.startswith("go to")]
            return away[0] if away else (rng or random).choice(go)
        if verb in ("use", "take") or held != thing:
            place = where[thing]
            verb = verb if verb == "use" else "take"
        if place not in here.removeprefix("at ").split(", "):
            return f"go to {place}"
        for command in sorted(self.state.commands):
            if re.fullmatch(rf"{verb} {thing}( \w+ {place})?", command):
                return command
        return f"open {place}"
