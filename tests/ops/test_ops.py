import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import (
    DIM,
    FEATURES,
    KV_HEADS,
    LENGTH,
    assert_like_reference,
    check_lower_precision,
    inputs,
    pattern_of,
    sinks_of,
)
from helpers.operation import SCALING, KeyMask, attend, make_pattern
from helpers.spies import LargestTensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_sparse_attn import SparseAttentionConfig, sparse_attention
from hf_sparse_attn.ops import reference
from hf_sparse_attn.ops.common import chunked as pieces


@pytest.mark.parametrize("fields", FEATURES.values(), ids=FEATURES.keys())
def test_every_feature(fields):
    assert_like_reference(*inputs(), pattern_of(fields))


@pytest.mark.parametrize("fields", FEATURES.values(), ids=FEATURES.keys())
def test_every_feature_with_softcap_and_sinks(fields):
    assert_like_reference(*inputs(), pattern_of(fields), softcap=0.7, sinks=sinks_of())


@pytest.mark.parametrize("softcap", [None, 0.7], ids=["", "softcap"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("fields", [{"window_size": LENGTH}, {"dense_below": 60}, {"dense_layers": (0,)}], ids=str)
@pytest.mark.parametrize("num_queries", [LENGTH, 40])
def test_softcap_and_sinks_by_their_formula(softcap, with_sinks, fields, num_queries, monkeypatch):
    """Of rows that read everything, as Gemma 2 and gpt-oss define them."""
    monkeypatch.setattr(pieces, "_DENSE_SCORES", 4 * LENGTH * 7)  # dense rows in blocks of 7
    query, key, value = inputs()
    sinks = sinks_of() if with_sinks else None
    pattern = pattern_of({"window_size": LENGTH} | fields)
    scores = torch.einsum("hid,hjd->hij", query, key.repeat_interleave(2, 0)) * 0.4
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    exp = scores.exp().tril()
    total = exp.sum(-1, keepdim=True) + (sinks.exp()[:, None, None] if with_sinks else 0)
    expected = (exp / total @ value.repeat_interleave(2, 0))[:, -num_queries:]
    output = attend(query[:, -num_queries:], key, value, pattern, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_dense_rows_with_softcap_and_sinks_in_blocks(monkeypatch):
    monkeypatch.setattr(pieces, "_DENSE_SCORES", 4 * LENGTH * 7)
    for fields in ({"dense_layers": (0,)}, {"dense_below": 90, "sliding_window": 41}):
        assert_like_reference(*inputs(), pattern_of(fields), softcap=0.7, sinks=sinks_of())


def test_queries_of_zeros():
    """Such as those of a token whose embedding is zero: all buckets score alike."""
    query, key, value = inputs()
    query[:, ::2] = 0
    assert_like_reference(query, key, value, pattern_of({}))


@pytest.mark.parametrize("group", [1, 2, 3, 4], ids=lambda group: f"group of {group}")
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65], ids=lambda length: f"{length} tokens")
def test_lengths_and_groups(length, group):
    pattern = pattern_of({"key_budget": 7}, num_heads=2 * group)
    output = assert_like_reference(*inputs(length, length, 2 * group), pattern)
    assert output.shape == (2 * group, length, DIM)


@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_other_numbers_of_kv_heads(num_kv_heads):
    pattern = pattern_of({}, num_heads=3, num_kv_heads=num_kv_heads)
    assert_like_reference(*inputs(70, 70, 3, num_kv_heads), pattern)


@pytest.mark.parametrize("name", ["defaults of this file", "dense rows", "everything at once", "random keys"])
@pytest.mark.parametrize("num_queries", [1, 2, 64, 97], ids=lambda n: f"{n} queries")
def test_cached_keys(num_queries, name):
    """Q < N: the rows of the whole document's last queries."""
    query, key, value = inputs()
    pattern = pattern_of(FEATURES[name])
    output = assert_like_reference(query[:, -num_queries:], key, value, pattern)
    whole = attend(query, key, value, pattern)
    torch.testing.assert_close(output, whole[:, -num_queries:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["model's window wider than ours", "model's window inside ours", "everything at once"])
@pytest.mark.parametrize("dropped", [1, 22, 50], ids=lambda n: f"{n} dropped")
def test_dropped_keys(dropped, name):
    """A sliding cache keeps only the keys that the rows can see; positions still count from the document's start."""
    query, key, value = inputs()
    pattern = pattern_of(FEATURES[name])
    first_row = dropped + pattern.sliding_window - 1
    query, kept_key, kept_value = query[:, first_row:], key[:, dropped:], value[:, dropped:]
    output = assert_like_reference(query, kept_key, kept_value, pattern, key_offset=dropped)
    torch.testing.assert_close(output, attend(query, key, value, pattern), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "fields",
    [
        {"window_size": LENGTH},
        {"num_global_tokens": LENGTH},
        {"stride": 1},
        {"key_budget": LENGTH, "min_weight": 0.0, "page_size": 1, "window_size": 1},
        {"dense_below": LENGTH},
        {"dense_layers": (0,)},
        {"dense_below": 60, "num_global_tokens": 50, "window_size": LENGTH - 50},
    ],
    ids=["window", "globals", "stride", "routed", "dense rows", "dense layer", "dense rows, globals and window"],
)
@pytest.mark.parametrize("sliding_window", [None, 40], ids=["all keys", "model's window"])
def test_full_coverage_is_sdpa(fields, sliding_window):
    query, key, value = inputs()
    row, column = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    mask = (column <= row) & (column > row - (sliding_window or LENGTH))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.4, enable_gqa=True)
    output = attend(query, key, value, pattern_of({**fields, "sliding_window": sliding_window}))
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_window_only_is_a_sliding_window_model():
    query, key, value = inputs()
    fields = {"num_global_tokens": 0, "key_budget": 0}
    ours = attend(query, key, value, pattern_of({**fields, "window_size": 17}))
    theirs = attend(query, key, value, pattern_of({**fields, "window_size": 300, "sliding_window": 17}))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fields", FEATURES.values(), ids=FEATURES.keys())
def test_later_tokens_leave_earlier_rows_alone_to_the_last_bit(fields):
    pattern = pattern_of(fields)
    query, key, value = inputs()
    before = attend(query, key, value, pattern)
    others = inputs(seed=1)
    for cut in (1, 12, 64, 127, 149):
        changed = [
            torch.cat([x[:, :cut], 30 * y[:, cut:]], 1) for x, y in zip((query, key, value), others, strict=True)
        ]
        after = attend(*changed, pattern)
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert not torch.isclose(after[:, cut:], before[:, cut:]).all(-1).any()


def test_gradients_of_earlier_tokens_only():
    """A row's output has no gradient in any later key, value or query."""
    leaves = [x.requires_grad_() for x in inputs()]
    output = attend(*leaves, pattern_of({"num_random_keys": 3}))
    gradients = torch.autograd.grad(output[:, 80].sum(), leaves)
    assert all((gradient[:, 81:] == 0).all() for gradient in gradients)
    assert (gradients[0][:, :80] == 0).all()
    assert all((gradient[:, :81] != 0).any() for gradient in gradients)


def test_only_what_needs_a_gradient_gets_one():
    query, key, value = inputs()
    pattern = pattern_of({"num_random_keys": 3})
    for i in range(3):
        leaves = [x.clone().requires_grad_(j == i) for j, x in enumerate((query, key, value))]
        expected = [x.clone().requires_grad_() for x in (query, key, value)]
        attend(*leaves, pattern).square().sum().backward()
        attend(*expected, pattern).square().sum().backward()
        torch.testing.assert_close(leaves[i].grad, expected[i].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["defaults of this file", "everything at once", "random keys"])
@pytest.mark.parametrize("implementation", ["torch", "numba"])
def test_error_of_lower_precision_is_at_most_twice_that_of_sdpa(implementation, name, dtype):
    check_lower_precision(implementation, name, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [8, 48])
def test_half_precision_is_widened_as_it_is_read(dim, dtype):
    """Numba gives what the same numbers give in float32, rounded once, and keeps none of them in float32."""

    def results(numbers):
        leaves = [x.clone().requires_grad_() for x in numbers]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.dtype) or x, lambda x: x):
            output = attend(*leaves, pattern_of({}, dtype=torch.float32, dim=dim), "numba")
        return [output, *torch.autograd.grad(output, leaves, probe.to(output.dtype))]

    tensors, saved = [x.to(dtype) for x in inputs(dim=dim)], []
    probe = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = results(tensors)
    assert set(saved) == {dtype}
    for stored, widened in zip(ours, results([x.float() for x in tensors]), strict=True):
        assert torch.equal(stored, widened.to(dtype))


