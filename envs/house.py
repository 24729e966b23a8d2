"""The house, the world in which graph_gpo.py trains if no other is given: a household in the manner
of ALFWorld, in which a thing has to be found, treated and put somewhere."""

import random

ROOMS = {  # the hall leads to each of the others
    "hall": ("bench", "rack"),
    "kitchen": ("counter", "fridge", "microwave", "sink", "cabinet"),
    "lounge": ("sofa", "table", "shelf", "chest"),
    "bedroom": ("bed", "desk", "drawer", "wardrobe"),
    "bathroom": ("basin", "bathtub", "hamper"),
}
PLACES = {place: room for room, places in ROOMS.items() for place in places}
# Shut at first.
LIDDED = ("fridge", "microwave", "cabinet", "chest", "drawer", "wardrobe", "hamper")
TREATED = {"clean": ("sink", "washed"), "heat": ("microwave", "hot"), "cool": ("fridge", "cold")}
THINGS = ("mug", "plate", "apple", "bread", "towel", "cup", "pan")
VERBS = ("go", "open", "take", "put", *TREATED)
HOUSE_WORDS = [f" {word}" for word in (*ROOMS, *PLACES, *THINGS, "washed", "hot", "cold", "plain")]
HOUSE_WORDS += " door| hand|Task: put a| into the| of the|.\n|You are in the| at the".split("|")
HOUSE_WORDS += ". It is| open| shut| nothing|. You see:|. You hold:|. The| is in the".split("|")
HOUSE_WORDS += [", in the", "Nothing happens. ", *VERBS]


class House:
    """A household in the manner of ALFWorld, deterministic: find a thing, take it, clean, heat or
    cool it, and put it somewhere; 4 to 14 steps if none is wasted."""

    instruction = """You are in a house. Do the task, one action at a time: go <room or place>,
open <place>, take <thing>, put <thing>, clean, heat or cool <thing> (at sink, microwave, fridge).
The hall leads to kitchen, lounge, bedroom and bathroom. Think briefly, then write
<action>...</action>.\n\n"""
    words = tuple(HOUSE_WORDS)

    def reset(self, seed: int = 0, options: dict | None = None) -> tuple[str, dict]:
        rng, held_out = random.Random(seed), bool((options or {}).get("held_out"))
        while True:
            self.verb, self.goal = rng.choice(["", *TREATED]), rng.choice([*PLACES])
            things = rng.sample(THINGS, 3)
            self.thing, self.where = things[0], {thing: rng.choice([*PLACES]) for thing in things}
            at = self.where[self.thing]
            task = f"{self.verb} {self.thing} {self.goal} {at}"  # a fifth of these is held out
            if at != self.goal and (random.Random(task).random() < 0.2) == held_out:
                break
        self.at, self.open, self.how = rng.choice([*ROOMS]), set(), dict.fromkeys(things, "plain")
        self.want = TREATED[self.verb][1] if self.verb else ""
        what = f"{self.want} {self.thing}".strip()
        task = f"put a {what} into the {self.goal} of the {PLACES[self.goal]}."
        return self.look(), {"task": task, "state": self.key()}

    def held(self) -> str:
        return next((thing for thing, place in self.where.items() if place == "hand"), "nothing")

    def shut(self) -> bool:
        return self.at in LIDDED and self.at not in self.open

    def key(self) -> str:
        things = [f"{how} {thing} {self.where[thing]}" for thing, how in self.how.items()]
        key = f"{self.at}: {', '.join(things)}"
        return f"{key}; open: {' '.join(sorted(self.open))}" if self.open else key

    def look(self) -> str:
        seen = [thing for thing, at in self.where.items() if at == self.at and not self.shut()]
        here, where = PLACES.get(self.at, self.at), self.where[self.thing]
        return (
            f"You are in the {here} at the {'door' if self.at in ROOMS else self.at}. "
            f"It is {'shut' if self.shut() else 'open'}. You see: {' '.join(seen) or 'nothing'}. "
            f"You hold: {self.held()}. The {self.how[self.thing]} {self.thing} is in the "
            f"{PLACES.get(where, here)}, in the {where}."
        )

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        verb, _, what = action.lower().rpartition(" ")
        room, is_held = PLACES.get(self.at, self.at), what == self.held() != "nothing"
        next_door = what in ROOMS and "hall" in (room, what)
        valid = True
        if verb == "go" and what != self.at and (PLACES.get(what) == room or next_door):
            self.at = what
        elif verb == "open" and what == self.at and self.shut():
            self.open.add(what)
        elif verb == "take" and self.where.get(what) == self.at and not self.shut():
            valid = self.held() == "nothing"
            if valid:
                self.where[what] = "hand"
        elif verb == "put" and is_held and self.at in PLACES and not self.shut():
            self.where[what] = self.at
        elif verb in TREATED and is_held and self.at == TREATED[verb][0]:
            self.how[what] = TREATED[verb][1]
        else:
            valid = False
        done = self.where[self.thing] == self.goal and self.want in (self.how[self.thing], "")
        seen = self.look() if valid else "Nothing happens. " + self.look()
        return seen, float(done), done, False, {"state": self.key(), "valid": valid}

    def demonstrate(self, rng: random.Random | None = None) -> str:
        """The next action of one who often forgets lids and treatments, takes the bedroom for the
        bathroom, and now and then does anything at all: habits for reward to mend. Without rng: of
        one without mistakes."""

        def wrong(rate: float) -> bool:
            return rng is not None and rng.random() < rate

        here = PLACES.get(self.at, self.at)
        if wrong(0.2):
            verb = rng.choice(VERBS)
            places = [*ROOMS, *ROOMS[here]]
            return f"{verb} {rng.choice(places if verb in ('go', 'open') else [*self.where])}"
        place, action = self.goal, f"put {self.thing}"
        if self.held() not in (self.thing, "nothing"):  # it is in the way
            place, action = ROOMS[here][0], f"put {self.held()}"
        elif self.held() == "nothing":
            place, action = self.where[self.thing], f"take {self.thing}"
        elif self.want not in (self.how[self.thing], "") and not wrong(0.5):
            place, action = TREATED[self.verb][0], f"{self.verb} {self.thing}"
        room = PLACES[place]
        if here == "hall" != room and wrong(0.7 if room == "bathroom" else 0.02):
            room = "bedroom" if room == "bathroom" else "bathroom"
        if here == room:
            way = place
        else:
            way = room if "hall" in (here, room) else "hall"
        if self.at != way:
            return f"go {way}"
        if self.shut() and action.startswith(("take", "put")) and not wrong(0.6):
            return f"open {place}"
        return action
