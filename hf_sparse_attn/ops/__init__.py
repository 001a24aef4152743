"""The operation and its implementations, which never import each other."""

from __future__ import annotations

from contextlib import nullcontext as _nullcontext
from functools import cache as _cache
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from logging import getLogger as _getLogger
from os import environ as _environ
from typing import Any as _Any
from typing import Protocol as _Protocol

import torch as _torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.ops.checks import check_document, check_scores
from hf_sparse_attn.recording import Recorder
from hf_sparse_attn.routing import LayerPattern, layer_pattern
from hf_sparse_attn.tracing import refuse_transforms


class Index(_Protocol):
    """The keys of one cached document, by bucket. An implementation has its own, and appends to it as keys come."""

    pattern: LayerPattern
    key_offset: int
    length: int
    knows_sliding_windows: bool

    def crop(self, length: int) -> None:
        """Forget the keys behind the first `length`."""

    def copy(self) -> Index:
        """Another one, of the same keys."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: SparseAttentionConfig,
    layer_idx: int = 0,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    recorder: Recorder | None = None,
) -> Tensor:
    """Causal sparse attention over whole documents: softmax(scaling * query . key over S(row)) . value.

    S(row) is defined in `SparseAttentionConfig`. The last query belongs to the last key, so Q < N continues a document
    whose first N - Q keys are cached.

    Args:
        query: [batch, num_heads, Q, head_dim]; any float dtype, computed in float32 or float64.
        key, value: [batch, num_key_value_heads, N, head_dim].
        config: which keys each row reads, and `config.implementation`.
        layer_idx: layer whose budget and hash apply.
        scaling: factor on query . key; head_dim ** -0.5 if None.
        softcap: scores become softcap * tanh(score / softcap) before the softmax (Gemma 2, arXiv 2408.00118).
        sinks: [num_heads], logits that take part in each softmax but carry no value (gpt-oss, arXiv 2508.10925).
        recorder: is told which keys each row read.

    Returns:
        [batch, num_heads, Q, head_dim of value], in query's dtype.

    Raises:
        ValueError: for shapes that do not fit together, impossible numbers, and under torch.jit.trace or torch.func.
    """
    refuse_transforms()
    if query.ndim != 4 or key.ndim != 4 or key.shape[:3] != value.shape[:3] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "query, key and value must be [batch, heads, tokens, head_dim] with one head_dim; got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if len(query) != len(key) or query.shape[1] % key.shape[1] or query.shape[2] > key.shape[2]:
        raise ValueError(
            "query must have key's batch, a multiple of its heads and at most its tokens; got "
            f"query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    pattern = layer_pattern(
        config, layer_idx, query.shape[1], key.shape[1], query.shape[-1], query.device, compute_dtype(query, key)
    )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    offset = key.shape[2] - query.shape[2]
    outputs = [
        document_attention(
            q,
            k,
            v,
            pattern=pattern,
            query_offset=offset,
            key_offset=0,
            scaling=scaling,
            softcap=softcap,
            sinks=sinks,
            recorder=recorder,
        )
        for q, k, v in zip(query, key, value, strict=True)
    ]
    output = outputs[0].unsqueeze(0) if len(outputs) == 1 else _torch.stack(outputs)
    return output.to(query.dtype)


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: LayerPattern,
    query_offset: int,
    key_offset: int,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    recorder: Recorder | None = None,
    index: Index | None = None,
) -> Tensor:
    """Attention of one document through the implementation that the config names.

    See `ops.pieces.attend_in_pieces` for the arguments; any float dtypes are taken and the result is in the dtype
    that was computed in: at least float32, except that "triton" keeps to the dtype of query and key. `index` is that of
    the cached keys, which the new ones are appended to, or None; no gradients flow where there is one.

    Raises:
        ValueError: for tensors, positions or numbers that do not fit together.
    """
    check_scores(scaling, softcap)
    check_document(query, key, value, pattern, query_offset, key_offset, sinks)
    if not query.shape[1]:
        return query.new_empty(len(query), 0, value.shape[-1])
    implementation = _implementation(pattern.config.implementation, query.device)
    dtype, precise = _dtype(implementation, query, key), compute_dtype(query, key)
    indexed = {} if index is None else {"index": index}
    halves = getattr(implementation, "HALF", ())
    as_stored = index is not None and dtype == _torch.float32 and {key.dtype} == {value.dtype} <= set(halves)
    autocast = _torch.is_autocast_enabled(query.device.type)
    with _torch.autocast(query.device.type, enabled=False) if autocast else _nullcontext():
        output: Tensor = implementation.document_attention(
            query.to(dtype),
            key if as_stored else key.to(dtype),
            value if as_stored else value.to(dtype),
            pattern=pattern,
            query_offset=query_offset,
            key_offset=key_offset,
            scaling=scaling,
            softcap=softcap,
            sinks=None if sinks is None else sinks.to(precise),
            recorder=recorder,
            **indexed,
        )
    return output


def new_index(pattern: LayerPattern, key: Tensor, key_offset: int) -> Index | None:
    """An empty index for the keys of one cached document, or None where the implementation has no such thing.

    Args:
        pattern: the layer's pattern.
        key: [num_key_value_heads, N, head_dim].
        key_offset: position of the first key.
    """
    implementation = _implementation(pattern.config.implementation, key.device)
    if not hasattr(implementation, "Index") or pattern.dense_rows() is None:
        return None
    if pattern.sliding_window is not None and not implementation.Index.knows_sliding_windows:
        return None
    index: Index = implementation.Index(pattern, len(key), key_offset)
    return index


@_torch.no_grad()
def find_keys(query: Tensor, key: Tensor, pattern: LayerPattern) -> None:
    """Hash the keys of a document and find every sparse row's keys, nothing else: to measure what routing costs.

    Args:
        query: [num_heads, N, head_dim].
        key: [num_key_value_heads, N, head_dim].
        pattern: the layer's pattern, in the dtype that is computed in; "reference" does not find keys by themselves.
    """
    implementation = _implementation(pattern.config.implementation, query.device)
    dtype = _dtype(implementation, query, key)
    if pattern.dense_rows() is not None:
        implementation.find_keys(query.to(dtype), key.to(dtype), pattern)


def check_implementation(name: str, device: _torch.device) -> None:
    """Whether the implementation that a config names runs on a device.

    Raises:
        ValueError: if it does not run there.
        ImportError: if it needs a package that is not installed or cannot be used.
    """
    _implementation(name, device)


def _implementation(name: str, device: _torch.device) -> _Any:
    """The module that the config's `implementation` means on a device."""
    if name == "auto":
        name = _best(device)
    if name == "numba" and device.type != "cpu":
        raise ValueError(f'implementation="numba" runs on a CPU only, not on {device}; choose "auto" or "torch"')
    if name == "numba" and not _installed("numba"):
        raise ModuleNotFoundError(
            'implementation="numba" needs Numba: pip install \'hf_sparse_attn[cpu]\', or choose "auto" or "torch"'
        )
    if name == "triton" and not _installed("triton"):
        raise ModuleNotFoundError(
            'implementation="triton" needs Triton: pip install triton, or choose "auto" or "torch"'
        )
    if name == "triton" and device.type != "cuda" and _environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f'implementation="triton" runs on a GPU only, not on {device}; choose "auto" or "torch"')
    failure = _failure(name)
    if failure is not None:
        raise ImportError(
            f'implementation="{name}": {name.capitalize()} is installed but cannot be used here, {failure}; '
            'choose "auto" or "torch"'
        ) from failure
    return _import_module(f"hf_sparse_attn.ops.{name}")


