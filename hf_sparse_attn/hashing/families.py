"""The hash that a config gives a layer, whatever its family."""

from __future__ import annotations

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.hashing.bucket_hash import BucketHash
from hf_sparse_attn.hashing.calibrated import decode_calibrated_hash
from hf_sparse_attn.hashing.random_hyperplanes import random_hyperplanes


def layer_hash(config: SparseAttentionConfig, layer_idx: int, num_kv_heads: int, head_dim: int) -> BucketHash:
    """The hash that `config` gives a layer, on the CPU in float32.

    Raises:
        ValueError: if the calibrated hash is damaged or was fitted for a model of another shape.
    """
    if config.hash == "random":
        return random_hyperplanes(config.num_hash_bits, config.seed, layer_idx, num_kv_heads, head_dim)
    assert config.calibrated_hash is not None  # the config's own check
    weight, bias = decode_calibrated_hash(config.calibrated_hash)
    fitted = (weight.shape[0], weight.shape[1], weight.shape[2])
    if layer_idx >= fitted[0] or (num_kv_heads, head_dim) != fitted[1:]:
        raise ValueError(
            f"calibrated_hash was fitted for {fitted[0]} layers, {fitted[1]} KV heads and head_dim {fitted[2]}, but "
            f"the model has a layer {layer_idx} with {num_kv_heads} KV heads and head_dim {head_dim}"
        )
    return BucketHash(weight[layer_idx], bias[layer_idx])
