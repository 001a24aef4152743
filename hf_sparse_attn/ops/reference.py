"""The specification: a boolean mask over all (row, key) pairs, then a softmax. Slow, any device, any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.ops.backend import Backend
from hf_sparse_attn.ops.common.call import AttentionCall
from hf_sparse_attn.patterns import LayerPattern, global_patterns, row_patterns, static_patterns
from hf_sparse_attn.recording import at_hand


def scored_keys(
    query: Tensor,
    key: Tensor,
    pattern: LayerPattern,
    query_offset: int,
    key_offset: int = 0,
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The keys that every row of one document scores, written out rule by rule.

    Args:
        query: [num_heads, Q, head_dim], at positions query_offset .. query_offset + Q - 1 of the document.
        key: [num_key_value_heads, N, head_dim], at positions key_offset .. key_offset + N - 1.
        pattern: the layer's pattern.
        query_offset: position of the first query.
        key_offset: position of the first key; 0 where attention is not causal.
        candidates: as of `AttentionCall`.

    Returns:
        [num_heads, Q, N] bool twice: all scored keys, and those of them that were found through the buckets alone,
        which the row does not read when their weight is small.
    """
    if not pattern.is_causal:
        return _scored_on_both_sides(query, key, pattern, query_offset, candidates)
    num_heads, num_queries, _ = query.shape
    group = num_heads // key.shape[0]
    bucket = pattern.bucket_hash.assign(key)
    position = torch.arange(key.shape[1], device=key.device) + key_offset
    all_scored, all_routed = [], []
    for head in range(num_heads):
        kv_head, config = head // group, pattern.config
        if pattern.kv_head_entries:
            config = config.of_entry(pattern.kv_head_entries[kv_head])
        static = torch.zeros_like(position, dtype=torch.bool)
        for part in static_patterns(config, pattern.marked):
            static = static | part.admits(position)
        group_query = query[kv_head * group : (kv_head + 1) * group].sum(0)
        for i in range(num_queries):
            p = query_offset + i
            admissible = position <= p
            if pattern.sliding_window is not None:
                admissible &= position > p - pattern.sliding_window
            fixed, routed = admissible, torch.zeros_like(admissible)
            dense_rows = pattern.dense_rows()
            if dense_rows is not None and p >= dense_rows:
                fixed = static | (position > p - config.window_size)
                for own in row_patterns(config):
                    fixed = fixed | own.admits(p, position)
                fixed = fixed & admissible
                routable = admissible & ~static & (position <= p - config.window_size)
                if config.num_voted_blocks:
                    routed = _voted(query[kv_head * group :][:group], key[kv_head], config, p) & admissible
                elif candidates is None:
                    page = p - p % config.page_size
                    known = ~static & (position < page)
                    if pattern.sliding_window is not None:
                        known &= position > page + config.page_size - 1 - pattern.sliding_window
                    nearest = torch.nonzero(routable).flatten().flip(0)
                    routed = _routed(
                        group_query[i], key[kv_head], bucket[kv_head], known, nearest, pattern.budgets[kv_head]
                    )
                else:
                    routed = torch.isin(position - key_offset, candidates[kv_head, i])
            all_scored.append(fixed | routed)
            all_routed.append(routed & ~fixed)
    shape = num_heads, num_queries, -1
    return torch.stack(all_scored).view(shape), torch.stack(all_routed).view(shape)


