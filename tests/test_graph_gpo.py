"""GraphGPO: the exactness of what rollouts that share prompts leave to the sampler and to training, and the credit of a
group of steps."""

import copy
import itertools
import math
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import assert_exact_on_cuda, assert_stored_logps, chi_square
from naive import path_logps
from outside import make_qwen3
from test_advantages import walks

import graph_gpo
from graph_gpo import (
    SUCCESS,
    Args,
    BadInput,
    Group,
    House,
    Node,
    Packed,
    Player,
    Transition,
    encode,
    goal_distances,
    load_model,
    micro_batches,
    packed_logps,
    save_tiny_model,
    update,
)


# ------------------------------------------------------------------------------------------------------------- SUCCESS
def test_success_survives_copies_and_pickles():
    t = Transition("s", "go", SUCCESS, 0)
    for again in (copy.deepcopy(t), copy.copy(t), *(pickle.loads(pickle.dumps(t, p)) for p in range(2, 6))):
        assert again == t and again.next_state is SUCCESS and goal_distances([again])["s"] == 1
    assert copy.deepcopy(SUCCESS) is pickle.loads(pickle.dumps(SUCCESS)) is SUCCESS
    assert all(SUCCESS != other for other in ("SUCCESS", "<class 'graph_gpo.SUCCESS'>", 0, None, (), object()))


def test_success_survives_another_process():
    code = ("import pickle, sys, graph_gpo as g\nt = pickle.load(sys.stdin.buffer)\n"
            "assert t.next_state is g.SUCCESS and g.graph_advantages([t]).tolist() == [0]\n"
            "sys.stdout.buffer.write(pickle.dumps(t._replace(state=[t.next_state])))")
    sent = pickle.dumps(Transition("s", "go", SUCCESS, 0, 2.5))
    answer = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True,
                            cwd=Path(graph_gpo.__file__).parent).stdout
    t = pickle.loads(answer)
    assert t.next_state is SUCCESS and t.state[0] is SUCCESS and t.cost == 2.5


