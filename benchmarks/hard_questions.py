"""Questions for tree_grpo.py of which it is known where the outcome is decided.

    python tree_grpo.py --env benchmarks/hard_questions.py:Late            in the last step
    python tree_grpo.py --env benchmarks/hard_questions.py:LateRepeated    the same, with observations four times as long
    python tree_grpo.py --env benchmarks/hard_questions.py:Decisive:1      in the first turn of four

They are built-in questions, of facts drawn for each one, whose demonstrator is right in all turns but one."""

import dataclasses
import random
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "envs"))

from facts import CITIES, PEOPLE, RELATIONS, Facts, Question, make_question
from retrieval import BM25

MISTAKEN = {  # what the demonstrator of Decisive asks for instead
    "mother": "friend",
    "friend": "teacher",
    "teacher": "mother",
    "birthplace": "home",
    "home": "birthplace",
    "mayor": "founder",
    "founder": "mayor",
}


def late_question(rng: random.Random, max_hops: int, held_out: bool) -> Question:
    """A built-in question whose last fact names its present value, then three former ones."""
    question = make_question(rng, max_hops, held_out)
    facts = [re.fullmatch(r"the (\w+) of (\w+) is (\w+)", text).groups() for _, text in question.passages.passages]
    known = {(relation, of): value for relation, of, value in facts}
    way = [question.start]
    for relation in question.relations:
        way.append(known[relation, way[-1]])
    passages = []
    for relation, of, value in facts:
        text = f"the {relation} of {of} is {value}"
        if relation == question.relations[-1]:
            former = rng.sample([e for e in RELATIONS[relation][1] if e not in (*way, value)], 3)
            text += f", formerly {', '.join(former)}"
        passages.append(("", text))
    return dataclasses.replace(question, passages=BM25(passages))


def decisive_question(turn: int, rng: random.Random, held_out: bool) -> Question:
    """Of three hops. In turn 1, 2 or 3 the mistaken relation is known too, and from there on leads to another answer;
    in turn 4 the last fact lists four names, of which the first is right."""
    while True:
        way, relations = [rng.choice(PEOPLE + CITIES)], []
        for _ in range(3):
            fit = [r for r in MISTAKEN if way[-1] in RELATIONS[r][0] and r not in relations]
            relations.append(rng.choice(fit))
            way.append(rng.choice([e for e in RELATIONS[relations[-1]][1] if e not in way]))
        where = "Where" if way[-1] in CITIES else "Who"
        text = f"{where} is the {' of the '.join(reversed(relations))} of {way[0]}?"
        mistaken = MISTAKEN[relations[min(turn, 3) - 1]]
        if mistaken not in relations and (random.Random(text).random() < 0.2) == held_out:
            break
    unused = [[e for e in kind if e not in way] for kind in (PEOPLE, CITIES)]
    for names in unused:
        rng.shuffle(names)

    def others(relation: str) -> list[str]:
        return unused[RELATIONS[relation][1] is CITIES]

    facts = {(relation, of): value for relation, of, value in zip(relations, way, way[1:])}
    if turn == 4:
        facts[relations[-1], way[2]] += f", formerly {', '.join(others(relations[-1])[:3])}"
    else:
        of = way[turn - 1]
        for relation in (mistaken, *relations[turn:]):
            facts[relation, of] = others(relation).pop()
            of = facts[relation, of]
    passages = [("", f"the {relation} of {of} is {value}") for (relation, of), value in facts.items()]
    rng.shuffle(passages)
    return Question(text, [way[-1]], BM25(passages), way[0], tuple(relations))


def values_of(found: str) -> list[str]:
    """The present value of a fact, and its former ones."""
    return found.partition(" is ")[2].replace("formerly ", "").split(", ")


class Late(Facts):
    """Questions whose last fact has former values. hops: the most of a question."""

    words = (*Facts.words, " formerly")
    turn = 0  # the one in which the demonstrator may ask for what is mistaken

    def __init__(self, args, hops: str = "3"):
        super().__init__(args, hops)
        rng = random.Random(0)
        self.held_out = [self.make(rng, True) for _ in self.held_out]

    def make(self, rng: random.Random, held_out: bool) -> Question:
        return late_question(rng, self.hops, held_out)

    def draw(self, rng: random.Random) -> Question:
        return self.make(rng, False)

    def demonstrate(self, question: Question, rng: random.Random) -> list[tuple[str, str]]:
        """Right in all turns but one, in which it is mistaken four times in five; where a fact has former values, its
        answer is mostly one of these."""
        turns, names = [], [question.start]
        for number, relation in enumerate(question.relations, 1):
            asked = MISTAKEN[relation] if number == self.turn and rng.random() < 0.8 else relation
            query = f"{asked} of {names[0]}"
            found = question.passages.top(query, 1)[0][1]
            turns.append((f"<think> next {asked}</think><search> {query}</search>", found))
            names = values_of(found)
        answer = rng.choices(names, [2, 4, 2, 2])[0] if len(names) > 1 else names[0]
        return [*turns, (f"<think> done</think><answer> {answer}</answer>", "")]


class LateRepeated(Late):
    """What a search finds is said four times."""

    def search(self, asked: list[tuple[Question, str]]) -> list[str]:
        return [", ".join([found] * 4) for found in super().search(asked)]

    def demonstrate(self, question: Question, rng: random.Random) -> list[tuple[str, str]]:
        *searches, answer = super().demonstrate(question, rng)
        return [*((written, ", ".join([found] * 4)) for written, found in searches), answer]


class Decisive(Late):
    """Questions of three hops that are decided in one turn, 1 to 4; the last gives the answer."""

    def __init__(self, args, turn: str):
        if turn not in ("1", "2", "3", "4"):
            raise ValueError(f"want a turn, 1 to 4, not {turn}")
        self.turn = int(turn)
        super().__init__(args)

    def make(self, rng: random.Random, held_out: bool) -> Question:
        return decisive_question(self.turn, rng, held_out)
