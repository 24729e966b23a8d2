"""What left the scripts: options of the authors' released code (zzj1111/alfworldauto, commit 51c1a03; tutorial, A.3) and
what earlier measurements were made with.

    python benchmarks/released.py graph_gpo --penalty-in-return --merge-similarity 0.95 --steps 20
    python benchmarks/released.py graph_gpo --dynamic-sampling 3
    python benchmarks/released.py treerl --random-forks

Each runs a script with a part of it replaced; other arguments are the script's own.
"""

import contextlib
import difflib
import functools
import random
from unittest import mock

import common
import torch
from common import SCRIPTS, graph_gpo, per_group, treerl
from torch import Tensor

from graph_gpo import SUCCESS, Transition, goal_distances, z_scores


# ----------------------------------------------------------------- GraphGPO: penalties, merged states
def merge_states(transitions: list[Transition], similarity: float) -> list[Transition]:
    """The same transitions, but each state is replaced by the first earlier one whose text is at least `similarity`
    (difflib's ratio, 0 to 1) like its own and which stays. At 1 none is."""

    def like(one: str, other: str) -> bool:
        match = difflib.SequenceMatcher(None, one, other)  # two bounds are cheaper than the ratio
        bounds = (match.real_quick_ratio, match.quick_ratio)
        return all(ratio() >= similarity for ratio in (*bounds, match.ratio))

    if similarity >= 1:
        return transitions
    merged, kept = {SUCCESS: SUCCESS}, {}  # kept: a state that stays -> its text
    for state in (s for t in transitions for s in (t.state, t.next_state)):
        if state not in merged:
            merged[state] = next((s for s, text in kept.items() if like(str(state), text)), state)
            kept.setdefault(merged[state], str(state))
    return [t._replace(state=merged[t.state], next_state=merged[t.next_state]) for t in transitions]


def graph_advantages(
    transitions: list[Transition], omega: float, penalties: Tensor | None, similarity: float
) -> Tensor:
    """graph_gpo.graph_advantages with the distances of merged states, and with penalties taken from R_G before the
    z-scores (None: none)."""
    merged, states = merge_states(transitions, similarity), [t.state for t in transitions]
    d = goal_distances(merged)
    ahead = torch.tensor([d[t.next_state] + t.cost for t in merged], dtype=torch.float64)
    if penalties is not None:
        return z_scores(10 * omega**ahead - penalties, states)
    if not any(t.next_state is SUCCESS for t in transitions):
        return torch.zeros_like(ahead)
    return z_scores(omega ** (ahead - per_group(states)(ahead, "amin")), states)


def gigpo_advantages(
    transitions: list[Transition], rewards: list[float], gamma: float, penalties: Tensor | None, similarity: float
) -> Tensor:
    """graph_gpo.gigpo_advantages where what leaves merged states is compared, and with penalties taken from the returns
    before the z-scores (None: none)."""
    later, returns = {}, []
    for t, reward in zip(reversed(transitions), reversed(rewards)):
        later[t.trajectory] = reward + gamma * later.get(t.trajectory, 0.0)
        returns.append(later[t.trajectory])
    returns = torch.tensor(returns[::-1], dtype=torch.float64)
    left = [t._replace(next_state=t.state) for t in transitions]  # where a rollout ends is no group
    states = [t.state for t in merge_states(left, similarity)]
    return z_scores(returns if penalties is None else returns - penalties, states)


def advantages(task, args, penalty_in_return: bool = False, similarity: float = 1.0) -> Tensor:
    """graph_gpo.advantages; with penalty_in_return the penalty is taken before the z-scores, and A_E is a z-score over
    steps."""
    transitions = [step.transition for step in task.steps]
    invalid = torch.tensor([not step.valid for step in task.steps])
    penalties, early = args.invalid_penalty * invalid.double(), None
    number = [t.trajectory for t in transitions]
    A = graph_gpo.episode_advantages(task.returns)[number]
    if penalty_in_return:
        returns = torch.tensor(task.returns, dtype=torch.float64)[number]
        A = graph_gpo.episode_advantages(returns - penalties)
        penalties, early = 0, penalties
    A = args.beta_episode * A - penalties
    if args.method == "graph_gpo":
        A += args.beta_graph * graph_advantages(transitions, args.omega, early, similarity)
    elif args.method == "gigpo":
        rewards = [step.reward for step in task.steps]
        A += args.beta_graph * gigpo_advantages(transitions, rewards, args.gamma, early, similarity)
    return A


def dynamic_sampling(times: int, play=graph_gpo.Player.play):
    """Player.play for training, where tasks whose returns are all equal are replaced by others, up to so many times;
    the last ones stay as they are."""

    def play_again(player, seeds, K, generator, *how, held_out=False):
        tasks = play(player, seeds, K, generator, *how, held_out=held_out)
        training = isinstance(generator, torch.Generator) and not held_out
        rng = random.Random(str(seeds))
        for _ in range(times if training else 0):
            tasks = [task for task in tasks if len(set(task.returns)) > 1]
            if len(tasks) == len(seeds):
                break
            others = [rng.getrandbits(32) for _ in range(len(seeds) - len(tasks))]
            tasks += play(player, others, K, generator, *how)
        return tasks

    return play_again


# ------------------------------------------------------------------------------- TreeRL: random forks
def random_forks(rng: random.Random):
    """In the place of treerl.fork_points: n of the places that are allowed, at random."""

    def anywhere(logps: Tensor, n: int, allowed: Tensor) -> list[int]:
        places = allowed.nonzero().flatten().tolist()
        return rng.sample(places, min(n, len(places)))

    return anywhere


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("script", choices=("treerl", "graph_gpo"))
    parser.add_argument("--penalty-in-return", action="store_true", help="taken before the z-scores")
    parser.add_argument("--merge-similarity", type=float, default=1.0, help="states at least so alike are one")
    parser.add_argument("--dynamic-sampling", type=int, default=0, help="how often tasks of equal returns are replaced")
    parser.add_argument("--random-forks", action="store_true")
    options, others = parser.parse_known_args()
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)} - {"script"}
    for name in sorted(given):
        if (name == "random_forks") != (options.script == "treerl"):
            parser.error(f"--{name.replace('_', '-')} is not for {options.script}")
    if not 0 < options.merge_similarity <= 1:
        parser.error("--merge-similarity: give a number above 0, at most 1")
    how = {"similarity": options.merge_similarity, "penalty_in_return": options.penalty_in_return}
    with contextlib.ExitStack() as stack:

        def replace(what, name: str, by) -> None:
            stack.enter_context(mock.patch.object(what, name, by))

        replace(graph_gpo, "advantages", functools.partial(advantages, **how))
        replace(graph_gpo.Player, "play", dynamic_sampling(options.dynamic_sampling))
        if options.random_forks:
            replace(treerl, "fork_points", random_forks(random.Random(0)))
        SCRIPTS[options.script].cli(others)


if __name__ == "__main__":
    main()
