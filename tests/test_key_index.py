"""Keys that are chosen once and applied many times: `build_index` and `apply_index`."""

import pytest
import torch
from helpers.cases import FEATURES, sinks_of
from helpers.tensors import EXACT, assert_all_close, batch, config, with_gradients

from hf_sparse_attn import AttentionStatistics, apply_index, build_index, sparse_attention
from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.patterns import layer_pattern

NAMES = [name for name, fields in FEATURES.items() if "sliding_window" not in fields]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_queries", [90, 37])
def test_from_the_same_tensors_it_is_the_operation(name, num_queries):
    query, key, value = batch(num_queries, 90)
    own, others = config(**FEATURES[name]), {"softcap": 0.9, "sinks": sinks_of(), "scaling": 0.3}
    index = build_index(query, key, config=own)
    found = with_gradients(lambda *x: apply_index(*x, index, **others), query, key, value)
    expected = with_gradients(lambda *x: sparse_attention(*x, config=own, **others), query, key, value)
    assert_all_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_from_other_tensors_it_is_the_specification_with_those_keys(name):
    query, key, value = batch(90, 90)
    other_query, other_key, _ = batch(90, 90, seed=7)
    results = []
    for implementation in ("torch", "reference"):
        index = build_index(
            other_query.flip(2), other_key, config=config(**{**FEATURES[name], "implementation": implementation})
        )
        results.append(with_gradients(lambda *x, index=index: apply_index(*x, index), query, key, value))
    assert_all_close(*results)
    if name == "defaults of this file":
        assert not torch.allclose(results[0][0], sparse_attention(query, key, value, config=config()))


def test_rows_list_what_they_are_given():
    """One kept key of each row in the index is read, a later one or an absent one is not."""
    query, key, value = batch(70, 70, 1)
    index = build_index(query, key, config=config(min_weight=0.0))
    (candidates,) = index.candidates
    routed = AttentionStatistics()
    apply_index(query, key, value, index, recorder=routed)
    local = AttentionStatistics()
    sparse_attention(query, key, value, config=config(), mode="local", recorder=local)
    per_kv_head = (candidates >= 0).sum((1, 2)).double() / 70
    torch.testing.assert_close(routed.keys_per_row - local.keys_per_row, per_kv_head.repeat_interleave(2))
    row = torch.arange(70)[:, None]
    listed = candidates >= 0
    assert (candidates <= row - 11)[listed].all()
    assert (candidates >= 3)[listed].all()


def test_more_budget_probes_more_buckets():
    """Buckets are taken whole, from the best down: a row with more budget goes on to further ones."""
    query, key, _ = batch(150, 150, 1)
    own = config(page_size=1, window_size=1, num_global_tokens=0)
    (every,) = build_index(query, key, config=own.replace(key_budget=150)).candidates
    bucket = layer_pattern(own, 0, 4, 2, 8, key.device, key.dtype).bucket_hash.assign(key[0])
    summed = query[0].unflatten(0, (2, 2)).sum(1)
    for kv_head in range(2):
        means = torch.stack([key[0, kv_head, :149][bucket[kv_head, :149] == b].mean(0) for b in range(8)])
        best = (means @ summed[kv_head, 149]).argsort(descending=True)
        probed = bucket[kv_head][every[kv_head, 149].long()].unique_consecutive()[: len(best)]
        assert probed.tolist() == best.tolist()
    numbers = []
    for budget in (4, 60, 140):
        (found,) = build_index(query, key, config=own.replace(key_budget=budget)).candidates
        assert torch.equal(found[:, 149], every[:, 149, :budget])
        numbers.append([len(bucket[kv_head][found[kv_head, 149].long()].unique()) for kv_head in range(2)])
    for few, some, many in zip(*numbers, strict=True):
        assert few < some < many


@pytest.mark.parametrize("num_queries", [70, 25])
def test_masks_are_those_of_the_index(num_queries):
    query, key, value = batch(num_queries, 70)
    keep = torch.ones(2, 70, dtype=torch.bool)
    keep[0, :13] = keep[1, 60:] = False
    index = build_index(query, key, config=config(), key_padding_mask=keep)
    given = {"config": config(), "key_padding_mask": keep}
    for others in ({}, {"dropout": 0.4, "dropout_seed": 8}):
        found = with_gradients(lambda *x, others=others: apply_index(*x, index, **others), query, key, value)
        expected = with_gradients(lambda *x, others=others: sparse_attention(*x, **given, **others), query, key, value)
        assert_all_close(found, expected)


def test_nothing_later_decides():
    query, key, _ = batch(70, 70, 1)
    index = build_index(query, key, config=config())
    query[:, :, 50:], key[:, :, 50:] = 7.0, -3.0
    changed = build_index(query, key, config=config())
    assert torch.equal(index.candidates[0][:, :50], changed.candidates[0][:, :50])
    assert not torch.equal(index.candidates[0][:, 50:], changed.candidates[0][:, 50:])


@pytest.mark.parametrize("num_tokens", [100, 400])
def test_its_memory_is_linear(num_tokens):
    query, key, _ = batch(num_tokens, num_tokens)
    assert build_index(query, key, config=config()).nbytes == 2 * 2 * num_tokens * 14 * 4  # batch, KV heads, budget
    assert build_index(query, key, config=config(dense_layers=(0,))).nbytes == 0


def test_no_gradient_flows_through_the_choice():
    query, key, _ = (x.requires_grad_() for x in batch())
    index = build_index(query, key, config=config())
    assert not any(rows.requires_grad for rows in index.candidates)


def test_keys_that_are_not_finite_do_not_reach_earlier_rows():
    query, key, value = batch(90, 90, 1)
    key[0, 0, 60], value[0, 1, 75] = torch.nan, torch.inf
    index = build_index(query, key, config=config())
    found = apply_index(query, key, value, index)
    torch.testing.assert_close(
        found[:, :, :60], sparse_attention(query, key, value, config=config())[:, :, :60], **EXACT
    )
    assert found[:, :, :60].isfinite().all()


def test_what_is_refused():
    query, key, value = batch()
    index = build_index(query, key, config=config())
    with pytest.raises(ArgumentError, match=r"^index: must be one of .* \(2, 2, 69, 69\), got \(2, 2, 70, 70\)$"):
        apply_index(query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], index)
    with pytest.raises(ArgumentError, match=r"^index: .* got list$"):
        apply_index(query, key, value, [])
    own = config(implementation="numba")
    with pytest.raises(ValueError, match=r'^implementation="numba" knows neither attention dropout nor an index'):
        build_index(query, key, config=own)
    compiled = torch.compile(lambda q, k: build_index(q, k, config=config()), backend="eager")
    with pytest.raises(Exception, match=r"torch.compile and torch.export do not support build_index"):
        compiled(query, key)
