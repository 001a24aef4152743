"""Non-causal attention: the specification against masks written from the rules, the fast path against both."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import DIM, FEATURES, LENGTH, assert_like_reference, inputs, pattern_of, rms, sinks_of
from helpers.operation import SCALING, KeyMask, attend
from helpers.spies import LargestTensor

from hf_sparse_attn import SparseAttentionConfig, sparse_attention
from hf_sparse_attn.ops import reference
from hf_sparse_attn.ops.common import chunked
from hf_sparse_attn.recording import DensityRecorder


def both_sides(fields, **others):
    return pattern_of({"is_causal": False} | fields, **others)


def check(tensors, pattern, sinks=None, **others):
    return assert_like_reference(*tensors, pattern, sinks, implementations=("torch",), **others)


def read_mask(tensors, pattern, implementation="torch", **others):
    """[num_heads, Q, N] bool: what a recorder was told."""
    query, key, _ = tensors
    recorder = KeyMask(query.shape[0], query.shape[1], key.shape[1], key.shape[1] - query.shape[1])
    attend(*tensors, pattern, implementation, recorder=recorder, **others)
    return recorder.mask


@pytest.mark.parametrize("fields", FEATURES.values(), ids=FEATURES.keys())
def test_every_feature(fields):
    check(inputs(), both_sides(fields))


@pytest.mark.parametrize("name", ["defaults of this file", "everything at once", "dense layer", "dense rows"])
def test_every_kind_of_row_with_softcap_and_sinks(name, monkeypatch):
    monkeypatch.setattr(chunked, "_DENSE_SCORES", 4 * LENGTH * 7)  # dense rows in blocks of 7
    check(inputs(), both_sides(FEATURES[name]), sinks_of(), softcap=0.7)


@pytest.mark.parametrize("group", [1, 2, 3], ids=lambda group: f"group of {group}")
@pytest.mark.parametrize("length", [1, 2, 3, 4, 63, 64, 65, 129], ids=lambda length: f"{length} tokens")
def test_lengths_and_groups(length, group):
    fields = {"key_budget": 7, "window_size": 5, "num_random_keys": 2}
    output = check(inputs(length, length, 2 * group), both_sides(fields, num_heads=2 * group))
    assert output.shape == (2 * group, length, DIM)


def test_queries_of_zeros():
    query, key, value = inputs()
    query[:, ::2] = 0
    check((query, key, value), both_sides({}))


@pytest.mark.parametrize("name", ["defaults of this file", "everything at once", "dense rows"])
@pytest.mark.parametrize("num_queries", [1, 64, 97], ids=lambda n: f"{n} queries")
def test_the_last_queries_alone(num_queries, name):
    """Q < N: the rows of the document's last tokens."""
    query, key, value = inputs()
    pattern = both_sides(FEATURES[name])
    output = check((query[:, -num_queries:], key, value), pattern)
    whole = attend(query, key, value, pattern)
    torch.testing.assert_close(output, whole[:, -num_queries:], rtol=1e-10, atol=1e-10)


