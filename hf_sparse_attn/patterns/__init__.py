"""The keys that a row attends to besides its window and its candidates: one pattern, one file.

Two kinds, which are all that kernels know: keys that every later row attends to (`StaticPattern`), and keys of a row's
own (`RowPattern`). `STATIC_PATTERNS` and `ROW_PATTERNS` list what a config turns on.
"""

from hf_sparse_attn.patterns.base import RowPattern, StaticKeys, StaticPattern
from hf_sparse_attn.patterns.combine import (
    ROW_PATTERNS,
    STATIC_PATTERNS,
    global_patterns,
    global_positions,
    num_row_keys,
    row_keys,
    row_patterns,
    static_patterns,
    static_positions,
)
from hf_sparse_attn.patterns.layer import LayerPattern, is_local, layer_pattern
from hf_sparse_attn.patterns.marked import Marked, marks_are_missing

__all__ = [
    "ROW_PATTERNS",
    "STATIC_PATTERNS",
    "LayerPattern",
    "Marked",
    "RowPattern",
    "StaticKeys",
    "StaticPattern",
    "global_patterns",
    "global_positions",
    "is_local",
    "layer_pattern",
    "marks_are_missing",
    "num_row_keys",
    "row_keys",
    "row_patterns",
    "static_patterns",
    "static_positions",
]
