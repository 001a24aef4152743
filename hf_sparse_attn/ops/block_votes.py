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
import math
import sys
from functools import lru_cache

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.ops.common.call import AttentionCall
from hf_sparse_attn.ops.common.chunked import cap, hide, with_sinks
from hf_sparse_attn.patterns import LayerPattern, row_keys, static_positions
from hf_sparse_attn.recording import at_hand


def check_votes(call: AttentionCall) -> None:
    """Make sure that blocks may vote.

    Raises:
        ValueError: where attention is not causal, and where gradients are recorded.
    """
    if not call.pattern.is_causal:
        raise ValueError("num_voted_blocks know causal attention alone")
    if torch.is_grad_enabled():  # also where nothing before this layer is trained: what comes after it may be
        raise ValueError(
            "num_voted_blocks look at later tokens, so nothing can be trained with them; use torch.no_grad() for "
            "inference"
        )


def reading_everything(pattern: LayerPattern) -> LayerPattern:
    """That of rows after a cached prefix."""
    return dataclasses.replace(pattern, config=_reading_everything(pattern.config))


@lru_cache(maxsize=64)
def _reading_everything(config: SparseAttentionConfig) -> SparseAttentionConfig:
    return config.replace(dense_below=sys.maxsize, num_voted_blocks=0)


@torch.no_grad()
def prefill(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    """A document from its first token on, a block of rows at a time: see `backend.AttendDocument`."""
    pattern, config, num_tokens = call.pattern, call.pattern.config, key.shape[1]
    position = torch.arange(num_tokens, device=key.device)
    block = (position + -config.block_offset % config.block_size) // config.block_size
    voters, candidates = _means(query.unflatten(0, (len(key), -1)).sum(1), block), _means(key, block)
    static = static_positions(config, num_tokens, key.device, marked=pattern.marked)
    output = query.new_empty(*query.shape[:2], value.shape[-1])
    rows_of_blocks = position.split_with_sizes(block.bincount().tolist())
    for number, rows in enumerate(rows_of_blocks):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        fixed, admissible = _read_anyway(pattern, rows, stop, static)
        voted = _votes(voters[:, number], candidates[:, :number], config.num_voted_blocks)
        for kv_head, chosen in enumerate(voted):
            read = (fixed | torch.isin(block[:stop], chosen)) & admissible
            columns = read.any(0).nonzero().flatten()
            keys, values = key[kv_head, columns], value[kv_head, columns]
            for head in range(kv_head * len(query) // len(key), (kv_head + 1) * len(query) // len(key)):
                scores = hide(cap(query[head, start:stop] @ keys.T * call.scaling, call.softcap), ~read[:, columns])
                sink = None if call.sinks is None else call.sinks[head]
                if pattern.min_weights[head]:
                    total = with_sinks(scores, sink).logsumexp(-1, keepdim=True)
                    light = scores < total + math.log(pattern.min_weights[head])
                    scores = hide(scores, light & ~fixed[:, columns])
                weights = with_sinks(scores, sink).softmax(-1)[:, : len(columns)]
                if call.dropout is not None:
                    weights = weights * call.dropout.factors(rows.new_tensor(head), rows[:, None], columns).to(weights)
                output[head, start:stop] = weights @ values
                if call.recorder is not None:
                    attended = scores > -torch.inf
                    told = at_hand(attended, columns.expand_as(attended))
                    call.recorder.add(pattern, head, rows, int(attended.sum()), int(read.sum()), told)
    return output


def _votes(voter: Tensor, candidates: Tensor, num_votes: int) -> Tensor:
    """Numbers of the blocks that one block of rows votes for, [num_key_value_heads, votes].

    Args:
        voter: [num_key_value_heads, head_dim], the mean query.
        candidates: [num_key_value_heads, blocks, head_dim], the mean keys of the blocks before it.
    """
    scores = (candidates @ voter.unsqueeze(-1)).squeeze(-1)
    # Of equal scores the later block, as the specification has it.
    order = scores.flip(-1).sort(stable=True, dim=-1, descending=True).indices[:, :num_votes]
    return scores.shape[1] - 1 - order


def _means(x: Tensor, block: Tensor) -> Tensor:
    """[heads, N, head_dim] -> [heads, blocks, head_dim]."""
    counts = block.bincount()
    sums = x.new_zeros(len(x), len(counts), x.shape[-1]).index_add_(1, block, x)
    return sums / counts[:, None]


def _read_anyway(pattern: LayerPattern, rows: Tensor, stop: int, static: Tensor) -> tuple[Tensor, Tensor]:
    """The keys that rows read without any vote, and those that they may read: [R, stop] bool twice."""
    older = rows[:, None] - torch.arange(stop, device=rows.device)
    admissible, window = pattern.admissible(older), pattern.window(stop)
    fixed = older < window
    fixed[:, static[static < stop]] = True
    own = row_keys(pattern, rows, static, window, 0)
    row, column = (own >= 0).nonzero(as_tuple=True)
    fixed[row, own[row, column]] = True
    dense_rows = pattern.dense_rows()
    if dense_rows is not None:
        fixed |= (rows < dense_rows)[:, None]
    return fixed & admissible, admissible
