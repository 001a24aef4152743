"""One call of the attention function, once it is known which pattern the layer has: masks to documents to ops."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from hf_sparse_attn import ops
from hf_sparse_attn.cache.document_indexes import KeyIndexes
from hf_sparse_attn.cache.evicting import KeptKeys
from hf_sparse_attn.masks.documents import Document
from hf_sparse_attn.masks.mask_function import check_lengths, reads_both_sides
from hf_sparse_attn.masks.read import read_documents
from hf_sparse_attn.ops.checks import check_scores
from hf_sparse_attn.ops.common.dropout import Dropout
from hf_sparse_attn.patterns import LayerPattern, Marked
from hf_sparse_attn.recording import Recorder
from hf_sparse_attn.side_channels import INDEXES, KEPT
from hf_sparse_attn.statistics import statistics_in
from hf_sparse_attn.tracing import carries_gradients

_FEWEST_ROWS = 128  # that are worth more than one call of SDPA


class Inputs(NamedTuple):
    """What Transformers passes to one call.

    Args:
        query: [batch, num_heads, Q, head_dim].
        key, value: [batch, num_key_value_heads, KV, head_dim]; the new ones alone where a cache evicts keys.
        attention_mask: what `masks.mask_function.signed_positions` made, a caller's own 4D mask, or None.
        position_ids: [1 or batch, Q], or None.
        cu_seq_lens: [documents + 1], or None.
        seq_idx: [batch, Q], or None.
        marks: [batch, slots] bool, where `global_token_ids` stand among all tokens that the cache was ever given and
            those of this call, or None.
        sinks: [num_heads], or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    seq_idx: Tensor | None = None
    marks: Tensor | None = None
    sinks: Tensor | None = None


