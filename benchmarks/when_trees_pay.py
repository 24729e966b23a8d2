"""When does a tree of rollouts pay? Estimators beside a gradient that is known.

    python benchmarks/when_trees_pay.py            all three parts, two processes; tables and figure
    python benchmarks/when_trees_pay.py trees      one of the parts: trees, tokens, graphs
    python benchmarks/when_trees_pay.py --report   no runs: tables and figures of the estimates

No language model: the policy is a table of logits, and success is known for each choice. So the gradient of the success
rate J is known, and estimators can be compared. Let g be what one computes from one prompt, and u the unit vector along
the gradient of J. The signal-to-noise ratio of g is (E[g] . u)^2 / E|g - E[g]|^2; it grows in proportion to the number
of prompts whose g are averaged, so it is divided by the number of steps that a prompt costs. All figures are ratios of
this to that of a baseline: an estimator with the ratio 2 needs half the steps for the same ratio of signal to noise.

"trees": T steps of 4 actions. Success if action 0 is taken at each decisive step; its rate is that of action 0, at every
step. Tree-GRPO's tree_search, tree_advantages and grpo_loss, and RLOO; a node is a step.
"tokens": the same with T = 16 tokens, of which the policy is more or less sure. TreeRL's eptree and step_rewards.
"graphs": random worlds of 8 states, of which each has one action that leads nearer to success. The others lead back, or,
if there are fewer loops, to failure. graph_advantages, gigpo_advantages and episode_advantages.

Forks that look at what is known (the paper draws nodes uniformly): "mixed" draws the deepest node whose leaves so far
differ in reward, "few" draws a node with a weight of 1 / (leaves below it), both need a second round to know anything.
"learned" draws a node by its depth d: the weight is v(d) / (steps that a fork at d draws), where v(d) is the variance of
the rewards among leaves below one node of depth d, pooled over the prompts before; one draw in ten is uniform.
"""

import functools
import itertools
import math
import random
import re
import statistics
from unittest import mock

import common
import torch
import torch.nn.functional as F
from common import graph_gpo, half_width, in_processes, pyplot, read_rows, table, tree_grpo, treerl, write_rows
from released import random_forks
from torch import Tensor

FILE = "when_trees_pay.jsonl"
PROMPTS = {"trees": 4000, "tokens": 3000, "graphs": 1000}
BLOCKS = 20  # of prompts, for the standard errors
ACTIONS = 4
OBSERVED = (0, 1, 4, 16)  # tokens of an observation for each token of an action


# -------------------------------------------- policies that are tables, and what is to be found out
def policy(rates: list[float]) -> Tensor:
    """(T, ACTIONS): the probability of action 0 at each step; the others share the rest."""
    right = torch.tensor(rates, dtype=torch.float64)[:, None]
    return torch.cat([right, ((1 - right) / (ACTIONS - 1)).expand(-1, ACTIONS - 1)], 1)


def true_gradient(probs: Tensor, decisive: tuple[int, ...]) -> Tensor:
    """Of J, the chance of action 0 at each decisive step, by the logits: (T, ACTIONS)."""
    logits = probs.log().requires_grad_()
    J = logits.softmax(-1)[list(decisive), 0].prod()
    return torch.autograd.grad(J, logits)[0]


def gradients(probs, rows, actions, A, weight, owner) -> Tensor:
    """The gradient of the script's loss with respect to the logits, for each prompt: (prompts, *probs.shape).

    A sequence is a leaf's path or, in a graph, a step. rows, actions: (sequences, length), the row of `probs` that a
    token was drawn from, and the token; A: (sequences,) or (sequences, length); weight: (sequences,), as in the
    scripts' Group; owner: (sequences,), the prompt."""
    logp = probs.log()[rows, actions].requires_grad_()
    loss, _ = tree_grpo.grpo_loss(logp, logp.detach(), None, A, torch.ones_like(logp))
    # of each token's gradient of log pi, the factor in minus the loss; and that gradient
    factor = -torch.autograd.grad(loss, logp)[0] * weight[:, None]
    score = F.one_hot(actions, probs.shape[-1]) - probs[rows]
    found = torch.zeros(int(owner.max()) + 1, *probs.shape, dtype=torch.float64)
    index = (owner[:, None].expand_as(rows), rows)
    return found.index_put(index, factor[:, :, None] * score, accumulate=True)


