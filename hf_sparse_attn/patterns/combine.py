"""The keys that all patterns of a config together give a row."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.patterns.base import RowPattern, StaticKeys, StaticPattern
from hf_sparse_attn.patterns.explicit import Explicit
from hf_sparse_attn.patterns.layer import LayerPattern
from hf_sparse_attn.patterns.leading import Leading
from hf_sparse_attn.patterns.marked import Marked, marks_are_missing
from hf_sparse_attn.patterns.seeded_random import SeededRandom
from hf_sparse_attn.patterns.strided import Strided

STATIC_PATTERNS: tuple[type[StaticPattern], ...] = (Leading, Explicit, Strided)
ROW_PATTERNS: tuple[type[RowPattern], ...] = (SeededRandom,)


def static_patterns(config: SparseAttentionConfig, marked: Marked | None = None) -> tuple[StaticKeys, ...]:
    """The patterns of keys for every later row that `config` turns on; `marked` are those that it names by token id.

    Raises:
        ValueError: `config` has `global_token_ids`, and where they stand is not said.
    """
    if config.global_token_ids and marked is None:
        raise marks_are_missing()
    found = tuple(pattern for kind in STATIC_PATTERNS if (pattern := kind.of(config)) is not None)
    return found if marked is None else (*found, marked)


def row_patterns(config: SparseAttentionConfig) -> tuple[RowPattern, ...]:
    """The patterns of a row's own keys that `config` turns on."""
    return tuple(pattern for kind in ROW_PATTERNS if (pattern := kind.of(config)) is not None)


def static_positions(
    config: SparseAttentionConfig, stop: int, device: torch.device, start: int = 0, marked: Marked | None = None
) -> Tensor:
    """Sorted positions from `start` to `stop` - 1 that every later row attends to, int64."""
    found = [pattern.positions(start, stop, device) for pattern in static_patterns(config, marked)]
    found = [positions for positions in found if len(positions)]
    if len(found) < 2:
        return found[0] if found else torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat(found).unique()


def num_row_keys(config: SparseAttentionConfig) -> int:
    """The most keys of its own that a row has: the width of `row_keys`."""
    return sum(pattern.num_keys for pattern in row_patterns(config))


def row_keys(pattern: LayerPattern, position: Tensor, static: Tensor, window: int, key_offset: int) -> Tensor:
    """The keys that the patterns of a row's own add to each row at `position` [R]: key indices [R, W], -1 for none.

    Keys are left out that the row attends to anyway (in its window, static, given twice) and those it cannot see.

    Args:
        pattern: the layer's pattern.
        position: the rows' positions.
        static: positions of the static keys.
        window: keys of the row's window.
        key_offset: position of the key with index 0.
    """
    given = [rows.keys(position) for rows in row_patterns(pattern.config)]
    if not given:
        return position.new_empty(len(position), 0)
    keys = torch.cat(given, 1).sort(-1).values
    known = (keys > position[:, None] - window) | (keys < key_offset) | torch.isin(keys, static)
    if pattern.sliding_window is not None:
        known |= keys <= position[:, None] - pattern.sliding_window
    known[:, 1:] |= keys[:, 1:] == keys[:, :-1]
    return (keys - key_offset).masked_fill_(known, -1)
