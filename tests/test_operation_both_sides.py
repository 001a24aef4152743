"""The operation and the module where attention is not causal: self-attention and cross-attention."""

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import FEATURES, sinks_of
from helpers.tensors import EXACT, FIELDS, assert_all_close, batch, config, with_gradients

from hf_sparse_attn import AttentionStatistics, SparseAttention, apply_index, build_index, sparse_attention
from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.pattern_fields import FROM_THE_ROW
from hf_sparse_attn.patterns import layer_pattern

NAMES = [name for name, fields in FEATURES.items() if not any(f"'{field}'" in str(fields) for field in FROM_THE_ROW)]
NAMES = [name for name in NAMES if "sliding_window" not in FEATURES[name]]
OTHERS = {"softcap": 0.9, "sinks": sinks_of()}
BOTH_SIDES = {"is_causal": False}
CROSS = {"is_causal": False, "cross_attention": True}
kinds = pytest.mark.parametrize(
    ("kind", "num_queries", "num_keys"),
    [(BOTH_SIDES, 70, 70), (BOTH_SIDES, 25, 70), (CROSS, 25, 70), (CROSS, 70, 25), (CROSS, 40, 40)],
    ids=["self", "last queries", "fewer queries", "more queries", "as many"],
)


def expected_cross(query, key, value, fields):
    """One batch row and KV head of one query head at a time, from the definition of cross-attention."""
    own = config(**fields)
    pattern = layer_pattern(own, 0, 4, 2, 8, key.device, key.dtype)
    bucket = pattern.bucket_hash.assign(key)
    num_keys = key.shape[1]
    position = torch.arange(num_keys)
    static = position < own.num_global_tokens
    output = torch.zeros_like(query)
    for head in range(4):
        keys, buckets, summed = key[head // 2], bucket[head // 2], query[head // 2 * 2 : head // 2 * 2 + 2].sum(0)
        for row in range(query.shape[1]):
            left, found = own.key_budget, []
            means = {b: keys[~static & (buckets == b)].mean(0) for b in buckets[~static].unique().tolist()}
            for b in sorted(means, key=lambda b: float(means[b] @ summed[row]), reverse=True):
                members = position[~static & (buckets == b)].flip(0)[:left]
                found, left = [*found, *members.tolist()], left - len(members)
            scores = keys @ query[head, row] * 8**-0.5
            scored = static.clone()
            scored[found] = True
            weights = scores.masked_fill(~scored, -torch.inf).softmax(0)
            weights = torch.where(static | (weights >= own.min_weight), weights, 0)
            output[head, row] = weights / weights.sum() @ value[head // 2]
    return output


@pytest.mark.parametrize("min_weight", [0.0, 0.05])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(9, 70), (70, 40)])
def test_cross_attention_by_its_definition(min_weight, num_queries, num_keys):
    tensors = batch(num_queries, num_keys, 1)
    fields = {"min_weight": min_weight}
    found = sparse_attention(*tensors, config=config(**fields), **CROSS)
    torch.testing.assert_close(found[0], expected_cross(*(x[0] for x in tensors), fields), **EXACT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_queries", "num_keys"), [(25, 70), (70, 25)])
def test_cross_attention_like_the_specification(name, num_queries, num_keys):
    tensors = batch(num_queries, num_keys)

    def attend(implementation, **others):
        own = config(**{**FEATURES[name], "implementation": implementation})
        return with_gradients(lambda q, k, v: sparse_attention(q, k, v, config=own, **CROSS, **others), *tensors)

    for others in ({}, {**OTHERS, "dropout": 0.3, "dropout_seed": 5}):
        assert_all_close(attend("torch", **others), attend("reference", **others))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"slash_distances": (3,)}, "slash_distances"),
        ({"by_kv_head": [{}, {"block_size": 4}]}, "block_size"),
        ({"by_layer": [{"dilated_window_size": 4}]}, "dilated_window_size"),
    ],
)
def test_cross_attention_refuses_patterns_that_count_from_the_row(fields, name):
    query, key, value = batch(9, 70)
    with pytest.raises(ArgumentError, match=f"^{name}: rows of cross-attention have no place"):
        sparse_attention(query, key, value, config=config(**fields), **CROSS)
    with pytest.raises(ArgumentError, match=f"^{name}: rows of cross-attention have no place"):
        build_index(query, key, config=config(**fields), **CROSS)


def test_a_row_of_cross_attention_does_not_know_the_others():
    """All that its position decides are its random keys."""
    query, key, value = batch(9, 70)
    whole = sparse_attention(query, key, value, config=config(), **CROSS)
    for rows in (slice(0, 1), slice(4, 9)):
        alone = sparse_attention(query[:, :, rows], key, value, config=config(), **CROSS)
        torch.testing.assert_close(alone, whole[:, :, rows], **EXACT)