def marks(g: Tensor, truth: Tensor, cost: float) -> dict[str, float]:
    """Of an estimator g, a row per prompt: "log" of its signal-to-noise ratio per unit of cost; the "error" of that by
    the jackknife over blocks of prompts; "cosine" of the mean of g and the truth."""
    g, u = g.flatten(1), F.normalize(truth.flatten(), dim=0)

    def measure(g: Tensor) -> float:
        mean = g.mean(0)
        noise = (g - mean).pow(2).sum(1).mean()
        return ((mean @ u) ** 2 / noise / cost).log().item()

    blocks = g.chunk(BLOCKS)
    left_out = [measure(torch.cat(blocks[:i] + blocks[i + 1 :])) for i in range(BLOCKS)]
    error = (BLOCKS - 1) / BLOCKS**0.5 * statistics.stdev(left_out)
    cosine = F.cosine_similarity(g.mean(0), u, dim=0).item()
    return {"log": measure(g), "error": error, "cosine": cosine}


def distance(g: Tensor, truth: Tensor) -> float:
    """Of the mean of g from the truth in standard errors, root mean square: about 1 if g is not biased."""
    error = g.std(0) / len(g) ** 0.5
    return ((g.mean(0) - truth) / error)[error > 1e-12].pow(2).mean().sqrt().item()


# --------------------------------------------------------------------------- agent steps: Tree-GRPO
class Drawn(random.Random):
    """The paper's choice of nodes, uniform; and what a rule may look at. tree_search calls `choices`."""

    def weights(self, nodes: list) -> list[float]:
        return [1.0] * len(nodes)

    def choices(self, nodes, k: int) -> list:
        return super().choices(nodes, self.weights(nodes), k=k)

    def observe(self, root) -> None:
        """Called with each finished tree."""


def rewards_below(node, tree: int) -> list[float]:
    """Of the leaves of one tree; below a root there are those of all."""
    return [leaf.reward for leaf in node.leaves() if leaf.tree == tree]


class Mixed(Drawn):
    def weights(self, nodes):
        tree = nodes[-1].tree
        mixed = [len(set(rewards_below(node, tree))) > 1 for node in nodes]
        deepest = max((len(node.path()) for node, yes in zip(nodes, mixed) if yes), default=0)
        if not deepest:
            return [1.0] * len(nodes)
        return [float(yes and len(node.path()) == deepest) for node, yes in zip(nodes, mixed)]


class Few(Drawn):
    def weights(self, nodes):
        tree = nodes[-1].tree
        return [1 / len(rewards_below(node, tree)) for node in nodes]


class Learned(Drawn):
    def __init__(self, seed):
        super().__init__(seed)
        self.squares = {}  # depth -> sum of squares of rewards about the mean below their node
        self.freedom = {}  # depth -> its degrees of freedom

    def observe(self, root):
        for node in root.below():
            rewards = [leaf.reward for leaf in node.leaves()]
            depth = len(node.path()) - 1
            if node.children and len(rewards) > 1:
                mean = statistics.fmean(rewards)
                squares = sum((reward - mean) ** 2 for reward in rewards)
                self.squares[depth] = self.squares.get(depth, 0.0) + squares
                self.freedom[depth] = self.freedom.get(depth, 0) + len(rewards) - 1

    def weights(self, nodes):
        worth = []
        for node in nodes:
            depth = len(node.path()) - 1
            variance = (self.squares.get(depth, 0.0) + 0.1) / (self.freedom.get(depth, 0) + 1)
            left = statistics.fmean(len(leaf.path()) - 1 - depth for leaf in node.leaves())
            worth.append(variance / left)
        return [0.9 * x / sum(worth) + 0.1 / len(worth) for x in worth]


@functools.cache
def leaf_advantages(rewards: tuple, trees: tuple, terms: str) -> list[float]:
    """tree_advantages of the script, or leave-one-out rewards; kept, as there are few patterns of rewards."""
    R = torch.tensor(rewards, dtype=torch.float64)
    if terms == "rloo":
        return treerl.leave_one_out(R).tolist()
    return tree_grpo.tree_advantages(R, torch.tensor(trees), terms=terms).tolist()


