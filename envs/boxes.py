"""The smallest task for tree_grpo.py, to begin one's own with: what is in a box? One has to look.

python tree_grpo.py --env envs/boxes.py:Boxes --sft-steps 150 --steps 20"""

import random
from types import SimpleNamespace as Question

THINGS, BOXES = ["ball", "key", "coin"], [f"box {n}" for n in range(5)]
TAGS = ["<search>", "</search>", "<answer>", "</answer>"]


class Boxes:
    instruction = "Look by <search> box 3</search>, answer by <answer> ball</answer>. Question: "
    words = ("What is in", "?", *(f" {x}" for x in THINGS + BOXES), *TAGS)  # of one token each

    def __init__(self, args):
        self.training = []  # a list of questions; if it is empty, draw() makes them
        self.held_out = [self.draw(random.Random(seed)) for seed in range(args.eval_prompts)]

    def draw(self, rng):
        """A question. The thing is drawn anew for each, so one has to look."""
        box = rng.choice(BOXES)
        return Question(text=f"What is in {box}?", box=box, thing=rng.choice(THINGS))

    def search(self, asked):
        """What is found, a text for each pair of a question and what the agent searches for."""
        return [question.thing if query == question.box else "nothing" for question, query in asked]

    def reward(self, question, turns):
        """A number, from the texts of the agent's turns."""
        return float(turns[-1].endswith(f"<answer> {question.thing}</answer>"))

    def demonstrate(self, question, rng):
        """Turns, each with what its search finds, of one who looks one time in five."""
        look = [(f"<search> {question.box}</search>", question.thing)] * (rng.random() < 0.2)
        return [*look, (f"<answer> {question.thing if look else rng.choice(THINGS)}</answer>", "")]
