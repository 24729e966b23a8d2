"""The text games of ALFWorld: pip install alfworld, then alfworld-download (into $ALFWORLD_DATA).

    --env envs/alfworld_games.py:ALFWorld                  held out: valid_seen
    --env envs/alfworld_games.py:ALFWorld:valid_unseen     held out: rooms never seen in training
    --env envs/alfworld_games.py:ALFWorld:train,clean,two  two kinds of tasks, a fifth held out

The third needs the training games alone; held out is every fifth task in a room, with all games of
it. The words after the comma choose among pick, look, clean, heat, cool and two (default: all). As
in ALFWorld, games with movable receptacles or sliced things, and those not known to be solvable,
are left out. Held-out games have a fixed order, and seed s is number s in it: so --eval-tasks 134
is all of valid_unseen, in every run.

Written for alfworld 0.4.2 and textworld 1.7.0, whose engine, texts and names it uses; a test plays
games in both ways. That engine is slow, so it is asked little: a game is translated once and not
four times, templates and rules are parsed once, and as games are deterministic, a game remembers
the states it was in and what followed there. A step takes milliseconds when it is new and
microseconds ever after (benchmarks/alfworld_speed.py).

The game's first sentence, which names all places, is told with the task, as it stays true. An
observation has the game's answer and the commands that are possible, with "go to ..." for all
places and "examine ..." for all things in sight, and without "help". Of commands that are not
possible the game is not asked.

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
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ARGV = sys.argv
try:
    import fast_downward
    from alfworld.agents.utils.misc import Demangler
    from alfworld.info import ALFWORLD_DATA
    from textworld.envs.pddl import logic, textgen
    from textworld.generator.game import EntityInfo
    from textworld.logic import Rule

    sys.argv = ["translate", "domain", "problem"]  # these read it
    from fast_downward.translate import normalize
    from fast_downward.translate.pddl_parser import lisp_parser, parsing_functions
except ImportError as error:
    how = "pip install alfworld, then alfworld-download"
    raise ImportError(f"ALFWorld needs: {how} ({error})") from None
finally:
    sys.argv = ARGV

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
# What the grammar's texts ask for, of what actions change.
IN_TEXTS = (*CHANGING, "holdsany", "not_inreceptacle", "not_istoggled")
KEPT_GAMES = 200  # at a time, of 4 MB each, and more for each state they were in
TRANSLATED = Path(ALFWORLD_DATA, "translated")
TASK = r'Your task is to: ([^"\\]*)'


# ----------------------------------------------------------------------- TextWorld, with a memory
# It parses a template whenever it writes and a rule whenever it asks, and copies what does not
# change. These are its own functions, which remember.
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
def translated(domain: str, problem: str) -> tuple:
    """A game in the planner's form. That takes most of a second, so it is kept in a file."""
    name = hashlib.sha1(f"{domain}{problem}".encode()).hexdigest()
    path = TRANSLATED / f"{name}.sas.gz"
    with contextlib.redirect_stdout(io.StringIO()):
        if path.exists():
            parts = (lisp_parser.parse_nested_list(text.split("\n")) for text in (domain, problem))
            task = parsing_functions.parse_task(*parts)
            normalize.normalize(task)
            return task, gzip.decompress(path.read_bytes()).decode()
        argv = sys.argv
        task, sas = pddl2sas(domain, problem)
        sys.argv = argv  # which it changes
    with contextlib.suppress(OSError):  # in a folder that is only read it is not kept
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(gzip.compress(sas.encode(), 1))
        temporary.replace(path)
    return task, sas


def translate(domain, problem, verbose=False, optimize=False):
    return translated(domain, problem)  # optimized it would serve a planner, which is not used


fast_downward.pddl2sas = translate


# -------------------------------------------------------------------------------------- the games
class State(NamedTuple):
    path: tuple  # the operators that lead there
    facts: frozenset  # those that texts ask for
    won: bool
    key: str
    shown: str  # the commands that are possible
    commands: dict  # command -> TextWorld's action, its operator
    after: dict  # command -> answer, state; as far as it was asked


