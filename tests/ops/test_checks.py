"""The gate in front of every implementation: impossible numbers and shapes, and ones that are only unusual."""

import math
import time
from functools import partial

import pytest
import torch
from helpers.cases import inputs, pattern_of

from hf_sparse_attn import SparseAttentionConfig, sparse_attention
from hf_sparse_attn.attention import Inputs, attention
from hf_sparse_attn.ops import document_attention

IMPLEMENTATIONS = ("numba", "torch", "reference")
FIELDS = {"dense_below": 0, "window_size": 8, "key_budget": 12, "num_hash_bits": 4, "min_weight": 0.0}
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def attend(query, key, value, implementation="torch", query_offset=0, key_offset=0, scaling=0.3, **others):
    pattern = pattern_of({"implementation": implementation}, num_heads=len(query), num_kv_heads=len(key))
    given = {"query_offset": query_offset, "key_offset": key_offset, "scaling": scaling}
    return document_attention(query, key, value, pattern=pattern, **given, **others)


@every_implementation
@pytest.mark.parametrize("scaling", [0.0, -0.3, math.nan, math.inf])
def test_scaling(implementation, scaling):
    message = f"scaling must be a finite number greater than 0, got {scaling}"
    with pytest.raises(ValueError, match=message):
        attend(*inputs(20, 20), implementation, scaling=scaling)
    batch = [x[None] for x in inputs(20, 20)]
    with pytest.raises(ValueError, match=message):  # where all rows are dense, too
        attention(Inputs(*batch), pattern_of({"dense_below": 100, "implementation": implementation}), scaling, None)


@every_implementation
@pytest.mark.parametrize("softcap", [0.0, -2.0, math.nan, math.inf])
def test_softcap(implementation, softcap):
    with pytest.raises(ValueError, match=f"softcap must be None or a finite number greater than 0, got {softcap}"):
        attend(*inputs(20, 20), implementation, softcap=softcap)


@every_implementation
@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 8])
def test_sinks_of_another_length(implementation, length):
    sinks = torch.zeros(length, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"one number for each of 4 heads, got shape \({length},\)"):
        attend(*inputs(20, 20), implementation, sinks=sinks)


@every_implementation
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "query_offset", "key_offset"),
    [
        (20, 20, -1, -1),
        (20, 20, -300, 0),
        (20, 20, 1, 0),
        (5, 20, 14, 0),
        (5, 20, 15, -1),
        (5, 20, 16, 0),
        (20, 5, 0, 15),
    ],
)
def test_positions(implementation, num_queries, num_keys, query_offset, key_offset):
    parts = inputs(num_queries, num_keys)
    with pytest.raises(ValueError, match=f"{num_queries} queries from position {query_offset} on and {num_keys} keys"):
        attend(*parts, implementation, query_offset, key_offset)


