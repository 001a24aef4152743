"""Rows that read everything, by the tiles of the compiled implementation: the specification's, whatever the tiles."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.cases import inputs, output_and_gradients, pattern_of, sinks_of
from helpers.operation import SCALING, attend

from hf_sparse_attn.ops.numba import dense_rows

SHAPES = {  # query heads, KV heads, rows, keys, head_dim
    "one chunk": (4, 2, 40, 40, 8),
    "many chunks": (4, 2, 150, 150, 16),
    "three query heads for each KV head": (6, 2, 100, 100, 24),
    "one KV head": (5, 1, 77, 77, 64),
    "no sharing": (3, 3, 130, 130, 40),
    "after cached keys": (6, 2, 30, 301, 16),
    "several blocks of keys": (2, 1, 33, 1300, 32),
    "wide heads": (2, 1, 150, 420, 256),
}

NAMES = (*["team", "rows", "key", "value", "grad", "logsumexp", "delta"], "query_grad", "key_grad", "value_grad")


def case(name, dtype=torch.float64, **fields):
    num_heads, num_kv_heads, num_rows, num_keys, dim = SHAPES[name]
    pattern = pattern_of({"dense_below": 10**6} | fields, num_heads, num_kv_heads, dtype, dim)
    tensors = inputs(num_rows, num_keys, num_heads, num_kv_heads, dim=dim)
    return pattern, [x.to(dtype) for x in tensors]


@pytest.fixture(autouse=True)
def tiles_are_used(monkeypatch):
    def spy(*args):
        calls.append(args)
        attend_chunks(*args)

    calls, attend_chunks = [], dense_rows.attend_chunks
    monkeypatch.setattr(dense_rows, "attend_chunks", spy)
    yield
    assert calls


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("sliding_window", [None, 1, 2, 7, 50, 300])
@pytest.mark.parametrize("name", SHAPES)
def test_as_specified(name, sliding_window, with_sinks):
    fields = {} if sliding_window is None else {"sliding_window": sliding_window}
    pattern, tensors = case(name, **fields)
    sinks = sinks_of(len(tensors[0])) if with_sinks else None
    expected = attend(*tensors, pattern, "reference", sinks=sinks)
    torch.testing.assert_close(attend(*tensors, pattern, "numba", sinks=sinks), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("sliding_window", [None, 1, 7, 50])
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_as_specified(name, sliding_window, with_sinks):
    fields = {} if sliding_window is None else {"sliding_window": sliding_window}
    pattern, tensors = case(name, **fields)
    sinks = sinks_of(len(tensors[0])) if with_sinks else None
    expected = output_and_gradients("reference", *tensors, pattern, sinks)
    for found, known in zip(output_and_gradients("numba", *tensors, pattern, sinks), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["many chunks", "one KV head", "after cached keys", "wide heads"])
def test_lower_precision(name, dtype):
    """Output and gradients are at most twice as far off as SDPA's."""
    pattern, tensors = case(name, dtype)
    expected = output_and_gradients("reference", *(x.double() for x in tensors), case(name)[0])
    ours = output_and_gradients("numba", *tensors, pattern)
    leaves = [x.clone().requires_grad_() for x in tensors]
    num_rows, num_keys = leaves[0].shape[1], leaves[1].shape[1]
    mask = torch.ones(num_rows, num_keys, dtype=torch.bool).tril(num_keys - num_rows)
    sdpa = F.scaled_dot_product_attention(*(x[None] for x in leaves), mask, scale=SCALING, enable_gqa=True)[0]
    probe = torch.randn(sdpa.shape, generator=torch.Generator().manual_seed(1), dtype=sdpa.dtype)
    others = [sdpa.detach(), *torch.autograd.grad((sdpa * probe).sum(), leaves)]
    for found, other, known in zip(ours, others, expected, strict=True):
        assert found.dtype == dtype
        error, limit = ((x.double() - known).square().mean().sqrt() for x in (found, other))
        assert error <= 2 * limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_do_not_depend_on_their_tile(dtype):
    """Bit by bit: pieces of a prefill give what one call does."""
    pattern, (query, key, value) = case("several blocks of keys", dtype)
    whole = attend(query, key, value, pattern, "numba")
    for start, stop in ((0, 17), (5, 33), (13, 30)):
        first = key.shape[1] - query.shape[1]
        part = attend(query[:, start:stop], key[:, : first + stop], value[:, : first + stop], pattern, "numba")
        assert torch.equal(part, whole[:, start:stop])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("fields", [{}, {"sliding_window": 9}], ids=["all", "model's window"])
def test_what_a_row_does_not_read_cannot_reach_it(broken, fields):
    pattern, (query, key, value) = case("three query heads for each KV head", **fields)
    expected = attend(query, key, value, pattern, "numba")
    for at in (40, 41, 42, 99):
        other_key, other_value = key.clone(), value.clone()
        other_key[:, at], other_value[:, at] = broken, broken
        found = attend(query, other_key, other_value, pattern, "numba")
        reads = torch.arange(100) >= at
        if "sliding_window" in fields:
            reads &= torch.arange(100) < at + 9
        assert torch.equal(found[:, ~reads], expected[:, ~reads])
        assert not found[:, reads].isfinite().all(-1).any()


def test_the_number_of_threads_changes_nothing():
    pattern, tensors = case("many chunks", torch.float32)
    before, found = torch.get_num_threads(), []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        found.append(attend(*tensors, pattern, "numba"))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def one_key_too_many(num_older, window):
    return num_older + 1, window


def one_key_too_few(num_older, window):
    return num_older - 1, window


def a_wider_window(num_older, window):
    return num_older, window + 1


@pytest.mark.parametrize("mutate", [one_key_too_many, one_key_too_few, a_wider_window])
def test_mutants_are_caught(mutate, monkeypatch):
    def mutant(team, rows, *others):
        num_older, window = mutate(rows.num_older, rows.window)
        attend_chunks(team, rows._replace(num_older=num_older, window=window), *others)

    attend_chunks = dense_rows.attend_chunks
    monkeypatch.setattr(dense_rows, "attend_chunks", mutant)
    with pytest.raises(AssertionError):
        test_as_specified("after cached keys", 50, False)


@pytest.mark.parametrize("left_out", ["logsumexp", "delta", "key_grad", "value_grad", "query_grad"])
def test_mutants_of_the_backward_are_caught(left_out, monkeypatch):
    def mutant(*args):
        changed = list(args)
        place = NAMES.index(left_out)
        changed[place] = args[place] * 0.9 if left_out in ("logsumexp", "delta") else np.zeros_like(args[place])
        differentiate_chunks(*changed)

    differentiate_chunks = dense_rows.differentiate_chunks
    monkeypatch.setattr(dense_rows, "differentiate_chunks", mutant)
    with pytest.raises(AssertionError):
        test_gradients_as_specified("many chunks", 50, False)


def test_a_kv_head_of_another_is_caught(monkeypatch):
    def mutant(team, rows, *others):
        attend_chunks(team, rows._replace(key=rows.key[::-1].copy()), *others)

    attend_chunks = dense_rows.attend_chunks
    monkeypatch.setattr(dense_rows, "attend_chunks", mutant)
    with pytest.raises(AssertionError):
        test_as_specified("many chunks", None, False)
