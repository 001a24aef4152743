"""The bucket of each key: a Triton kernel, and the keys sorted by bucket."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton.arguments import HashSizes, HashTables
from hf_sparse_attn.ops.triton.launch import TL, rows_contiguous, strided
from hf_sparse_attn.ops.triton.primitives import load_keys
from hf_sparse_attn.patterns import LayerPattern

_BLOCK = 64


@triton.jit
def buckets_of(key, head, n, num_keys, tables, HASH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Buckets [BLOCK] of the keys n of one KV head: the digits argmax_c key . weight[:, t, c] + bias[t, c]."""
    HEAD_DIM: tl.constexpr = HASH.HEAD_DIM
    CODEBOOKS: tl.constexpr = HASH.CODEBOOKS
    CODEBOOKS_PADDED: tl.constexpr = HASH.CODEBOOKS_PADDED
    CODE_BITS: tl.constexpr = HASH.CODE_BITS
    BLOCK_K: tl.constexpr = HASH.BLOCK_K
    codes: tl.constexpr = 2**CODE_BITS
    columns: tl.constexpr = CODEBOOKS * codes
    weight = tables.weight + head * HEAD_DIM * columns
    bias = tables.bias + head * columns
    c = tl.arange(0, CODEBOOKS_PADDED * codes)
    scores = tl.load(bias + c, mask=c < columns, other=0.0)[None, :]
    scores += tl.zeros((BLOCK, CODEBOOKS_PADDED * codes), ACC)
    for low in range(0, HEAD_DIM, BLOCK_K):
        d = low + tl.arange(0, BLOCK_K)
        x = load_keys(key, head, n, n < num_keys, d, HEAD_DIM)
        w = tl.load(
            weight + d[:, None] * columns + c[None, :],
            mask=(d < HEAD_DIM)[:, None] & (c < columns)[None, :],
            other=0.0,
        )
        scores = tl.dot(x.to(ACC), w, scores, input_precision="ieee", out_dtype=ACC)
    digits = tl.argmax(tl.reshape(scores, (BLOCK, CODEBOOKS_PADDED, codes)), 2)
    t = tl.arange(0, CODEBOOKS_PADDED)
    place = CODE_BITS * (CODEBOOKS - 1 - t)
    spelled = tl.where((t < CODEBOOKS)[None, :], digits << tl.where(place > 0, place, 0)[None, :], 0)
    return tl.sum(spelled, 1)


@triton.jit(do_not_specialize=["num_keys"])
def hash_keys_kernel(key, tables, bucket, num_keys, HASH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """bucket [Hkv, N] of all keys."""
    head = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = buckets_of(key, head, n, num_keys, tables, HASH, BLOCK, ACC)
    tl.store(bucket + head * num_keys + n, own, mask=n < num_keys)


def hash_keys(pattern: LayerPattern, key: Tensor) -> Tensor:
    """The bucket of every key: [num_key_value_heads, N, head_dim] -> [num_key_value_heads, N], int32."""
    num_kv_heads, num_keys, _ = key.shape
    bucket = torch.empty(num_kv_heads, num_keys, dtype=torch.int32, device=key.device)
    triton_launch.launch(
        hash_keys_kernel,
        (triton.cdiv(num_keys, _BLOCK), num_kv_heads),
        strided(rows_contiguous(key)),
        hash_tables(pattern),
        bucket,
        num_keys,
        HASH=hash_sizes(pattern),
        BLOCK=_BLOCK,
        ACC=TL[pattern.bucket_hash.weight.dtype],
    )
    return bucket


def hash_tables(pattern: LayerPattern) -> HashTables:
    """A pattern's hash for the kernels, in one piece each."""
    return HashTables(pattern.bucket_hash.weight.contiguous(), pattern.bucket_hash.bias.contiguous())


def hash_sizes(pattern: LayerPattern) -> HashSizes:
    """The sizes that the kernels that hash keys are compiled for."""
    codebooks, codes = pattern.bucket_hash.bias.shape[1:]
    padded = max(triton.next_power_of_2(codebooks), 16 // codes)
    return HashSizes(pattern.bucket_hash.weight.shape[1], codebooks, padded, int(math.log2(codes)), 32)


def sort_by_bucket(bucket: Tensor, num_buckets: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys by bucket, oldest first: buckets in order [Hkv, N], their keys' indices [Hkv, N] int64, each one's start.

    Args:
        bucket: [Hkv, N] int32, `num_buckets` for static keys.
        num_buckets: B.

    Returns:
        The third is [Hkv, B + 1] int32; the static keys start last.
    """
    in_order, order = torch.sort(bucket, dim=1, stable=True)
    edges = torch.arange(num_buckets + 1, device=bucket.device, dtype=torch.int32).expand(len(bucket), -1)
    return in_order, order, torch.searchsorted(in_order, edges.contiguous()).int()
