"""The keys that all patterns of a config together give a row."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.patterns.base import RowPattern, StaticKeys, StaticPattern
from hf_sparse_attn.patterns.blocks import Blocks
from hf_sparse_attn.patterns.dilated import Dilated
from hf_sparse_attn.patterns.explicit import Explicit
from hf_sparse_attn.patterns.layer import LayerPattern
from hf_sparse_attn.patterns.leading import Leading
from hf_sparse_attn.patterns.marked import Marked, marks_are_missing
from hf_sparse_attn.patterns.random_blocks import RandomBlocks
from hf_sparse_attn.patterns.seeded_random import SeededRandom
from hf_sparse_attn.patterns.slash import Slash
from hf_sparse_attn.patterns.strided import Strided

STATIC_PATTERNS: tuple[type[StaticPattern], ...] = (Leading, Explicit, Strided)
GLOBAL_PATTERNS = (Leading, Explicit, Marked)  # where attention is not causal, rows of their tokens read everything
ROW_PATTERNS: tuple[type[RowPattern], ...] = (SeededRandom, Dilated, Slash, Blocks, RandomBlocks)


def static_patterns(config: SparseAttentionConfig, marked: Marked | None = None) -> tuple[StaticKeys, ...]:
    """The patterns of keys for every later row that `config` turns on; `marked` are those that it names by token id.

    Raises:
        ValueError: `config` has `global_token_ids`, and where they stand is not said.
    """
    if config.global_token_ids and marked is None:
        raise marks_are_missing()
    found = tuple(pattern for kind in STATIC_PATTERNS if (pattern := kind.of(config)) is not None)
    return found if marked is None else (*found, marked)


def row_patterns(config: SparseAttentionConfig, num_tokens: int | None = None) -> tuple[RowPattern, ...]:
    """The patterns of a row's own keys that `config` turns on; see `RowPattern.of`."""
    return tuple(pattern for kind in ROW_PATTERNS if (pattern := kind.of(config, num_tokens)) is not None)


def global_patterns(config: SparseAttentionConfig, marked: Marked | None = None) -> tuple[StaticKeys, ...]:
    """The static patterns that `config` turns on whose tokens' own rows read everything in non-causal attention."""
    return tuple(keys for keys in static_patterns(config, marked) if isinstance(keys, GLOBAL_PATTERNS))


def static_positions(
    config: SparseAttentionConfig, stop: int, device: torch.device, start: int = 0, marked: Marked | None = None
) -> Tensor:
    """Sorted positions from `start` to `stop` - 1 that every later row attends to, int64."""
    return _positions(static_patterns(config, marked), start, stop, device)


def global_positions(
    config: SparseAttentionConfig, stop: int, device: torch.device, start: int = 0, marked: Marked | None = None
) -> Tensor:
    """Sorted positions from `start` to `stop` - 1 of rows that read everything in non-causal attention, int64."""
    return _positions(global_patterns(config, marked), start, stop, device)


def _positions(patterns: tuple[StaticKeys, ...], start: int, stop: int, device: torch.device) -> Tensor:
    found = [pattern.positions(start, stop, device) for pattern in patterns]
    found = [positions for positions in found if len(positions)]
    if len(found) < 2:
        return found[0] if found else torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat(found).unique()


def num_row_keys(config: SparseAttentionConfig, num_tokens: int | None = None) -> int:
    """The most keys of its own that a row has, the width of `row_keys`; see `RowPattern.of`."""
    return sum(pattern.num_keys for pattern in row_patterns(config, num_tokens))


def row_keys(pattern: LayerPattern, position: Tensor, static: Tensor, window: int, key_offset: int) -> Tensor:
    """The keys that the patterns of a row's own add to each row at `position` [R]: key indices [R, W], -1 for none.

    Keys are left out that the row attends to anyway (in its window, static, given twice) and those it cannot see.

    Args:
        pattern: the layer's pattern.
        position: the rows' positions.
        static: positions of the static keys, ascending; later ones do not matter.
        window: keys of the row's window, or of its half on each side where attention is not causal.
        key_offset: position of the key with index 0.
    """
    given = [rows.keys(position) for rows in row_patterns(pattern.config, pattern.num_tokens)]
    if not given:
        return position.new_empty(len(position), 0)
    keys = _sorted(torch.cat(given, 1))
    older = position[:, None] - keys
    distance = older if pattern.is_causal else older.abs()
    known = (distance < window) | (keys < key_offset) | _among(keys, static)
    if pattern.num_tokens is not None:
        known |= keys >= pattern.num_tokens
    if pattern.sliding_window is not None:
        known |= distance >= pattern.sliding_window
    known[:, 1:] |= keys[:, 1:] == keys[:, :-1]
    return (keys - key_offset).masked_fill_(known, -1)


def _among(keys: Tensor, static: Tensor) -> Tensor:
    """Which of these are in the ascending `static`; unlike `torch.isin` without a wait for the device."""
    if not len(static):
        return torch.zeros_like(keys, dtype=torch.bool)
    place = torch.searchsorted(static, keys.to(static.dtype)).clamp_(max=len(static) - 1)
    return static[place] == keys


def _sorted(keys: Tensor) -> Tensor:
    """Each row of [R, W], ascending; on a CPU by NumPy's sort, which carries no indices along and is vectorised."""
    if keys.device.type != "cpu":
        return keys.sort(-1).values
    keys.numpy().sort(-1)
    return keys
