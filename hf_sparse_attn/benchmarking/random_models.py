"""Models of the shapes of known ones with random weights, for measurements that need no weights of theirs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_sparse_attn.config import text_config
from hf_sparse_attn.global_tokens import mark_global_tokens
from hf_sparse_attn.integration import merge_sparse_attention

_LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_GEMMA_3 = {
    "vocab_size": 262144,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
}
_SMALL_LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": True,
}


def _alternating(num_layers: int, period: int) -> list[str]:
    """Each layer of index `period` - 1 of a period reads everything, the others have a sliding window."""
    kinds = ("sliding_attention", "full_attention")
    return [kinds[layer % period == period - 1] for layer in range(num_layers)]


# Model type, and fields of its config that differ from the type's defaults.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": (
        "llama",
        _LARGE | {"vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "llama-3.2-1b": ("llama", _SMALL_LLAMA),
    "mistral-7b": (
        "llama",
        _LARGE | {"vocab_size": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    ),
    "mistral-7b-v0.1": ("mistral", _LARGE | {"vocab_size": 32000, "sliding_window": 4096}),
    "gemma-2-2b": (
        "gemma2",
        {
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
        },
    ),
    "gemma-3-270m": (
        "gemma3_text",
        _GEMMA_3
        | {
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "layer_types": _alternating(18, 6),
        },
    ),
    "gemma-3-1b": (
        "gemma3_text",
        _GEMMA_3
        | {
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "layer_types": _alternating(26, 6),
        },
    ),
}


def shape_config(shape: str, **changes: Any) -> Any:
    """The config of one of SHAPES, with some fields changed.

    Raises:
        ValueError: an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"{shape!r} is not a known shape; expected one of {', '.join(SHAPES)}")
    model_type, fields = SHAPES[shape]
    return AutoConfig.for_model(model_type, **{"max_position_embeddings": 2**18, **fields, **changes})


def random_sparse_model(
    shape: str, overrides: dict[str, Any] | None, dtype: torch.dtype, device: torch.device, **changes: Any
) -> PreTrainedModel:
    """A model of one of SHAPES with seeded random weights and `attn_implementation="sparse"`.

    Args:
        changes: of fields of its config.

    Raises:
        ValueError: an unknown shape, or an override that `SparseAttentionConfig` refuses.
    """
    config = shape_config(shape, **changes)
    text_config(config).sparse_attention = merge_sparse_attention(config, overrides)
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sparse", dtype=dtype)
    mark_global_tokens(model)
    return model.eval()
