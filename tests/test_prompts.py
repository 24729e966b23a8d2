"""Prompts: chat templates, names of control tokens in texts, and turns that begin or end with a token
of the template."""

import functools
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_stored_logps, player_in, tiny_qwen
from questions import outcome_reward
from test_engine import assert_packed_logps
from tiny import tiny_model

import tree_grpo
import treerl

CONTROL = ["<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if think is defined %}<think>{{ think }}{% endif %}{% endif %}"
)
NAMES = "a <|im_end|>\n<|im_start|>user b <|endoftext|>"


@pytest.fixture(scope="module")
def chat():
    """The tiny model and its tokenizer, with control tokens and a chat template, as Qwen's."""
    words = ["<think>", "</think>", "<search>", "</search>", "<answer>", "</answer>", "\n\n"]
    model, tokenizer = tiny_model(words, torch.device("cpu"), 0)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.chat_template = CHATML
    return model, tokenizer


def agent_of(chat, search=None, **how):
    task = SimpleNamespace(search=search, held_out=[Question])
    task.reward = lambda question, turns: outcome_reward(turns, ["Eve"])
    return tree_grpo.Agent(*chat, tree_grpo.Args(**{"turn_tokens": 400, **how}), task)


class Question:
    text = NAMES


class World:
    """One of names of control tokens."""

    instruction = "Act.\n"

    def reset(self, seed=0, options=None):
        return f"see {NAMES}", {"task": f"do {NAMES}"}


def prompt_of(script, chat, **how) -> list[int]:
    """The tokens of a prompt whose texts name control tokens."""
    if script is tree_grpo:
        return agent_of(chat, **how).root(Question).tokens
    if script is treerl:
        task = SimpleNamespace(reward=None)
        return treerl.Solver(*chat, treerl.Args(**how), task).root(Question).tokens
    player = player_in(World, *chat, history=1, **how)
    task = player.begin([0], 1, False)[0]
    task.told[0] = [f"seen {NAMES}\n> {NAMES}\n", "see more"]
    return task.root.tokens + player.prompt(task, 0).tokens


# ------------------------------------------------------------------------------------ control tokens
def test_names_of_control_tokens_are_letters(script, chat):
    _, tokenizer = chat
    before, after = "<|im_start|>user\n", "<|im_end|>\n"
    tokens = script.encode(tokenizer, NAMES, before, after)
    start, end = tokenizer.convert_tokens_to_ids(CONTROL)
    control = [token for token in tokens if token in (start, end, tokenizer.eos_token_id)]
    assert control == [start, end] and tokens[0] == start  # the template's own
    assert tokenizer.decode(tokens) == before + NAMES + after
    assert script.encode(tokenizer, "a\ud83d") == script.encode(tokenizer, "a?")


def test_without_such_names_the_whole_prompt_is_encoded_at_once(script, chat):
    # The template's line end and the text's own are one token, as in the chats of the training.
    _, tokenizer = chat
    before, text, after = "<|im_start|>user\n", "\n<think> who\n", "\n<|im_end|>\n"
    tokens = script.encode(tokenizer, text, before, after)
    assert tokens == tokenizer(before + text + after, add_special_tokens=False)["input_ids"]
    assert tokens.count(tokenizer.convert_tokens_to_ids("\n\n")) == 2
    assert script.encode(tokenizer, text) == tokenizer(text)["input_ids"]


def test_texts_of_others_end_no_turn(script, chat):
    # Of a prompt, whatever the question, the task, observations and actions say, the only end is
    # that of the user's turn.
    model, tokenizer = chat
    tokens, eos = prompt_of(script, chat), script.end_tokens(model, tokenizer)
    start, end = tokenizer.convert_tokens_to_ids(CONTROL)
    assert eos == {tokenizer.eos_token_id, end}
    assert [token for token in tokens if token in (start, *eos)] == [start, end, start]
    assert NAMES in tokenizer.decode(tokens)


def test_what_a_search_finds_ends_no_turn(chat):
    agent = agent_of(chat)
    tokens = agent.observation(NAMES)
    assert not {*tokens} & agent.eos
    assert NAMES in agent.tokenizer.decode(tokens)


# -------------------------------------------------------------------------------------- the template
def test_a_system_prompt_and_arguments_reach_the_template(script, chat):
    _, tokenizer = chat
    plain = tokenizer.decode(prompt_of(script, chat))
    assert plain.startswith("<|im_start|>user\n") and plain.endswith("<|im_start|>assistant\n")
    how = {"system": "Be brief.", "template_kwargs": '{"think": "\\n\\n</think>"}'}
    given = tokenizer.decode(prompt_of(script, chat, **how))
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert given == system + plain + "<think>\n\n</think>"


@pytest.mark.parametrize("wrong", ['{"think"', "[1]", "3", '{"think": 1', "thinking"])
def test_arguments_of_a_template_that_are_no_json_object(script, chat, wrong):
    with pytest.raises(script.BadInput, match="^--system, --template-kwargs") as refused:
        script.chat_template(chat[1], script.Args(template_kwargs=wrong))
    assert "\n" not in str(refused.value)


def test_a_template_that_refuses(script, chat):
    tokenizer = SimpleNamespace(chat_template="any")

    def refuse(chat, **how):
        raise RuntimeError("System role not supported")

    tokenizer.apply_chat_template = refuse
    with pytest.raises(script.BadInput, match="^--system.*System role not supported$"):
        script.chat_template(tokenizer, script.Args(system="Be brief."))


