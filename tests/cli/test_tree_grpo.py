"""What only tree_grpo.py has, as its user sees it: its trees, data files, the search server."""

import re

import pytest
import torch
from questions import Questions
from test_questions import hit, send, serve  # noqa: F401

import tree_grpo
from cli.outside import README, ROOT, are_chains, draw_tree, metrics
from tree_grpo import Agent, Args

SCRIPT = "tree_grpo"


def test_the_tree(whole):
    labels, _, leaves = draw_tree(whole)
    assert re.match(r"(Who|Where) is the .* of \w+\?$", labels[0])
    assert len(leaves) == 2 * (1 + 2)  # M (1 + N L)
    for node, label in labels.items():  # leaves and no other nodes have a reward
        note = re.search(r"<br>R = (0|0\.1|0\.2|0\.8|1), A = [+-]\d\.\d\d$", label)
        assert bool(note) == (node in leaves)


@pytest.mark.parametrize("line, most", [("--N 1 --L 2", 6), ("--method grpo --M 3", 3)])
def test_the_sizes_of_trees(script, run, whole, out, line, most):
    run.well(f"{script.small} {line} --keep 1 --steps 1 --model {whole / 'start'} --out out")
    labels, edges, leaves = draw_tree(out)
    assert len(leaves) == most
    assert are_chains(edges, leaves, most) == ("grpo" in line)
    dropped = [leaf for leaf in leaves if "not kept" in labels[leaf]]
    assert len(dropped) == (0 if "grpo" in line else 4)  # one of each tree is kept


def test_a_run_on_musique(run, files, out):
    line = f"--model {files / 'chat'} --data {files / 'musique.jsonl'} --steps 1 --prompts 2"
    result = run.well(f"{line} --max-turns 2 --turn-tokens 8 --out out")
    assert "4 questions, 2 held out" in result.stdout
    _, _, leaves = draw_tree(out)
    assert len(leaves) == 6


def test_a_run_with_a_search_server(run, whole, files, out, serve):  # noqa: F811
    def reply(handler, number):
        queries = posted[-1][1]["queries"]
        send(handler, {"result": [[hit('"Rome"\nA city.')]] * len(queries)})

    url, posted = serve(reply)
    line = f"--model {whole / 'start'} --data {files / 'hotpot.json'} --search-url {url} --topk 2"
    run.well(f"{line} --prompts 4 --turn-tokens 16 --steps 1 --out out")
    assert {body["topk"] for _, body in posted} == {2}
    queries = sum(len(body["queries"]) for _, body in posted)
    (step,) = metrics(out, "train")
    assert 0 < step["tool_calls"] <= queries  # evaluations have searched as well


def test_limits_of_a_model_that_is_given(run, whole, out):
    run.well(f"--steps 0 --eval-prompts 2 --model {whole / 'start'} --out out")
    args = torch.load(out / "checkpoint-000000" / "state.pt", weights_only=True)["args"]
    assert (args["lr"], args["turn_tokens"]) == (1e-6, 500)


def test_the_chat_template_makes_the_prompt(files):
    model, tokenizer = tree_grpo.load_model(str(files / "chat"), torch.device("cpu"))
    args = Args(data=str(files / "hotpot.json"), max_turns=3)
    task = Questions(args)
    question = task.training[0]
    root = Agent(model, tokenizer, args, task).root(question)
    prompt = tokenizer.decode(root.tokens)
    assert prompt.startswith("<|im_start|>user\nAnswer the question.")
    assert prompt.endswith(f"{question.text}<|im_end|>\n<|im_start|>assistant\n")
    assert "<search>" in prompt
    assert "3 turns" in prompt


def test_the_task_of_the_readme(run, out):
    (line,) = re.findall(r"`python tree_grpo.py (--env envs/boxes.py:Boxes .*?)`", README)
    run.well(f"{line.replace('envs', str(ROOT / 'envs'))} --out out")
    before, after = metrics(out, "eval")
    assert after["success"] > before["success"] + 0.2