def credits_of(root, terms: str) -> list[float]:
    """Of each leaf below the root."""
    leaves = root.leaves()
    return leaf_advantages(tuple(leaf.reward for leaf in leaves), tuple(leaf.tree for leaf in leaves), terms)


def estimate(probs: Tensor, roots: list, credit) -> Tensor:
    """The gradients of one tree per prompt; credit(root): of each leaf a number, or one for each token of its path."""
    actions, A, weight, owner = [], [], [], []
    for i, root in enumerate(roots):
        leaves = root.leaves()
        actions += [[token for node in leaf.path() for token in node.tokens] for leaf in leaves]
        A += credit(root)
        weight += [1 / len(leaves)] * len(leaves)
        owner += [i] * len(leaves)
    actions, owner = torch.tensor(actions), torch.tensor(owner)
    A, weight = (torch.tensor(x, dtype=torch.float64) for x in (A, weight))
    return gradients(probs, torch.arange(len(probs)).expand_as(actions), actions, A, weight, owner)


def grow_trees(probs: Tensor, decisive: tuple, shape: tuple, rule, prompts: int, seed: int):
    """(the trees of each prompt, by the script's tree_search; steps drawn and observations read, per prompt)."""
    T, generator, rng = len(probs), torch.Generator().manual_seed(seed), rule(seed)
    drawn = read = 0

    def play(starts):
        nonlocal drawn, read
        rows = torch.multinomial(probs, len(starts), True, generator=generator).T.tolist()
        for (_, node, tree), row in zip(starts, rows):
            depth = len(node.path()) - 1
            drawn += T - depth
            read += T - depth - 1  # after each step but the last; the one before a fork is there
            for action in row[depth:]:
                node = tree_grpo.Node(node, [action], tree=tree)
            steps = node.path()[1:]
            node.reward = float(all(steps[t].tokens == [0] for t in decisive))

    roots, batch = [], 200
    for start in range(-batch * (rule is Learned), prompts, batch):  # one batch more, to learn from
        if start == 0:
            drawn = read = 0
        new = [tree_grpo.Node() for _ in range(batch)]
        tree_grpo.tree_search(play, [(None, root) for root in new], *shape, rng)
        for root in new:
            rng.observe(root)
        roots += new if start >= 0 else []
    return roots, drawn / prompts, read / prompts


CHAINS, GROUP, TREE = "4 chains", "6 chains", "2, 2, 1"
SHAPES = {  # column -> M, N, L, the choice of nodes
    CHAINS: (4, 0, 0, Drawn),
    GROUP: (6, 0, 0, Drawn),
    TREE: (2, 2, 1, Drawn),
    "1, 5, 1": (1, 5, 1, Drawn),
    "2, 2, 2": (2, 2, 2, Drawn),
    "2, 2, 2 mixed": (2, 2, 2, Mixed),
    "2, 2, 2 few": (2, 2, 2, Few),
    "2, 2, 1 learned": (2, 2, 1, Learned),
    "1, 5, 1 learned": (1, 5, 1, Learned),
    "2, 2, 2 learned": (2, 2, 2, Learned),
}
TERMS_OF = {TREE: ("both", "intra", "inter"), CHAINS: ("inter", "rloo")}  # others: both
FEW_SHAPES = (CHAINS, GROUP, TREE, "2, 2, 1 learned")  # those of the rates .2 and .9
RATES = (0.5, 0.2, 0.9)
WHERE = {  # T -> decisive steps, from 1
    4: ((1,), (2,), (3,), (4,), (1, 4), (1, 2, 3, 4)),
    8: ((1,), (4,), (8,), tuple(range(1, 9))),
}


