"""The pattern of one layer: the model's config, what it gives the layer's heads, the model's own restrictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.hashing import BucketHash, layer_hash
from hf_sparse_attn.patterns.marked import Marked
from hf_sparse_attn.tensor_parallel import HeadSplit


@dataclass(frozen=True)
class LayerPattern:
    """The pattern of one layer's attention: the config, the layer's budgets and hash, the model's own restrictions.

    Args:
        config: the model's sparse attention config.
        layer_idx: index of the layer.
        budgets: keys found for a row through the buckets, for each KV head of this process.
        min_weights: smallest softmax weight of a routed key that is read, for each query head of this process.
        bucket_hash: the hash of its KV heads.
        sliding_window: the model's own window (keys with `p - sliding_window < j`), or None.
        marked: where `config.global_token_ids` stand in the document at hand; None: not said, or there are none.
    """

    config: SparseAttentionConfig
    layer_idx: int
    budgets: list[int]
    min_weights: list[float]
    bucket_hash: BucketHash
    sliding_window: int | None = None
    marked: Marked | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerPattern:
        """Itself: copies of a cache know by it which pattern their indexes were made for."""
        return self

    @property
    def is_local(self) -> bool:
        """Whether the model's own window leaves no row more than `dense_below` keys, so that nothing can be sparse."""
        return is_local(self.config, self.sliding_window)

    def dense_rows(self) -> int | None:
        """Rows at positions under this number read everything; None: all of them."""
        all_dense = self.is_local or self.layer_idx in self.config.dense_layers
        return None if all_dense else self.config.dense_below

    def window(self, num_keys: int) -> int:
        """Keys of a row's window, of `num_keys` in all: the config's, inside the model's own."""
        window = min(self.config.window_size, num_keys)
        return window if self.sliding_window is None else min(window, self.sliding_window)


def is_local(config: SparseAttentionConfig, sliding_window: int | None) -> bool:
    """Whether rows of a layer with such a window of its own, or None, have at most `dense_below` keys each."""
    return sliding_window is not None and sliding_window <= config.dense_below


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
) -> LayerPattern:
    """The pattern of one layer, its hash on `device` in `dtype`.

    Args:
        config: the model's sparse attention config, which counts all heads of the layer.
        layer_idx: index of the layer.
        num_heads, num_kv_heads: query and KV heads of this process.
        head_dim: size of each.
        device, dtype: of the hash.
        sliding_window: the model's own window, or None.
        split: which part of the layer's heads this process holds; None: all of them.

    Raises:
        ValueError: if the config's budgets, smallest weights or calibrated hash do not fit the layer, or the layer's
            heads or window are impossible.
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
    if layer_idx in config.dense_layers:  # it may have another shape than those that the config was fitted to
        no_hash = BucketHash.empty(num_kv_heads, head_dim)
        return LayerPattern(config, layer_idx, [0] * num_kv_heads, [0.0] * num_heads, no_hash, sliding_window)
    budgets = config.key_budgets(layer_idx, num_kv_heads * split.size)[kv_heads]
    min_weights = config.min_weights(layer_idx, num_heads * split.size)[heads]
    whole = layer_hash(config, layer_idx, num_kv_heads * split.size, head_dim)
    bucket_hash = BucketHash(whole.weight[kv_heads].to(device, dtype), whole.bias[kv_heads].to(device, dtype))
    return LayerPattern(config, layer_idx, budgets, min_weights, bucket_hash, sliding_window)
