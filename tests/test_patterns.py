"""What each pattern gives: its positions, and its rule for the specification."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.drawings import drawing
from helpers.operation import make_pattern

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.pattern_fields import FROM_THE_ROW, PATTERN_FIELDS
from hf_sparse_attn.patterns import (
    ROW_PATTERNS,
    STATIC_PATTERNS,
    layer_pattern,
    num_row_keys,
    row_keys,
    row_patterns,
    slash,
    static_patterns,
    static_positions,
)
from hf_sparse_attn.patterns.seeded_random import SeededRandom
from hf_sparse_attn.presets import PRESETS
from hf_sparse_attn.tensor_parallel import HeadSplit

CPU = torch.device("cpu")
STATIC = [
    {"num_global_tokens": 5},
    {"num_global_tokens": 0, "global_token_indices": (7, 40, 7, 500, 0)},
    {"num_global_tokens": 0, "stride": 1},
    {"num_global_tokens": 0, "stride": 9},
    {"num_global_tokens": 0, "stride": 9, "stride_offset": 8},
    {"num_global_tokens": 0, "stride": 9, "stride_offset": 3, "stride_width": 4},
    {"num_global_tokens": 0, "stride": 9, "stride_offset": 0, "stride_width": 9},
    {"num_global_tokens": 3, "global_token_indices": (2, 11), "stride": 10},
    {"num_global_tokens": 0},
]
ROWS = [
    {"num_random_keys": 4, "seed": 7},
    {"dilated_window_size": 5},
    {"dilated_window_size": 30, "dilation": 7},
    {"slash_distances": (0, 3, 40, 3, 900)},
    {"block_size": 1},
    {"block_size": 16},
    {"block_size": 16, "block_offset": 5},
    {"block_size": 7, "num_neighbouring_blocks": 2, "block_offset": 6},
    {"block_size": 600},
    {"block_size": 16, "num_random_blocks": 3, "seed": 3},
    {"block_size": 7, "num_random_blocks": 2, "block_offset": 4},
    {"block_size": 1, "num_random_blocks": 5},
]
EVERY_PATTERN = SparseAttentionConfig(
    num_global_tokens=2,
    global_token_indices=(5,),
    stride=3,
    num_random_keys=1,
    dilated_window_size=1,
    slash_distances=(2,),
    block_size=4,
    num_random_blocks=1,
)


def random_keys(config, position):
    (pattern,) = row_patterns(config)
    return pattern.keys(position)


@pytest.mark.parametrize("fields", STATIC, ids=str)
def test_positions_are_those_that_the_rule_admits(fields):
    """The fast paths read `positions`, the specification `admits`."""
    config = SparseAttentionConfig(**fields)
    for start, stop in [(0, 0), (0, 1), (0, 90), (3, 4), (8, 41), (90, 600), (5, 2)]:
        position = torch.arange(start, max(start, stop))
        admitted = torch.zeros(len(position), dtype=torch.bool)
        for pattern in static_patterns(config):
            listed = pattern.positions(start, stop, CPU)
            assert listed.dtype == torch.int64
            assert torch.equal(listed, position[pattern.admits(position)])
            admitted |= pattern.admits(position)
        assert torch.equal(static_positions(config, stop, CPU, start), position[admitted])


@pytest.mark.parametrize("num_tokens", [None, 400], ids=["causal", "both sides"])
@pytest.mark.parametrize("fields", ROWS, ids=str)
def test_a_rows_own_keys_are_those_that_the_rule_admits(fields, num_tokens):
    config, position = SparseAttentionConfig(**fields), torch.arange(400)
    for pattern in row_patterns(config, num_tokens):
        rows = torch.tensor([0, 1, 6, 7, 15, 16, 17, 47, 300, 399])
        keys = pattern.keys(rows)
        assert keys.shape == (len(rows), pattern.num_keys)
        assert keys.dtype == torch.int64
        for row, own in zip(rows.tolist(), keys.tolist(), strict=True):
            admitted = pattern.admits(row, position) & ((position <= row) | (num_tokens is not None))
            assert set(position[admitted].tolist()) == {key for key in own if 0 <= key < 400}
            assert max(own) <= row or num_tokens is not None
    sizes = [pattern.num_keys for pattern in row_patterns(config, num_tokens)]
    assert num_row_keys(config, num_tokens) == sum(sizes)


def own_keys(fields, row, num_tokens=None):
    """Of the last of a config's row patterns."""
    keys = row_patterns(SparseAttentionConfig(**fields), num_tokens)[-1].keys(torch.tensor([row]))[0].tolist()
    return sorted({key for key in keys if 0 <= key < (num_tokens or 10**6)})