def attention(
    inputs: Inputs,
    pattern: LayerPattern,
    scaling: float,
    softcap: float | None,
    recorder: Recorder | None = None,
    *,
    dropout: Dropout | None = None,
    documents: list[Document] | None = None,
    candidates: list[Tensor] | None = None,
    choose: ops.Chooser | None = None,
) -> Tensor:
    """Sparse attention of a batch with any padding and packing.

    Args:
        inputs: the tensors.
        pattern: the layer's pattern.
        scaling, softcap, recorder: as for `operation.sparse_attention`.
        dropout: of the weights, or None.
        documents: the documents of the batch; None: as the masks say.
        candidates: of each of these `documents`, in place of what the buckets would give; see `AttentionCall`.
        choose: chooses the keys of every document, in place of the buckets.

    Returns:
        [batch, Q, num_heads, head_dim], in query's dtype; zeros for padding.

    Raises:
        ValueError: for a mask or position_ids that cannot be read.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    batch_size, num_heads, q_length, _ = query.shape
    kept: KeptKeys | None = getattr(key, KEPT, None)
    kv_length = key.shape[2] if kept is None else kept.num_slots
    if documents is None and (reads_both_sides(inputs.attention_mask) or not pattern.is_causal):
        check_lengths(q_length, kv_length)
        pattern = dataclasses.replace(pattern, is_causal=False, num_tokens=kv_length)
    indexes: KeyIndexes | None = getattr(key, INDEXES, None)
    step = None if indexes is None else indexes.step
    if step is not None:
        if recorder is not None or choose is not None or documents is not None:
            raise ValueError("a step of fixed shapes records nothing and knows no other choice of keys")
        documents = step.documents(kv_length)
    by_document = dropout is not None or documents is not None or bool(statistics_in(recorder))
    if kept is None and softcap is None and not by_document and _is_dense(inputs, pattern):
        check_scores(scaling, softcap)
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=pattern.is_causal and q_length > 1, scale=scaling, enable_gqa=True
        )
        if recorder is not None:
            recorder.add_dense(pattern, range(batch_size * num_heads), kv_length - q_length, kv_length)
        return output.transpose(1, 2).contiguous()

    every, window = documents, pattern.sliding_window
    if every is None:
        every, window = read_documents(inputs, kv_length, pattern.sliding_window, pattern.is_causal)
    if window != pattern.sliding_window:
        pattern = dataclasses.replace(pattern, sliding_window=window)
    by_gradients = carries_gradients(query, key, value, inputs.sinks)
    if indexes is not None and (by_gradients or choose is not None or not pattern.is_causal):
        for document in every:
            indexes.take_back(document, pattern.layer_idx)  # they hear nothing of the keys that are written now
        indexes = None
    if kept is not None:
        if not pattern.is_causal:
            raise ValueError("a SparseCache with a policy holds keys of causal attention alone")
        if choose is not None:
            raise ValueError("a SparseCache with a policy knows no other choice of keys")
        if by_gradients:
            raise ValueError("a SparseCache with a policy carries no gradients; use torch.no_grad()")
        if inputs.marks is not None:
            raise ValueError("a SparseCache with a policy does not take global_token_ids")
        if pattern.sliding_window is not None:
            raise ValueError("a SparseCache with a policy cannot hold keys of a layer with a sliding window")
        kept.begin(every, batch_size, key.shape[1])

    given: dict[str, Any] = {
        "scaling": scaling,
        "softcap": softcap,
        "sinks": inputs.sinks,
        "recorder": recorder,
    }

    def attend(document: Document, candidates: Tensor | None) -> Tensor:
        slots = document.keys if kept is None else document.queries
        marked = None if inputs.marks is None else _marked(inputs.marks, document, kv_length)
        rows = query[document.batch][:, document.queries]
        keys, values = key[document.batch][:, slots], value[document.batch][:, slots]
        if kept is not None:
            heads_first = kept.attend(document.batch, rows, keys, values, pattern=pattern, **given)
        else:
            heads_first = ops.document_attention(
                rows,
                keys,
                values,
                pattern=pattern if marked is None else dataclasses.replace(pattern, marked=marked),
                query_offset=document.query_offset,
                key_offset=document.key_offset,
                index=None if indexes is None else indexes.of(document, pattern, keys, marked),
                dropout=None if dropout is None else dataclasses.replace(dropout, batch=document.batch),
                candidates=candidates,
                newest=None if step is None else step.newest(document.batch),
                choose=choose,
                **given,
            )
        return heads_first.transpose(0, 1).to(query.dtype)

    chosen = [None] * len(every) if candidates is None else candidates
    if batch_size == 1 and len(every) == 1 and every[0].queries == slice(0, q_length):
        return attend(every[0], chosen[0]).unsqueeze(0)
    output = query.new_zeros(batch_size, q_length, num_heads, value.shape[-1])
    for document, keys_of_rows in zip(every, chosen, strict=True):
        output[document.batch, document.queries] = attend(document, keys_of_rows)
    return output


def _marked(marks: Tensor, document: Document, num_keys: int) -> Marked:
    """The marks of a document's keys, of which a sliding cache may have dropped the first ones."""
    held = marks[document.batch, max(marks.shape[1] - num_keys, 0) :]
    return Marked(held[document.keys].cpu(), document.key_offset)


def _is_dense(inputs: Inputs, pattern: LayerPattern) -> bool:
    """Whether every row reads all keys, or all up to its own, so that SDPA's own call gives the answer, and nobody
    gives it faster."""
    q_length, kv_length = inputs.query.shape[2], inputs.key.shape[2]
    dense_rows = pattern.dense_rows()
    return (
        inputs.attention_mask is None
        and inputs.cu_seq_lens is None
        and inputs.seq_idx is None
        and inputs.sinks is None
        and pattern.config.implementation != "reference"
        and (dense_rows is None or kv_length <= dense_rows)
        and (pattern.sliding_window is None or kv_length <= pattern.sliding_window)
        and q_length in (1, kv_length)
        and not (
            pattern.is_causal
            and q_length >= _FEWEST_ROWS
            and ops.computes_dense_rows(pattern.config.implementation, inputs.query.device)
        )
    )
