"""The index of a cached document: rows that go on where the last call stopped read what they read in one shot."""

import numpy as np
import pytest
import torch
from helpers.cases import DIM, FEATURES, KV_HEADS, LENGTH, inputs, pattern_of, sinks_of
from helpers.index_checks import (
    EXACT,
    NUMBA,
    check_any_steps,
    check_copies,
    check_same_rows_again,
    check_steps,
    check_taken_back,
    in_steps,
)
from helpers.operation import attend
from helpers.spies import count_hashed_keys
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_attn.ops.numba import attention as numba_attention
from hf_sparse_attn.ops.numba import decode as numba_decode
from hf_sparse_attn.ops.numba import index as numba_index


@pytest.mark.parametrize("name", FEATURES)
def test_steps(name):
    check_steps(name)


@pytest.mark.parametrize("name", FEATURES)
def test_linked_rows_alone(name, monkeypatch):
    monkeypatch.setattr(numba_attention, "_KEYS_PER_LINKED_ROW", 1)
    check_steps(name, (3, 30, 1, 2, 12))


def test_softcap_and_sinks():
    check_steps(softcap=2.0, sinks=sinks_of())


@pytest.mark.parametrize("name", ["defaults of this file", "page of 1", "stride", "model's window wider than ours"])
@pytest.mark.parametrize("wrong", [1, 2, 9])
def test_taken_back(name, wrong):
    check_taken_back(wrong=wrong, name=name)


def test_the_same_rows_again():
    check_same_rows_again()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), max_size=12), st.sampled_from(sorted(FEATURES)))
def test_any_steps(steps, name):
    check_any_steps(steps, name)


def test_keys_dropped_in_front():
    pattern, tensors = pattern_of({"sliding_window": 41}), inputs()
    expected = attend(*tensors, pattern, "reference")
    index = numba_index.Index(pattern, KV_HEADS, 60)
    query, key, value = (x[:, 60:] for x in tensors)
    for start, stop in ((41, 60), *((i, i + 1) for i in range(60, 90))):
        output = NUMBA.go_on(pattern, query, key, value, index, start, stop, key_offset=60)
        torch.testing.assert_close(output, expected[:, 60 + start : 60 + stop], **EXACT)


def test_few_keys_fall_into_the_same_buckets():
    for name in ("defaults of this file", "calibrated"):
        pattern, (_, key, _) = pattern_of(FEATURES[name]), inputs()
        index = numba_index.Index(pattern, KV_HEADS, 0)
        for stop in range(1, LENGTH + 1):
            index.append(key[:, :stop])
        expected = pattern.bucket_hash.assign(key).numpy()
        expected[:, :3] = pattern.bucket_hash.num_buckets  # static
        assert np.array_equal(index.bucket[:, :LENGTH], expected)


def test_no_key_is_hashed_twice(monkeypatch):
    hashed = count_hashed_keys(monkeypatch)
    in_steps(NUMBA, pattern_of({}), inputs())
    assert sum(hashed) == LENGTH
    assert hashed.count(1) > 60


def test_a_copy_goes_its_own_way():
    check_copies()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [DIM, 16, 48])
def test_half_precision_is_read_as_it_is_stored(dtype, dim):
    """What the same numbers give in float32, rounded once."""
    pattern = pattern_of({}, dtype=torch.float32, dim=dim)
    tensors = [x.to(dtype) for x in inputs(dim=dim)]
    stored, widened = in_steps(NUMBA, pattern, tensors), in_steps(NUMBA, pattern, [x.float() for x in tensors])
    assert torch.equal(stored, widened.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_copies_no_cached_keys_of_half_precision(dtype, monkeypatch):
    def spy(*args, keys, **others):
        arrays.extend(keys[1:3])
        attend_heads(*args, keys=keys, **others)

    attend_heads, arrays = numba_decode.attend_heads, []
    monkeypatch.setattr(numba_decode, "attend_heads", spy)
    tensors = [x.to(dtype) for x in inputs(dim=16)]
    in_steps(NUMBA, pattern_of({}, dtype=torch.float32, dim=16), tensors, (149, 1))
    cached = [x.view(torch.int16).numpy() for x in tensors[1:]]
    assert [np.shares_memory(*pair) for pair in zip(arrays, cached, strict=True)] == [True, True]


def test_memory_is_counted():
    pattern, tensors = pattern_of({}), inputs()
    index = numba_index.Index(pattern, KV_HEADS, 0)
    before = index.nbytes
    index.append(tensors[1])
    assert index.nbytes - before >= 2 * 4 * KV_HEADS * LENGTH  # a bucket and a link for each key


def links_of_the_oldest_key(monkeypatch):
    def mutant(bucket, previous, tail, start, stop):
        link(bucket, previous, tail, start, stop)
        previous[previous >= 0] = np.maximum(previous[previous >= 0] - 1, 0)

    link = numba_index.link_keys
    monkeypatch.setattr(numba_index, "link_keys", mutant)


def nothing_is_unlinked(monkeypatch):
    monkeypatch.setattr(numba_index, "unlink_keys", lambda *args: None)


def states_never_move_back(monkeypatch):
    monkeypatch.setattr(numba_index, "move_back", lambda *args: None)


def states_keep_the_means_of_later_pages(monkeypatch):
    move_back = numba_index.move_back

    def mutant(bucket, previous, states, num_older, first_of_page):
        move_back(bucket, previous, states, num_older, 10**9)

    monkeypatch.setattr(numba_index, "move_back", mutant)


def one_key_too_many_behind_the_window(monkeypatch):
    move_back = numba_index.move_back

    def mutant(bucket, previous, states, num_older, first_of_page):
        move_back(bucket, previous, states, num_older + 1, first_of_page)

    monkeypatch.setattr(numba_index, "move_back", mutant)


def copies_share_their_states(monkeypatch):
    def mutant(self):
        other = numba_index.Index(self.pattern, len(self.bucket), self.key_offset)
        other.__dict__.update(self.__dict__)
        return other

    monkeypatch.setattr(numba_index.Index, "copy", mutant)


def static_keys_are_routed_too(monkeypatch):
    positions = numba_index.static_positions

    def mutant(config, stop, device, start=0, marked=None):
        return positions(config, stop, device, start, marked) if start == 0 else torch.zeros(0, dtype=torch.int64)

    monkeypatch.setattr(numba_index, "static_positions", mutant)


def budget_of_the_first_head(monkeypatch):
    attend_heads = numba_decode.attend_heads

    def mutant(*args, budgets, **kwargs):
        attend_heads(*args, budgets=np.full_like(budgets, budgets[0]), **kwargs)

    monkeypatch.setattr(numba_decode, "attend_heads", mutant)


@pytest.mark.parametrize(
    ("mutate", "check"),
    [
        (links_of_the_oldest_key, check_steps),
        (nothing_is_unlinked, check_taken_back),
        (states_never_move_back, check_taken_back),
        (states_never_move_back, check_same_rows_again),
        (states_keep_the_means_of_later_pages, check_taken_back),
        (one_key_too_many_behind_the_window, check_taken_back),
        (copies_share_their_states, test_a_copy_goes_its_own_way),
        (static_keys_are_routed_too, check_steps),
        (budget_of_the_first_head, check_steps),
    ],
    ids=lambda function: function.__name__,
)
def test_broken_variants_are_caught(mutate, check, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()