@pytest.mark.parametrize("mode", ["all", "routed"])
def test_cross_attention_that_reads_everything(mode):
    tensors = batch(25, 70)
    own = config(key_budget=70, min_weight=0.0)
    found = with_gradients(lambda *x: sparse_attention(*x, config=own, mode=mode, **CROSS), *tensors)
    sdpa = lambda *x: F.scaled_dot_product_attention(*x, enable_gqa=True)  # noqa: E731
    assert_all_close(found, with_gradients(sdpa, *tensors))


@kinds
def test_each_row_is_as_alone(kind, num_queries, num_keys):
    keep = torch.ones(3, num_keys, dtype=torch.bool)
    keep[0, :8] = keep[1, -6:] = keep[2, 5:9] = False
    tensors = batch(num_queries, num_keys, 3)
    found = with_gradients(lambda *x: sparse_attention(*x, config=config(), key_padding_mask=keep, **kind), *tensors)

    def one_by_one(query, key, value):
        output = torch.zeros_like(query)
        for i, kept in enumerate(keep):
            rows = torch.ones(num_queries, dtype=torch.bool) if kind is CROSS else kept[-num_queries:]
            own = query[i : i + 1, :, rows], key[i : i + 1, :, kept], value[i : i + 1, :, kept]
            output[i, :, rows] = sparse_attention(*own, config=config(), **kind)[0]
        return output

    assert_all_close(found, with_gradients(one_by_one, *tensors))


def test_rows_without_any_key_are_zero():
    keep = torch.ones(2, 70, dtype=torch.bool)
    keep[1] = False
    found = sparse_attention(*batch(9, 70), config=config(), key_padding_mask=keep, **CROSS)
    assert (found[1] == 0).all()
    assert found[0].abs().min() > 0


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("fields", [{"key_budget": 0}, {"min_weight": 0.9}], ids=["nothing", "light keys alone"])
def test_rows_that_read_nothing_are_zero(implementation, fields):
    own = config(num_global_tokens=0, implementation=implementation, **fields)
    output, *gradients = with_gradients(lambda *x: sparse_attention(*x, config=own, **CROSS), *batch(9, 70))
    assert (output == 0).all(-1).any()
    assert all(bool(x.isfinite().all()) for x in (output, *gradients))


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_cross_attention_has_no_window_in_any_head(implementation):
    tensors, own = batch(9, 70), config(implementation=implementation)
    wide = own.replace(by_kv_head=[{}, {"window_size": 40}])
    found = [sparse_attention(*tensors, config=fields, **CROSS) for fields in (own, wide)]
    torch.testing.assert_close(*found, **EXACT)


def test_packed_on_both_sides():
    tensors = batch(batch_size=1)
    document = torch.tensor([0] * 30 + [1] * 25 + [2] * 15)
    mask = document[:, None] == document
    found = sparse_attention(*tensors, config=config(), attention_mask=mask, **BOTH_SIDES)
    parts = [[x[:, :, document == i] for x in tensors] for i in range(3)]
    expected = [sparse_attention(*part, config=config(), **BOTH_SIDES) for part in parts]
    torch.testing.assert_close(found, torch.cat(expected, 2), **EXACT)
    keep = torch.arange(70)[None] < 62
    found = sparse_attention(*tensors, config=config(), attention_mask=mask, key_padding_mask=keep, **BOTH_SIDES)
    torch.testing.assert_close(found[:, :, :55], torch.cat(expected[:2], 2), **EXACT)


@kinds
@pytest.mark.parametrize("name", ["defaults of this file", "random keys", "everything at once", "no routing"])
def test_chosen_keys(kind, num_queries, num_keys, name):
    query, key, value = batch(num_queries, num_keys)
    other_query, other_key, _ = batch(num_queries, num_keys, seed=7)
    refused = ("sliding_window", *FROM_THE_ROW, "dilation", "block_offset")
    refused += ("num_neighbouring_blocks", "num_random_blocks")
    fields = {field: x for field, x in FEATURES[name].items() if kind is BOTH_SIDES or field not in refused}
    fields.pop("sliding_window", None)
    own = config(**fields)
    index = build_index(query, key, config=own, **kind)
    found = with_gradients(lambda *x: apply_index(*x, index, **OTHERS), query, key, value)
    assert_all_close(
        found, with_gradients(lambda *x: sparse_attention(*x, config=own, **kind, **OTHERS), query, key, value)
    )
    results = []
    for implementation in ("torch", "reference"):
        index = build_index(
            other_query, other_key, config=config(**fields | {"implementation": implementation}), **kind
        )
        results.append(with_gradients(lambda *x, index=index: apply_index(*x, index), query, key, value))
    assert_all_close(*results)


