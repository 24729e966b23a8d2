"""What the tests share: tiny models of both Qwen architectures, trees that each script's search grows
with them, and what to compare with: plain forwards, and distributions."""

import copy
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from naive import path_logps

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "envs")]  # the files of envs/ import each other by name

import graph_gpo
import tree_grpo
import treerl

torch.set_num_threads(1)  # the models are too small to gain by more
tree_grpo.quiet_transformers()  # registers the scripts' attention
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def tiny_qwen(kind: str, dtype=torch.float32, vocab_size: int = 50):
    """(model with the scripts' attention, the same model with transformers' own) with sharp random
    weights. 1 is the end of a text."""
    import transformers

    config = getattr(transformers, f"{kind.capitalize()}Config")(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    plain = getattr(transformers, f"{kind.capitalize()}ForCausalLM")(config).to(dtype).eval()
    model = copy.deepcopy(plain)
    model.set_attn_implementation("token_tree")
    return model, plain


# -------------------------------------------------------------------- trees of each script's search
class Letters:
    """A tokenizer of 50 characters, one token each; 1 is the end, and 0 says nothing."""

    characters = "01 abcdefghijklmnopqrstuvwxyz0123456789.:>\nT#!?-+*"
    chat_template, eos_token_id = None, 1

    def __call__(self, text, add_special_tokens, split_special_tokens):
        return {"input_ids": [self.characters.index(c, 2) for c in text]}

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(self.characters[token] for token in tokens if token > 1)

    def get_vocab(self):
        return {character: i for i, character in enumerate(self.characters)}


class Ring:
    """Six places in a circle; an action goes on by the sum of its letters, to success at place 0.
    It gives no keys of its states."""

    instruction = "Walk round the ring.\n"

    def reset(self, seed=0, options=None):
        self.at = 1 + seed % 5
        return self.look(), {"task": f"go from {self.at} to 0."}

    def look(self):
        return f"place {self.at}" + " and on" * self.at

    def step(self, action):
        self.at = (self.at + sum(map(ord, action))) % 6
        won = self.at == 0
        return self.look(), float(won), won, False, {"valid": len(action) % 3 > 0}


def player_in(world, model, tokenizer=None, **how):
    args = graph_gpo.Args(**{"max_tokens": 3, "max_steps": 5, "K": 4, "tasks": 3, **how})
    return graph_gpo.Player(model, tokenizer or Letters(), args, world)


def turns(model, rng, draws):
    """A play() for tree_search: at most three turns, each but the last with an observation, which
    may be empty."""

    def play(starts):
        live = [tree_grpo.Node(node, tree=tree) for _, node, tree in starts]
        while live:
            limits = [rng.randint(1, 20) for _ in live]
            tree_grpo.sample(model, live, limits, lambda tokens: tokens[-1] == 7, {1}, *draws)
            going = []
            for node in live:
                if node.tokens[-1] == 1 or len(node.path()) > 3:
                    node.reward = float(sum(node.tokens) % 2)
                else:
                    node.tokens += rng.choices(range(2, 50), k=rng.choice([0, 1, 5, 9]))
                    going.append(tree_grpo.Node(node, tree=node.tree))
            live = going

    return play


def solutions(model, draws, most=30):
    """A play() for eptree: paths of at most so many tokens after the prompt."""

    def play(starts, keep=False):
        nodes = [treerl.Node(node, tree=tree) for _, node, tree in starts]
        limits = [most - treerl.length(node.path()[1:]) for node in nodes]
        treerl.sample(model, nodes, limits, lambda tokens: False, {1}, *draws, keep=keep)
        for node in nodes:
            node.reward = float(sum(node.tokens) % 2)

    return play


def grow(script, model, seed=0, temperature=1.0, top_p=1.0, prompts=(3, 17, 30)):
    """Groups of trees by a script's own search and credit, some of the leaves left out, and the
    search's counts. The policy is `model`; the task is nonsense."""
    rng, counts = random.Random(seed), Counter()
    generator = torch.Generator(model.device).manual_seed(seed)
    draws = generator, temperature, top_p, counts
    if script is graph_gpo:
        player = player_in(Ring, model, history=1, invalid_penalty=0.7)
        tasks = player.play(range(len(prompts)), 4, generator, temperature, counts)
        groups = [g for task in tasks for g in graph_gpo.credit(task, len(tasks), player.args)]
        return groups, counts
    pairs = [(None, script.Node(tokens=rng.choices(range(2, 50), k=n))) for n in prompts]
    if script is tree_grpo:
        tree_grpo.tree_search(turns(model, rng, draws), pairs, 2, 2, 2, rng)
        args = tree_grpo.Args(M=2, keep=3)
    else:
        treerl.eptree(solutions(model, draws), pairs, 3, 2, 2, 2, lambda problem, leaf: 25)
        args = treerl.Args(keep=9)
    groups = []
    for _, root in pairs:
        leaves, A = script.credit(root, args, rng)
        A = A.view(len(leaves), -1)
        groups.append(script.Group(root, leaves, A, 1 / len(leaves) / len(pairs)))
    return groups, counts


def roots_of(groups) -> list:
    return list(dict.fromkeys(group.root for group in groups))


def nodes_of(groups) -> list:
    return [node for root in roots_of(groups) for node in root.below()]


# ------------------------------------------------------------------------------- to compare with
def assert_stored_logps(plain, leaves, tolerance):
    """What the sampler stored on each path is what a plain forward of that path gives."""
    for leaf in leaves:
        stored = [logp for node in leaf.path() for logp in node.logps]
        with torch.no_grad():
            expected = path_logps(plain, leaf.path())
        assert stored and stored == pytest.approx(expected.tolist(), abs=tolerance)


def chi_square(counts: list[int], probs: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom, cells with an expectation under 5 put
    together."""
    n, small, statistic, cells = sum(counts), [0, 0.0], 0.0, 0
    for seen, p in zip(counts, probs.tolist()):
        if n * p < 5:
            small[0] += seen
            small[1] += n * p
        else:
            statistic, cells = statistic + (seen - n * p) ** 2 / (n * p), cells + 1
    if small[1] > 0:
        statistic, cells = statistic + (small[0] - small[1]) ** 2 / small[1], cells + 1
    return statistic, cells - 1


def p_value(counts: list[int], probs: torch.Tensor) -> float:
    """How likely draws from `probs` are to be as far from it as these counts."""
    statistic, freedom = chi_square(counts, probs)
    return float(torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)))


@pytest.fixture(params=[tree_grpo, treerl, graph_gpo], ids=lambda script: script.__name__)
def script(request):
    return request.param


@pytest.fixture(params=["qwen2", "qwen3"])
def architecture(request):
    return request.param