def trees_job(T: int, decisive: tuple, rate: float, prompts: int) -> list[dict]:
    """A row of the map: all shapes at these decisive steps, which count from 1."""
    probs, right = policy([rate] * T), tuple(t - 1 for t in decisive)
    truth, found = true_gradient(probs, right), []
    for name in SHAPES if rate == 0.5 else FEW_SHAPES:
        *shape, rule = SHAPES[name]
        roots, drawn, read = grow_trees(probs, right, shape, rule, prompts, seed=0)
        for terms in TERMS_OF.get(name, ("both",)):
            g = estimate(probs, roots, functools.partial(credits_of, terms=terms))
            row = {"part": "trees", "T": T, "decisive": decisive, "rate": rate, "shape": name, "terms": terms}
            row |= {"drawn": drawn, "read": read, **marks(g, truth, drawn)}
            found.append({**row, "off": distance(g, truth / T) if terms == "rloo" else None})
    return found


# ----------------------------------------------------------------------------------- tokens: TreeRL
TOKENS = 16
SURE, UNSURE = 0.97, 0.5
CASES = {  # what decides, and how sure the policy is there and elsewhere
    "token 3, unsure there alone": ((2,), UNSURE, SURE),
    "token 14, unsure there alone": ((13,), UNSURE, SURE),
    "tokens 3, 8, 14, unsure there alone": ((2, 7, 13), UNSURE, SURE),
    "tokens 3, 8, 14, unsure everywhere": ((2, 7, 13), UNSURE, UNSURE),
    "tokens 3, 8, 14, sure there, unsure elsewhere": ((2, 7, 13), 0.9, UNSURE),
}
RLOO = "18 chains, RLOO"
TOKEN_ARMS = {  # arm -> M, N, L, T of eptree, forks, credit
    RLOO: ((18, 0, 0, 1), "entropy", "rloo"),
    "18 chains, GRPO": ((18, 0, 0, 1), "entropy", "inter"),
    "6, 2, 1, 2": ((6, 2, 1, 2), "entropy", "R(s)"),
    "6, 2, 1, 2 random forks": ((6, 2, 1, 2), "random", "R(s)"),
    "6, 2, 1, 2 outcomes": ((6, 2, 1, 2), "entropy", "rloo"),
    "2, 2, 2, 2": ((2, 2, 2, 2), "entropy", "R(s)"),
    "2, 2, 2, 2 random forks": ((2, 2, 2, 2), "random", "R(s)"),
}


def token_advantages(root, credit: str) -> list[list[float]]:
    """Of each leaf below the root, a number per token: R(s) of its segment, or the leaf's own."""
    if credit != "R(s)":
        return [[a] * TOKENS for a in credits_of(root, credit)]
    R = treerl.process_rewards(root, "treerl")
    return [[R[node] for node in leaf.path()[1:] for _ in node.tokens] for leaf in root.leaves()]


def grow_solutions(probs: Tensor, decisive: tuple, shape: tuple, forks: str, prompts: int):
    """(the root of each prompt's tree, by the script's eptree; tokens drawn, per prompt)."""
    generator, rng, logs = torch.Generator().manual_seed(0), random.Random(0), probs.log().tolist()
    drawn = 0

    def play(starts, keep):
        nonlocal drawn
        rows = torch.multinomial(probs, len(starts), True, generator=generator).T.tolist()
        for (_, node, tree), row in zip(starts, rows):
            above = [token for n in node.path() for token in n.tokens]
            own = row[len(above) :]
            drawn += len(own)
            logps = [logs[len(above) + t][token] for t, token in enumerate(own)]
            leaf = treerl.Node(node, own, logps, tree=tree)
            leaf.reward = float(all((above + own)[t] == 0 for t in decisive))

    groups = [(None, treerl.Node()) for _ in range(prompts)]
    choose = random_forks(rng) if forks == "random" else treerl.fork_points
    with mock.patch.object(treerl, "fork_points", choose):
        treerl.eptree(play, groups, *shape, lambda problem, leaf: TOKENS)
    return [root for _, root in groups], drawn / prompts


def tokens_job(case: str, prompts: int) -> list[dict]:
    decisive, there, elsewhere = CASES[case]
    probs = policy([there if t in decisive else elsewhere for t in range(TOKENS)])
    truth, found = true_gradient(probs, decisive), []
    for arm, (shape, forks, credit) in TOKEN_ARMS.items():
        roots, drawn = grow_solutions(probs, decisive, shape, forks, prompts)
        g = estimate(probs, roots, functools.partial(token_advantages, credit=credit))
        row = {"part": "tokens", "case": case, "arm": arm, "drawn": drawn, **marks(g, truth, drawn)}
        found.append({**row, "off": distance(g, truth / TOKENS) if arm == RLOO else None})
    return found


