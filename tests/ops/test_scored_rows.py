"""Rows that score every key up to their own, by the tiles of the compiled implementation: as by buckets."""

import numpy as np
import pytest
import torch
from helpers.cases import inputs, pattern_of, sinks_of
from helpers.operation import KeyMask, attend

from hf_sparse_attn.ops.numba import chunks, dense_rows

SHAPES = {  # query heads, KV heads, rows, head_dim
    "one KV head": (5, 1, 400, 64),
    "two for each KV head": (4, 2, 150, 8),
    "three for each KV head": (6, 2, 333, 16),
    "no sharing": (3, 3, 260, 40),
}
FIELDS = {
    "all keys": {"key_budget": 1000, "min_weight": 0.0},
    "light keys dropped": {"key_budget": 1000, "min_weight": 0.01},
    "up to some row": {"key_budget": 60, "min_weight": 0.02},
    "static keys": {"key_budget": 1000, "min_weight": 0.05, "stride": 13},
    "a wider window": {"key_budget": 1000, "min_weight": 0.01, "num_global_tokens": 0, "window_size": 64},
    "after dense rows": {"key_budget": 100, "min_weight": 0.01, "dense_below": 71},
    "nothing routed": {"key_budget": 0, "dense_below": 3},
}


def case(name, fields, dtype=torch.float64):
    num_heads, num_kv_heads, num_rows, dim = SHAPES[name]
    pattern = pattern_of(fields, num_heads, num_kv_heads, dtype, dim)
    return pattern, [x.to(dtype) for x in inputs(num_rows, num_rows, num_heads, num_kv_heads, dim=dim)]


@pytest.fixture
def scored(monkeypatch):
    """The rows that were computed by tiles."""

    def spy(call, num_older, kv_head, static, output, *parts):
        attend_scored(call, num_older, kv_head, static, output, *parts)
        found.extend((kv_head, num_older + i) for i in range(output.shape[1]))

    found, attend_scored = [], dense_rows.attend_scored
    monkeypatch.setattr(chunks, "attend_scored", spy)
    return found


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("name", SHAPES)
def test_as_specified(name, fields, with_sinks, scored):
    pattern, tensors = case(name, FIELDS[fields])
    sinks = sinks_of(len(tensors[0])) if with_sinks else None
    expected = attend(*tensors, pattern, "reference", sinks=sinks)
    torch.testing.assert_close(attend(*tensors, pattern, "numba", sinks=sinks), expected, rtol=1e-11, atol=1e-12)
    config, (num_kv_heads, num_rows, _) = pattern.config, tensors[1].shape
    stop = min(pattern.budgets[0] + config.window_size, num_rows)
    assert sorted(scored) == [(h, row) for h in range(num_kv_heads) for row in range(config.dense_below, stop)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(dtype):
    """As by buckets, which a recorder is told of."""
    pattern, tensors = case("three for each KV head", FIELDS["light keys dropped"], dtype)
    by_tiles = attend(*tensors, pattern, "numba")
    by_buckets = attend(*tensors, pattern, "numba", recorder=KeyMask(6, 333, 333))
    assert by_tiles.dtype == by_buckets.dtype == dtype
    error = (by_tiles.double() - by_buckets.double()).abs()
    assert error.median() <= torch.finfo(dtype).eps
    assert error.max() < 0.02  # a key whose weight is on the edge


@pytest.mark.parametrize("fields", ["light keys dropped", "up to some row"])
def test_pieces_of_a_prefill(fields):
    """Bit by bit what one call gives."""
    pattern, (query, key, value) = case("three for each KV head", FIELDS[fields], torch.float32)
    whole = attend(query, key, value, pattern, "numba")
    for start, stop in ((0, 70), (60, 64), (61, 333), (200, 201)):
        part = attend(query[:, start:stop], key[:, :stop], value[:, :stop], pattern, "numba")
        assert torch.equal(part, whole[:, start:stop])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_later_keys_cannot_reach_a_row(broken):
    pattern, (query, key, value) = case("three for each KV head", FIELDS["light keys dropped"])
    expected = attend(query, key, value, pattern, "numba")
    for at in (100, 101, 102):
        other_key, other_value = key.clone(), value.clone()
        other_key[:, at], other_value[:, at] = broken, broken
        found = attend(query, other_key, other_value, pattern, "numba")
        assert torch.equal(found[:, :at], expected[:, :at])


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": 90},
        {"num_random_keys": 3},
        {"slash_distances": (20, 33)},
        {"window_size": 5, "page_size": 8},
        {"softcap": 3.0},
    ],
    ids=str,
)
def test_what_is_left_to_the_buckets(fields, scored):
    softcap = fields.get("softcap")
    own = {name: value for name, value in fields.items() if name != "softcap"}
    pattern, tensors = case("two for each KV head", FIELDS["light keys dropped"] | own)
    expected = attend(*tensors, pattern, "reference", softcap=softcap)
    torch.testing.assert_close(attend(*tensors, pattern, "numba", softcap=softcap), expected, rtol=1e-11, atol=1e-12)
    assert not scored


def light_keys_stay(rows, value, sinks, min_weights, static, own_window):
    return rows, value, sinks, 0 * min_weights, static, own_window


def static_keys_are_dropped(rows, value, sinks, min_weights, static, own_window):
    return rows, value, sinks, min_weights, static[:1], own_window


def a_shorter_window(rows, value, sinks, min_weights, static, own_window):
    return rows, value, sinks, min_weights, static, own_window - 1


def later_keys_are_read(rows, value, sinks, min_weights, static, own_window):
    return rows._replace(num_older=rows.num_older + 1), value, sinks, min_weights, static, own_window


def smallest_weights_of_other_heads(rows, value, sinks, min_weights, static, own_window):
    return rows, value, sinks, np.ascontiguousarray(min_weights[::-1]), static, own_window


@pytest.mark.parametrize(
    "mutate",
    [light_keys_stay, static_keys_are_dropped, a_shorter_window, later_keys_are_read, smallest_weights_of_other_heads],
)
def test_mutants_are_caught(mutate, monkeypatch):
    def mutant(*args):
        attend_scored_rows(*mutate(*args[:6]), *args[6:])

    fields = {"key_budget": 1000, "stride": 13, "min_weight": ((0.0, 0.02, 0.05, 0.2),)}
    pattern, tensors = case("two for each KV head", fields)
    expected = attend(*tensors, pattern, "reference")
    torch.testing.assert_close(attend(*tensors, pattern, "numba"), expected)
    attend_scored_rows = dense_rows.attend_scored_rows
    monkeypatch.setattr(dense_rows, "attend_scored_rows", mutant)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(attend(*tensors, pattern, "numba"), expected)
