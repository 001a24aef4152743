"""The operation on queries, keys and values: its patterns, a call of it, what its rows read."""

import dataclasses

import torch

from helpers.families import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS
from hf_sparse_attn import ops
from hf_sparse_attn.hashing import encode_calibrated_hash
from hf_sparse_attn.patterns import layer_pattern

SCALING = 0.4  # of `attend`


def calibrated_hash_text(num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, seed=0):
    """A calibrated hash of two codebooks of four codewords each, fitted to nothing."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_layers, num_kv_heads, head_dim, 2, 4, generator=generator)
    return encode_calibrated_hash(weight, torch.randn(num_layers, num_kv_heads, 2, 4, generator=generator))


def make_pattern(
    config,
    num_heads,
    num_kv_heads,
    head_dim,
    layer_idx=0,
    sliding_window=None,
    dtype=torch.float64,
    device="cpu",
    is_causal=True,
):
    heads = num_heads, num_kv_heads, head_dim
    return layer_pattern(config, layer_idx, *heads, torch.device(device), dtype, sliding_window, is_causal=is_causal)


class KeyMask:
    """A recorder that writes down S(row) as a boolean mask and refuses a key that is read twice."""

    def __init__(self, num_heads, num_queries, num_keys, query_offset=0, key_offset=0):
        self.count = torch.zeros(num_heads, num_queries, num_keys, dtype=torch.int64)
        self.query_offset, self.key_offset = query_offset, key_offset

    def add(self, pattern, head, position, num_attended, num_scored, read):
        attended, keys = read()
        assert num_attended == attended.sum()
        row, column = attended.cpu().nonzero(as_tuple=True)
        keys, position = keys.cpu()[row, column] - self.key_offset, position.cpu()
        assert (keys >= 0).all()
        assert (keys < self.count.shape[-1]).all()
        ones = torch.ones_like(keys)
        self.count[head].index_put_((position[row] - self.query_offset, keys), ones, accumulate=True)

    def add_dense(self, pattern, heads, start, stop):
        position = torch.arange(start, stop)[:, None]
        key = torch.arange(self.count.shape[-1]) + self.key_offset
        distance = position - key if pattern.is_causal else (position - key).abs()
        admissible = distance >= 0
        if pattern.sliding_window is not None:
            admissible &= distance < pattern.sliding_window
        self.count[heads.start : heads.stop, start - self.query_offset : stop - self.query_offset] += admissible

    @property
    def mask(self):
        assert self.count.max() <= 1, "a row reads a key twice"
        return self.count.bool()


def attend(query, key, value, pattern, implementation="torch", query_offset=None, key_offset=0, **others):
    """`ops.document_attention` with an implementation of one's choice; the last query at the last key."""
    pattern = dataclasses.replace(pattern, config=pattern.config.replace(implementation=implementation))
    return ops.document_attention(
        query,
        key,
        value,
        pattern=pattern,
        query_offset=key_offset + key.shape[1] - query.shape[1] if query_offset is None else query_offset,
        key_offset=key_offset,
        scaling=SCALING,
        **others,
    )