@kinds
def test_statistics(kind, num_queries, num_keys):
    tensors = batch(num_queries, num_keys, 1)
    statistics = AttentionStatistics(num_rows=500)
    sparse_attention(*tensors, config=config(), recorder=statistics, **kind)
    weights = sparse_attention(
        tensors[0], tensors[1], torch.eye(num_keys).double().expand(1, 2, -1, -1), config=config(), **kind
    )
    read = weights[0] > 0
    dense = (tensors[0][0] @ tensors[1][0].repeat_interleave(2, 0).transpose(-1, -2) * 8**-0.5).softmax(-1)
    assert statistics.density == pytest.approx(float(read.double().mean()), abs=1e-6)
    torch.testing.assert_close(statistics.keys_per_row, read.double().sum(-1).mean(-1))
    torch.testing.assert_close(statistics.kept_mass, (dense * read).sum(-1).mean(-1))


def test_compiled_on_both_sides():
    tensors = batch()
    attend = lambda *x: sparse_attention(*x, config=config(), **BOTH_SIDES)  # noqa: E731
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_all_close(with_gradients(compiled, *tensors), with_gradients(attend, *tensors))
    cross = torch.compile(lambda *x: sparse_attention(*x, config=config(), **CROSS), backend="eager")
    with pytest.raises(Exception, match=r"cross_attention: torch.compile and torch.export do not support it"):
        cross(*tensors)


def test_what_is_refused():
    query, key, value = batch(9, 70)
    with pytest.raises(ArgumentError, match=r"^cross_attention: is never causal; give is_causal=False as well$"):
        sparse_attention(query, key, value, config=config(), cross_attention=True)
    with pytest.raises(ArgumentError, match=r"^attention_mask: is not for cross-attention; give a key_padding_mask$"):
        sparse_attention(query, key, value, config=config(), attention_mask=torch.ones(9, 70).bool(), **CROSS)
    for rows in (1, 9):
        mask = torch.ones(rows, 70).bool()
        with pytest.raises(ArgumentError, match=rf"^attention_mask: of non-causal .* 70 keys, got {rows} queries"):
            sparse_attention(query[:, :, :rows], key, value, config=config(), attention_mask=mask, **BOTH_SIDES)
    with pytest.raises(ValueError, match=r"^query must have key's batch, a multiple of its heads"):
        sparse_attention(query, key[:, :0], value[:, :0], config=config(), **CROSS)
    with pytest.raises(ArgumentError, match=r"^config: must be a SparseAttentionConfig, got dict$"):
        sparse_attention(query, key, value, config={}, **CROSS)
    with pytest.raises(ArgumentError, match=r"^config: global_token_ids needs a model; name positions by"):
        build_index(query, key, config=config(global_token_ids=[3], dense_below=999), **CROSS)
    with pytest.raises(ValueError, match=r"^query must have key's batch, .* at most its tokens"):
        sparse_attention(batch(71, 71)[0], key, value, config=config(), **BOTH_SIDES)


class TestModule:
    @staticmethod
    def layer(**others):
        torch.manual_seed(0)
        return SparseAttention(32, 4, 2, is_causal=False, dtype=torch.float64, **{**FIELDS, **others})

    @pytest.mark.parametrize("num_context", [None, 40, 130])
    @pytest.mark.parametrize("length", [1, 63])
    def test_like_the_specification(self, length, num_context):
        x = torch.randn(2, length, 32, dtype=torch.float64)
        context = None if num_context is None else torch.randn(2, num_context, 32, dtype=torch.float64)
        outputs = [self.layer(implementation=name)(x, context) for name in ("torch", "reference")]
        torch.testing.assert_close(*outputs, **EXACT)

    def test_its_context_is_another_document(self):
        module, x = self.layer(), torch.randn(2, 63, 32, dtype=torch.float64)
        assert not torch.allclose(module(x, x.clone()), module(x))

    def test_later_tokens_are_read(self):
        module, x = self.layer(), torch.randn(2, 63, 32, dtype=torch.float64)
        before = module(x)[:, 0]
        x[:, 5] += 1
        assert not torch.allclose(module(x)[:, 0], before)

    def test_chosen_keys_are_applied(self):
        module, x = self.layer(), torch.randn(2, 30, 32, dtype=torch.float64)
        context = torch.randn(2, 70, 32, dtype=torch.float64)
        expected, index = module(x, context, return_index=True)
        torch.testing.assert_close(module(x, context, index=index), expected, **EXACT)