def test_autocast_changes_nothing_forward_or_backward():
    """The operation is computed in float32 whatever autocast says, also where backward() is called inside it."""
    results = []
    for enabled in (False, True):
        leaves = [x.float().requires_grad_() for x in inputs()]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = attend(*leaves, pattern_of({"num_random_keys": 3}, dtype=torch.float32))
            output.square().sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for plain, autocast in zip(*results, strict=True):
        assert autocast.dtype == torch.float32
        assert torch.equal(autocast, plain)


@given(data=st.data())
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_any_config_and_any_shape(data):
    def draw(strategy):
        return data.draw(strategy)

    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    length = draw(st.integers(1, 80))
    fields = {
        "window_size": draw(st.integers(1, 30)),
        "num_global_tokens": draw(st.integers(0, 5)),
        "global_token_indices": tuple(draw(st.lists(st.integers(0, 90), max_size=2))),
        "stride": draw(st.sampled_from([0, 0, 1, 7])),
        "num_random_keys": draw(st.integers(0, 4)),
        "dilated_window_size": draw(st.sampled_from([0, 0, 3])),
        "slash_distances": draw(st.lists(st.integers(0, 90), max_size=2)),
        "block_size": draw(st.sampled_from([0, 0, 1, 6, 40])),
        "by_kv_head": draw(
            st.lists(st.sampled_from([{}, {"block_size": 9}, {"window_size": 2}]), max_size=num_kv_heads)
        ),
        "key_budget": (tuple(draw(st.integers(0, 20)) for _ in range(num_kv_heads)),),
        "min_weight": (tuple(draw(st.sampled_from([0.0, 0.01, 0.1])) for _ in range(num_kv_heads * group)),),
        "num_hash_bits": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 3)),
        "page_size": draw(st.sampled_from([1, 2, 3, 8, 64])),
        "dense_below": draw(st.sampled_from([0, 0, 5, 40])),
        "sliding_window": draw(st.sampled_from([None, None, 1, 9, 33])),
    }
    if size := fields["block_size"]:
        fields |= {"num_neighbouring_blocks": draw(st.integers(0, 1)), "num_random_blocks": draw(st.integers(0, 2))}
        fields |= {"block_offset": draw(st.sampled_from([0, min(size - 1, 5)]))}
    if fields["stride"] == 7:
        fields |= {"stride_offset": draw(st.integers(0, 3)), "stride_width": draw(st.integers(1, 4))}
    if fields["dilated_window_size"]:
        fields["dilation"] = draw(st.sampled_from([1, 11]))
    num_queries = draw(st.integers(1, length))
    pattern = pattern_of(fields, num_kv_heads * group, num_kv_heads)
    seed = draw(st.integers(0, 1000))
    query, key, value = inputs(num_queries, length, num_kv_heads * group, num_kv_heads, seed)
    recorder = KeyMask(num_kv_heads * group, num_queries, length, length - num_queries)
    attend(query, key, value, pattern, recorder=recorder)
    expected = reference.attended_keys(query, key, pattern, length - num_queries, scaling=SCALING)
    assert torch.equal(recorder.mask, expected)
    assert_like_reference(query, key, value, pattern)


