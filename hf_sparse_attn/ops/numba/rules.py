"""The rules of a chunk's or a step's rows, as the compiled code is told, and their keys, as a recorder is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from hf_sparse_attn.ops.common.chunked import Call
from hf_sparse_attn.ops.numba.kernels import (
    Array,
    Read,
    Rules,
    count_read,
)
from hf_sparse_attn.ops.numba.layout import padded
from hf_sparse_attn.ops.numba.simd import LANES
from hf_sparse_attn.routing import MEANS_LAG

UNBOUNDED = 2**40  # stands for no sliding window


def make_rules(call: Call, budget: int, min_weights: Array) -> Rules:
    """The rules without the sinks, which a chunk is given with its rows."""
    pattern, config = call.pattern, call.pattern.config
    sliding_window = pattern.sliding_window or UNBOUNDED
    return Rules(
        page_size=config.page_size,
        window=pattern.window(UNBOUNDED),
        sliding_window=sliding_window,
        means_lag=MEANS_LAG,
        budget=budget,
        min_weights=min_weights,
        softcap=call.softcap or 0.0,
        sinks=np.zeros((*min_weights.shape[:-1], 0), min_weights.dtype),
    )


def num_columns(rules: Rules, num_static: int, num_keys: int, num_random: int) -> int:
    fixed = num_static + min(rules.window, num_keys) + num_random
    return padded(fixed) + padded(rules.budget) + LANES


def record(call: Call, kv_head: int, position: Tensor, read: Read, order: Array | None) -> None:
    """Tell the recorder what rows of a KV head read; found slots are places in `order`, if there is one."""
    rows = Read(*(x[: len(position)] for x in read))
    num_attended, num_scored = count_read(rows)
    columns = cache(partial(_columns, rows, order, call.key_offset))  # for all heads at once, if any is asked for
    group = len(num_attended)
    for i in range(group):
        which = partial(_read_by_head, rows.weights[:, i], columns)
        call.record(kv_head * group + i, position, int(num_attended[i]), num_scored, which)


def _columns(rows: Read, order: Array | None, key_offset: int) -> tuple[Array, Array, Tensor]:
    """Of each row's columns: those of fixed keys, those of found ones, and the keys' positions; [R, C] each."""
    column, slots = np.arange(rows.slots.shape[1]), rows.slots
    num_fixed, first_found, stop = (rows.sizes[:, i, None] for i in range(3))
    fixed, found = column < num_fixed, (column >= first_found) & (column < stop)
    if order is not None:
        slots = np.where(found, order[np.where(found, slots, 0)], slots)
    return fixed, found, torch.from_numpy(slots).long() + key_offset


def _read_by_head(weights: Array, columns: Callable[[], tuple[Array, Array, Tensor]]) -> tuple[Tensor, Tensor]:
    fixed, found, keys = columns()
    return torch.from_numpy(fixed | (found & (weights != 0))), keys
