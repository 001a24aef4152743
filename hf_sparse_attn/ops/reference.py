"""The specification: a boolean mask over all (row, key) pairs, then a softmax. Slow, any device, any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse_attn.recording import Recorder
from hf_sparse_attn.routing import LayerPattern, random_positions


def attended_keys(query: Tensor, key: Tensor, pattern: LayerPattern, query_offset: int, key_offset: int = 0) -> Tensor:
    """S(row) for every row of one document, written out rule by rule.

    Args:
        query: [num_heads, Q, head_dim], at positions query_offset .. query_offset + Q - 1 of the document.
        key: [num_key_value_heads, N, head_dim], at positions key_offset .. key_offset + N - 1.
        pattern: the layer's pattern.
        query_offset: position of the first query.
        key_offset: position of the first key.

    Returns:
        [num_heads, Q, N], bool.
    """
    config = pattern.config
    num_heads, num_queries, _ = query.shape
    group = num_heads // key.shape[0]
    bucket = pattern.bucket_hash.assign(key)
    position = torch.arange(key.shape[1], device=key.device) + key_offset
    static = position < config.num_global_tokens
    for index in config.global_token_indices:
        static = static | (position == index)
    if config.stride:
        static = static | (position % config.stride == 0)
    rows = []
    for head in range(num_heads):
        for i in range(num_queries):
            p = query_offset + i
            admissible = position <= p
            if pattern.sliding_window is not None:
                admissible &= position > p - pattern.sliding_window
            dense_rows = pattern.dense_rows()
            if dense_rows is None or p < dense_rows:
                rows.append(admissible)
                continue
            chosen = static | (position > p - config.window_size)
            if config.num_random_keys:
                drawn = random_positions(config, torch.tensor([p], device=key.device))
                chosen = chosen | torch.isin(position, drawn)
            routable = admissible & ~static & (position <= p - config.window_size)
            routed = _routed(
                query[head, i], key[head // group], bucket[head // group], position, routable, p, head, pattern
            )
            rows.append((chosen | routed) & admissible)
    return torch.stack(rows).view(num_heads, num_queries, -1)


def _routed(
    query: Tensor,
    key: Tensor,
    bucket: Tensor,
    position: Tensor,
    routable: Tensor,
    p: int,
    head: int,
    pattern: LayerPattern,
) -> Tensor:
    """The row's routed keys: whole buckets from the best down, the last one cut to its most recent keys."""
    config = pattern.config
    page = p - p % config.page_size
    static = ~routable & (position <= p - config.window_size)
    if pattern.sliding_window is not None:
        static &= position > p - pattern.sliding_window
    known = ~static & (position <= page - config.window_size)
    if pattern.sliding_window is not None:
        known &= position > page + config.page_size - 1 - pattern.sliding_window
    buckets = bucket[known].unique()
    scores = torch.stack([query @ key[known & (bucket == b)].mean(0) for b in buckets]) if len(buckets) else query[:0]
    routed = torch.zeros_like(routable)
    budget = pattern.budgets[head]
    # Equal scores, such as those of a query of zeros, go by the bucket's number.
    for _, best in sorted(zip(scores.tolist(), buckets.tolist(), strict=True), reverse=True):
        members = torch.nonzero(routable & (bucket == best)).flatten()
        members = members[max(0, len(members) - budget) :]
        routed[members] = True
        budget -= len(members)
        if budget == 0:
            break
    return routed


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: LayerPattern,
    query_offset: int,
    key_offset: int,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    recorder: Recorder | None,
) -> Tensor:
    """Attention of one document; see `ops.torch.document_attention` for the arguments."""
    group = query.shape[0] // key.shape[0]
    attended = attended_keys(query, key, pattern, query_offset, key_offset)
    if recorder is not None:
        keys = (torch.arange(key.shape[1], device=key.device) + key_offset).expand_as(attended[0])
        rows = torch.arange(query.shape[1], device=key.device) + query_offset
        for head in range(query.shape[0]):
            recorder.add(pattern, head, rows, attended[head], lambda: keys)
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = (query @ key.transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~attended, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, query.shape[1], 1)], -1)
    return scores.softmax(-1)[..., : key.shape[1]].to(value.dtype) @ value