def test_largest_tensor_sees_a_square():
    with LargestTensor() as largest:
        torch.ones(100, 1) @ torch.ones(1, 100)
    assert largest.bytes == 40_000


LONG = 4096
LONG_FIELDS = {"window_size": 64, "num_global_tokens": 8, "key_budget": 64, "num_hash_bits": 6, "page_size": 16}


@pytest.mark.parametrize("others", [{}, {"softcap": 3.0}], ids=["", "softcap"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window": 1024},
        {"num_random_keys": 16, "key_budget": 16},
        {"block_size": 64, "num_neighbouring_blocks": 1, "num_random_blocks": 1, "key_budget": 16},
        {"dense_below": 256},
        {"dense_layers": (0,)},
        {"dense_layers": (0,), "sliding_window": 1024},
    ],
    ids=[
        "routed",
        "model's window",
        "random keys",
        "blocks",
        "dense rows",
        "dense layer",
        "dense layer and model's window",
    ],
)
def test_no_tensor_is_quadratic(fields, backward, others, monkeypatch):
    """Neither rows x keys (as bits, even) nor rows x routed keys x head_dim."""
    monkeypatch.setattr(pieces, "_DENSE_SCORES", 2**20)
    pattern = pattern_of(LONG_FIELDS | fields, num_heads=2, num_kv_heads=1, dtype=torch.float32, dim=64)
    leaves = [x.float().requires_grad_(backward) for x in inputs(LONG, LONG, 2, 1, dim=64)]
    with LargestTensor() as largest:
        output = attend(*leaves, pattern, **others)
        if backward:
            output.sum().backward()
    assert largest.bytes < LONG * LONG / 2
    assert largest.bytes < LONG * 64 * 64 * 4