# -------------------------------------------------------------------------------------------- the policy, in a world
class Ring:
    """Six places in a circle; an action goes on by the sum of its letters, to success at place 0. No keys of states."""
    instruction = "Walk round the ring.\n"

    def reset(self, seed=0, options=None):
        self.at = 1 + seed % 5
        return self.look(), {"task": f"go from {self.at} to 0."}

    def look(self):
        return f"place {self.at}" + " and on" * self.at

    def step(self, action):
        self.at = (self.at + sum(map(ord, action))) % 6
        return self.look(), float(self.at == 0), self.at == 0, False, {"valid": len(action) % 3 > 0}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(model, tokenizer, the same model with transformers' own attention) of a Qwen2 with the tokenizer of the built-in
    world, and of a Qwen3 with a chat template; with sharp random weights."""
    from transformers import AutoModelForCausalLM

    found = {}
    for kind, factor in (("qwen2", 3), ("qwen3", 6)):
        folder = tmp_path_factory.mktemp(kind)
        make_qwen3(folder, 2048) if kind == "qwen3" else save_tiny_model(folder, [*House.words], 0)
        model, tokenizer = load_model(str(folder), torch.device("cpu"))
        for parameter in model.parameters():
            parameter.data *= factor if parameter.dim() > 1 else 1
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        plain.load_state_dict(model.state_dict())
        found[kind] = model, tokenizer, plain
    return found


@pytest.fixture
def make(loaded):
    """make(architecture, ...) -> (player, its model with transformers' own attention)."""
    def make(architecture, dtype=torch.float32, world=Ring, device="cpu", **how):
        model, tokenizer, plain = loaded[architecture]
        args = Args(**{"max_tokens": 3, "max_steps": 5, "dtype": "float32", "K": 4, "tasks": 3, **how})
        model, plain = (copy.deepcopy(m).to(device, dtype) for m in (model, plain))
        return Player(model, tokenizer, args, world), plain

    return make


def played(player, seeds=(0, 1, 2), K=4, seed=0, held_out=False, temperature=1.0):
    counts, generator = Counter(), torch.Generator(player.model.device).manual_seed(seed)
    return player.play([*seeds], K, held_out, generator, temperature, counts), counts


def waves(groups) -> list[list[tuple]]:
    """The steps of all groups by their place in their rollouts."""
    found = []
    for group in groups:
        at = Counter()
        for step in group.steps:
            k = step[0].trajectory
            found += [[]] if at[k] == len(found) else []
            found[at[k]].append((group, *step))
            at[k] += 1
    return found


@pytest.mark.parametrize("kept", [0, 60, 200_000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_stored_logps_are_those_of_a_plain_forward(make, architecture, dtype, tolerance, kept):
    player, plain = make(architecture, dtype, kept_tokens=kept)
    groups, counts = played(player)
    nodes = [node for group in groups for _, node, *_ in group.steps]
    assert len(set(nodes)) == len(nodes) == counts["env_steps"] > 30
    assert_stored_logps(plain, nodes, tolerance)
    for group in groups:
        assert all(prompt.parent is group.root and prompt.children for prompt in group.root.children)
        assert len({tuple(prompt.tokens) for prompt in group.root.children}) == len(group.root.children)
        assert {*group.root.leaves()} == {node for _, node, *_ in group.steps}
        assert not any(any(node.sampled) for node in (group.root, *group.root.children))
        assert all(node.kv is None for node in group.root.below())


def test_kv_of_actions_is_let_go_after_each_step(make):
    player, _ = make("qwen2")
    earlier, read = [], player.action

    def action(node):
        assert all(node.kv is None for node in earlier) and node.kv is None
        assert node.parent.kv is not None  # what may be met again stays
        earlier.append(node)
        return read(node)

    player.action = action
    for seed in range(5):
        played(player, seeds=(seed,), K=1)
        earlier.clear()


@pytest.mark.parametrize("kept", [0, 200_000])
def test_each_prompt_is_forwarded_once(make, architecture, kept):
    """Counted at the embedding, where pads have id 0, in rollouts in which the policy never draws that before an end.
    With --kept-tokens 0 once in a wave of steps, by default once at all; the text above all prompts of a task once.
    What begins below another text runs that one's last token: it comes once for each."""
    player, _ = make(architecture, kept_tokens=kept)
    seen = Counter()
    player.model.model.embed_tokens.register_forward_hook(
        lambda module, ids, out: seen.update(ids[0].flatten().tolist()))
    for seed in range(99):
        seen.clear()
        groups, counts = played(player, seed=seed)
        nodes = [node for group in groups for node in group.root.below()]
        if not any(0 in (node.tokens if node.children else node.tokens[:-1]) for node in nodes):
            break
    else:
        raise AssertionError("no such rollouts")
    expected, new = Counter(), 0
    for group in groups:
        expected.update(group.root.tokens[:-1])
    in_waves = [list(dict.fromkeys(node.parent for _, _, node, *_ in wave)) for wave in waves(groups)]
    for prompt in itertools.chain(*in_waves) if kept == 0 else dict.fromkeys(itertools.chain(*in_waves)):
        expected.update(prompt.parent.tokens[-1:] + prompt.tokens[:-1])
        new += len(prompt.tokens)
    for group in groups:
        for _, node, *_ in group.steps:
            expected.update(node.parent.tokens[-1:] + node.tokens[:-1])
    steps = [node for group in groups for _, node, *_ in group.steps]
    assert len(steps) > sum(map(len, in_waves)) > sum(len(group.root.children) for group in groups)  # both share
    del seen[0]
    assert seen == expected and counts["forwarded_tokens"] == expected.total()
    assert counts["generated_tokens"] == sum(len(node.tokens) for node in steps)
    assert counts["env_steps"] == len(steps)
    assert counts["prompt_tokens"] == sum(len(node.parent.tokens) + len(node.parent.parent.tokens) for node in steps)
    assert counts["prompt_tokens_sampling"] == new + sum(len(group.root.tokens) for group in groups)


def test_rollouts_are_what_the_world_says(make, architecture):
    player, _ = make(architecture)
    groups, _ = played(player, K=6)
    for seed, group in enumerate(groups):
        world = Ring()
        assert group.task == world.reset(seed)[1]["task"]
        for k in range(6):
            mine = [step for step in group.steps if step[0].trajectory == k]
            at, _ = world.reset(seed)
            assert 1 <= len(mine) <= 5
            for i, (t, node, reward, valid) in enumerate(mine):
                assert t.state == at and t.action == player.action(node) and t.cost == 1
                at, paid, over, _, info = world.step(t.action)
                assert (reward, valid) == (paid, info["valid"])
                assert (t.next_state is SUCCESS) if over else t.next_state == at
                assert over or len(mine) == 5 or i + 1 < len(mine)
            assert group.won[k] == over and group.returns[k] == float(over)
    assert 0 < sum(sum(group.won) for group in groups) < 18
    again, _ = played(player, K=6)
    assert [[(t, n.tokens, n.logps) for t, n, *_ in a.steps] for a in again] == [
        [(t, n.tokens, n.logps) for t, n, *_ in b.steps] for b in groups]


def prompt_text(player, told: list[str], actions: list[str], h: int) -> str:
    """The last h observations and actions of a rollout, and where it is now."""
    past = list(zip(told[:-1], actions))[-h:] if h else []
    return "".join(f"{seen}\n> {action}\n" for seen, action in past) + told[-1]


@pytest.mark.parametrize("h", [0, 1, 3])
def test_prompts_with_a_history(make, architecture, h):
    player, plain = make(architecture, history=h, max_steps=6)
    groups, _ = played(player, K=6)
    for group in groups:
        assert player.tokenizer.decode(group.root.tokens) == player.before + group.task + "\n"
        for k in range(6):
            told, actions = [], []
            for t, node, *_ in (step for step in group.steps if step[0].trajectory == k):
                told.append(t.state)
                text = prompt_text(player, told, actions, h)
                assert node.parent.tokens == encode(player.tokenizer, text) + encode(player.tokenizer, player.after)
                actions.append(t.action)
    assert_stored_logps(plain, [node for group in groups for _, node, *_ in group.steps], 1e-4)


def test_a_history_is_shared_by_fewer(make):
    ratios = []
    for h in (0, 1, 3):
        player, _ = make("qwen2", history=h, max_steps=6)
        groups, counts = played(player, K=12)
        ratios.append(sum(len(group.root.children) for group in groups) / counts["env_steps"])
    assert ratios[0] < ratios[1] < ratios[2]


def test_system_text_and_task_are_in_every_prompt(make):
    player, _ = make("qwen3")
    group = player.group("do it", 1)
    text = player.tokenizer.decode(group.root.tokens + player.prompt(group, ["here"]).tokens)
    assert text == "<|im_start|>user\nWalk round the ring.\nTask: do it\nhere\n<|im_end|>\n<|im_start|>assistant\n"
    player, _ = make("qwen2")
    group = player.group("do it", 1)
    assert player.tokenizer.decode(group.root.tokens + player.prompt(group, ["here"]).tokens) == "Task: do it\nhere\n"


def test_a_long_prompt_is_cut_from_the_left(make, architecture):
    player, plain = make(architecture, history=3)
    whole, _ = played(player, seeds=(2,))
    root = len(whole[0].root.tokens)
    tail = player.encode(player.after)
    player.model.config.max_position_embeddings = root + 20 + len(tail) + 3  # 3 are --max-tokens
    groups, _ = played(player, seeds=(2,))
    cut = 0
    for k in range(4):
        told, actions = [], []
        for t, node, *_ in (step for step in groups[0].steps if step[0].trajectory == k):
            told.append(t.state)
            text = player.encode(prompt_text(player, told, actions, 3))
            actions.append(t.action)
            assert node.parent.tokens == text[-20:] + tail
            cut += len(text) > 20
            assert sum(len(above.tokens) for above in node.path()) <= player.model.config.max_position_embeddings
    assert cut > 3
    assert_stored_logps(plain, [node for _, node, *_ in groups[0].steps], 1e-4)
    player.model.config.max_position_embeddings = root + len(tail) + 3
    with pytest.raises(BadInput, match="--model"):
        played(player, seeds=(2,))


# ----------------------------------------------------------------------------------------------------------- training
class Caught:
    """In the place of an optimizer: what it was given."""
    def __init__(self, model):
        self.model, self.param_groups = model, [{}]

    def step(self):
        self.gradients = [p.grad.clone() for p in self.model.parameters()]

    def zero_grad(self):
        self.model.zero_grad()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_update_is_that_of_separate_sequences(make, architecture, dtype, tolerance, kl_coef):
    # Each step is a sequence of its own; its mean over its tokens counts 1 / (steps of the task) / tasks.
    player, plain = make(architecture, dtype, kl_coef=kl_coef, invalid_penalty=0.7)
    groups, _ = played(player, K=6)
    samples = player.credit(0, groups)
    reference, plain_reference = (copy.deepcopy(model) for model in (player.model, plain))
    noise = torch.Generator().manual_seed(0)
    for ours, theirs in zip(reference.parameters(), plain_reference.parameters()):
        theirs.data = ours.data = ours.data * (1 + 0.1 * torch.randn(ours.shape, generator=noise, dtype=dtype))
    loss, tokens, kl_sum = 0.0, 0, 0.0
    for group in groups:
        for (_, node, *_), A in zip(group.steps, player.advantages(group)):
            logps = path_logps(plain, node.path())
            with torch.no_grad():
                gap = path_logps(plain_reference, node.path())
            gap = gap - logps
            kl = gap.exp() - gap - 1
            part = ((logps - logps.detach()).exp() * A - kl_coef * kl).mean()
            loss = loss - part / len(group.steps) / len(groups)
            tokens, kl_sum = tokens + len(logps), kl_sum + float(kl.detach().sum())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    batches = []
    for player.args.micro_tokens in (16384, 150, 1):
        batches.append(len(micro_batches(samples, player.args.micro_tokens)))
        caught = Caught(player.model)
        row = update(player.model, reference if kl_coef else None, caught, samples, player.args)
        assert row["loss"] == pytest.approx(loss.item(), rel=tolerance, abs=tolerance)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=tolerance)
        assert row["kl"] == (pytest.approx(kl_sum / tokens, rel=max(tolerance, 1e-6)) if kl_coef else None)
        assert row["clip_fraction"] == 0 and row["sampler_gap"] < 1e-5
        for (name, p), ours in zip(plain.named_parameters(), caught.gradients):
            most = p.grad.abs().max().item()
            assert torch.allclose(ours, p.grad, atol=tolerance * max(most, 1e-3), rtol=0), name
    assert batches[0] == 1 and batches[1] > 2 and batches[2] == len(samples) > len(groups)


def test_credit_packs_equal_actions_once(make, architecture):
    player, _ = make(architecture, max_tokens=1)
    groups, _ = played(player, K=40)
    samples = player.credit(0, groups)
    assert [item.root for item in samples] == [g.root for g in groups for _ in {s[1].parent for s in g.steps}]
    for group in groups:
        mine = [item for item in samples if item.root is group.root]
        A = player.advantages(group)
        assert sum(len(item.leaves) for item in mine) == len(group.steps)
        assert all(item.weight == 1 / len(group.steps) / 3 for item in mine)
        found = Counter((leaf.parent, *leaf.tokens, float(a)) for item in mine
                        for leaf, a in zip(item.leaves, item.advantages))
        assert found == Counter((node.parent, *node.tokens, float(a)) for (_, node, *_), a in zip(group.steps, A))
        for item in mine:
            assert len({leaf.parent for leaf in item.leaves}) == 1
            assert len({*item.leaves}) == len({tuple(leaf.tokens) for leaf in item.leaves})
    assert any(len({*item.leaves}) < len(item.leaves) for item in samples)
    packed = Packed(samples, "cpu")
    distinct = {(*map(tuple, (n.tokens for n in leaf.path())), id(item.root)) for item in samples
                for leaf in item.leaves}
    prompts = {item.leaves[0].parent for item in samples}
    assert packed.ids.shape[1] == sum(len(group.root.tokens) for group in groups) + sum(
        len(p.tokens) for p in prompts) + sum(len(path[2]) for path in distinct)


def test_a_rollout_of_training_says_what_it_did(make):
    player, _ = make("qwen2", K=4, tasks=3)
    groups, row = player.rollout(5)
    assert len(groups) == 3 and all(len(group.returns) == 4 for group in groups)
    steps = [node for group in groups for _, node, *_ in group.steps]
    assert row["success"] == sum(sum(group.won) for group in groups) / 12
    assert row["reward"] == pytest.approx(sum(sum(group.returns) for group in groups) / 12)
    assert row["env_steps"] == len(steps) and row["generated_tokens"] == sum(len(node.tokens) for node in steps)
    assert row["prompt_tokens_training"] == sum(
        len(node.tokens) for group in groups for node in (group.root, *group.root.children))
    assert 0 < row["entropy"] < math.log(player.model.config.vocab_size)  # a mean over tokens
    again, same = player.rollout(5)
    assert same == row and [g.task for g in again] == [g.task for g in groups]
    other, row = player.rollout(6)
    assert row != same and [[t for t, *_ in g.steps] for g in other] != [[t for t, *_ in g.steps] for g in groups]


def test_the_tiny_models_tokens_are_the_worlds_words(make):
    player, _ = make("qwen2", world=House, max_steps=20, max_tokens=8)
    byte, tokenizer = 257, player.tokenizer  # ids below are the end and single bytes
    groups = player.play(list(range(150)), 1, False, random.Random(0), 1.0, Counter())
    assert sum(len(group.steps) for group in groups) > 1000
    for group in groups:
        assert min(encode(tokenizer, f"Task: {group.task}\n")) >= byte
        for t, node, *_ in group.steps:
            assert min(node.tokens[:-1]) >= byte and node.tokens[-1] == tokenizer.eos_token_id
            assert len(node.tokens) == 1 + len(t.action.split()) == 3 and all(node.sampled)
            assert " ".join(tokenizer.decode(node.tokens[:-1]).split()) == t.action
    house, seen = House(), Counter()
    for seed in range(60):
        rng = random.Random(seed)
        told = [house.reset(seed, {"held_out": True})[0]]
        told += [house.step(rng.choice([house.demonstrate(rng), "x"]))[0] for _ in range(15)]
        for text in told:
            tokens = encode(tokenizer, text + "\n")
            assert min(tokens) >= byte
            seen.update(tokens)
    assert len(seen) > 40


class Scripted:
    """Says what it is told at the only step."""
    instruction, told = "", (0.0, False, False)

    def reset(self, seed=0, options=None):
        self.options = options
        return "here", {"task": "x"}

    def step(self, action):
        return "there", *self.told, {}

    def demonstrate(self, rng):
        return "go"


@pytest.mark.parametrize(("reward", "terminated", "truncated", "won"), [
    (1.0, True, False, True), (0.5, True, False, True), (0.0, True, False, False), (-1.0, True, False, False),
    (1.0, False, True, False), (1.0, False, False, False), (1, True, True, True)])
def test_success_is_an_end_with_a_reward(make, reward, terminated, truncated, won):
    player, _ = make("qwen2", world=Scripted, max_steps=3)
    Scripted.told = (reward, terminated, truncated)
    (group,) = player.play([0], 2, True, random.Random(0), 1.0, counts := Counter())
    assert group.won == [won, won] and player.envs[0].options == {"held_out": True}
    n = 1 if terminated or truncated else 3
    assert group.returns == [n * reward] * 2 and len(group.steps) == 2 * n == counts["env_steps"]
    # A failure is a state of its own: from one that looks the same, another rollout may have gone on to success.
    end = SUCCESS if won else "there (failed)" if terminated else "there"
    assert all(t.next_state == end for t, *_ in group.steps)
    assert all(valid is True for *_, valid in group.steps)  # the default
    assert counts["generated_tokens"] == counts["forwarded_tokens"] == 0


def test_what_is_drawn_follows_the_policy(make):
    # 3,000 rollouts of one step from the same prompt: their first tokens against the policy's distribution there, from
    # a plain forward, and the second tokens after the commonest first one. A p-value under 1e-4 is bad luck of one in
    # ten thousand.
    player, plain = make("qwen2", max_steps=1, max_tokens=2, temperature=1.0)
    player.eos = set()
    (group,), _ = played(player, seeds=(3,), K=3000)
    nodes = [node for _, node, *_ in group.steps]
    assert len({node.parent for node in nodes}) == 1 and len(nodes) == 3000
    prompt, vocabulary = group.root.tokens + nodes[0].parent.tokens, player.model.config.vocab_size
    first = Counter(node.tokens[0] for node in nodes)
    ((common, _),) = first.most_common(1)
    second = Counter(node.tokens[1] for node in nodes if node.tokens[0] == common)
    for above, seen in ((prompt, first), ([*prompt, common], second)):
        with torch.no_grad():
            probs = plain(torch.tensor([above])).logits[0, -1].double().softmax(-1)
        counts = [seen[token] for token in range(vocabulary)]
        statistic, freedom = chi_square(counts, probs)
        assert freedom > 3
        assert torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)) > 1e-4
        statistic, freedom = chi_square(counts, probs**0.7 / (probs**0.7).sum())  # it can tell another distribution
        assert torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)) < 1e-4