# --------------------------------------------------------------------------------- states: GraphGPO
STATES, HORIZON, WORLDS = 8, 20, 16
SUCCESS_RATE = 0.3  # of the policy in each world
LOOPS, GROUPS = (0.0, 0.5, 0.8, 1.0), (4, 8, 16)
TERMS = {  # credit -> the weights of A_E, of GiGPO's step term and of A_G
    "A_E": (1, 0, 0),
    "A_E + GiGPO's": (1, 1, 0),
    "A_E + A_G": (1, 0, 1),
    "A_G": (0, 0, 1),
}


def make_world(loops: float, seed: int) -> tuple[list[list[int]], Tensor]:
    """(next state of each state and action, STATES for success and -1 for failure; a policy (STATES, ACTIONS)).

    States are numbered by nearness: action 0 leads to the next one, or to the one after it. Another one leads to a
    state no nearer with probability `loops`, else to failure. The policy is random, and takes action 0 as often as
    makes it succeed at the SUCCESS_RATE."""
    rng = random.Random(f"{seed}/{loops}")
    leads = []
    for state in range(STATES):
        others = [rng.randrange(state + 1) if rng.random() < loops else -1 for _ in range(ACTIONS - 1)]
        leads.append([min(state + rng.choice((1, 2)), STATES), *others])
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    logits = torch.randn(STATES, ACTIONS, generator=generator, dtype=torch.float64)
    low, high = -10.0, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        probs = (logits + torch.tensor([middle, 0, 0, 0])).softmax(-1)
        if success_gradient(leads, probs)[1] < SUCCESS_RATE:
            low = middle
        else:
            high = middle
    return leads, probs


def success_gradient(leads: list[list[int]], probs: Tensor) -> tuple[Tensor, float]:
    """(gradient of the chance J of success within HORIZON steps with respect to the logits, J)."""
    logits = probs.log().requires_grad_()
    after = torch.tensor(leads)
    # of each state, of success, and of failure (index -1)
    value = torch.zeros(STATES + 2, dtype=torch.float64)
    value[STATES] = 1
    ends = value[STATES:]
    for _ in range(HORIZON):
        value = torch.cat([(logits.softmax(-1) * value[after]).sum(1), ends])
    return torch.autograd.grad(value[0], logits)[0], value[0].item()


def play_world(leads: list[list[int]], cumulative: list[list[float]], K: int, rng: random.Random):
    """(transitions of K rollouts, their returns, the action numbers)."""
    group, won, actions = [], [0.0] * K, []
    for k in range(K):
        state = 0
        for _ in range(HORIZON):
            at = rng.random()
            action = sum(at > bound for bound in cumulative[state][:-1])
            after = leads[state][action]
            end = graph_gpo.SUCCESS if after == STATES else "failed" if after < 0 else after
            group.append(graph_gpo.Transition(state, str(action), end, k))
            actions.append(action)
            if after < 0 or after == STATES:
                won[k] = float(after == STATES)
                break
            state = after
    return group, torch.tensor(won), actions


def within_states(mean: Tensor, truth: Tensor) -> float:
    """The cosine that the mean would have with the truth if each state's part of it had the true length."""
    parts = F.normalize(mean, dim=1) * truth.norm(dim=1, keepdim=True)
    return F.cosine_similarity(parts.flatten(), truth.flatten(), dim=0).item()