class Game:
    """A game file, and what was met of it. TextWorld's engine is a library that holds one state of
    one game; it gets to another by beginning again and following its path."""

    library = loaded = None  # loaded: the state that the library holds

    def __init__(self, file: Path):
        data = json.loads(file.read_text())
        self.walkthrough = data["walkthrough"]
        self.task = re.search(TASK, data["grammar"])[1]
        # But for the task all games have the same grammar.
        self.logic = game_logic(data["pddl_domain"], data["grammar"].replace(self.task, ""))
        Game.library, Game.loaded = Game.library or fast_downward.load_lib(), None
        self.engine = logic.PddlState(Game.library, data["pddl_problem"], self.logic)
        self.sas = self.engine.sas.encode()
        self.engine.task = self.engine.sas = self.engine.sas_replan = None  # not needed again
        facts = list(self.engine.facts)
        types = {v.name: v.type for fact in facts for v in fact.arguments}
        self.things = {name: EntityInfo(name, type) for name, type in types.items()}
        demangler = Demangler(game_infos=self.things)
        for name, thing in self.things.items():
            thing.name, thing.indefinite = demangler.demangle_alfred_name(name), "a"
        self.names = {name: thing.name for name, thing in self.things.items()}
        self.places = {}  # a location -> the names of the places there
        for place, location in (f.arguments for f in facts if f.name == "receptacleatlocation"):
            self.places.setdefault(location.name, []).append(self.names[place.name].strip())
        self.templates, self.actions, self.states = {}, {}, {}
        self.facts = frozenset(fact for fact in facts if fact.name in IN_TEXTS)
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
        """The state that the engine is in, which a path has led to."""
        if self.facts not in self.states:
            commands = {}
            for action in self.engine.all_applicable_actions():
                effects = self.engine._operators[action.id].nb_effect_atoms
                known = self.actions.setdefault(action.id, (action, (action.id, effects)))
                commands.setdefault(self.command(action), known)  # states share what they can
            shown = [c for c in sorted(commands) if not re.match("go to|examine|help", c)]
            shown = ", ".join(["go to ...", "examine ...", *shown])
            found = path, self.facts, self.engine.check_goal(), self.key(), shown, commands, {}
            self.states[self.facts] = State(*found)
        Game.loaded = self.states[self.facts]
        return Game.loaded

    def key(self) -> str:
        facts = [(f.name, *(self.names[v.name].strip() for v in f.arguments)) for f in self.facts]
        here = [f.arguments[1].name for f in self.facts if f.name == "atlocation"]
        at = sorted(place for location in here for place in self.places.get(location, []))
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
        if command not in state.after:
            if Game.loaded is not state:
                Game.library.load_sas(self.sas)
                for operator in state.path:
                    self.run(operator)
            Game.loaded = None  # until the new state is known
            action, operator = state.commands[command]
            true = self.run(operator)
            new = {fact for fact in true if fact.name in IN_TEXTS}
            self.change(state.facts - {fact.negate() for fact in true} | new)
            answer = self.write(action.feedback_rule, action.mapping)
            state.after[command] = answer, self.state((*state.path, operator))
        return state.after[command]


open_game = functools.lru_cache(KEPT_GAMES)(Game)


@functools.cache  # there are thousands of files, and many worlds that ask for them
def files(games: str, held_out: bool) -> list[Path]:
    """The files of ALFWorld(games), shuffled in the same way in every run."""
    split, *kinds = games.split(",")
    folder = Path(ALFWORLD_DATA, "json_2.1.1", split if held_out else "train")
    wanted, found = tuple(KINDS[kind] for kind in kinds or KINDS), {}
    for path in sorted(folder.glob("*/*/game.tw-pddl")):
        task = path.parts[
            -3
        ]  # in a room: kind, thing, what it is put in, place, number of the room
        left_out = re.search("movable|Sliced", f"{path.relative_to(folder)}")
        if task.startswith(wanted) and not left_out:
            found.setdefault(task, []).append(path)
    groups = list(found.values())
    if split == "train":
        groups = [group for i, group in enumerate(groups) if (i % 5 == 0) == held_out]
    paths = [path for group in groups for path in group]
    paths = [path for path in paths if re.search(r'"solvable": *true', path.read_text())]
    if not paths:
        where = "run alfworld-download, and set ALFWORLD_DATA if they are elsewhere"
        raise FileNotFoundError(f"no games in {folder}: {where}")
    random.Random(0).shuffle(paths)
    return paths


