"""The smallest world for graph_gpo.py, to begin one's own with: walk along a line to a place.

python graph_gpo.py --env envs/line.py:Line --steps 20 --sft-steps 60 --max-steps 8"""

import random


class Line:
    instruction = "Walk along places 0 to 7: <action>left</action> or <action>right</action>.\n\n"
    words = ("Task: go to", "You are at", *(f" {n}" for n in range(8)), ".", "\n", "left", "right")

    def reset(self, seed=0, options=None):
        """What is seen at first, and the task, which the seed decides on."""
        rng, held_out = random.Random(seed), bool((options or {}).get("held_out"))
        self.at, self.goal = rng.sample(range(8), 2)
        while ((self.at + self.goal) % 5 == 0) != held_out:
            self.at, self.goal = rng.sample(range(8), 2)
        return f"You are at {self.at}.", {"task": f"go to {self.goal}.", "state": str(self.at)}

    def step(self, action):
        """What is seen then, the reward, if this is the end, if a limit was met, and the state."""
        by = {"left": -1, "right": 1}.get(action, 0)
        self.at = min(max(self.at + by, 0), 7)
        done = self.at == self.goal
        info = {"state": str(self.at), "valid": by != 0}
        return f"You are at {self.at}.", float(done), done, False, info

    def demonstrate(self, rng):
        """The next action of one who strays one time in three."""
        return rng.choice(["left", "right", "left" if self.goal < self.at else "right"])