def graphs_job(loops: float, seed: int, prompts: int) -> list[dict]:
    leads, probs = make_world(loops, seed)
    truth, J = success_gradient(leads, probs)
    cumulative, rng, found = probs.cumsum(1).tolist(), random.Random(seed), []
    for K in GROUPS:
        credits, states, actions, weight, owner = [], [], [], [], []
        for prompt in range(prompts):
            group, won, taken = play_world(leads, cumulative, K, rng)
            paid = torch.tensor([float(t.next_state is graph_gpo.SUCCESS) for t in group])
            A_E = graph_gpo.episode_advantages(won)[[t.trajectory for t in group]]
            A_S, A_G = graph_gpo.gigpo_advantages(group, paid), graph_gpo.graph_advantages(group)
            credits.append(torch.stack([A_E, A_S, A_G]))
            states += [t.state for t in group]
            actions += taken
            weight += [1 / len(group)] * len(group)
            owner += [prompt] * len(group)
        credits, weight = torch.cat(credits, 1), torch.tensor(weight, dtype=torch.float64)
        places, steps = (torch.tensor(states)[:, None], torch.tensor(actions)[:, None]), len(states) / prompts
        for name, factors in TERMS.items():
            A = torch.tensor(factors, dtype=torch.float64) @ credits
            g = gradients(probs, *places, A, weight, torch.tensor(owner))
            row = {"part": "graphs", "loops": loops, "world": seed, "K": K, "credit": name}
            row["within"] = within_states(g.mean(0), truth)
            found.append({**row, **marks(g, truth, steps), "steps": steps / K, "J": J})
    return found


# --------------------------------------------------------------------------------- runs and reports
def jobs_of(part: str, prompts: int) -> list[tuple]:
    """(function, its arguments): a job for each row of a map, or for each world."""
    if part == "tokens":
        return [(tokens_job, (case, prompts)) for case in CASES]
    if part == "graphs":
        return [(graphs_job, (loops, seed, prompts)) for loops in LOOPS for seed in range(WORLDS)]
    rows = itertools.product(RATES, ((T, decisive) for T, rows in WHERE.items() for decisive in rows))
    # Where rate ** decisive steps is small hardly a prompt succeeds.
    return [(trees_job, (*row, rate, prompts)) for rate, row in rows if rate ** len(row[1]) > 0.01]


def do(job: tuple) -> list[dict]:
    function, arguments = job
    return function(*arguments)


@functools.cache
def results(part: str, *names: str) -> dict[tuple, list[dict]]:
    """The rows of a part by what they have under these names, in their order."""
    found = {}
    for row in read_rows(FILE):
        if row["part"] == part:
            key = tuple(tuple(row[name]) if isinstance(row[name], list) else row[name] for name in names)
            found.setdefault(key, []).append(row)
    return found


def ratio(row: dict, base: dict) -> str:
    """A ratio of signal-to-noise with its standard error."""
    value = math.exp(row["log"] - base["log"])
    error = value * math.hypot(row["error"], base["error"]) if row is not base else 0.0
    return f"{value:.2f} ± {error:.2f}"


def label(T: int, decisive: tuple[int, ...]) -> str:
    return f"all {T}" if len(decisive) == T else f"{' and '.join(map(str, decisive))} of {T}"


TREE_COLUMNS = {  # title -> shape, terms; the first six at all rates
    "4 chains, RLOO": (CHAINS, "rloo"),
    "6 chains": (GROUP, "both"),
    "2, 2, 1": (TREE, "both"),
    "A_intra alone": (TREE, "intra"),
    "A_inter alone": (TREE, "inter"),
    "2, 2, 1, learned": ("2, 2, 1 learned", "both"),
    "1, 5, 1": ("1, 5, 1", "both"),
    "2, 2, 2": ("2, 2, 2", "both"),
    "2, 2, 2, mixed": ("2, 2, 2 mixed", "both"),
    "2, 2, 2, few": ("2, 2, 2 few", "both"),
    "1, 5, 1, learned": ("1, 5, 1 learned", "both"),
    "2, 2, 2, learned": ("2, 2, 2 learned", "both"),
}
TITLES = {  # column of the first figure -> of the table
    "6 chains": "6 chains",
    "tree\n2, 2, 1": "2, 2, 1",
    "its A_intra\nalone": "A_intra alone",
    "its A_inter\nalone": "A_inter alone",
    "one trunk\n1, 5, 1": "1, 5, 1",
    "tree 2, 2, 1,\nforks learned": "2, 2, 1, learned",
    "one trunk,\nforks learned": "1, 5, 1, learned",
}


def trees_map() -> dict[tuple, dict[tuple, dict]]:
    """(rate, T, decisive) -> (shape, terms) -> row."""
    found = results("trees", "rate", "T", "decisive")
    return {key: {(row["shape"], row["terms"]): row for row in rows} for key, rows in found.items()}