# -------------------------------------------------------------------------------------- the world
# For the tiny model: its tokens, but for names, and when demonstrate() takes a command as done.
WORDS = """go to|take|move|open|close|use|clean|heat|cool|examine|inventory|look| from| to| with|, |
Commands: go to ..., examine ...|You are in the middle of a room.|, you see| a| and a|, a|, and a|
Looking quickly around you| nothing|.|You arrive at|. On the|. The|. In it, you see| is closed.|
 is open|You open the|You close the|You pick up the| from the|You move the| to the|You clean the|
You heat the|You cool the| using the|You turn on the|You are facing the|. Next to it, you see|
You are carrying:|You are not carrying anything.|There's nothing special about|This is a|
Nothing happens. |Task:""".replace("|\n", "|").split("|")
DONE = {"clean": "isclean {}", "heat": "ishot {}", "cool": "iscool {}", "use": "istoggled {}"}
DONE |= {"move": "inreceptacle {}, {}", "take": "holds agent1, {}"}


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
        paths = files(self.games, held_out)
        number = seed if held_out else random.Random(seed).randrange(len(paths))
        self.game = open_game(paths[number % len(paths)])
        self.state = self.game.start
        seen, _, rest = self.game.seen.partition(". ")
        return self.look(f"{seen}."), {"task": f"{self.game.task} {rest}", "state": self.state.key}

    def look(self, answer: str) -> str:
        return f"{' '.join(answer.split())}\nCommands: {self.state.shown}"

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        command, answer = " ".join(action.lower().split()), "Nothing happens."
        valid = command in self.state.commands
        if valid:
            answer, self.state = self.game.follow(self.state, command)
        won = self.state.won
        return self.look(answer), float(won), won, False, {"state": self.state.key, "valid": valid}

    @functools.cached_property
    def words(self) -> list[str]:
        """WORDS, those of the tasks, and all names of things, each with its number."""
        most, words = Counter(), {*WORDS}  # most: name -> how many of its kind a game has
        for path in files(self.games, True) + files(self.games, False):
            text = path.read_text()
            words |= {f" {word}" for word in re.search(TASK, text)[1].strip(" .").split()}
            things = re.findall(r"\\n *((\w+?)_bar_\w+) - (?:object|receptacle)", text)
            most |= Counter(f"{name}{'basin' * ('Basin' in id)}" for id, name in things)
        numbered = (f" {name} {i + 1}".lower() for name in most for i in range(most[name]))
        return sorted({*words, *numbered})

    def goal(self, facts: list[str], forgets: bool):
        """What is to be done next, in the order of the walkthrough: verb, thing, place."""
        looking = any(command.startswith("use") for command in self.game.walkthrough)
        for command in self.game.walkthrough:
            parts = re.fullmatch(r"(\w+) (.+?)(?: (?:to|with|from) (.+))?", command)
            verb, thing, place = parts.groups()
            # In most tasks what is taken is put somewhere, which asks for it.
            wanted = verb in DONE and (verb != "take" or looking)
            wanted = wanted and not (forgets and verb in ("clean", "heat", "cool"))
            if wanted and DONE[verb].format(thing, place) not in facts:
                return verb, thing, place
        return "look", "", ""

    def demonstrate(self, rng: random.Random | None = None) -> str:
        """The next command of one who knows where things are, but now and then does anything, and
        often forgets to clean, heat and cool. Without rng: of one without mistakes."""
        possible = sorted(self.state.commands.keys() - {"help"})
        if rng and rng.random() < 0.2:
            return rng.choice(possible)
        here, held, *facts = self.state.key.split("; ")
        here, held = here.removeprefix("at ").split(", "), held.removeprefix("holding ")
        verb, thing, place = self.goal(facts, forgets=bool(rng) and rng.random() < 0.5)
        if verb == "look":
            return verb
        if verb != "use" and held not in (thing, "nothing"):  # it is in the way
            away = [command for command in possible if command.startswith(f"move {held} to")]
            ways = [command for command in possible if command.startswith("go to")]
            return away[0] if away else (rng or random).choice(ways)
        if verb == "use" or held != thing:  # where it is
            verb = "use" if verb == "use" else "take"
            places = [f.split(", ")[1] for f in facts if f.startswith(f"inreceptacle {thing}, ")]
            # Some things lie in two places at once.
            known = [p for p in places if f"take {thing} from {p}" in self.game.walkthrough]
            place = (known or places)[0]
        if place not in here:
            return f"go to {place}"
        for command in possible:
            if re.fullmatch(rf"{verb} {thing}( \w+ {place})?", command):
                return command
        return f"open {place}"
