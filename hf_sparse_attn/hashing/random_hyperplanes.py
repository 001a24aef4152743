"""The hash of models that were never converted: seeded random hyperplanes (SimHash, Charikar 2002)."""

from __future__ import annotations

import torch

from hf_sparse_attn.hashing.bucket_hash import BucketHash


def random_hyperplanes(num_bits: int, seed: int, layer_idx: int, num_kv_heads: int, head_dim: int) -> BucketHash:
    """The hash of one layer, on the CPU in float32; 2**num_bits buckets."""
    # On the CPU in float32, whatever PyTorch's defaults are: another dtype draws other numbers.
    generator = torch.Generator("cpu").manual_seed(seed * 100_003 + layer_idx)
    like = torch.empty(0, dtype=torch.float32, device="cpu")
    normals = torch.randn(
        num_kv_heads, head_dim, num_bits, 1, generator=generator, dtype=like.dtype, device=like.device
    )
    return BucketHash(torch.cat([-normals, normals], -1), like.new_zeros(num_kv_heads, num_bits, 2))