def per_forwarded(row: dict, observed: int) -> dict:
    """The row with its cost counted in forwarded tokens, so many of an observation for each token of an action."""
    forwarded = row["drawn"] + observed * row["read"]
    return {**row, "log": row["log"] + math.log(row["drawn"] / forwarded)}


def trees_table(columns: list[str]) -> str:
    lines, keys = [], [TREE_COLUMNS[column] for column in columns]
    for (rate, T, decisive), rows in trees_map().items():
        if all(key in rows for key in keys):
            cells = [ratio(rows[key], rows[CHAINS, "inter"]) for key in keys]
            lines.append([label(T, decisive), rate, *cells, f"{rows[TREE, 'both']['cosine']:.3f}"])
    return table(("decisive steps", "rate", *columns, "cosine of 2, 2, 1"), lines)


def observations_table() -> str:
    """Of the tree 2, 2, 1 at the rate .5, against 4 chains: the longer the observations, the more is shared."""
    lines = []
    for (rate, T, decisive), rows in trees_map().items():
        if rate == 0.5:
            both = rows[TREE, "both"], rows[CHAINS, "inter"]
            cells = [ratio(*(per_forwarded(row, observed) for row in both)) for observed in OBSERVED]
            lines.append([label(T, decisive), *cells])
    return table(("decisive steps", *(f"{n} observed" for n in OBSERVED)), lines)


def tokens_map() -> dict[str, dict[str, dict]]:
    """case -> arm -> row."""
    return {case: {row["arm"]: row for row in rows} for (case,), rows in results("tokens", "case").items()}


def tokens_table() -> str:
    arms = list(TOKEN_ARMS)[1:]
    lines = [[case, *(ratio(rows[arm], rows[RLOO]) for arm in arms)] for case, rows in tokens_map().items()]
    return table(("decisive tokens, and where the policy is unsure", *arms), lines)


def of_worlds(loops: float, K: int, credit: str) -> list[dict]:
    """The rows of all worlds, in their order."""
    return results("graphs", "loops", "K", "credit")[loops, K, credit]


def graphs_table() -> str:
    """Geometric means over worlds of the ratio to A_E, with the 95 % interval over them; and mean cosines."""
    lines = []
    for loops, K in itertools.product(LOOPS, GROUPS):
        found = {credit: of_worlds(loops, K, credit) for credit in TERMS}
        line = [loops, K, f"{statistics.mean(row['steps'] for row in found['A_E']):.1f}"]
        for credit, rows in found.items():
            if credit != "A_E":
                logs = [row["log"] - base["log"] for row, base in zip(rows, found["A_E"])]
                middle, half = statistics.mean(logs), half_width(logs)
                value, low, high = map(math.exp, (middle, middle - half, middle + half))
                line.append(f"{value:.2f} ({low:.2f} to {high:.2f})")
            line.append(f"{statistics.mean(row['cosine'] for row in rows):.2f}")
        lines.append([*line, f"{statistics.mean(row['within'] for row in found['A_G']):.2f}"])
    columns = [title for credit in list(TERMS)[1:] for title in (credit, "its cosine")]
    return table(("loops", "K", "steps a rollout", "cosine of A_E", *columns, "cosine within states"), lines)


def pointing(row: dict, groups: int) -> float:
    """About the cosine of the mean over so many groups with the true gradient: its noise averages out, and where its
    mean points elsewhere does not."""
    signal = groups * math.exp(row["log"]) * row["steps"] * row["K"]
    return (1 / row["cosine"] ** 2 + 1 / signal) ** -0.5


def mean_pointing(loops: float, K: int, credit: str, groups: int) -> float:
    return statistics.mean(pointing(row, groups) for row in of_worlds(loops, K, credit))


def pointing_table() -> str:
    cases = list(itertools.product((1, 16), TERMS))
    lines = []
    for loops, K in itertools.product(LOOPS, GROUPS):
        lines.append([loops, K, *(f"{mean_pointing(loops, K, credit, groups):.2f}" for groups, credit in cases)])
    titles = [f"{credit}, {groups} group{'s' * (groups > 1)}" for groups, credit in cases]
    return table(("loops", "K", *titles), lines)


