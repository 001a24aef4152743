"""What the tests of several commands share."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig


@pytest.fixture
def hybrid_path(tmp_path, tiny_tokenizer):
    """A tiny Gemma 3 with a local layer and a global one."""
    config = Gemma3TextConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=20,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "hybrid")
    tiny_tokenizer.save_pretrained(tmp_path / "hybrid")
    return tmp_path / "hybrid"
