"""The attention as an operation on queries, keys and values, for programs without a Transformers model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn import ops
from hf_sparse_attn.attention import Inputs, attention
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.custom_op import compiled_attention
from hf_sparse_attn.errors import ArgumentError, check_integer
from hf_sparse_attn.masks.documents import Document
from hf_sparse_attn.masks.mask_function import signed_positions
from hf_sparse_attn.masks.read import read_documents
from hf_sparse_attn.ops.common.dropout import Dropout
from hf_sparse_attn.pattern_fields import FROM_THE_ROW, OVERRIDABLE, PATTERN_FIELDS
from hf_sparse_attn.patterns import LayerPattern, layer_pattern
from hf_sparse_attn.recording import Recorder
from hf_sparse_attn.tensor_parallel import HeadSplit
from hf_sparse_attn.tracing import is_traced, refuse_transforms

MODES = ("routed", "all", "local", "strided")


@dataclass(frozen=True)
class SparseIndex:
    """The keys that `build_index` has chosen, to be applied many times.

    Of each row, the keys that the buckets gave it are listed; its window and the other patterns follow from `config`.

    Args:
        config: what it was built by.
        layer_idx: the layer, likewise.
        shape: batch, KV heads, Q and N of the queries and keys that it fits.
        is_causal: whether rows see no later keys.
        documents: which tokens belong together, by the masks that it was built with.
        candidates: for each document [num_key_value_heads, Q, K] int32, indices of keys in the document, negative for
            none.
    """

    config: SparseAttentionConfig
    layer_idx: int
    shape: tuple[int, int, int, int]
    is_causal: bool
    documents: list[Document]
    candidates: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of memory: 4 for each row and key."""
        return sum(rows.nbytes for rows in self.candidates)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: SparseAttentionConfig,
    layer_idx: int = 0,
    is_causal: bool = True,
    cross_attention: bool = False,
    mode: str = "routed",
    key_padding_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: int | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    recorder: Recorder | None = None,
) -> Tensor:
    """Sparse attention: softmax(scaling * query . key over S(row)) . value.

    S(row) is defined in `SparseAttentionConfig`. The last query belongs to the last key, so Q < N continues a document
    whose first N - Q keys are cached; in cross-attention, queries and keys are of different documents, of any lengths.

    Args:
        query: [batch, num_heads, Q, head_dim]; any float dtype, computed in float32 or float64.
        key, value: [batch, num_key_value_heads, N, head_dim]; num_heads is a multiple of num_key_value_heads.
        config: which keys each row reads, and `config.implementation`.
        layer_idx: layer whose budget and hash apply.
        is_causal: False: rows read keys on both sides; of `config.implementation`, "reference" and "torch" can.
        cross_attention: with is_causal=False, rows have no place among the keys, so there is no window, and
            patterns that count from the row are refused: rows read the global and strided keys, their random ones, and
            those that the buckets give them out of all.
        mode: see `in_mode`.
        key_padding_mask: [batch, N], bool, True for tokens and False for padding, on either side or between; a query
            that is padding gives zeros. (`torch.nn.MultiheadAttention` has it the other way round.)
        attention_mask: [Q, N], [batch, Q, N] or [batch, 1, Q, N], bool, True where the row may read the key. It must
            describe attention inside documents, causal unless is_causal is False, whatever the padding and packing;
            positions count from the first token of the row's own document. Not for cross-attention, nor for Q < N where
            is_causal is False.
        dropout: probability with which each weight is dropped, after the softmax; the others are divided by
            1 - dropout. At least 0 and under 1; "numba" and "triton" refuse it.
        dropout_seed: what is dropped is a hash of this number (at least 0, under 2**63), the batch row, the head and
            the positions of row and key: the same in a recompute. Needed for dropout > 0.
        scaling: factor on query . key; head_dim ** -0.5 if None.
        softcap: scores become softcap * tanh(score / softcap) before the softmax (Gemma 2, arXiv 2408.00118).
        sinks: [num_heads], logits that take part in each softmax but carry no value (gpt-oss, arXiv 2508.10925).
        recorder: is told which keys each row read, such as `AttentionStatistics`.

    Returns:
        [batch, num_heads, Q, head_dim of value], in query's dtype.

    Raises:
        ValueError: for shapes that do not fit together, masks of another kind, impossible numbers, and under
            torch.jit.trace or torch.func.
    """
    refuse_transforms()
    check_config(config)
    _check_shapes(query, key, value, is_causal, cross_attention)
    drop = _dropout(dropout, dropout_seed)
    inputs = _inputs(query, key, value, is_causal, cross_attention, key_padding_mask, attention_mask, sinks)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_traced(query):
        if mode != "routed":
            raise ArgumentError("mode", "torch.compile and torch.export need a config that `in_mode` made before")
        refused: dict[str, Any] = {"dropout": drop, "recorder": recorder, "attention_mask": attention_mask}
        refused["cross_attention"] = cross_attention or None
        for name, given in refused.items():
            if given is not None:
                raise ArgumentError(name, "torch.compile and torch.export do not support it in sparse_attention")
        output = compiled_attention(inputs, config.text, layer_idx, HeadSplit(), None, scaling, softcap, is_causal)
    else:
        pattern = _pattern(in_mode(config, mode), layer_idx, query, key, is_causal)
        documents = None if is_causal else _documents(inputs, key_padding_mask, cross_attention, pattern)
        output = attention(inputs, pattern, scaling, softcap, recorder, dropout=drop, documents=documents)
    return output.transpose(1, 2)