def test_keys_by_hand():
    assert own_keys({"dilated_window_size": 4, "dilation": 3}, 10) == [1, 4, 7]
    assert own_keys({"dilated_window_size": 2, "dilation": 3}, 10) == [4, 7]
    assert own_keys({"slash_distances": [2, 7, 11]}, 10) == [3, 8]
    assert own_keys({"block_size": 4}, 10) == [8, 9, 10]
    assert own_keys({"block_size": 4, "num_neighbouring_blocks": 1}, 10) == [4, 5, 6, 7, 8, 9, 10]
    assert own_keys({"block_size": 4, "block_offset": 1}, 10) == [9, 10]
    assert own_keys({"block_size": 4, "block_offset": 1, "num_neighbouring_blocks": 9}, 4) == [0, 1, 2, 3, 4]
    assert own_keys({"dilated_window_size": 2, "dilation": 3}, 10, 15) == [4, 7, 13]
    assert own_keys({"slash_distances": [2, 7, 11]}, 10, 22) == [3, 8, 12, 17, 21]
    assert own_keys({"block_size": 4, "num_neighbouring_blocks": 1}, 10, 15) == [*range(4, 15)]
    assert own_keys({"block_size": 4, "block_offset": 1}, 10, 15) == [9, 10, 11, 12]
    strided = static_positions(SparseAttentionConfig(num_global_tokens=0, stride=5, stride_offset=2), 14, CPU)
    assert strided.tolist() == [2, 7, 12]


