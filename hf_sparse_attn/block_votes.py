"""Blocks of keys that blocks of rows choose together, as in MInference (Jiang et al. 2024, arXiv 2407.02490).

Not causal: the last rows of a block have a vote on what its first ones read. Whatever the rows read tells of later
tokens, so a loss that is computed over them means nothing. For the prefill of inference alone; rows after a cached
prefix read everything.

The query of a KV head's block of rows is the mean of its rows' queries, added up over the group, the key of a block the
mean of its keys. Of the blocks before the row's own, the `num_voted_blocks` with the largest products are read. Blocks
are those of `patterns/blocks.py`. MInference votes for every query head by itself; here those of a group share the keys
that are loaded.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import lru_cache

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.ops.common.call import AttentionCall
from hf_sparse_attn.patterns import LayerPattern, not_read, static_positions

_ROWS = 1024  # whose keys are written out together


def with_votes(query: Tensor, key: Tensor, call: AttentionCall) -> AttentionCall:
    """A call whose candidates are the keys of voted blocks; after a cached prefix, one that reads everything.

    Args:
        query: [num_heads, Q, head_dim].
        key: [num_key_value_heads, N, head_dim].
        call: of a pattern with `num_voted_blocks`.

    Raises:
        ValueError: where attention is not causal, and where gradients are to flow.
    """
    pattern = call.pattern
    if not pattern.is_causal:
        raise ValueError("num_voted_blocks know causal attention alone")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        raise ValueError(
            "num_voted_blocks look at later tokens, so a model cannot be trained with them; use torch.no_grad() for "
            "inference"
        )
    if call.query_offset:
        return dataclasses.replace(call, pattern=dataclasses.replace(pattern, config=_everything(pattern.config)))
    return dataclasses.replace(call, candidates=voted_keys(query, key, pattern))


@torch.no_grad()
def voted_keys(query: Tensor, key: Tensor, pattern: LayerPattern) -> Tensor:
    """The keys of voted blocks that rows do not read anyway: see `AttentionCall.candidates`.

    Args:
        query: [num_heads, N, head_dim], a whole document.
        key: [num_key_value_heads, N, head_dim].
        pattern: one with `num_voted_blocks`.

    Returns:
        [num_key_value_heads, N, num_voted_blocks * block_size], int32; negative for none.
    """
    config, num_tokens = pattern.config, key.shape[1]
    size, missing = config.block_size, -config.block_offset % config.block_size
    position = torch.arange(num_tokens, device=key.device)
    block = (position + missing) // size
    num_blocks = int(block[-1]) + 1
    grouped = query.unflatten(0, (len(key), -1)).sum(1)
    scores = _means(grouped, block, num_blocks) @ _means(key, block, num_blocks).transpose(-1, -2)
    number = torch.arange(num_blocks, device=key.device)
    scores = scores.masked_fill(number >= number[:, None], -torch.inf)
    # Of equal scores the later block, as the specification has it.
    order = scores.flip(-1).sort(stable=True, dim=-1, descending=True).indices[..., : config.num_voted_blocks]
    voted = num_blocks - 1 - order
    voted = voted.masked_fill(voted >= number[:, None], -1)
    static = static_positions(config, num_tokens, key.device, marked=pattern.marked)
    inside = torch.arange(size, device=key.device) - missing
    found = key.new_empty(len(key), num_tokens, voted.shape[-1] * size, dtype=torch.int32)
    for head, chosen in enumerate(voted):
        for rows in position.split(_ROWS):
            blocks = chosen[block[rows]][..., None]
            keys = (blocks * size + inside).masked_fill_(blocks < 0, -1).flatten(1)
            found[head, rows] = not_read(pattern, rows, keys, static, config.window_size).int()
    return found


def _means(x: Tensor, block: Tensor, num_blocks: int) -> Tensor:
    """[heads, N, head_dim] -> [heads, num_blocks, head_dim]."""
    sums = x.new_zeros(len(x), num_blocks, x.shape[-1]).index_add_(1, block, x)
    return sums / block.bincount(minlength=num_blocks)[:, None]


@lru_cache(maxsize=64)
def _everything(config: SparseAttentionConfig) -> SparseAttentionConfig:
    return config.replace(dense_below=sys.maxsize, num_voted_blocks=0)
