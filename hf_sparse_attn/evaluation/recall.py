"""What of the dense attention the sparse rows find, by layer and head, for each family of hashes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse_attn.calibration.budget_allocation import first_row
from hf_sparse_attn.config import HASHES, SparseAttentionConfig
from hf_sparse_attn.integration import Observer, observe_dense
from hf_sparse_attn.ops import compute_dtype, document_attention
from hf_sparse_attn.patterns import LayerPattern, Marked, layer_pattern
from hf_sparse_attn.tracing import input_device

FAMILIES = (*HASHES, "none")
_BLOCK_ROWS = 16
_MEASURES = ("kept", "best", "recall", "lost", "keys")


def hash_families(
    config: SparseAttentionConfig, names: Iterable[str] | None = None
) -> dict[str, SparseAttentionConfig]:
    """The config with other hashes and everything else alike: its own first, then those of `names`, by name.

    "calibrated" and "random" are the config's hashes, "none" reads no key through buckets (key_budget=0). Without
    names: all that the config has.

    Raises:
        ValueError: for "calibrated" if the config has no calibrated hash.
    """
    if names is None:
        names = [name for name in FAMILIES if name != "calibrated" or config.calibrated_hash is not None]
    return {config.hash: config} | {
        name: config.replace(key_budget=0) if name == "none" else config.replace(hash=name) for name in names
    }


@torch.no_grad()
def measure_recall(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    configs: Mapping[str, SparseAttentionConfig],
    num_rows: int = 64,
    num_top: int = 64,
    progress: Callable[[Any], Any] = iter,
) -> dict[str, dict[str, Any]]:
    """Measure on sampled rows of every sparse layer and head, on the dense model's own queries and keys.

    Every document goes through the model once. Of a row, with w the weights of its dense softmax over all admissible
    keys, S the keys that it reads (all of them: window, static and those found through buckets) and T the `num_top`
    admissible keys with the largest w (all admissible ones where there are fewer):

        kept = sum of w over S      best = sum of the |S| largest w      recall = |S & T| / |T|      keys = |S|

    Args:
        model: with attn_implementation="sparse"; left as it was. A softcap or sinks of its own are left out of w and S.
        documents: [N] int64 token ids each, N at least 16 more than `first_row` of every config.
        configs: what is measured, by name.
        num_rows: sparse rows sampled per document.
        num_top: size of T.
        progress: wraps the iteration over the documents.

    Returns:
        For each name a JSON-ready dict of means over rows, heads and sparse layers: "kept", "best", "recall", "keys",
        "lost" (share of rows with kept < 0.5) and "ratio" (of the means of kept and best); and "layers": per layer a
        list with the same per head, or {"dense": True} for a dense layer, or None for one without attention.

    Raises:
        ValueError: if the model has no sparse layer under one of the configs.
    """
    sums: dict[str, dict[int, Tensor]] = {name: {} for name in configs}
    for document in progress(documents):
        with observe_dense(model, _observer(configs, document, num_rows, num_top, sums)):
            model.base_model(input_ids=document[None].to(input_device(model)), use_cache=False)
    return {name: _report(layers) for name, layers in sums.items()}


def _observer(
    configs: Mapping[str, SparseAttentionConfig],
    document: Tensor,
    num_rows: int,
    num_top: int,
    sums: dict[str, dict[int, Tensor]],
) -> Observer:
    """Adds to `sums` by name and layer: [num_heads, measures and number of rows]; without any head in dense layers."""
    first = max(map(first_row, configs.values()))

    def observer(dense: LayerPattern, query: Tensor, key: Tensor, value: Tensor, scaling: float, _: Tensor) -> None:
        layer, sliding_window = dense.layer_idx, dense.sliding_window
        num_heads, num_tokens, head_dim = query.shape[1:]
        dtype = compute_dtype(query, key)
        patterns = {}
        for name, config in configs.items():
            pattern = layer_pattern(
                config, layer, num_heads, key.shape[1], head_dim, query.device, dtype, sliding_window
            )
            measured_heads = 0 if pattern.dense_rows() is None else num_heads
            sums[name].setdefault(layer, torch.zeros(measured_heads, len(_MEASURES) + 1, dtype=torch.float64))
            if measured_heads:
                marked = Marked.in_document(document, config.global_token_ids)
                patterns[name] = replace(pattern, marked=marked)
        if not patterns:
            return
        num_blocks = max(num_rows // _BLOCK_ROWS, 1)
        starts = torch.linspace(first, num_tokens - _BLOCK_ROWS, num_blocks, dtype=torch.float32).long().tolist()
        for start in starts:
            stop = start + _BLOCK_ROWS
            rows, keys = query[0, :, start:stop].to(dtype), key[0, :, :stop].to(dtype)
            truth = _DenseRows.of(rows, keys, start, scaling, dense, num_top)
            for name, pattern in patterns.items():
                document_attention(
                    rows,
                    keys,
                    value[0, :, :stop],
                    pattern=pattern,
                    query_offset=start,
                    key_offset=0,
                    scaling=scaling,
                    recorder=_RecallRecorder(truth, sums[name][layer]),
                )

    return observer


@dataclass(frozen=True)
class _DenseRows:
    """What the dense attention does in R rows of one layer.

    Args:
        start: position of the first row.
        weights: [num_heads, R, N], softmax over the admissible keys.
        best: [num_heads, R, N], sum of the 1, 2, ... largest weights.
        top: [num_heads, R, T], keys with the largest weights; after the admissible ones, others.
        num_top: [R], how many of `top` are admissible.
    """

    start: int
    weights: Tensor
    best: Tensor
    top: Tensor
    num_top: Tensor

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, start: int, scaling: float, pattern: LayerPattern, num_top: int
    ) -> _DenseRows:
        position = torch.arange(start, start + query.shape[1], device=key.device)[:, None]
        column = torch.arange(key.shape[1], device=key.device)
        admissible = pattern.admissible(position - column)
        scores = query @ key.repeat_interleave(len(query) // len(key), 0).transpose(-1, -2) * scaling
        scores = scores.masked_fill(~admissible, -torch.inf)
        ranked = scores.sort(-1, descending=True)
        return cls(
            start,
            scores.softmax(-1),
            ranked.values.softmax(-1).cumsum(-1),
            ranked.indices[..., :num_top],
            admissible.sum(-1).clamp(max=num_top),
        )


@dataclass(frozen=True)
class _RecallRecorder:
    """Compares what rows read with the dense rows and adds it up in `sums` [num_heads, measures and number of rows]."""

    truth: _DenseRows
    sums: Tensor

    def add(
        self,
        pattern: LayerPattern,
        head: int,
        position: Tensor,
        num_attended: int,
        num_scored: int,
        read: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        row = position - self.truth.start
        weights, best, top = (x[head, row] for x in (self.truth.weights, self.truth.best, self.truth.top))
        attended, keys = read()
        is_read = torch.zeros_like(weights, dtype=torch.bool)
        is_read[attended.nonzero()[:, 0], keys[attended].long()] = True
        count = is_read.sum(-1)
        kept = (weights * is_read).sum(-1)
        measures = {
            "kept": kept,
            "best": best.gather(1, count[:, None] - 1).squeeze(1),
            "recall": is_read.gather(1, top).sum(-1).double() / self.truth.num_top[row],
            "lost": kept < 0.5,
            "keys": count,
        }
        self.sums[head, :-1] += torch.stack([measures[name].double().sum() for name in _MEASURES]).cpu()
        self.sums[head, -1] += len(row)

    def add_dense(self, pattern: LayerPattern, heads: range, start: int, stop: int) -> None:
        """Only sparse rows are asked for."""


def _report(layers: dict[int, Tensor]) -> dict[str, Any]:
    if not any(map(len, layers.values())):
        raise ValueError("no layer of the model has sparse attention: there is nothing to measure")
    reports: list[Any] = [None] * (max(layers) + 1)
    for layer, heads in layers.items():
        reports[layer] = [_summary(head) for head in heads] or {"dense": True}
    return _summary(torch.cat(list(layers.values())).sum(0)) | {"layers": reports}


def _summary(sums: Tensor) -> dict[str, float]:
    means = dict(zip(_MEASURES, (sums[:-1] / sums[-1]).tolist(), strict=True))
    return means | {"ratio": means["kept"] / means["best"]}
