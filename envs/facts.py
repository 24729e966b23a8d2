"""Built-in questions for tree_grpo.py: two or more hops through facts about people and cities.

    python tree_grpo.py --env envs/facts.py:Facts:4 --max-turns 5        of up to four hops

Each question brings facts drawn for it alone, so there is nothing to remember: whoever wants the
answer has to search for one fact after the other."""

import random
from dataclasses import dataclass

from questions import outcome_reward
from retrieval import BM25, show_passages

PEOPLE = "Ada Bob Cleo Dan Eve Finn Gus Hana Ivo Jane Kai Lena Max Nora Ola".split()
CITIES = "Rome Oslo Lima Cairo Paris Delhi Quito Tunis Bern Kyoto".split()
RELATIONS = {  # of what, and what it gives
    "mother": (PEOPLE, PEOPLE),
    "friend": (PEOPLE, PEOPLE),
    "teacher": (PEOPLE, PEOPLE),
    "birthplace": (PEOPLE, CITIES),
    "home": (PEOPLE, CITIES),
    "mayor": (CITIES, PEOPLE),
    "founder": (CITIES, PEOPLE),
    "twin": (CITIES, CITIES),
}

WORDS = [f" {word}" for word in (*RELATIONS, *PEOPLE, *CITIES)]  # of one token each
WORDS += " is| the| of| next| done| nothing| found| that| was| no| action| write".split("|")
WORDS += " search| query| or| answer|Who|Where|\n\n".split("|")
WORDS += [
    f"<{end}{tag}>" for tag in ("think", "search", "information", "answer") for end in ("", "/")
]


@dataclass
class Question:
    text: str
    answers: list[str]
    passages: BM25  # what a search looks into
    start: str  # the entity it starts from,
    relations: tuple[str, ...]  # and the relations to follow from there


def make_question(rng: random.Random, max_hops: int, held_out: bool) -> Question:
    """A question of 2 to max_hops hops over facts drawn for it alone, so there is nothing to
    remember. A fifth of all question texts is held out."""
    while True:
        entity = start = rng.choice(PEOPLE + CITIES)
        facts, seen = {}, [start]  # (relation, of) -> entity
        for _ in range(rng.randint(2, max_hops)):
            used = [relation for relation, _ in facts]
            fitting = [r for r, (of, _) in RELATIONS.items() if entity in of and r not in used]
            relation, of = rng.choice(fitting), entity
            entity = rng.choice([e for e in RELATIONS[relation][1] if e not in seen])
            facts[relation, of] = entity
            seen.append(entity)
        relations = tuple(relation for relation, _ in facts)
        text = f"{'Where' if entity in CITIES else 'Who'} is the {' of the '.join(relations[::-1])}"
        text += f" of {start}?"
        if (random.Random(text).random() < 0.2) == held_out:
            break

    def other(kind: list[str]) -> str:  # so that no search is ambiguous
        return rng.choice([e for e in kind if e not in seen])

    # Facts beside the way: another relation of each entity, each relation of another entity.
    for relation, of in list(facts):
        kinds = [r for r, (kind, _) in RELATIONS.items() if of in kind and r != relation]
        beside = rng.choice(kinds)
        facts.setdefault((beside, of), other(RELATIONS[beside][1]))
        facts.setdefault(
            (relation, rng.choice(RELATIONS[relation][0])), other(RELATIONS[relation][1])
        )
    passages = [
        ("", f"the {relation} of {of} is {value}") for (relation, of), value in facts.items()
    ]
    rng.shuffle(passages)
    return Question(text, [entity], BM25(passages), start, relations)


class Facts:
    """Questions without end. hops: the most of a question, 2, 3 or 4."""

    # Told to models with a chat template; without the example a 0.5B did not search.
    instruction = """Look up one fact after another until you know the answer, one action a turn, as
in this example:

Question: Who is the mayor of the birthplace of Cleo?
<think> first the birthplace </think> <search> birthplace of Cleo </search>
<information> the birthplace of Cleo is Rome </information>
<think> now the mayor </think> <search> mayor of Rome </search>
<information> the mayor of Rome is Bob </information>
<think> that is it </think> <answer> Bob </answer>

You have {turns} turns. Question: """
    words = WORDS

    def __init__(self, args, hops: str = "3"):
        if hops not in ("2", "3", "4"):
            raise ValueError(f"questions have 2, 3 or 4 hops at most, not {hops}")
        self.hops, self.topk, self.training = int(hops), args.topk or 1, []  # these are drawn
        rng = random.Random(0)  # the same held-out questions for every seed
        self.held_out = [make_question(rng, self.hops, True) for _ in range(args.eval_prompts)]

    def draw(self, rng: random.Random) -> Question:
        return make_question(rng, self.hops, False)

    def search(self, asked: list[tuple[Question, str]]) -> list[str]:
        """What each question's query finds."""
        return [show_passages(question.passages.top(query, self.topk)) for question, query in asked]

    def reward(self, question: Question, turns: list[str]) -> float:
        return outcome_reward(turns, question.answers)

    def demonstrate(self, question: Question, rng: random.Random) -> list[tuple[str, str]]:
        """The turns of an imperfect agent, each with what its search finds: it tends to stop early,
        and at times asks for a wrong relation. What it teaches is mostly wrong, for reward to
        mend."""
        turns, entity = [], question.start
        for relation in question.relations:
            if turns and rng.random() < 0.6:
                break
            if rng.random() < 0.15:
                relation = rng.choice([r for r in RELATIONS if r != relation])
            query = f"{relation} of {entity}"
            found = question.passages.top(query, 1)[0][1]
            turns.append((f"<think> next {relation}</think><search> {query}</search>", found))
            entity = found.partition(" is ")[2]
        return [*turns, (f"<think> done</think><answer> {entity}</answer>", "")]