def fixed_mask(
    num_tokens,
    window_size,
    *,
    num_global_tokens=0,
    global_token_indices=(),
    stride=0,
    dilated_window_size=0,
    dilation=1,
    slash_distances=(),
    block_size=0,
    block_offset=0,
    num_neighbouring_blocks=0,
    sliding_window=None,
):
    """The fixed keys of Longformer, BigBird and the others, pair by pair."""
    steps = [i * dilation for i in range(1, dilated_window_size + 1)]
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for row in range(num_tokens):
        for key in range(num_tokens):
            distance = abs(row - key)
            read = distance < window_size or distance in slash_distances or distance in steps
            read |= any(token < num_global_tokens or token in global_token_indices for token in (row, key))
            read |= stride > 0 and key % stride == 0
            if block_size:
                blocks = [(token - block_offset) // block_size for token in (row, key)]
                read |= abs(blocks[0] - blocks[1]) <= num_neighbouring_blocks
            mask[row, key] = read and (sliding_window is None or distance < sliding_window)
    return mask


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize(
    "fields",
    [
        {"window_size": 5, "num_global_tokens": 0},
        {"window_size": 5, "num_global_tokens": 3},
        {"window_size": 1, "num_global_tokens": 2, "global_token_indices": (7, 8, 30, 99)},
        {"window_size": 4, "num_global_tokens": 0, "stride": 6},
        {"window_size": 1, "num_global_tokens": 0, "dilated_window_size": 3, "dilation": 5},
        {"window_size": 3, "num_global_tokens": 1, "slash_distances": (2, 7, 30)},
        {"window_size": 1, "num_global_tokens": 0, "block_size": 8, "block_offset": 3},
        {"window_size": 1, "num_global_tokens": 4, "block_size": 6, "num_neighbouring_blocks": 1},
        {"window_size": 4, "num_global_tokens": 2, "global_token_indices": (21,), "stride": 6, "sliding_window": 9},
    ],
    ids=[
        *("window", "leading globals", "explicit globals", "stride", "dilated", "slashes", "blocks", "bigbird"),
        "model's window",
    ],
)
def test_fixed_keys_by_their_formula(fields, implementation):
    pattern = both_sides({"key_budget": 0} | fields)
    expected = fixed_mask(41, **fields)
    tensors = inputs(41, 41)
    assert torch.equal(read_mask(tensors, pattern, implementation), expected.expand(4, -1, -1))
    query, key, value = tensors
    sdpa = F.scaled_dot_product_attention(query, key, value, attn_mask=expected, scale=SCALING, enable_gqa=True)
    torch.testing.assert_close(attend(*tensors, pattern, implementation), sdpa, rtol=1e-10, atol=1e-10)


def test_the_window_before_a_row_is_the_causal_one():
    fields = {"key_budget": 0, "num_global_tokens": 0, "window_size": 9, "stride": 7}
    both = read_mask(inputs(), both_sides(fields))
    causal = read_mask(inputs(), pattern_of(fields))
    assert torch.equal(both.tril(), causal)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_random_keys_are_of_the_whole_document(implementation):
    fields = {"key_budget": 0, "num_global_tokens": 0, "window_size": 1, "num_random_keys": 5}
    mask = read_mask(inputs(), both_sides(fields), implementation)[0]
    off = mask & ~torch.eye(LENGTH, dtype=torch.bool)
    assert off.sum(-1).min() >= 3  # of five draws, a few fall on each other
    assert int(off.triu().sum()) == pytest.approx(int(off.tril().sum()), rel=0.2)
    assert int(off[:, LENGTH // 2 :].sum()) == pytest.approx(int(off[:, : LENGTH // 2].sum()), rel=0.2)


def routed_by_rule(query, key, pattern, window, budget, row, num_static):
    """Plain Python, from the documented rule: one row's candidates of KV head 0, whose group is all of `query`."""
    bucket = pattern.bucket_hash.assign(key)[0].tolist()
    dynamic = list(range(num_static, key.shape[1]))
    score = {
        b: float(query[:, row].sum(0) @ key[0, [j for j in dynamic if bucket[j] == b]].mean(0))
        for b in {bucket[j] for j in dynamic}
    }
    found = []
    for b in sorted(score, key=score.get, reverse=True):
        members = [j for j in dynamic if bucket[j] == b and abs(j - row) >= window]
        found += sorted(members, key=lambda j: (abs(j - row), j))[: budget - len(found)]
    return set(found)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("budget", [1, 6, 13, 40])
def test_routed_keys_by_the_rule(implementation, budget):
    tensors = inputs(90, 90, 2, 1)
    fields = {"window_size": 3, "num_global_tokens": 2, "key_budget": budget, "min_weight": 0.0}
    pattern = both_sides(fields, num_heads=2, num_kv_heads=1)
    mask = read_mask(tensors, pattern, implementation)
    fixed = fixed_mask(90, 3, num_global_tokens=2)
    for row in range(2, 90):
        expected = routed_by_rule(*tensors[:2], pattern, 3, budget, row, 2)
        for head in range(2):
            assert set((mask[head, row] & ~fixed[row]).nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_a_document_is_dense_by_its_length(implementation):
    """There are no earlier rows that read less, so all rows of a document are dense, or none."""
    pattern = both_sides({"dense_below": 60, "window_size": 2, "key_budget": 1})
    assert read_mask(inputs(60, 60), pattern, implementation).all()
    assert read_mask(inputs(61, 61), pattern, implementation)[:, 3:].sum(-1).max() <= 3 + 3 + 1


def test_a_layer_whose_own_window_is_narrow_is_dense():
    """It admits 2 * 21 - 1 keys to a row."""
    for dense_below, expected in ((41, True), (40, False)):
        pattern = both_sides({"sliding_window": 21, "dense_below": dense_below, "window_size": 2, "key_budget": 1})
        mask = read_mask(inputs(), pattern)
        assert pattern.is_local is expected
        assert torch.equal(mask, fixed_mask(LENGTH, 21).expand(4, -1, -1)) is expected


@pytest.mark.parametrize(
    "fields",
    [
        {"window_size": LENGTH},
        {"num_global_tokens": LENGTH},
        {"stride": 1},
        {"key_budget": LENGTH, "min_weight": 0.0, "window_size": 1},
        {"dense_below": LENGTH},
        {"dense_layers": (0,)},
    ],
    ids=["window", "globals", "stride", "routed", "dense document", "dense layer"],
)
@pytest.mark.parametrize("sliding_window", [None, 40], ids=["all keys", "model's window"])
def test_full_coverage_is_sdpa(fields, sliding_window):
    tensors = [x.requires_grad_() for x in inputs()]
    mask = fixed_mask(LENGTH, LENGTH, sliding_window=sliding_window)
    results = []
    pattern = both_sides({**fields, "sliding_window": sliding_window})
    for output in (
        attend(*tensors, pattern),
        F.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=SCALING, enable_gqa=True),
    ):
        results.append([output, *torch.autograd.grad(output.sin().sum(), tensors)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fields", [{}, {"dense_below": LENGTH}, FEATURES["everything at once"]], ids=str)
def test_density(fields):
    """Admissible are all pairs of the document, or those inside of the model's own window."""
    tensors, pattern = inputs(), both_sides(fields)
    recorders = []
    for implementation in ("torch", "reference"):
        recorders.append(DensityRecorder())
        attend(*tensors, pattern, implementation, recorder=recorders[-1])
    ours, expected = map(vars, recorders)
    assert ours == expected
    window = pattern.sliding_window or LENGTH
    assert ours["admissible"] == 4 * int(fixed_mask(LENGTH, window).sum())
    mask = reference.attended_keys(*tensors[:2], dataclasses.replace(pattern, num_tokens=LENGTH), 0, scaling=SCALING)
    assert ours["attended"] == int(mask.sum())


def test_memory_is_linear():
    """No tensor is as large as a table of all rows and keys of one head, forward or backward."""
    length = 4096
    tensors = [x.float().requires_grad_() for x in inputs(length, length, 1, 1)]
    pattern = both_sides({"num_random_keys": 2}, num_heads=1, num_kv_heads=1, dtype=torch.float32)
    with LargestTensor() as largest:
        attend(*tensors, pattern).sum().backward()
    assert largest.bytes < length * length * 4 / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_of_lower_precision_is_at_most_twice_that_of_sdpa(dtype):
    tensors = [x.to(dtype) for x in inputs()]
    pattern = both_sides({"num_random_keys": 3}, dtype=torch.float32)
    mask = read_mask(tensors, pattern)
    ours = attend(*tensors, pattern).to(dtype)
    sdpa = [
        F.scaled_dot_product_attention(*(x.to(d) for x in tensors), attn_mask=mask, scale=SCALING, enable_gqa=True)
        for d in (dtype, torch.float64)
    ]
    assert rms(ours - sdpa[1]) <= 2 * rms(sdpa[0] - sdpa[1])


class TestOperation:
    CONFIG = SparseAttentionConfig(window_size=9, num_global_tokens=2, key_budget=8, dense_below=0, num_hash_bits=3)

    def batch(self):
        return [torch.stack(pair) for pair in zip(inputs(seed=0), inputs(seed=1), strict=True)]

    def test_is_causal_false(self):
        query, key, value = self.batch()
        output = sparse_attention(query, key, value, config=self.CONFIG, is_causal=False)
        config = self.CONFIG.replace(implementation="reference")
        expected = sparse_attention(query, key, value, config=config, is_causal=False)
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(output, sparse_attention(query, key, value, config=self.CONFIG))

    @pytest.mark.parametrize("name", ["numba", "triton"])
    def test_implementations_without_it_are_refused(self, name, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        message = f'^implementation="{name}" has no non-causal attention; choose "auto" or "torch"$'
        with pytest.raises(ValueError, match=message):
            sparse_attention(*self.batch(), config=self.CONFIG.replace(implementation=name), is_causal=False)

    def test_keys_that_a_cache_has_dropped_are_refused(self):
        with pytest.raises(ValueError, match="non-causal attention needs all keys of the document, got those from pos"):
            attend(*inputs(), both_sides({}), key_offset=3)
