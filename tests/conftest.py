"""What the tests share: tiny models of both Qwen architectures, and plain forwards to compare with."""

import copy
import sys
from pathlib import Path

import pytest
import torch

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


def plain_logps(plain, path) -> torch.Tensor:
    """Log-probs of the sampled tokens of a path (root to leaf), by an ordinary forward of that path alone."""
    tokens = torch.tensor([[token for node in path for token in node.tokens]], device=plain.device)
    sampled = torch.tensor([drawn for node in path for drawn in node.sampled], device=plain.device)[1:]
    logps = plain(tokens).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, tokens[0, 1:, None])[:, 0][sampled]


@pytest.fixture(params=["qwen2", "qwen3"])
def architecture(request):
    return request.param
