"""What each pattern gives: its positions, and its rule for the specification."""

import pytest
import torch

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.patterns import (
    ROW_PATTERNS,
    STATIC_PATTERNS,
    num_row_keys,
    row_patterns,
    static_patterns,
    static_positions,
)

CPU = torch.device("cpu")
STATIC = [
    {"num_global_tokens": 5},
    {"num_global_tokens": 0, "global_token_indices": (7, 40, 7, 500, 0)},
    {"num_global_tokens": 0, "stride": 1},
    {"num_global_tokens": 0, "stride": 9},
    {"num_global_tokens": 3, "global_token_indices": (2, 11), "stride": 10},
    {"num_global_tokens": 0},
]


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


def test_a_rows_own_keys_are_those_that_the_rule_admits():
    config = SparseAttentionConfig(num_random_keys=4, seed=7)
    for pattern in row_patterns(config):
        for row in (0, 1, 17, 300):
            keys = pattern.keys(torch.tensor([row]))
            assert keys.shape == (1, pattern.num_keys)
            position = torch.arange(400)
            assert set(position[pattern.admits(row, position)].tolist()) == set(keys[0].tolist())
    assert num_row_keys(config) == 4


def test_what_is_turned_off_is_not_there():
    config = SparseAttentionConfig(num_global_tokens=0)
    assert static_patterns(config) == row_patterns(config) == ()
    assert num_row_keys(config) == 0
    on = SparseAttentionConfig(num_global_tokens=2, global_token_indices=(5,), stride=3, num_random_keys=1)
    assert tuple(map(type, static_patterns(on))) == STATIC_PATTERNS
    assert tuple(map(type, row_patterns(on))) == ROW_PATTERNS


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