def build_index(
    query: Tensor,
    key: Tensor,
    *,
    config: SparseAttentionConfig,
    layer_idx: int = 0,
    is_causal: bool = True,
    cross_attention: bool = False,
    mode: str = "routed",
    key_padding_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> SparseIndex:
    """Choose the keys of every row once, for `apply_index`. No gradient flows through the choice.

    Args:
        query, key, config, layer_idx, is_causal, cross_attention, mode, key_padding_mask, attention_mask: as of
            `sparse_attention`.

    Returns:
        An index of at most Q x key_budget numbers for each KV head.

    Raises:
        ValueError: as `sparse_attention`; for an implementation other than "auto", "torch" and "reference"; and inside
            torch.compile and torch.export.
    """
    refuse_transforms()
    _refuse_tracing(query)
    check_config(config)
    _check_shapes(query, key, key, is_causal, cross_attention)
    inputs = _inputs(query, key, key, is_causal, cross_attention, key_padding_mask, attention_mask, None)
    config = in_mode(config, mode)
    pattern = _pattern(config, layer_idx, query, key, is_causal)
    documents = _documents(inputs, key_padding_mask, cross_attention, pattern)
    candidates = [
        ops.find_candidates(
            query[document.batch][:, document.queries],
            key[document.batch][:, document.keys],
            pattern=pattern,
            query_offset=document.query_offset,
            key_offset=document.key_offset,
        )
        for document in documents
    ]
    return SparseIndex(config, layer_idx, _shape(query, key), is_causal, documents, candidates)


def apply_index(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: SparseIndex,
    *,
    dropout: float = 0.0,
    dropout_seed: int | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    recorder: Recorder | None = None,
) -> Tensor:
    """Sparse attention over keys that were chosen before, from these tensors or others, such as another layer's.

    Built from the same query and key, it is `sparse_attention`. Rows score the candidates of the index in place of
    those that their own buckets would give, and read those of weight at least `min_weight`, as ever.

    Args:
        query, key, value: as of `sparse_attention`, with the batch, KV heads, Q and N of the index.
        index: what `build_index` returned, its masks included.
        dropout, dropout_seed, scaling, softcap, sinks, recorder: as of `sparse_attention`.

    Returns:
        [batch, num_heads, Q, head_dim of value], in query's dtype; gradients flow to query, key, value and sinks.

    Raises:
        ValueError: as `build_index`, and where the index is one of other shapes.
    """
    refuse_transforms()
    _refuse_tracing(query)
    if not isinstance(index, SparseIndex):
        raise ArgumentError("index", f"must be what build_index returned, got {type(index).__name__}")
    _check_shapes(query, key, value, index.is_causal, not index.is_causal)
    if index.shape != _shape(query, key):
        raise ArgumentError(
            "index", f"must be one of batch, KV heads, queries and keys {_shape(query, key)}, got {index.shape}"
        )
    drop = _dropout(dropout, dropout_seed)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    pattern = _pattern(index.config, index.layer_idx, query, key, index.is_causal)
    chosen: dict[str, Any] = {"documents": index.documents, "candidates": index.candidates}
    inputs = Inputs(query, key, value, sinks=sinks)
    return attention(inputs, pattern, scaling, softcap, recorder, dropout=drop, **chosen).transpose(1, 2)


def in_mode(config: SparseAttentionConfig, mode: str) -> SparseAttentionConfig:
    """A config that reads less, or everything, by one word.

    Args:
        config: the config.
        mode: "routed" is the config as it is. "all" reads every key. "local" reads the window and the global keys
            (`num_global_tokens`, `global_token_indices`). "strided" reads these and every `stride`-th key; where the
            config has no stride, it is `window_size` (Sparse Transformer, arXiv 1904.10509). In "local" and "strided"
            `dense_below` is 0.

    Raises:
        ArgumentError: for another mode.
    """
    if mode not in MODES:
        raise ArgumentError("mode", f"must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "routed":
        return config
    if mode == "all":
        return config.replace(dense_below=sys.maxsize)
    kept = ["window_size", "num_global_tokens", "global_token_indices"]
    if mode == "strided" and config.stride:
        kept += ["stride", "stride_offset", "stride_width"]
    off = {name: getattr(SparseAttentionConfig, name) for name in (*PATTERN_FIELDS, *OVERRIDABLE) if name not in kept}
    if mode == "strided" and not config.stride:
        off["stride"] = config.window_size
    return config.replace(key_budget=0, dense_below=0, **off)


def check_config(config: Any) -> None:
    """Make sure that tensors alone say what a config's rows read.

    Raises:
        ArgumentError: if it is no config, or names tokens by their ids.
    """
    if not isinstance(config, SparseAttentionConfig):
        raise ArgumentError("config", f"must be a SparseAttentionConfig, got {type(config).__name__}")
    if config.global_token_ids:
        raise ArgumentError("config", "global_token_ids needs a model; name positions by global_token_indices")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, cross_attention: bool) -> None:
    if is_causal and cross_attention:
        raise ArgumentError("cross_attention", "is never causal; give is_causal=False as well")
    if query.ndim != 4 or key.ndim != 4 or key.shape[:3] != value.shape[:3] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "query, key and value must be [batch, heads, tokens, head_dim] with one head_dim; got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    too_many = query.shape[2] > key.shape[2] and not cross_attention
    if len(query) != len(key) or not key.shape[1] or query.shape[1] % key.shape[1] or too_many:
        raise ValueError(
            "query must have key's batch, a multiple of its heads and at most its tokens; got "
            f"query {tuple(query.shape)} and key {tuple(key.shape)}"
        )


def _shape(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    return len(key), key.shape[1], query.shape[2], key.shape[2]


def _refuse_tracing(query: Tensor) -> None:
    if is_traced(query):
        raise ValueError("torch.compile and torch.export do not support build_index and apply_index")


def check_dropout(p: Any) -> None:
    """Make sure that a value is a probability that leaves something.

    Raises:
        ArgumentError: if it is not.
    """
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ArgumentError("dropout", f"must be a number of at least 0 and under 1, got {p!r}")


def _dropout(p: float, seed: int | None) -> Dropout | None:
    check_dropout(p)
    if p == 0:
        return None
    if seed is None:
        raise ArgumentError("dropout_seed", f"dropout={p} needs an integer that says what is dropped, got None")
    check_integer("dropout_seed", seed, 0)
    return Dropout(p, seed)


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    cross_attention: bool,
    key_padding_mask: Tensor | None,
    attention_mask: Tensor | None,
    sinks: Tensor | None,
) -> Inputs:
    """The tensors of a call, and its masks as one that `masks.read` reads."""
    batch_size, num_queries, num_keys = len(query), query.shape[2], key.shape[2]
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, [(batch_size, num_keys)], "for tokens and False for padding")
    if attention_mask is not None and cross_attention:
        raise ArgumentError("attention_mask", "is not for cross-attention; give a key_padding_mask")
    if attention_mask is not None and not is_causal and num_queries != num_keys:
        raise ArgumentError(
            "attention_mask",
            f"of non-causal attention needs a row for each of the {num_keys} keys, got {num_queries} queries; give a "
            "key_padding_mask",
        )
    if attention_mask is not None:
        pairs = num_queries, num_keys
        shapes = [pairs, (batch_size, *pairs), (batch_size, 1, *pairs)]
        _check_mask("attention_mask", attention_mask, shapes, "where the row may read the key")
        while attention_mask.ndim < 4:
            attention_mask = attention_mask.unsqueeze(-3)
        if key_padding_mask is not None:
            attention_mask = attention_mask & key_padding_mask[:, None, None]
            if not is_causal:  # causal rows that do not read their own token are padding by that alone
                attention_mask = attention_mask & key_padding_mask[:, None, num_keys - num_queries :, None]
        attention_mask = attention_mask.expand(batch_size, 1, -1, -1)
    elif key_padding_mask is not None and not cross_attention:
        attention_mask = signed_positions(
            *(batch_size, num_queries, num_keys, num_keys - num_queries),
            attention_mask=key_padding_mask,
            device=query.device,
        )
    return Inputs(query, key, value, attention_mask, sinks=sinks)


