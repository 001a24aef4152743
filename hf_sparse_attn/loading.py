"""The model that a script works on: where it is, and its sparse attention with overrides applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_sparse_attn.demo import demo_model_directory
from hf_sparse_attn.integration import check_model, merge_sparse_attention

# Shapes of known models, for measurements that need no weights of theirs.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2**18,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "mistral-7b": {
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2**18,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}


def resolve_model(model: str) -> str:
    """What `from_pretrained` takes for a `--model` argument: a directory or a Hub id; `demo` is made on first use.

    Raises:
        FileNotFoundError: `model` is a path that holds no model.
        ImportError: `demo` was asked for and its packages are not installed.
    """
    if model == "demo":
        return str(demo_model_directory())
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{model!r} holds no model: it is not a directory with a config.json")
        return str(path)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"{model!r}: no such directory")
    return model


def load_config(path: str) -> Any:
    """The config of a checkpoint, its `sparse_attention` (if it has one) validated.

    Raises:
        ValueError: a field of its own that `SparseAttentionConfig` refuses.
        OSError: there is no such model.
    """
    config = AutoConfig.from_pretrained(path)
    merge_sparse_attention(config)
    return config


def parse_device(device: str | None) -> torch.device:
    """The device of a `--device` argument; None takes the GPU if there is one.

    Raises:
        ValueError: not the name of a device that this machine has.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{device!r} is no device of this machine; try cpu or cuda") from error
    return torch.device(device)


def parse_dtype(dtype: str) -> torch.dtype | str:
    """The dtype of a `--dtype` argument: the name of a floating-point dtype, or "auto" for the checkpoint's own.

    Raises:
        ValueError: not the name of a floating-point dtype of PyTorch.
    """
    if dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{dtype!r} is no floating-point dtype; expected auto, float32, bfloat16, float16 or float64")
    return found


def load_sparse_model(path: str, overrides: dict[str, Any] | None = None, **kwargs: Any) -> PreTrainedModel:
    """A causal language model with `attn_implementation="sparse"`, converted or not; `kwargs` go to from_pretrained.

    Raises:
        ValueError: an override that `SparseAttentionConfig` refuses, or a family of models whose attention does not
            go through Transformers' registry.
        OSError: there is no such model.
    """
    # As a keyword of from_pretrained, sparse_attention reaches only a config that has the attribute already.
    config = AutoConfig.from_pretrained(path)
    config.sparse_attention = merge_sparse_attention(config, overrides)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, config=config, attn_implementation="sparse", **kwargs
    )
    check_model(model)
    return model


def random_sparse_model(
    shape: str, overrides: dict[str, Any] | None, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A LLaMA model of one of SHAPES with seeded random weights and `attn_implementation="sparse"`.

    Raises:
        ValueError: an unknown shape, or an override that `SparseAttentionConfig` refuses.
    """
    if shape not in SHAPES:
        raise ValueError(f"{shape!r} is no known shape; expected {' or '.join(SHAPES)}")
    config = LlamaConfig(**SHAPES[shape])
    config.sparse_attention = merge_sparse_attention(config, overrides)
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sparse", dtype=dtype)
    return model.eval()