def _scored_on_both_sides(
    query: Tensor, key: Tensor, pattern: LayerPattern, query_offset: int, candidates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`scored_keys` where attention is not causal; `key` is the whole document."""
    config, num_tokens = pattern.config, key.shape[1]
    num_heads, num_queries, _ = query.shape
    group = num_heads // key.shape[0]
    bucket = pattern.bucket_hash.assign(key)
    position = torch.arange(num_tokens, device=key.device)
    is_static, is_global = torch.zeros(2, num_tokens, dtype=torch.bool, device=key.device)
    for part in static_patterns(config, pattern.marked):
        is_static = is_static | part.admits(position)
    for part in global_patterns(config, pattern.marked):
        is_global = is_global | part.admits(position)
    all_dense = pattern.is_local or pattern.layer_idx in config.dense_layers or num_tokens <= config.dense_below
    all_scored, all_routed = [], []
    for head in range(num_heads):
        kv_head = head // group
        group_query = query[kv_head * group : (kv_head + 1) * group].sum(0)
        for i in range(num_queries):
            p = query_offset + i
            distance = (position - p).abs()
            admissible = torch.ones_like(is_static)
            if pattern.sliding_window is not None:
                admissible = distance < pattern.sliding_window
            fixed, routed = admissible, torch.zeros_like(admissible)
            reads_everything = all_dense or (p < num_tokens and bool(is_global[p]))
            if not reads_everything:
                fixed = is_static | (distance < config.window_size)
                for own in row_patterns(config, num_tokens):
                    fixed = fixed | own.admits(p, position)
                fixed = fixed & admissible
                routable = admissible & ~is_static & (distance >= config.window_size)
                nearest = torch.sort(distance, stable=True).indices  # at equal distances the earlier one
                nearest = nearest[routable[nearest]]
                if candidates is None:
                    routed = _routed(
                        group_query[i], key[kv_head], bucket[kv_head], ~is_static, nearest, pattern.budgets[kv_head]
                    )
                else:
                    routed = torch.isin(position, candidates[kv_head, i])
            all_scored.append(fixed | routed)
            all_routed.append(routed & ~fixed)
    shape = num_heads, num_queries, -1
    return torch.stack(all_scored).view(shape), torch.stack(all_routed).view(shape)


def attended_keys(
    query: Tensor,
    key: Tensor,
    pattern: LayerPattern,
    query_offset: int,
    key_offset: int = 0,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    candidates: Tensor | None = None,
) -> Tensor:
    """S(row) for every row of one document: [num_heads, Q, N], bool. Arguments as of `AttentionCall`."""
    scored, routed = scored_keys(query, key, pattern, query_offset, key_offset, candidates)
    logits = _logits(query, key, scaling, softcap).masked_fill(~scored, -torch.inf)
    weights = _softmax(logits, sinks)
    min_weights = torch.tensor(pattern.min_weights, dtype=weights.dtype, device=weights.device)[:, None, None]
    return scored & ~(routed & (weights < min_weights))


def _voted(query: Tensor, key: Tensor, config: SparseAttentionConfig, p: int) -> Tensor:
    """The keys [N] of the blocks that the block of the row at position p votes for; `query` is [group, N, head_dim]."""
    block = (torch.arange(key.shape[0], device=key.device) - config.block_offset) // config.block_size
    voters = query[:, block == block[p]].mean(1).sum(0)
    scores = {int(b): float(voters @ key[block == b].mean(0)) for b in block[block < block[p]].unique()}
    best = sorted(scores, key=lambda b: (scores[b], b), reverse=True)[: config.num_voted_blocks]
    return torch.isin(block, torch.tensor(best, dtype=block.dtype, device=block.device))


def _routed(query: Tensor, key: Tensor, bucket: Tensor, known: Tensor, nearest: Tensor, budget: int) -> Tensor:
    """The keys found through the buckets: whole ones from the best down, the last one cut to its nearest keys.

    Args:
        query: [head_dim], the sum of the queries of the KV head's group at the row's token.
        key: [N, head_dim].
        bucket: [N].
        known: [N], the keys that buckets' means are taken of.
        nearest: indices of the keys that may be taken, the nearest to the row first.
        budget: how many are taken at most.

    Returns:
        [N], bool.
    """
    buckets = bucket[known].unique()
    scores = torch.stack([query @ key[known & (bucket == b)].mean(0) for b in buckets]) if len(buckets) else query[:0]
    routed = torch.zeros_like(known)
    # Equal scores, such as those of a query of zeros, go by the bucket's number.
    for _, best in sorted(zip(scores.tolist(), buckets.tolist(), strict=True), reverse=True):
        members = nearest[bucket[nearest] == best][:budget]
        routed[members] = True
        budget -= len(members)
        if budget == 0:
            break
    return routed


def document_attention(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    """See `backend.AttendDocument`."""
    pattern, query_offset, key_offset, recorder = call.pattern, call.query_offset, call.key_offset, call.recorder
    scaling, softcap, sinks, candidates = call.scaling, call.softcap, call.sinks, call.candidates
    attended = attended_keys(
        query,
        key,
        pattern,
        query_offset,
        key_offset,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
        candidates=candidates,
    )
    keys = (torch.arange(key.shape[1], device=key.device) + key_offset).expand_as(attended[0])
    rows = torch.arange(query.shape[1], device=key.device) + query_offset
    if recorder is not None:
        scored, _ = scored_keys(query, key, pattern, query_offset, key_offset, candidates)
        for head in range(query.shape[0]):
            num_attended, num_scored = int(attended[head].sum()), int(scored[head].sum())
            recorder.add(pattern, head, rows, num_attended, num_scored, at_hand(attended[head], keys))
    weights = _softmax(_logits(query, key, scaling, softcap).masked_fill(~attended, -torch.inf), sinks)
    if call.dropout is not None:
        heads = torch.arange(query.shape[0], device=key.device)[:, None, None]
        weights = weights * call.dropout.factors(heads, rows[:, None], keys).to(weights)
    return weights.to(value.dtype) @ value.repeat_interleave(query.shape[0] // key.shape[0], 0)


def _logits(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
    logits = query @ key.repeat_interleave(query.shape[0] // key.shape[0], 0).transpose(-1, -2) * scaling
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """[num_heads, Q, N] -> the same, zeros where nothing is read; sinks take part without a column of their own."""
    if sinks is None:
        reads_nothing = (logits == -torch.inf).all(-1, keepdim=True)
        return logits.masked_fill(reads_nothing, 0).softmax(-1).masked_fill(reads_nothing, 0)
    beside = torch.cat([logits, sinks[:, None, None].expand(-1, logits.shape[1], 1)], -1)
    return beside.softmax(-1)[..., : logits.shape[-1]]


BACKEND = Backend(document_attention, plain=True, both_sides=True)
