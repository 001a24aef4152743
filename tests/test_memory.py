"""No path through a model allocates anything of size tokens x tokens."""

import pytest
import torch
from helpers.batches import tokens
from helpers.spies import LargestTensor
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH = 131072


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_128k_tokens_with_padding_and_packing(backward):
    """Through Transformers' mask functions; the largest tensor has the size of the hidden states."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        attn_implementation="sparse",
    )
    config.sparse_attention = {"window_size": 64, "key_budget": 32, "num_hash_bits": 6}
    model, mask = LlamaForCausalLM(config), torch.ones(1, LENGTH, dtype=torch.long)
    mask[:, :100] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    position_ids[:, 70_000:] -= position_ids[:, 70_000].item()
    with LargestTensor() as largest, torch.set_grad_enabled(backward):
        inputs = {"attention_mask": mask, "position_ids": position_ids, "use_cache": False}
        output = model.model(tokens(LENGTH), **inputs).last_hidden_state
        if backward:
            output.sum().backward()
    assert output.isfinite().all()
    hidden_states = LENGTH * config.hidden_size * 4
    assert hidden_states <= largest.bytes <= 2 * hidden_states
