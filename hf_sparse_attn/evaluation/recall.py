"""How much of the dense attention's mass the sparse rows keep, against the best possible keys of the same number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.integration import Observer, observe_dense
from hf_sparse_attn.ops import compute_dtype, document_attention
from hf_sparse_attn.routing import LayerPattern, layer_pattern

_BLOCK_ROWS = 16


@torch.no_grad()
def kept_mass(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    config: SparseAttentionConfig,
    num_rows: int = 64,
    progress: Callable[[Any], Any] = iter,
) -> dict[str, Any]:
    """Measure on sampled rows of every layer and head, on the dense model's own queries and keys.

    Args:
        model: with attn_implementation="sparse"; left as it was.
        documents: [N] int64 token ids each.
        config: whose routing is measured.
        num_rows: sparse rows sampled per document.
        progress: wraps the iteration over the documents.

    Returns:
        A JSON-ready dict: "kept" and "best" (mean attention mass of the rows' own keys, and of the same number of keys
        with the largest weights), "ratio" (their quotient), "lost" (share of rows that keep less than half), "keys"
        (mean number per row), and "layers" (per layer, per head: the same).
    """
    totals: dict[tuple[int, int], Tensor] = {}
    for document in progress(documents):
        with observe_dense(model, _observer(config, num_rows, totals)):
            model.base_model(input_ids=document[None].to(model.device), use_cache=False)
    if not totals:
        raise ValueError("model: its attention never goes through Transformers' attention registry")
    num_layers = max(layer for layer, _ in totals) + 1
    num_heads = max(head for _, head in totals) + 1
    return _summary(sum(totals.values())) | {  # type: ignore[arg-type]
        "layers": [[_summary(totals[layer, head]) for head in range(num_heads)] for layer in range(num_layers)]
    }


class _MassRecorder:
    """Adds up (kept, best, lost, keys, rows) per head for the rows that it is told of."""

    def __init__(
        self, query: Tensor, key: Tensor, start: int, scaling: float, totals: dict[tuple[int, int], Tensor]
    ) -> None:
        self.query, self.key, self.start, self.scaling, self.totals = query, key, start, scaling, totals

    def add(
        self, pattern: LayerPattern, head: int, position: Tensor, attended: Tensor, keys: Callable[[], Tensor]
    ) -> None:
        group = len(self.query) // len(self.key)
        scores = self.query[head, position - self.start] @ self.key[head // group].T * self.scaling
        column = torch.arange(scores.shape[-1], device=scores.device)
        inadmissible = column > position[:, None]
        if pattern.sliding_window is not None:
            inadmissible |= column <= position[:, None] - pattern.sliding_window
        weights = scores.masked_fill(inadmissible, -torch.inf).softmax(-1)
        index = keys().long().clamp(0, scores.shape[-1] - 1)
        kept = (weights.gather(1, index) * attended).sum(-1)
        count = attended.sum(-1)
        largest = weights.sort(-1, descending=True).values.cumsum(-1)
        best = largest.gather(1, count[:, None] - 1).squeeze(1)
        result = torch.stack([kept.sum(), best.sum(), (kept < 0.5).sum(), count.sum(), torch.tensor(len(position))])
        self.totals[pattern.layer_idx, head] = self.totals.get((pattern.layer_idx, head), 0) + result.double().cpu()

    def add_dense(self, pattern: LayerPattern, heads: range, start: int, stop: int) -> None:
        """Dense rows keep everything and are not what is measured."""


def _observer(config: SparseAttentionConfig, num_rows: int, totals: dict[tuple[int, int], Tensor]) -> Observer:
    def observer(dense: LayerPattern, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        num_heads, num_tokens, head_dim = query.shape[1:]
        dtype = compute_dtype(query, key)
        pattern = layer_pattern(
            config,
            dense.layer_idx,
            num_heads,
            key.shape[1],
            head_dim,
            query.device,
            dtype,
            dense.sliding_window,
        )
        if pattern.dense_rows() is None:
            return
        first = max(config.dense_below, config.window_size)
        starts = torch.linspace(first, num_tokens - _BLOCK_ROWS, max(num_rows // _BLOCK_ROWS, 1)).long().tolist()
        for start in starts:
            stop = start + _BLOCK_ROWS
            rows, keys = query[0, :, start:stop].to(dtype), key[0, :, :stop].to(dtype)
            document_attention(
                rows,
                keys,
                value[0, :, :stop],
                pattern=pattern,
                query_offset=start,
                key_offset=0,
                scaling=scaling,
                recorder=_MassRecorder(rows, keys, start, scaling, totals),
            )

    return observer


def _summary(total: Tensor) -> dict[str, float]:
    kept, best, lost, keys, rows = total.tolist()
    return {"kept": kept / rows, "best": best / rows, "ratio": kept / best, "lost": lost / rows, "keys": keys / rows}
