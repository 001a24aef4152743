"""The attention of a few rows over a list of cached keys.

Each row of each KV head has a list of its own. Its columns are the window, static keys, random keys, and the candidates
that `find_cached` found; programs take BLOCK columns of it each, to score them, then a part of the values' width each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.ops.triton import launch as triton_launch
from hf_sparse_attn.ops.triton.arguments import Score, ScoredColumns
from hf_sparse_attn.ops.triton.launch import TL, block_dim, precision, strided
from hf_sparse_attn.ops.triton.primitives import load_keys, score_keys


@triton.jit(do_not_specialize=["key_offset", "rows_to_end", "num_static", "max_found", "capacity"])
def score_listed_kernel(
    query,
    key,
    static,
    drawn,
    found,
    num_found,
    columns,
    newest,
    key_offset,
    rows_to_end,
    window,
    num_static,
    max_found,
    capacity,
    NUM_RANDOM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Scores of all keys that the rows score; each program takes BLOCK columns of a row's list.

    Args:
        query: [H, R, D], the first row `rows_to_end` positions before the one after the newest key.
        static: [num_static], positions; those in a row's window or after it are not its own columns.
        drawn: [R, NUM_RANDOM], indices of random keys, -1 for none.
        found, num_found: [Hkv, R, max_found] and [Hkv, R].
        columns: `ScoredColumns`, written.
        newest: [1], index of the newest key.
    """
    head = tl.program_id(1)
    row = tl.program_id(2)
    place = head * tl.num_programs(2) + row
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before_random = window + num_static
    before_found = before_random + NUM_RANDOM
    stop = before_found + tl.load(num_found + place)
    first_row = tl.load(newest).to(tl.int32) + 1 + key_offset - rows_to_end
    oldest = first_row + row - window + 1  # of the window
    index = oldest + c - key_offset
    is_static = (c >= window) & (c < before_random)
    index = tl.where(is_static, tl.load(static + c - window, mask=is_static, other=0) - key_offset, index)
    valid = (index >= 0) & ((c < window) | (is_static & (index + key_offset < oldest)))
    is_found = (c >= before_found) & (c < stop)
    index = tl.where(is_found, tl.load(found + place * max_found + c - before_found, mask=is_found, other=0), index)
    valid = valid | is_found
    if NUM_RANDOM > 0:
        is_random = (c >= before_random) & (c < before_found)
        own = tl.load(drawn + row * NUM_RANDOM + c - before_random, mask=is_random, other=-1)
        index = tl.where(is_random, own, index)
        valid = valid | (own >= 0)
        if (tl.program_id(0) + 1) * BLOCK > before_found:
            for i in range(NUM_RANDOM):
                other = tl.load(drawn + row * NUM_RANDOM + i)
                valid = valid & ((index != other) | (c < before_found))
    index = tl.where(valid, index, 0)
    m = tl.arange(0, GROUP_PADDED)
    d = tl.arange(0, BLOCK_DIM)
    heads = (head * GROUP + m).to(tl.int64)
    q = tl.load(
        query.pointer + heads[:, None] * query.head + row * query.row + d[None, :],
        mask=(m < GROUP)[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    k = load_keys(key, head, index, valid, d, HEAD_DIM, TRANSPOSED=True)
    score = score_keys(q, k, SCORE, PRECISION, ACC)
    score = tl.where(valid[None, :], score, float("-inf"))
    tl.store(columns.keys + place * capacity + c, index)
    tl.store(columns.scores + (place * GROUP_PADDED + m)[:, None] * capacity + c[None, :], score)
    top = tl.max(score, 1)
    weight = tl.sum(tl.exp(score - tl.where(top > float("-inf"), top, 0.0)[:, None]), 1)
    part = (place * tl.num_programs(0) + tl.program_id(0)) * GROUP_PADDED + m
    tl.store(columns.largest + part, top)
    tl.store(columns.weights + part, weight)


@triton.jit(do_not_specialize=["num_static", "num_parts", "capacity"])
def sum_listed_kernel(
    value,
    output,
    columns,
    num_found,
    sinks,
    log_min_weights,
    window,
    num_static,
    num_parts,
    capacity,
    NUM_RANDOM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """output [H, R, D] of the listed keys' values; each program takes BLOCK_VALUE_DIM of a value's numbers.

    Candidates whose weight is below the head's smallest one are dropped, if DROP.
    """
    head = tl.program_id(1)
    row = tl.program_id(2)
    place = head * tl.num_programs(2) + row
    m = tl.arange(0, GROUP_PADDED)
    heads = head * GROUP + m
    inside = m < GROUP
    part = tl.arange(0, PARTS_PADDED)[:, None]
    parts = (place * num_parts + part) * GROUP_PADDED + m[None, :]
    tops = tl.load(columns.largest + parts, mask=part < num_parts, other=float("-inf"))
    sink = tl.full((GROUP_PADDED,), float("-inf"), ACC)
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=inside, other=float("-inf")).to(ACC)
    top = tl.maximum(tl.max(tops, 0), sink)
    part_weights = tl.load(columns.weights + parts, mask=part < num_parts, other=0.0)
    logsumexp = top + tl.log(tl.sum(part_weights * tl.exp(tops - top[None, :]), 0) + tl.exp(sink - top))
    least = logsumexp
    if DROP:
        least = logsumexp + tl.load(log_min_weights + heads, mask=inside, other=float("-inf"))
    before_found = window + num_static + NUM_RANDOM
    stop = before_found + tl.load(num_found + place)
    e = tl.program_id(0) * BLOCK_VALUE_DIM + tl.arange(0, BLOCK_VALUE_DIM)
    weight = tl.exp(sink - logsumexp)
    summed = tl.zeros((GROUP_PADDED, BLOCK_VALUE_DIM), ACC)
    for low in range(0, stop, BLOCK):
        c = low + tl.arange(0, BLOCK)
        index = tl.load(columns.keys + place * capacity + c)
        score = tl.load(columns.scores + (place * GROUP_PADDED + m)[:, None] * capacity + c[None, :])
        p = tl.exp(score - logsumexp[:, None])
        if DROP:
            p = tl.where((c < before_found)[None, :] | (score >= least[:, None]), p, 0.0)
        weight += tl.sum(p, 1)
        v = load_keys(value, head, index, None, e, VALUE_DIM)
        summed = tl.dot(p.to(v.dtype), v, summed, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        output.pointer + heads.to(tl.int64)[:, None] * output.head + row * output.row + e[None, :],
        (summed / weight[:, None]).to(output.pointer.dtype.element_ty),
        mask=inside[:, None] & (e < VALUE_DIM)[None, :],
    )


def decode(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    static: Tensor,
    drawn: Tensor,
    found: Tensor,
    num_found: Tensor,
    log_min_weights: Tensor,
    newest: Tensor,
    key_offset: int,
    rows_to_end: int,
    window: int,
    drop: bool,
    score: Score,
) -> None:
    """Fill output [H, R, D] for rows from `rows_to_end` positions before the one after the newest key on.

    Args:
        output: [H, R, D].
        query: [H, R, D].
        key, value: [Hkv, N, D].
        sinks: [H] or None.
        static: [keys] int32, positions of the static keys, also of later ones.
        drawn: [R, random keys] int32, their indices, -1 for none.
        found, num_found: [Hkv, R, most] and [Hkv, R] int32, indices of the candidates.
        log_min_weights: [H], logarithm of the smallest weight of a candidate that is attended to.
        newest: [1] int64, index of the newest key.
        key_offset: position of the first key.
        rows_to_end: see above.
        window: keys of a row's window.
        drop: candidates of too little weight are dropped.
        score: how products become scores.
    """
    num_heads, num_rows, head_dim = query.shape
    num_kv_heads, value_dim, acc = len(key), value.shape[-1], log_min_weights.dtype
    group, num_static, num_random = num_heads // num_kv_heads, len(static), drawn.shape[1]
    group_padded = max(triton.next_power_of_2(group), 16)
    block = triton_launch.block_keys(key, max(head_dim, value_dim))
    num_parts = triton.cdiv(window + num_static + num_random + found.shape[2], block)
    capacity = num_parts * block
    rows = (num_kv_heads, num_rows)
    columns = ScoredColumns(
        torch.empty(*rows, capacity, dtype=torch.int32, device=key.device),
        torch.empty(*rows, group_padded, capacity, dtype=acc, device=key.device),
        torch.empty(*rows, num_parts, group_padded, dtype=acc, device=key.device),
        torch.empty(*rows, num_parts, group_padded, dtype=acc, device=key.device),
    )
    constants = {
        "NUM_RANDOM": num_random,
        "GROUP": group,
        "GROUP_PADDED": group_padded,
        "BLOCK": block,
        "PRECISION": precision(value.dtype),
        "ACC": TL[acc],
    }
    triton_launch.launch(
        score_listed_kernel,
        (num_parts, num_kv_heads, num_rows),
        strided(query),
        strided(key),
        static,
        drawn,
        found,
        num_found,
        columns,
        newest,
        key_offset,
        rows_to_end,
        window,
        num_static,
        found.shape[2],
        capacity,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim(head_dim),
        SCORE=score,
        **constants,
    )
    block_value_dim = min(block_dim(value_dim), 32)
    triton_launch.launch(
        sum_listed_kernel,
        (triton.cdiv(value_dim, block_value_dim), num_kv_heads, num_rows),
        strided(value),
        strided(output),
        columns,
        num_found,
        sinks,
        log_min_weights,
        window,
        num_static,
        num_parts,
        capacity,
        VALUE_DIM=value_dim,
        BLOCK_VALUE_DIM=block_value_dim,
        PARTS_PADDED=triton.next_power_of_2(num_parts),
        DROP=drop,
        **constants,
    )
