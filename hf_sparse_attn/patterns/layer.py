"""The pattern of one layer: the model's config, what it gives the layer's heads, the model's own restrictions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.hashing import BucketHash, layer_hash
from hf_sparse_attn.patterns.marked import Marked
from hf_sparse_attn.tensor_parallel import HeadSplit


@dataclass(frozen=True)
class LayerPattern:
    """The pattern of one layer's attention: the config, the layer's budgets and hash, the model's own restrictions.

    Args:
        config: the layer's sparse attention config, without `by_layer`.
        layer_idx: index of the layer.
        budgets: keys found for a row through the buckets, for each KV head of this process.
        min_weights: smallest softmax weight of a routed key that is read, for each query head of this process.
        bucket_hash: the hash of its KV heads.
        sliding_window: the model's own window (keys with `p - sliding_window < j`), or None.
        is_causal: False: rows read on both sides, and windows reach as far after a row as before it.
        num_tokens: of the document that rows read, where it is known; None where attention is causal.
        kv_head_entries: of each KV head of this process, its entry of `config.by_kv_head`; empty: they have none.
        marked: where `config.global_token_ids` stand in the document at hand; None: not said, or there are none.
    """

    config: SparseAttentionConfig
    layer_idx: int
    budgets: list[int]
    min_weights: list[float]
    bucket_hash: BucketHash
    sliding_window: int | None = None
    is_causal: bool = True
    num_tokens: int | None = None
    kv_head_entries: tuple[int, ...] = ()
    marked: Marked | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerPattern:
        """Itself: copies of a cache know by it which pattern their indexes were made for."""
        return self

    @property
    def is_local(self) -> bool:
        """Whether the model's own window leaves no row more than `dense_below` keys, so that nothing can be sparse."""
        return is_local(self.config, self.sliding_window, self.is_causal)

    def dense_rows(self) -> int | None:
        """Rows at positions under this number read everything; None: all of them.

        Where attention is not causal, that is all rows of a document of at most `dense_below` tokens, or none.
        """
        if self.is_local or self.layer_idx in self.config.dense_layers:
            return None
        if self.num_tokens is None:
            return self.config.dense_below
        return None if self.num_tokens <= self.config.dense_below else 0

    def admissible(self, older: Tensor) -> Tensor:
        """Whether the model itself lets rows see keys that are so much older than they are: bool, of the same shape."""
        seen = older >= 0 if self.is_causal else torch.ones_like(older, dtype=torch.bool)
        return seen if self.sliding_window is None else seen & (older.abs() < self.sliding_window)

    def of_kv_heads(self, kv_heads: slice) -> LayerPattern:
        """The pattern of some of the KV heads, start .. stop - 1, and their query heads."""
        group = len(self.min_weights) // len(self.budgets)
        return replace(
            self,
            budgets=self.budgets[kv_heads],
            min_weights=self.min_weights[kv_heads.start * group : kv_heads.stop * group],
            bucket_hash=BucketHash(self.bucket_hash.weight[kv_heads], self.bucket_hash.bias[kv_heads]),
            kv_head_entries=self.kv_head_entries[kv_heads],
        )

    @cached_property
    def parts(self) -> list[tuple[slice, LayerPattern]]:
        """KV heads side by side with the same entry, and their pattern without `by_kv_head`; at least one part."""
        if not self.kv_head_entries:
            return [(slice(0, len(self.budgets)), self)]
        parts, start = [], 0
        for entry, heads in groupby(self.kv_head_entries):
            kv_heads = slice(start, start := start + len(list(heads)))
            part = replace(self.of_kv_heads(kv_heads), config=self.config.of_entry(entry), kv_head_entries=())
            parts.append((kv_heads, part))
        return parts

    def window(self, num_keys: int) -> int:
        """Keys of a row's window, of `num_keys` in all: the config's, inside the model's own."""
        window = min(self.config.window_size, num_keys)
        return window if self.sliding_window is None else min(window, self.sliding_window)


def is_local(config: SparseAttentionConfig, sliding_window: int | None, is_causal: bool = True) -> bool:
    """Whether rows of a layer with such a window of its own, or None, have at most `dense_below` keys each."""
    if sliding_window is None:
        return False
    return (sliding_window if is_causal else 2 * sliding_window - 1) <= config.dense_below


def layer_pattern(
    config: SparseAttentionConfig,
    layer_idx: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    sliding_window: int | None = None,
    split: HeadSplit | None = None,
    is_causal: bool = True,
) -> LayerPattern:
    """The pattern of one layer, its hash on `device` in `dtype`.

    Args:
        config: the model's sparse attention config, which knows all layers and counts all heads of a layer.
        layer_idx: index of the layer.
        num_heads, num_kv_heads: query and KV heads of this process.
        head_dim: size of each.
        device, dtype: of the hash.
        sliding_window: the model's own window, or None.
        split: which part of the layer's heads this process holds; None: all of them.
        is_causal: whether rows read nothing after them.

    Raises:
        ValueError: if the config's budgets, smallest weights, patterns by head or calibrated hash do not fit the layer,
            or the layer's heads or window are impossible.
    """
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads or head_dim < 1:
        raise ValueError(
            f"query heads must be a multiple of KV heads and head_dim at least 1; got {num_heads} query heads, "
            f"{num_kv_heads} KV heads and head_dim {head_dim}"
        )
    if layer_idx < 0:
        raise ValueError(f"layer_idx must be at least 0, got {layer_idx}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"the model's sliding_window must be at least 1 or None, got {sliding_window}")
    split = split or HeadSplit()
    heads = slice(split.rank * num_heads, (split.rank + 1) * num_heads)
    kv_heads = slice(split.rank * num_kv_heads, (split.rank + 1) * num_kv_heads)
    config = config.of_layer(layer_idx)
    if layer_idx in config.dense_layers:  # it may have another shape than those that the config was fitted to
        no_hash = BucketHash.empty(num_kv_heads, head_dim)
        no_keys = [0] * num_kv_heads, [0.0] * num_heads
        return LayerPattern(config, layer_idx, *no_keys, no_hash, sliding_window, is_causal)
    entries = tuple(config.kv_head_entries(num_kv_heads * split.size)[kv_heads])
    budgets = config.key_budgets(layer_idx, num_kv_heads * split.size)[kv_heads]
    min_weights = config.min_weights(layer_idx, num_heads * split.size)[heads]
    whole = layer_hash(config, layer_idx, num_kv_heads * split.size, head_dim)
    bucket_hash = BucketHash(whole.weight[kv_heads].to(device, dtype), whole.bias[kv_heads].to(device, dtype))
    own = budgets, min_weights, bucket_hash, sliding_window, is_causal
    return LayerPattern(config, layer_idx, *own, kv_head_entries=entries)
