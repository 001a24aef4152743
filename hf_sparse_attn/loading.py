"""The model to work on: where it is, what it is, and its sparse attention with single fields replaced."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_sparse_attn.config import longest_context, text_config
from hf_sparse_attn.demo import demo_model_directory
from hf_sparse_attn.errors import ArgumentError, argument
from hf_sparse_attn.global_tokens import mark_global_tokens
from hf_sparse_attn.integration import check_model, merge_sparse_attention
from hf_sparse_attn.notices import beyond_trained_length, tell_once
from hf_sparse_attn.offloading import is_offloaded, named_weights

logger = logging.getLogger(__name__)


def resolve_model(model: str) -> str:
    """What `from_pretrained` takes for a `model` argument: a directory or a Hub id; `demo` is made on first use.

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


class Checkpoint(NamedTuple):
    """What a `model` argument names, without its weights.

    Args:
        path: what `from_pretrained` takes.
        config: its config.
        tokenizer: its tokenizer.
        sparse_attention: its own `sparse_attention` with the fields that were given in place of its own, validated.
    """

    path: str
    config: Any
    tokenizer: Any
    sparse_attention: dict[str, Any]


def read_checkpoint(model: str, overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read and check what a `model` argument names, all but its weights, with the fields that `sparse_attention` sets.

    Raises:
        ArgumentError: for "model" or "sparse_attention".
    """
    with argument("model", model):
        path = resolve_model(model)
        config = read_config(path)
        sparse_attention = merge_sparse_attention(config)
        with library_errors("its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(path)
        known = getattr(text_config(config), "vocab_size", tokenizer.vocab_size)
        if tokenizer.vocab_size > known:
            raise ValueError(
                f"its tokenizer has {tokenizer.vocab_size} tokens, but its config.json a vocab_size of {known}"
            )
    if overrides:
        with argument("sparse_attention"):
            sparse_attention = merge_sparse_attention(config, dict(overrides))
    return Checkpoint(path, config, tokenizer, sparse_attention)


def read_config(path: str) -> Any:
    """The config of a checkpoint; `merge_sparse_attention` checks what it says.

    Raises:
        ValueError: it cannot be read.
        OSError: there is no such model.
    """
    with library_errors("its config.json"):
        return AutoConfig.from_pretrained(path)


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


def check_attention(config: Any, attn_implementation: str) -> None:
    """Make sure that a family of models has an attention, and that what it needs is installed.

    Raises:
        ValueError, ImportError: it has not, or it is not.
    """
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attn_implementation)


def read_weights(path: str, config: Any, *, attn_implementation: str = "sparse", **kwargs: Any) -> PreTrainedModel:
    """What `from_pretrained` loads with an attention, if the checkpoint holds all of its weights.

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
                path, config=config, attn_implementation=attn_implementation, output_loading_info=True, **kwargs
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
    """The device of a `device` argument, one that computes; None takes the GPU if there is one.

    Raises:
        ArgumentError: it is not the name of a device that this machine has.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # a tensor on meta holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ArgumentError("device", f"{device!r} is not a device of this machine; try cpu or cuda") from error
    return torch.device(device)


def parse_dtype(dtype: str) -> torch.dtype | str:
    """The dtype of a `dtype` argument, one that a whole model computes in, or "auto" for the checkpoint's own.

    Raises:
        ArgumentError: it is not the name of such a dtype of PyTorch.
    """
    if dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    expected = "expected auto, float32, bfloat16, float16 or float64"
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ArgumentError("dtype", f"{dtype!r} is not a floating-point dtype; {expected}")
    if found.itemsize < 2:
        raise ArgumentError("dtype", f"no model computes in {dtype!r}; {expected}")
    return found


def load_sparse_model(
    path: str,
    overrides: dict[str, Any] | None = None,
    *,
    config: Any = None,
    attn_implementation: str = "sparse",
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal language model with `attn_implementation="sparse"`, converted or not; `kwargs` go to from_pretrained.

    `config` stands in place of the checkpoint's own, and `attn_implementation` names another attention.

    Raises:
        ValueError: an override that `SparseAttentionConfig` refuses, or a family of models whose attention does not
            go through Transformers' registry.
        OSError: there is no such model.
    """
    # As a keyword of from_pretrained, sparse_attention reaches only a config that has the attribute already.
    config = read_config(path) if config is None else config
    text_config(config).sparse_attention = merge_sparse_attention(config, overrides)
    model = read_weights(path, config, attn_implementation=attn_implementation, **kwargs)
    if attn_implementation == "sparse":
        mark_global_tokens(model)
        check_model(model)
    return model


def load_model(
    model: str,
    path: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    device: torch.device | None = None,
    num_tokens: int = 0,
    **kwargs: Any,
) -> Any:
    """The sparse model that a `model` argument names, with sound weights.

    A warning is logged if it was made for fewer tokens than it is to read.

    Args:
        model: as it was given.
        path: what `read_checkpoint` returned for it.
        overrides: fields of its sparse attention.
        device: moves it there, unless weights are offloaded, for evaluation; None leaves it as it was loaded.
        num_tokens: the most that it will read at once.
        kwargs: go to `load_sparse_model`: a `config`, and what `from_pretrained` takes, such as `offloading.placement`.

    Raises:
        ArgumentError: for "model".
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    with argument("model", model):
        loaded: Any = load_sparse_model(path, dict(overrides) if overrides else None, **kwargs)
        most = longest_context(text_config(loaded.config)) or num_tokens
        tables = [table.num_embeddings for table in loaded.modules() if isinstance(table, torch.nn.Embedding)]
        if num_tokens > most and any(most <= size <= most + 2 for size in tables):  # OPT leaves two places free
            raise ValueError(f"it has learned {most} positions and cannot read {num_tokens} tokens")
        for name, weight in named_weights(loaded):
            if weight.itemsize > 1 and not _is_finite(weight):  # quantised ones have no such numbers
                raise ValueError(f"its weights are damaged: {name} has numbers that are not finite")
    if num_tokens > most:
        told = f"{num_tokens} tokens are more than the {most} that the model was made for (max_position_embeddings)"
        told += "; finetune --rope-scaling yarn trains it for more"
        tell_once(text_config(loaded.config), beyond_trained_length(most), lambda _: logger.warning(told))
    if device is None:
        return loaded
    return (loaded if is_offloaded(loaded) else loaded.to(device)).eval()


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether all numbers are finite; looked at in parts, for a table of embeddings takes more memory than a layer."""
    return all(bool(part.isfinite().all()) for part in weight.detach().flatten().split(2**24))