@every_implementation
def test_shapes(implementation):
    query, key, value = inputs(20, 20)
    for broken, message in [
        ((query[..., :-2], key, value), "query and key with the same head_dim"),
        ((query, key, value[:, :-1]), "key and value with the same heads and tokens"),
        ((query, key, value[:1]), "key and value with the same heads and tokens"),
        ((query[0], key, value), "must be .heads, tokens, head_dim."),
        ((query.long(), key, value), "must be real numbers, got torch.int64"),
        ((query, key.to(torch.complex128), value), "must be real numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend(*broken, implementation)
    other = pattern_of({"implementation": implementation}, num_heads=6, num_kv_heads=3)
    with pytest.raises(ValueError, match="query has 4 heads and key 2; the pattern is one of 6 query heads over 3"):
        document_attention(query, key, value, pattern=other, query_offset=0, key_offset=0, scaling=1.0)
    other = pattern_of({"implementation": implementation}, dim=16)
    with pytest.raises(ValueError, match="the pattern's hash is one of 2 heads of 16"):
        document_attention(query, key, value, pattern=other, query_offset=0, key_offset=0, scaling=1.0)


@every_implementation
def test_no_rows(implementation):
    query, key, value = inputs(0, 20)
    assert attend(query, key, value, implementation, query_offset=20).shape == (4, 0, 8)


@every_implementation
def test_impossible_layers(implementation):
    config = {"implementation": implementation}
    with pytest.raises(ValueError, match="query heads must be a multiple of KV heads"):
        pattern_of(config, num_heads=5, num_kv_heads=2)
    for window in (0, -1):
        with pytest.raises(ValueError, match=f"sliding_window must be at least 1 or None, got {window}"):
            pattern_of({**config, "sliding_window": window})


LARGE = {  # name: value of the field that buffers must not follow
    "key_budget": 2**30,
    "window_size": 2**30,
    "page_size": 2**30,
    "num_global_tokens": 2**30,
    "stride": 2**30,
    "global_token_indices": (2**30, 5),
    "num_random_keys": 4096,
    "dilated_window_size": 4096,
    "block_size": 2**14,
    "slash_distances": (2**30, 5),
    "dense_below": 2**63 - 1,
}


@pytest.mark.parametrize("name", LARGE)
def test_large_numbers_cost_no_more_than_the_sequence(name):
    batch = [x[None] for x in inputs(200, 200)]
    outputs = {}
    for implementation in IMPLEMENTATIONS:
        config = SparseAttentionConfig(**{**FIELDS, "implementation": implementation, name: LARGE[name]})
        start = time.perf_counter()
        outputs[implementation] = sparse_attention(*batch, config=config)
        if implementation == "torch":
            assert time.perf_counter() - start < 10
        torch.testing.assert_close(outputs[implementation], outputs["numba"])
    with pytest.raises(ValueError, match=f"{name} must be "):
        SparseAttentionConfig(**{**FIELDS, name: (2**80,) if isinstance(LARGE[name], tuple) else 2**80})


@pytest.mark.parametrize("page_size", [60, 100, 149, 150, 151, 400])
@pytest.mark.parametrize("sliding_window", [None, 41])
def test_pages_of_many_rows(page_size, sliding_window):
    """Rows are computed in parts of a page."""
    parts = inputs()
    outputs = []
    for implementation in IMPLEMENTATIONS:
        fields = {"page_size": page_size, "implementation": implementation, "sliding_window": sliding_window}
        outputs.append(
            document_attention(*parts, pattern=pattern_of(fields), query_offset=0, key_offset=0, scaling=0.3)
        )
    torch.testing.assert_close(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e10, 1e20, 1e30, 1e36])
def test_large_scores(size, dtype):
    query, key, value = (x[None].to(dtype) for x in inputs(120, 120))
    outputs = [
        sparse_attention(
            query * size, key, value, config=SparseAttentionConfig(**FIELDS, implementation=implementation)
        )
        for implementation in IMPLEMENTATIONS
    ]
    assert outputs[0].isfinite().all()
    torch.testing.assert_close(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[2])


@pytest.mark.parametrize("implementation", ["numba", "torch"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("position", [1, 37, 100, 149])
def test_what_is_not_finite_does_not_reach_earlier_rows(implementation, number, where, position):
    query, key, value = inputs()
    before = attend(query, key, value, implementation)
    (key if where == "key" else value)[1, position, 3] = number
    (key if where == "key" else value)[0, 149, 0] = number  # another one
    after = attend(query, key, value, implementation)
    torch.testing.assert_close(after[:, :position], before[:, :position])


class TestSecondDerivatives:
    """An error that always comes: also where the input is reached another way, and where nothing varies upstream."""

    @staticmethod
    def attend(x, implementation):
        return sparse_attention(x, x, x, config=SparseAttentionConfig(**FIELDS, implementation=implementation))

    @pytest.mark.parametrize("implementation", ["numba", "torch"])
    @pytest.mark.parametrize("residual", [True, False])
    @pytest.mark.parametrize("squared", [True, False])
    def test_refused(self, implementation, residual, squared):
        x = torch.randn(1, 2, 60, 8, dtype=torch.float64, requires_grad=True)
        y = self.attend(x, implementation) + (x if residual else 0)
        (gradient,) = torch.autograd.grad((y.square() if squared else y).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivatives"):
            torch.autograd.grad((gradient * torch.randn_like(gradient)).sum(), x)
        with pytest.raises(RuntimeError, match="has no second derivatives"):
            self.backward_twice(x, implementation)

    def backward_twice(self, x, implementation):
        (gradient,) = torch.autograd.grad(self.attend(x, implementation).square().sum(), x, create_graph=True)
        gradient.sum().backward()

    def test_the_first_derivative_with_a_graph_is_the_same(self):
        x = torch.randn(1, 2, 60, 8, dtype=torch.float64, requires_grad=True)
        gradients = [
            torch.autograd.grad(self.attend(x, "numba").square().sum(), x, create_graph=graph)[0] for graph in (0, 1)
        ]
        assert torch.equal(*gradients)

    def test_the_reference_has_them(self):
        x = torch.randn(1, 2, 20, 4, dtype=torch.float64, requires_grad=True)
        torch.autograd.gradgradcheck(partial(self.attend, implementation="reference"), (x,))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(implementation, dtype):
    query, key, value = (x[None].float() for x in inputs())
    config = SparseAttentionConfig(**FIELDS, num_random_keys=3, implementation=implementation)
    before = sparse_attention(query, key, value, config=config)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(sparse_attention(query, key, value, config=config), before)
    finally:
        torch.set_default_dtype(torch.float32)
