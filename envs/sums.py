"""Built-in problems for treerl.py: calculations modulo 11.

python treerl.py --env envs/sums.py:Sums:12          of up to twelve operations"""

import functools
import random
import re

from problems import Problem, final_answer

OPS = [f"{sign}{n}" for sign in "+-" for n in range(1, 6)] + [f"*{n}" for n in range(2, 6)]

WORDS = [f" {op}" for op in OPS] + [f" {op} =" for op in OPS]  # of one token each; what decides a
WORDS += [f" {value}" for value in range(11)]  # line's result is in two tokens
WORDS += ["Modulo 11, from", ":", "\n", "####"]


def result(value: int, op: str) -> int:
    return (value * int(op[1:]) if op[0] == "*" else value + int(op)) % 11


def make_problem(rng: random.Random, ops: int, held_out: bool) -> Problem:
    """A calculation modulo 11, from the left to the right, of 5 to `ops` operations. A fifth of all
    is held out."""
    while True:
        start, steps = rng.randrange(11), [rng.choice(OPS) for _ in range(rng.randint(5, ops))]
        text = f"Modulo 11, from {start}: {' '.join(steps)}\n"
        if (random.Random(text).random() < 0.2) == held_out:
            return Problem(text, str(functools.reduce(result, steps, start)))


class Sums:
    """Problems without end. ops: the most operations of one, 5 or more."""

    words = WORDS

    def __init__(self, args, ops: str = "8"):
        if not ops.isdigit() or int(ops) < 5:
            raise ValueError(f"problems have 5 operations or more, not {ops}")
        self.ops, self.training = int(ops), []  # they are drawn
        rng = random.Random(0)  # the same held-out problems for every seed
        self.held_out = [make_problem(rng, self.ops, True) for _ in range(args.eval_prompts)]

    def draw(self, rng: random.Random) -> Problem:
        return make_problem(rng, self.ops, False)

    def answer_start(self, problem: Problem, text: str) -> int:
        """Where in a solution its final answer begins; its length if there is none."""
        return final_answer(text, problem.latex)[0]

    def reward(self, problem: Problem, text: str) -> float:
        return float(final_answer(text, problem.latex)[1] == problem.answer)

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """The solution of one who has learned some products wrong: each has a rate of its own, from
        0.1 to 0.9, at which a wrong value, always the same, is given for it. So much of what this
        teaches is wrong, for reward to mend."""
        lines = ""
        value, *steps = re.findall(r"(?<=from )\d+|[-+*]\d", problem.text)
        for step in steps:
            fact = random.Random(f"{value}{step}")
            found = result(int(value), step)
            rate, wrong = fact.uniform(0.1, 0.9), (found + fact.randrange(1, 11)) % 11
            if step[0] == "*" and rng.random() < rate:
                found = wrong
            lines += f" {value} {step} = {found}\n"
            value = found
        return lines + f"#### {value}"
