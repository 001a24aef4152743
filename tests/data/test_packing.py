"""Rows with whole documents: best-fit decreasing."""

import time

import datasets
import numpy as np
import pytest
import torch
from helpers.documents import token_dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from hf_sparse_attn.data import IGNORED_LABEL, best_fit, packed
from hf_sparse_attn.data.packing import best_fit_bins

PAD = 255


def pieces(row):
    """Pairs of input_ids and labels of a row, cut where its positions begin again."""
    starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
    bounds = list(zip(starts, [*starts[1:], len(row["input_ids"])], strict=True))
    return [(row["input_ids"][a:b], row["labels"][a:b], row["position_ids"][a:b]) for a, b in bounds]


def test_documents_that_fit_are_whole_and_the_tail_is_padding():
    [first, second] = best_fit(token_dataset(4, 6, 3, 5), 10, PAD)
    # 6 goes first and takes 4, the largest that fits; 5 and 3 share the other row, with two tokens to spare.
    assert first["input_ids"] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert first["position_ids"] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert first["labels"] == [IGNORED_LABEL, 1, 2, 3, IGNORED_LABEL, 5, 6, 7, 8, 9]
    assert second["input_ids"] == [10, 11, 12, 13, 14, 15, 16, 17, PAD, PAD]
    assert second["position_ids"] == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1]
    assert second["labels"] == [IGNORED_LABEL, 11, 12, IGNORED_LABEL, 14, 15, 16, 17, IGNORED_LABEL, IGNORED_LABEL]


def test_each_piece_goes_where_it_leaves_the_least_free():
    # First fit would put the 3 beside the 6; the smallest gap that it fits is beside the 7.
    assert best_fit_bins(np.array([6, 7, 3]), 10) == [[1, 2], [0]]
    assert best_fit_bins(np.array([5, 5, 5, 5, 9, 1, 0]), 10) == [[4], [0, 1], [2, 3]]


def test_long_documents_give_whole_rows_and_a_rest():
    rows = best_fit(token_dataset(3, 11, 9), 4, PAD)
    assert [row["input_ids"] for row in rows] == [
        [0, 1, 2, PAD],
        [3, 4, 5, 6],
        [7, 8, 9, 10],
        [11, 12, 13, PAD],
        [14, 15, 16, 17],
        [18, 19, 20, 21],  # the last token of the third document, alone, has no target
    ]
    assert all(row["labels"][0] == IGNORED_LABEL for row in rows)


@given(st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 8, 11, 20]), min_size=1, max_size=30), st.integers(2, 8))
def test_no_document_is_cut_needlessly_and_nothing_else_is_lost(lengths, context_length):
    tokens = token_dataset(*lengths)
    try:
        rows = list(best_fit(tokens, context_length, pad_token_id=10**6))
    except ValueError:
        assert sum(lengths) < context_length or max(lengths) < 2
        return
    found = [piece for row in rows for piece in pieces(row)]
    for row in rows:
        assert len(row["input_ids"]) == len(row["position_ids"]) == len(row["labels"]) == context_length
        assert any(label != IGNORED_LABEL for label in row["labels"])
    for ids, labels, positions in found:
        assert positions == list(range(len(ids)))
        assert labels == [IGNORED_LABEL] + (ids[1:] if ids[0] < 10**6 else [IGNORED_LABEL] * (len(ids) - 1))
    expected = [
        document[start : start + context_length]
        for document in tokens["input_ids"]
        for start in range(0, len(document), context_length)
        if len(document) - start > 1
    ]
    assert sorted(ids for ids, *_ in found if ids[0] < 10**6) == sorted(expected)
    # No two rows would fit into one.
    used = sorted(sum(token < 10**6 for token in row["input_ids"]) for row in rows)
    assert len(used) < 2 or used[0] + used[1] > context_length


def test_rows_are_the_same_each_time_and_in_order_of_documents():
    tokens = token_dataset(*[3, 9, 5, 2, 7, 14, 6, 4] * 5)
    rows = best_fit(tokens, 10)
    assert list(rows["input_ids"]) == list(best_fit(tokens, 10)["input_ids"])
    firsts = [row["input_ids"][0] for row in rows]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([4, 5], "9 tokens in all, fewer than one row of 10"), ([1] * 12, "12 of its documents are single tokens")],
)
def test_documents_that_fill_no_row_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        best_fit(token_dataset(*lengths), 10)
    with pytest.raises(ValueError, match="context_length must be at least 2"):
        best_fit(token_dataset(4), 1)


def test_packing_takes_nearly_linear_time():
    seconds = []
    for number in (20_000, 80_000):
        lengths = np.random.default_rng(0).integers(2, 8192, number)
        started = time.perf_counter()
        bins = best_fit_bins(lengths, 8192)
        seconds.append(time.perf_counter() - started)
    assert seconds[1] < 10 * seconds[0] + 0.5  # 16 times, if every bin were looked at
    assert len(bins) < 1.005 * lengths.sum() / 8192 + 1


@pytest.mark.parametrize("implementation", ["sdpa", "sparse"])
def test_documents_of_a_row_and_its_padding_do_not_see_each_other(tiny_llama_config, implementation):
    torch.manual_seed(0)
    config = type(tiny_llama_config)(**tiny_llama_config.to_dict())
    config.sparse_attention = {"window_size": 8, "num_global_tokens": 2, "key_budget": 0, "dense_below": 0}
    config._attn_implementation = implementation
    model = LlamaForCausalLM(config).eval()
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 200, length).tolist() for length in (30, 21)]
    [row] = best_fit(datasets.Dataset.from_dict({"input_ids": documents}), 51, PAD)
    [padded] = best_fit(datasets.Dataset.from_dict({"input_ids": [*documents, [3] * 60]}), 60, PAD).select([0])
    assert padded["input_ids"][51:] == [PAD] * 9
    alone = torch.cat([model(torch.tensor([ids])).logits[0] for ids in documents])
    for found in (row, padded):
        inputs = {name: torch.tensor([found[name]]) for name in ("input_ids", "position_ids")}
        logits = model(**inputs, use_cache=False).logits[0, :51]
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


def test_best_fit_cuts_less_than_packing_end_to_end():
    lengths = np.random.default_rng(1).integers(5, 60, 300)
    tokens = token_dataset(*lengths.tolist())
    whole = {tuple(ids) for ids in tokens["input_ids"]}
    kept = [
        sum(tuple(ids) in whole for row in make(tokens, 64) for ids, *_ in pieces(row)) for make in (packed, best_fit)
    ]
    assert kept[1] == 300 > kept[0]