def _documents(
    inputs: Inputs, key_padding_mask: Tensor | None, cross_attention: bool, pattern: LayerPattern
) -> list[Document]:
    """The documents of a batch; of cross-attention, queries and the keys of another one that are no padding."""
    num_queries, num_keys = inputs.query.shape[2], inputs.key.shape[2]
    if not cross_attention:
        return read_documents(inputs, num_keys, None, pattern.is_causal)[0]
    configs = [part.config for _, part in pattern.parts]
    for config in configs:
        for name in FROM_THE_ROW:
            if getattr(config, name):
                raise ArgumentError(name, "rows of cross-attention have no place among the keys that it counts from")
    documents, beyond = [], max(config.window_size for config in configs)
    for batch in range(len(inputs.query)):
        keys: slice | Tensor = slice(0, num_keys)
        if key_padding_mask is not None and not bool(key_padding_mask[batch].all()):
            keys = torch.nonzero(key_padding_mask[batch]).flatten()
        count = num_keys if isinstance(keys, slice) else len(keys)
        if count:  # else the rows give zeros
            documents.append(Document(batch, slice(0, num_queries), keys, count + beyond, 0))
    return documents


def _check_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]], meaning: str) -> None:
    if mask.dtype != torch.bool:
        raise ArgumentError(name, f"must be bool, True {meaning}; got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        allowed = " or ".join(map(str, shapes))
        raise ArgumentError(name, f"must be of shape {allowed}, got {tuple(mask.shape)}")


def _pattern(
    config: SparseAttentionConfig, layer_idx: int, query: Tensor, key: Tensor, is_causal: bool
) -> LayerPattern:
    heads = query.shape[1], key.shape[1], query.shape[-1]
    others = query.device, ops.compute_dtype(query, key), None, None, is_causal
    return _cached_pattern(config, layer_idx, *heads, *others)


@lru_cache(maxsize=64)
def _cached_pattern(config: SparseAttentionConfig, layer_idx: int, *layer: Any) -> LayerPattern:
    with torch.inference_mode(False):  # what is kept serves calls with gradients, too
        return layer_pattern(config, layer_idx, *layer)