OTHER_REGISTERS = """
import importlib.util
import sys
from pathlib import Path
import torch
import hf_sparse_attn
from hf_sparse_attn import SparseAttentionConfig
name = "hf_sparse_attn.ops.numba.simd"  # before its package, which compiles with it
path = Path(hf_sparse_attn.__file__).parent / "ops" / "numba" / "simd.py"
spec = importlib.util.spec_from_file_location(name, path)
sys.modules[name] = simd = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simd)
simd.LANES = 24 - simd.LANES
from hf_sparse_attn import sparse_attention
torch.manual_seed(0)
*inputs, weights = (torch.randn(1, heads, 200, 24, dtype=torch.float64) for heads in (8, 2, 2, 8))
results = []
for implementation in ("numba", "reference"):
    config = SparseAttentionConfig(
        window_size=9, key_budget=40, num_hash_bits=4, page_size=8, dense_below=50, implementation=implementation
    )
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = sparse_attention(*leaves, config=config)
    results.append([output, *torch.autograd.grad((output * weights).sum(), leaves)])
for ours, expected in zip(*results):
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
"""


def test_registers_of_another_size(tmp_path):
    """Machines with AVX-512 test what others run, and the other way round."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", OTHER_REGISTERS], env=environment, check=True)


def test_batch_and_cached_keys_through_the_public_function():
    config = SparseAttentionConfig(window_size=5, num_global_tokens=1, key_budget=6, num_hash_bits=2, dense_below=0)
    rows = [inputs(30, 70, seed=seed) for seed in (0, 1)]
    query, key, value = (torch.stack(parts) for parts in zip(*rows, strict=True))
    pattern = make_pattern(config, 4, KV_HEADS, DIM)
    expected = torch.stack([attend(*row, pattern, "reference") for row in rows])
    torch.testing.assert_close(sparse_attention(query, key, value, config=config, scaling=0.4), expected)
    capped = sparse_attention(query, key, value, config=config, scaling=0.4, softcap=0.7, sinks=sinks_of())
    expected_capped = [attend(*row, pattern, "reference", softcap=0.7, sinks=sinks_of()) for row in rows]
    torch.testing.assert_close(capped, torch.stack(expected_capped))
    default = sparse_attention(query, key, value, config=config)
    torch.testing.assert_close(default, sparse_attention(query, key, value, config=config, scaling=1 / math.sqrt(DIM)))
    assert not torch.allclose(default, expected)


def test_layers_differ_in_budget_and_hash():
    query, key, value = (x[None] for x in inputs())
    config = SparseAttentionConfig(window_size=4, key_budget=(8, 8, 0), num_hash_bits=3, page_size=4, dense_below=0)
    outputs = [sparse_attention(query, key, value, config=config, layer_idx=layer) for layer in range(3)]
    assert not torch.allclose(outputs[0], outputs[1])
    unrouted = dataclasses.replace(config, key_budget=0)
    assert torch.equal(outputs[2], sparse_attention(query, key, value, config=unrouted))


@pytest.mark.parametrize("implementation", ["auto", "numba", "reference", "torch"])
def test_dtype_of_the_result(implementation):
    config = SparseAttentionConfig(window_size=5, key_budget=6, dense_below=0, implementation=implementation)
    query, key, value = (x[None, :, :20].bfloat16() for x in inputs())
    assert sparse_attention(query, key, value, config=config).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 8, 8)),
        ((1, 4, 9, 8), (1, 2, 9, 6), (1, 2, 9, 6)),
        ((4, 9, 8), (2, 9, 8), (2, 9, 8)),
        ((1, 4, 9, 8), (1, 3, 9, 8), (1, 3, 9, 8)),
        ((1, 4, 10, 8), (1, 2, 9, 8), (1, 2, 9, 8)),
        ((2, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8)),
    ],
    ids=["value shorter", "head_dim", "no batch", "heads", "more queries than keys", "batch"],
)
def test_shapes_that_do_not_fit(query, key, value):
    with pytest.raises(ValueError, match=r"^query"):
        sparse_attention(torch.zeros(query), torch.zeros(key), torch.zeros(value), config=SparseAttentionConfig())
