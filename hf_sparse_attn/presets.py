"""Patterns of papers, by name: `SparseAttentionConfig.preset("longformer")`, or `{"preset": "longformer"}` in JSON.

A preset gives every field that decides which keys a row reads but `seed`, so it means the same whatever a model had
before; other fields given beside it count. Papers of encoders read on both sides: here a row reads what their formula
gives it out of the keys at or before itself. Each preset is held against its formula in tests/test_presets.py.

longformer          Beltagy, Peters, Cohan 2020, arXiv 2004.05150, sections 3.1 and 5: half of a window of 512 on either
                    side of the row, and a global first token.
bigbird             Zaheer et al. 2020, arXiv 2007.14062, section 2 and the base model's blocks (ITC): blocks of 64;
                    a window of 3 blocks around the row's, 3 random blocks, and 2 global ones, here the first two.
sparse-transformer  Child et al. 2019, arXiv 1904.10509, section 4.3, the fixed pattern, which they take for text: the
                    row's own block of l = 128 and the last c positions of every block, merged in each head; of the c
                    that they name, 8, 16 and 32, the largest.
sparse-transformer-strided
                    The same section's strided pattern, for data with a period: the last l = 128 keys, which are l + 1
                    with the row's own, and every key at a multiple of l before the row: here at most 4096 of these,
                    which is all of them in documents of 4096 * l tokens.
streaming-llm       Xiao et al. 2023, arXiv 2309.17453, table 1: 4 attention sinks and the last 1020 keys. Theirs also
                    counts rotary positions inside the cache; this is the pattern alone.
longlora            Chen et al. 2023, arXiv 2309.12307, section 3.2, for training at 8192 tokens: groups of 2048, a
                    quarter of the context, shifted by half a group for half of the KV heads. The first half group of
                    these stands alone: in theirs, it shares a group with the document's last tokens.
minference-like     Jiang et al. 2024, arXiv 2407.02490, section 3: its block-sparse heads alone, 100 blocks of 64 keys
                    that each block of 64 rows chooses by the product of mean query and mean key. NOT CAUSAL, and for
                    the prefill of inference alone: see `block_votes.py`. Here query heads of a KV head vote together.
ssa                 This package's defaults: a window, leading global keys, and keys that a random hash finds.
"""

from __future__ import annotations

from typing import Any

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.pattern_fields import PATTERN_FIELDS

_READS = (
    *PATTERN_FIELDS,
    *("global_token_ids", "by_layer", "by_kv_head", "key_budget", "min_weight", "hash", "num_hash_bits", "page_size"),
    *("dense_layers", "dense_below"),
)
_DEFAULTS = {name: value for name, value in SparseAttentionConfig().to_dict().items() if name in _READS}
_NOTHING = _DEFAULTS | {"window_size": 1, "num_global_tokens": 0, "key_budget": 0, "dense_below": 0}

PRESETS: dict[str, dict[str, Any]] = {
    "longformer": {"window_size": 257, "num_global_tokens": 1},
    "bigbird": {"block_size": 64, "num_neighbouring_blocks": 1, "num_random_blocks": 3, "num_global_tokens": 128},
    "sparse-transformer": {"block_size": 128, "stride": 128, "stride_offset": 96, "stride_width": 32},
    "sparse-transformer-strided": {"window_size": 129, "dilated_window_size": 4096, "dilation": 128},
    "streaming-llm": {"window_size": 1020, "num_global_tokens": 4},
    "longlora": {"block_size": 2048, "by_kv_head": [{}, {"block_offset": 1024}]},
    "minference-like": {"block_size": 64, "num_voted_blocks": 100, "min_weight": 0.0},
    "ssa": _DEFAULTS,
}


def preset_fields(name: Any) -> dict[str, Any]:
    """The fields of `SparseAttentionConfig` that a preset stands for, JSON-ready.

    Raises:
        ValueError: for an unknown name, listing the names.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return _NOTHING | PRESETS[name]