def test_random_blocks_are_whole_older_blocks_and_the_same_for_all_rows_of_a_block():
    fields = {"block_size": 6, "block_offset": 4, "num_random_blocks": 2, "seed": 5}
    assert own_keys(fields, 3) == []
    drawn = set()
    for first in range(4, 400, 6):
        keys = own_keys(fields, first)
        assert all(own_keys(fields, row) == keys for row in range(first, first + 6))
        blocks = {(key + 2) // 6 for key in keys}
        assert keys == [key for block in sorted(blocks) for key in range(6 * block - 2, 6 * block + 4) if key >= 0]
        assert max(keys) < first
        drawn |= {(first - block * 6) // 6 for block in blocks}
    assert len(drawn) > 20
    assert own_keys(fields, 399) != own_keys({**fields, "seed": 6}, 399)


def test_random_blocks_on_both_sides_are_of_the_whole_document():
    fields = {"block_size": 6, "block_offset": 4, "num_random_blocks": 2, "seed": 5}
    drawn = set()
    for first in [0, *range(4, 400, 6)]:
        keys = own_keys(fields, first, 400)
        assert own_keys(fields, first + 3, 400) == keys
        drawn |= {(key + 2) // 6 for key in keys}
    assert drawn <= {*range(67)}
    assert len(drawn) > 45  # of 67, two draws for each
    assert max(drawn) > 62


def test_a_process_knows_the_patterns_of_its_own_heads():
    """Where tensor parallelism splits them: entries go by the heads of the whole layer."""
    config = SparseAttentionConfig(stride=3, by_kv_head=[{}, {"stride": 5}])
    split = [layer_pattern(config, 0, 4, 2, 4, CPU, torch.float64, split=HeadSplit(rank, 2)) for rank in (0, 1)]
    assert [[part.config.stride for _, part in pattern.parts] for pattern in split] == [[3], [5]]
    whole = layer_pattern(config, 0, 8, 4, 4, CPU, torch.float64)
    assert [(heads, part.config.stride) for heads, part in whole.parts] == [(slice(0, 2), 3), (slice(2, 4), 5)]
    with pytest.raises(ValueError, match="as the layer has KV heads, 1, got 2"):
        layer_pattern(config, 0, 8, 1, 4, CPU, torch.float64)
    dense = config.replace(dense_layers=(0,))  # its heads may be others
    assert layer_pattern(dense, 0, 8, 1, 4, CPU, torch.float64).dense_rows() is None


@pytest.mark.parametrize("static", [[], [0], [0, 1, 8, 9, 30], [*range(0, 300, 2)]], ids=len)
@pytest.mark.parametrize("sliding_window", [None, 50])
@pytest.mark.parametrize("key_offset", [0, 21])
def test_row_keys_are_what_nothing_else_gives(static, sliding_window, key_offset):
    """Wide tables, in which patterns repeat each other: as sets in Python."""
    fields = {"block_size": 60, "num_neighbouring_blocks": 1, "num_random_blocks": 1, "block_offset": 7}
    config = SparseAttentionConfig(**fields, num_random_keys=9, slash_distances=(3, 3, 70), dilated_window_size=40)
    pattern = make_pattern(config, 1, 1, 4, sliding_window=sliding_window)
    position = torch.arange(key_offset, 260)
    given = torch.cat([own.keys(position) for own in row_patterns(config)], 1).tolist()
    found = row_keys(pattern, position, torch.tensor(static, dtype=torch.int64), 5, key_offset)
    for p, keys, listed in zip(position.tolist(), given, found.tolist(), strict=True):
        first = max(key_offset, p - (sliding_window or 1000) + 1)
        expected = [key - key_offset for key in set(keys) if first <= key <= p - 5 and key not in static]
        assert sorted(key for key in listed if key >= 0) == sorted(expected)


DOCS = Path(__file__).parents[1] / "docs" / "patterns.md"


@pytest.mark.parametrize("section", DOCS.read_text(encoding="utf-8").split("\n## ")[1:], ids=lambda text: text[:12])
def test_docs_patterns(section):
    """Each drawing is the pattern of the fields above it, and the file that is shown is the one that is there."""
    blocks = re.findall(r"^```(json|text|python)\n(.*?)\n?^```$", section, re.DOTALL | re.MULTILINE)
    configs = [json.loads(text) for language, text in blocks if language == "json"]
    for fields in configs:
        SparseAttentionConfig.from_dict(fields)
    for language, text in blocks:
        if language == "text":
            assert drawing(configs[-1]) == text
        elif language == "python":
            assert text in inspect.getsource(slash)


def test_docs_name_every_pattern_field_and_preset():
    text = DOCS.read_text(encoding="utf-8")
    assert not [name for name in (*PATTERN_FIELDS, *PRESETS, "by_layer", "by_kv_head") if f"`{name}`" not in text]
    fields = {field.name for field in dataclasses.fields(SparseAttentionConfig)}
    others = {"key_budget", "min_weight", "hash", "num_hash_bits", "seed", "page_size", "dense_layers", "dense_below"}
    others |= {"implementation", "calibrated_hash", "by_layer", "by_kv_head", "global_token_ids"}
    assert set(PATTERN_FIELDS) == fields - others
    drawn = "".join(re.findall(r"```json\n(.*)\n```\n\n```text\n", text))
    assert [name for name in PATTERN_FIELDS if f'"{name}"' not in drawn] == ["num_voted_blocks"]  # it needs queries


def test_what_is_turned_off_is_not_there():
    config = SparseAttentionConfig(num_global_tokens=0)
    assert static_patterns(config) == row_patterns(config) == ()
    assert num_row_keys(config) == 0
    assert tuple(map(type, static_patterns(EVERY_PATTERN))) == STATIC_PATTERNS
    assert tuple(map(type, row_patterns(EVERY_PATTERN))) == ROW_PATTERNS


def test_every_row_pattern_but_random_keys_is_named_in_from_the_row():
    """Else cross-attention would take it and count from a place that its rows do not have."""
    off = {name: getattr(SparseAttentionConfig(), name) for name in (*FROM_THE_ROW, "num_random_blocks")}
    assert tuple(map(type, row_patterns(EVERY_PATTERN.replace(**off)))) == (SeededRandom,)


def test_static_positions():
    config = SparseAttentionConfig(num_global_tokens=2, global_token_indices=(30, 7, 7), stride=10)
    assert static_positions(config, 25, torch.device("cpu")).tolist() == [0, 1, 7, 10, 20]
    assert static_positions(config, 1, torch.device("cpu")).tolist() == [0]


@pytest.mark.parametrize("seed", [3, 2**32 - 1])
def test_random_keys_are_in_range_and_spread(seed):
    config = SparseAttentionConfig(num_random_keys=8, seed=seed)
    position = torch.arange(2000)
    drawn = random_keys(config, position)
    assert drawn.shape == (2000, 8)
    assert (drawn >= 0).all()
    assert (drawn <= position[:, None]).all()
    assert abs(float((drawn[100:] / position[100:, None]).mean()) - 0.5) < 0.02
    assert drawn[1000].unique().numel() > 4


def test_random_keys_depend_on_the_row_alone():
    config = SparseAttentionConfig(num_random_keys=4, seed=3)
    drawn = random_keys(config, torch.arange(100))
    assert torch.equal(random_keys(config, torch.tensor([57, 3])), drawn[[57, 3]])
    assert not torch.equal(random_keys(config.replace(seed=4), torch.arange(100)), drawn)


def test_random_keys_are_the_same_on_every_machine():
    """The finaliser of MurmurHash3 in Python's own integers."""

    def drawn(seed, p, i):
        x = (p * 0x9E3779B1 + i * 0x85EBCA77 + seed * 0xC2B2AE3D) % 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return (x ^ x >> 16) % (p + 1)

    for seed in (0, 1, 2**31 - 1):
        config = SparseAttentionConfig(num_random_keys=3, seed=seed)
        rows = [0, 10, 131_071, 1_000_000]
        expected = [[drawn(seed, p, i) for i in range(3)] for p in rows]
        assert random_keys(config, torch.tensor(rows)).tolist() == expected
