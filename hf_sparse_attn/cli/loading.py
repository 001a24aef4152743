"""The model that a script works on: where it is, and its sparse attention with overrides applied."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_sparse_attn.config import text_config
from hf_sparse_attn.demo import demo_model_directory
from hf_sparse_attn.integration import check_model, merge_sparse_attention

logger = logging.getLogger(__name__)

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
        ValueError: a field of its own that `SparseAttentionConfig` refuses, or a shape that no model has.
        OSError: there is no such model.
    """
    config = read_config(path)
    merge_sparse_attention(config)
    return config


def read_config(path: str) -> Any:
    """The config of a checkpoint; it has the numbers of a model, and `sparse_attention`, if it is there, is an object.

    Raises:
        ValueError: naming the field.
        OSError: there is no such model.
    """
    with library_errors("its config.json"):
        config = AutoConfig.from_pretrained(path)
    of_text = text_config(config)
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim"):
        value = getattr(of_text, name, None)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} in its config.json must be at least 1, got {value}")
    for owner in (config, of_text):
        fields = getattr(owner, "sparse_attention", None)
        if fields is not None and not isinstance(fields, dict):
            raise ValueError(f"sparse_attention in its config.json must be an object, got {type(fields).__name__}")
    return config


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn whatever a library raises over a damaged file into a ValueError; code of this package is not to run inside.

    Errors that say by themselves what is wrong (ValueError, OSError, ImportError) and a lack of memory pass.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{what} cannot be read ({type(error).__name__}: {error})") from error


def read_weights(path: str, config: Any, **kwargs: Any) -> PreTrainedModel:
    """What `from_pretrained` loads with `attn_implementation="sparse"`, if the checkpoint holds all of its weights.

    Transformers draws those that are missing at random, and tells it in a table.

    Raises:
        ValueError: a file is damaged, or weights are missing or have other shapes than the config says.
        OSError: there are no weights.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with library_errors("its weights"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, config=config, attn_implementation="sparse", output_loading_info=True, **kwargs
            )
    except ValueError as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ValueError("its weights have other shapes than its config.json says") from error
        raise
    finally:
        transformers_logging.set_verbosity(verbosity)
    model: PreTrainedModel
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"it has no weights for {len(missing)} parameters of the model, such as {missing[0]}")
    if unused := sorted(found["unexpected_keys"]):
        logger.warning("%s holds %d weights that the model has no use for, such as %s", path, len(unused), unused[0])
    return model


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
    config = read_config(path)
    text_config(config).sparse_attention = merge_sparse_attention(config, overrides)
    model = read_weights(path, config, **kwargs)
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
    text_config(config).sparse_attention = merge_sparse_attention(config, overrides)
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sparse", dtype=dtype)
    return model.eval()