def tables() -> str:
    at_all_rates, at_half = list(TREE_COLUMNS)[:6], list(TREE_COLUMNS)[6:]
    trees = trees_table(at_all_rates), trees_table(at_half), observations_table()
    return "\n\n".join((*trees, tokens_table(), graphs_table(), pointing_table()))


def heat_map(name: str, height: float, rows: list[str], columns: list[str], logs: list[list[float]], **text) -> None:
    """Ratios as numbers on green (above 1) or red (below)."""
    figure, axis = pyplot().subplots(figsize=(9, height), layout="constrained")
    axis.imshow(logs, cmap="RdYlGn", vmin=-math.log(3), vmax=math.log(3), aspect="auto")
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    for y, x in itertools.product(range(len(rows)), range(len(columns))):
        how = {"ha": "center", "va": "center", "fontsize": 9, "color": "white" if abs(logs[y][x]) > 0.9 else "black"}
        axis.text(x, y, f"{math.exp(logs[y][x]):.2f}", **how)
    axis.set(**text)
    figure.savefig(common.RESULTS / name, dpi=100)


def figures() -> None:
    """when_trees_pay.png: Tree-GRPO at a rate of .5; with _tokens TreeRL; with _graphs GraphGPO."""
    names, logs = [], []
    for (rate, T, decisive), rows in trees_map().items():
        if rate == 0.5:
            names.append(f"step {label(T, decisive)}" if len(decisive) == 1 else label(T, decisive))
            base = rows[CHAINS, "inter"]["log"]
            logs.append([rows[TREE_COLUMNS[column]]["log"] - base for column in TITLES.values()])
    title = "What a drawn step is worth, against one of 4 chains (GRPO): above 1 the tree pays"
    ylabel = "where the outcome is decided"
    heat_map("when_trees_pay.png", 4.8, names, list(TITLES), logs, title=title, ylabel=ylabel)

    found, arms = tokens_map(), list(TOKEN_ARMS)[1:]
    logs = [[rows[arm]["log"] - rows[RLOO]["log"] for arm in arms] for rows in found.values()]
    columns = [re.sub(r",? (random|outcomes|GRPO)", r"\n\1", arm) for arm in arms]
    title = "TreeRL: what a drawn token is worth, against one of 18 chains (RLOO)"
    heat_map("when_trees_pay_tokens.png", 3.6, list(found), columns, logs, title=title)

    figure, axes = pyplot().subplots(1, len(LOOPS), figsize=(11, 3.2), sharey=True, layout="constrained")
    numbers = [2**i for i in range(7)]
    for axis, loops in zip(axes, LOOPS):
        for credit in list(TERMS)[:3]:
            curve = [mean_pointing(loops, 8, credit, groups) for groups in numbers]
            axis.plot(numbers, curve, "o-", markersize=3, label=credit)
        axis.set_xscale("log", base=2)
        axis.set(title=f"loops {loops}", xlabel="groups of 8 rollouts")
    axes[0].set_ylabel("cosine with the true gradient")
    axes[0].legend()
    figure.savefig(common.RESULTS / "when_trees_pay_graphs.png", dpi=100)


def rounded(row: dict) -> dict:
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PROMPTS)} (default: all)")
    prompts = "per estimate, a multiple of 200 (default: 4000; 3000; 1000)"
    parser.add_argument("--prompts", type=int, help=prompts)
    parser.add_argument("--processes", type=int, default=2, help="side by side, each with one thread")
    parser.add_argument("--report", action="store_true", help="no runs: tables and figures of the results there are")
    options = parser.parse_args()
    if unknown := set(options.parts) - PROMPTS.keys():
        parser.error(f"no such part: {', '.join(unknown)}")
    if not options.report:
        parts = options.parts or list(PROMPTS)
        kept = [row for row in read_rows(FILE) if row["part"] not in parts]
        jobs = [job for part in parts for job in jobs_of(part, options.prompts or PROMPTS[part])]
        new = [rounded(row) for rows in in_processes(do, jobs, options.processes, None) for row in rows]
        write_rows(common.RESULTS / FILE, kept + new)
    print(tables())
    figures()


if __name__ == "__main__":
    main()