def _best(device: _torch.device) -> str:
    """What "auto" means: "torch" wherever there is nothing faster. Triton's kernels multiply bfloat16 and tf32."""
    best = "torch"
    if device.type == "cpu" and _installed("numba"):
        best = "numba"
    if device.type == "cuda" and _torch.version.cuda and _installed("triton"):
        best = "triton" if _torch.cuda.get_device_capability(device) >= (8, 0) else "torch"
    return best if _usable(best) else "torch"


@_cache
def _usable(name: str) -> bool:
    """Whether an implementation can be loaded; if not, a warning says so, once."""
    failure = _failure(name)
    if failure is not None:
        _getLogger("hf_sparse_attn").warning(
            f"{name.capitalize()} is installed but cannot be used here, {failure}; PyTorch's operations are slower"
        )
    return failure is None


@_cache
def _failure(name: str) -> Exception | None:
    """What comes of loading an implementation: compiled libraries that do not fit raise all kinds of errors."""
    try:
        _import_module(f"hf_sparse_attn.ops.{name}")
    except Exception as error:
        return error
    return None


@_cache
def _installed(package: str) -> bool:
    return _find_spec(package) is not None


def _dtype(implementation: _Any, query: Tensor, key: Tensor) -> _torch.dtype:
    """Of the tensors that an implementation is given: Triton's keeps half precision."""
    if getattr(implementation, "KEEPS_HALF", False):
        return _torch.promote_types(query.dtype, key.dtype)
    return compute_dtype(query, key)


def compute_dtype(query: Tensor, key: Tensor) -> _torch.dtype:
    """float64 if an input is, else float32."""
    return _torch.promote_types(_torch.promote_types(query.dtype, key.dtype), _torch.float32)
