"""What the tests share: tiny models of both Qwen architectures, plain forwards to compare with, and what takes long to
make for the tests of the scripts as seen from outside."""

import copy
import functools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("outside")
from naive import path_logps
from outside import ENVIRONMENT, FORKING, make_models

sys.path.insert(0, str(Path(__file__).parent.parent))

import tree_grpo

torch.set_num_threads(1)  # the models are too small to gain by more


def tiny_qwen(kind: str, dtype=torch.float32, vocab_size: int = 50):
    """(model with the scripts' attention, the same model with transformers' own) with sharp random weights."""
    from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    AttentionInterface.register("token_tree", tree_grpo.token_tree)
    classes = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = classes[kind]
    config = config_class(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.2, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )
    torch.manual_seed(0)
    model = model_class(copy.deepcopy(config)).to(dtype).eval()
    plain = model_class(config).to(dtype).eval()
    plain.load_state_dict(model.state_dict())
    model.set_attn_implementation("token_tree")
    return model, plain


def chi_square(counts: list[int], probs: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom, cells with an expectation under 5 put together."""
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


def assert_stored_logps(plain, leaves, tolerance):
    """What the sampler stored on each path is what a plain forward of that path gives. Returns these, one per leaf."""
    found = []
    for leaf in leaves:
        stored = [logp for node in leaf.path() for logp, drawn in zip(node.logps, node.sampled) if drawn]
        with torch.no_grad():
            found.append(path_logps(plain, leaf.path()))
        stored = torch.tensor(stored, dtype=found[-1].dtype, device=found[-1].device)
        assert torch.allclose(stored, found[-1], atol=tolerance, rtol=0)
    return found


def assert_exact_on_cuda(model, plain, samples, packed_logps, packed):
    """The sampler's log-probs and the packed ones are those of plain forwards, in the rounding of a GPU."""
    logps = packed_logps(model, packed)
    for item, (index, mask) in zip(samples, packed.paths):
        for expected, row, drawn in zip(assert_stored_logps(plain, item.leaves, 1e-3), logps[index], mask):
            assert torch.allclose(row[drawn], expected, atol=1e-3, rtol=0)


def assert_each_token_is_forwarded_once(model, grow):
    """Counted at the embedding, not by the script's own counter: pads are given id 0, which nothing else has in the
    first trees of the many that grow() makes, as (roots, counts), in which the policy never draws it either."""
    with torch.no_grad():
        model.lm_head.weight[0] = 0
    seen = Counter()
    model.model.embed_tokens.register_forward_hook(lambda module, ids, out: seen.update(ids[0].flatten().tolist()))
    for _ in range(1000):
        seen.clear()
        roots, counts = grow()
        nodes = [node for root in roots for node in root.below()]
        if all(0 not in node.tokens for node in nodes):
            break
    assert all(0 not in node.tokens for node in nodes)
    # each token once, but the last of a node once for each branch below it: not at all for a leaf's. In all these are
    # as many as there are tokens, less one per root, for there are as many nodes below a node as nodes that are no root
    tokens = sum(len(node.tokens) for node in nodes)
    assert seen.total() - seen[0] == tokens - len(roots) == counts["forwarded_tokens"]
    assert counts["generated_tokens"] == sum(sum(node.sampled) for node in nodes)
    expected = Counter(token for node in nodes for token in node.tokens[:-1])
    expected += Counter(node.parent.tokens[-1] for node in nodes if node.parent)
    del seen[0]
    assert seen == expected


@pytest.fixture(params=["qwen2", "qwen3"])
def architecture(request):
    return request.param


# A module that takes the fixtures below says with SCRIPT which script it tests, and with SMALL and FIVE what the
# arguments of a small run of the built-in task and of five steps are.
@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """fork_server(script, folder, *arguments) runs it there in a copy of one process: much quicker than a new one."""
    command = [sys.executable, "-c", FORKING]
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        def quick_run(script, folder, *arguments):
            output = tmp_path_factory.mktemp("output")
            message = [str(script.path), str(folder), str(output), list(map(str, arguments))]
            parent.stdin.write(json.dumps(message) + "\n")
            parent.stdin.flush()
            status = int(parent.stdout.readline())
            stdout, stderr = ((output / name).read_text() for name in ("stdout", "stderr"))
            return subprocess.CompletedProcess(arguments, status, stdout, stderr)

        yield quick_run
        parent.stdin.close()


@pytest.fixture(scope="module")
def quick_run(request, fork_server):
    return functools.partial(fork_server, request.module.SCRIPT)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    """A run of five steps of the built-in task that nobody interrupts: (its folder, the finished process)."""
    module, folder = request.module, tmp_path_factory.mktemp("whole")
    return folder / "out", module.SCRIPT.ran(folder, *module.SMALL, *module.FIVE, "--out", "out")


@pytest.fixture(scope="module")
def runs(whole, tmp_path_factory):
    """Folders for --resume, one good and several that cannot be continued."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(whole[0], folder / "good")
    (folder / "nothing").mkdir()
    (checkpoint,) = whole[0].glob("checkpoint-*")
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    contents = {"other-script": {**state, "script": "other.py"}, "other-file": {"weights": torch.ones(2)}}
    (folder / "no-state" / checkpoint.name).mkdir(parents=True)
    for name, content in contents.items():
        (folder / name / checkpoint.name).mkdir(parents=True)
        torch.save(content, folder / name / checkpoint.name / "state.pt")
    for name, damaged in {"cut-state": "state.pt", "cut-weights": "model.safetensors"}.items():
        shutil.copytree(whole[0], folder / name)
        path = folder / name / checkpoint.name / damaged
        path.write_bytes(path.read_bytes()[:1000])
    return folder