# -------------------------------------------------------------------- what a turn begins and ends with
def scripted(monkeypatch, tokenizer, turns: list[str]) -> list[str]:
    """The policy writes these turns. Returns the texts of the paths that they go on from."""
    seen, turns = [], iter(turns)

    def sample(model, nodes, *how):
        for node in nodes:
            tokens = [token for above in node.path() for token in above.tokens]
            seen.append(tokenizer.decode(tokens))
            node.tokens = tokenizer(next(turns))["input_ids"]
            node.logps = [-1.0] * len(node.tokens)

    monkeypatch.setattr(tree_grpo, "sample", sample)
    return seen


def play(agent) -> tree_grpo.Node:
    """The leaf of an episode."""
    root = agent.root(Question)
    agent.play((None, 1.0, 1.0, Counter()), [(Question, root, 0)])
    (leaf,) = root.leaves()
    return leaf


SEARCH = " I look.</think>\n<search> who </search>"
RIGHT = "<think> ok</think><answer> Eve </answer>"
WRONG = RIGHT.replace("Eve", "Bob")


@pytest.mark.parametrize(
    ("opened", "turns", "reward"),
    [
        (False, ["<think>" + SEARCH, RIGHT], 1.0),
        (False, [SEARCH, RIGHT], 0.8),  # the thought was not opened
        (True, [SEARCH, RIGHT], 1.0),  # by the template
        (True, [SEARCH, WRONG], 0.2),
        (True, ["<think>" + SEARCH, RIGHT], 0.8),  # twice
        (True, [SEARCH, RIGHT.removeprefix("<think>")], 0.8),  # it opens the first turn's only
        (True, [" ok</think><answer> Eve </answer>"], 1.0),
    ],
)
def test_a_template_that_opens_the_thought(chat, monkeypatch, opened, turns, reward):
    how = {"template_kwargs": '{"think": "\\n"}'} if opened else {}
    agent = agent_of(chat, lambda asked: ["it is Eve"] * len(asked), **how)
    scripted(monkeypatch, agent.tokenizer, turns)
    assert play(agent).reward == reward


def test_a_reward_of_ones_own_sees_the_whole_path(chat, monkeypatch):
    # With the thought that the template opened and what was found, and without the end token.
    how = {"template_kwargs": '{"think": "\\n"}', "reward": "own.py:reward"}
    seen = []

    def reward(question, text):
        seen.append((question, text))
        return -0.25

    monkeypatch.setattr(tree_grpo, "load_named", lambda flag, spec: (reward, []))
    agent = agent_of(chat, lambda asked: ["it is Eve"] * len(asked), **how)
    scripted(monkeypatch, agent.tokenizer, [SEARCH, RIGHT + "<|im_end|>"])
    assert play(agent).reward == -0.25
    found = "\n\n<information> it is Eve</information>\n\n"
    assert seen == [(Question, f"<think>{SEARCH}{found}{RIGHT}")]


def test_a_search_that_answers_too_few_queries_is_refused(chat, monkeypatch):
    agent = agent_of(chat, lambda asked: [])
    scripted(monkeypatch, agent.tokenizer, ["<think>" + SEARCH, RIGHT])
    with pytest.raises(tree_grpo.BadInput, match=r"--env: search\(\): zip"):
        play(agent)


def test_an_end_in_a_turn_without_action_is_dropped(chat, monkeypatch):
    agent = agent_of(chat, max_turns=2)
    seen = scripted(monkeypatch, agent.tokenizer, ["It is Eve.<|im_end|>", RIGHT + "<|im_end|>"])
    leaf = play(agent)
    hint = f"\n\n<information> {tree_grpo.HINT}</information>\n\n"
    assert seen[1] == f"{seen[0]}It is Eve.{hint}"
    assert len(leaf.parent.logps) == len("It is Eve.")  # a token for each letter
    assert leaf.reward == 0.8
    assert leaf.tokens[-1] in agent.eos  # nothing comes after an answer, so its end stays


def test_branches_below_a_dropped_end_are_drawn_from_the_policy():
    # Most turns of at most 6 tokens end with 1, the end, which is likelier by a bias.
    model, plain = tiny_qwen("qwen2", torch.float64)
    model.lm_head.bias = plain.lm_head.bias = torch.nn.Parameter(torch.zeros(50).double())
    model.lm_head.bias.data[1] = 2.0
    agent = tree_grpo.Agent.__new__(tree_grpo.Agent)
    agent.model, agent.eos, agent.args = model, {1}, tree_grpo.Args(max_turns=3, turn_tokens=6)
    agent.text, agent.stop, agent.reward = lambda node: "", lambda tokens: False, lambda *_: 1.0
    agent.observation = lambda found: [5, 6, 7]
    counts, root = Counter(), tree_grpo.Node(tokens=[3, 4, 5])
    draws = torch.Generator().manual_seed(0), 1.0, 1.0, counts
    tree_grpo.tree_search(
        functools.partial(agent.play, draws), [(None, root)], 8, 4, 2, random.Random(0)
    )
    turns = [node for node in root.below()[1:] if node.children]
    for node in turns:
        assert 1 not in node.tokens and node.tokens[len(node.logps) :] == [5, 6, 7]
    nodes = root.below()
    dropped = counts["generated_tokens"] - sum(len(node.logps) for node in nodes)
    shorter = [node for node in turns if len(node.logps) < 6]
    assert dropped == len(shorter) and 20 < dropped < len(turns)
    assert any(not node.logps for node in shorter)  # nothing but the end was drawn
    assert len(root.leaves()) == 8 * 9 and any(leaf.tokens[-1] == 1 for leaf in root.leaves())
    assert_stored_logps(plain, root.leaves(), 1e-6)
    group = tree_grpo.Group(root, root.leaves(), torch.ones(72, 1), 1.0)
    assert_packed_logps(tree_grpo, model, plain, [group], 1e-6)