def test_greedy_is_the_likeliest_token(make):
    player, plain = make("qwen2", max_steps=2)
    groups, _ = played(player, K=2, temperature=0.0)
    for node in (node for group in groups for _, node, *_ in group.steps):
        tokens = [t for above in node.path() for t in above.tokens]
        with torch.no_grad():
            best = plain(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        n = len(node.tokens)
        assert tokens[-n:] == best[-n - 1 : -1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_rollouts_and_packed_training_on_cuda(make, architecture):
    player, plain = make(architecture, device="cuda", history=1)
    groups, _ = played(player)
    assert_stored_logps(plain, [node for group in groups for _, node, *_ in group.steps], 1e-3)
    samples = player.credit(0, groups)
    assert_exact_on_cuda(player.model, plain, samples, packed_logps, Packed(samples, "cuda"))


# --------------------------------------------------------------------------------------- credit of a group of steps
def stub(**how) -> Player:
    player = Player.__new__(Player)
    player.args, player.model = Args(**how), type("Model", (), {"device": "cpu"})
    return player


def group_of(paths, rewards=None, invalid=(), task="task") -> Group:
    """Rollouts by their states, as in walks(); the last step of a won one pays 1, or rewards are given by rollout."""
    won = [path[-1] == "G" for path in paths]
    group, root, number = Group(task, Node(tokens=[1]), [], won), Node(tokens=[1]), -1
    for number, t in enumerate(walks(*paths)):
        last = number + 1 == sum(len(path) - 1 for path in paths[: t.trajectory + 1])
        reward = (rewards[t.trajectory] if rewards else float(won[t.trajectory])) if last else 0.0
        node = Node(Node(root), [5], [True], [0.0])
        group.steps.append((t, node, reward, number not in invalid))
    group.returns = [sum(r for t, _, r, _ in group.steps if t.trajectory == k) for k in range(len(paths))]
    group.root = root
    return group


# by hand: at s to m, to m, to x: 1 / sqrt 3, 1 / sqrt 3, -2 / sqrt 3 as in test_advantages.py; m to G is alone
PATHS, A_G = ("smG", "sm", "sx"), [1 / math.sqrt(3), 0, 1 / math.sqrt(3), -2 / math.sqrt(3)]
# returns 1, 0, 0: mean 1/3, from it 2/3, -1/3, -1/3, variance (4 + 1 + 1) / 9 / 2 = 1/3: A_E = 2, -1, -1 over sqrt 3
A_E = [2 / math.sqrt(3), 2 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)]
# returns from each step at s with gamma 1/2: 1/2, 0, 0: 2, -1, -1 over sqrt 3
A_GIGPO = [2 / math.sqrt(3), 0, -1 / math.sqrt(3), -1 / math.sqrt(3)]


@pytest.mark.parametrize(("method", "step"), [("graph_gpo", A_G), ("gigpo", A_GIGPO), ("grpo", [0, 0, 0, 0])])
def test_an_advantage_has_three_terms(method, step):
    player = stub(method=method, beta_graph=0.7, beta_episode=1.3, invalid_penalty=0.2, gamma=0.5)
    expected = [0.7 * a + 1.3 * e - p for a, e, p in zip(step, A_E, [0, 0.2, 0, 0.2])]
    found = player.advantages(group_of(PATHS, invalid=(1, 3)))
    assert found.shape == (4,) and found.tolist() == pytest.approx(expected)
    plain = stub(method=method, gamma=0.5).advantages(group_of(PATHS))
    assert plain.tolist() == pytest.approx([a + e for a, e in zip(step, A_E)])


def evaluated(sampled, greedy, **how):
    player, calls = stub(K=2, **how), []

    def play(seeds, K, held_out, generator, temperature, counts):
        assert held_out and (K, temperature) in ((2, 1.0), (1, 0.0))
        calls.append((K, *seeds))
        return [(sampled if temperature else greedy)[seed] for seed in seeds]

    player.play = play
    return player.evaluate(), calls


def test_evaluation_counts_steps_as_the_papers_figure():
    # s - m - G won, s - x - s - m failed: d(m) = 1, d(s) = 2, d(x) = 3: of the failed one's steps x - s and s - m lead
    # nearer, s - x does not: 2 of 3. A won s - s - x - s - G: at d(s) = 1, d(x) = 2 only the steps x - s and s - G do:
    # 2 of 4 are waste; with the first rollout's 0 of 2 that is 2 of 6. A task without success does not count.
    sampled = [group_of(["smG", "sxsm"]), group_of(["ssxsG", "sx"]), group_of(["sms", "s" * 5])]
    greedy = [group_of(["sG"]), group_of(["sa"]), group_of(["sa"])]
    row, calls = evaluated(sampled, greedy, eval_tasks=3)
    assert row == {"success": 2 / 6, "greedy_success": 1 / 3, "progress_in_failed": 2 / 4,
                   "waste_in_successful": 2 / 6}  # the second task's failed rollout has a step, which leads away
    assert sorted(calls) == [(1, 0, 1, 2), (2, 0, 1, 2)]
    row, calls = evaluated(sampled, greedy, eval_tasks=3, tasks=2)  # in batches of as many as in training
    assert row["success"] == 2 / 6 and sorted(calls) == [(1, 0, 1), (1, 2), (2, 0, 1), (2, 2)]


def test_evaluation_without_anything_to_count():
    row, _ = evaluated([group_of(["sa", "sb"])], [group_of(["sa"])], eval_tasks=1)
    assert row == {"success": 0, "greedy_success": 0, "progress_in_failed": None, "waste_in_successful": None}
    row, _ = evaluated([group_of(["sG", "sG"])], [group_of(["sG"])], eval_tasks=1)
    assert row == {"success": 1, "greedy_success": 1, "progress_in_failed": None, "waste_in_successful": 0}


@pytest.mark.parametrize(("text", "action"), [
    ("<action>go hall</action>", "go hall"), ("so <action> take\n  mug </action> then", "take mug"),
    ("<action>a</action> no: <action>b</action>", "b"), ("<action></action>", "<action></action>"),
    ("go hall", "go hall"),
    ("I think\n so: \n go   hall \n\n", "go hall"), ("", ""), ("\n \n", ""), ("<action>open", "<action>open"),
    ("think\n<action>open", "<action>open"), ("<action>x</action>\nlast line", "x"),
    ("</action>a<action>", "</action>a<action>"),
])
def test_what_the_policy_wants_to_do(text, action):
    player = stub()
    player.tokenizer = type("Tokenizer", (), {"decode": lambda self, tokens, skip_special_tokens: text})()
    assert player.action(Node(tokens=[1])) == action


def test_the_end_is_no_part_of_an_action(make):
    player, _ = make("qwen3")
    tokens = player.encode("hm <action>go hall</action>") + [player.tokenizer.eos_token_id]
    assert player.action(Node(tokens=tokens)) == "go hall"
    tokens = player.encode("go hall") + [player.tokenizer.eos_token_id]
    assert player.action(Node(tokens=tokens)) == "go hall"


# ---------------------------------------------------------------------------------------------------------- the picture
def test_the_picture_is_of_the_smallest_task_with_both_outcomes():
    player = stub()
    groups = [group_of(["sG", "sG"], task="won"), group_of(["sabG", "sa"], task="large"),
              group_of(["sG", "sa"], task="small"), group_of(["s"] * 2, task="nothing")][:3]
    name, text = player.picture(groups, [])
    assert name == "graph.md" and "Task: small<br>" in text and "+1.41" in text  # A_G + A_E, both 1 / sqrt 2
    assert "Task: won<br>" in player.picture(groups[:1], [])[1]
