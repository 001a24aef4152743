"""What a mask and a collator's arguments say of documents."""

import pytest
import torch
from helpers.masks import mask, span, split

import hf_sparse_attn  # noqa: F401  (registers the mask function)
from hf_sparse_attn.masks.documents import Document, document_starts, documents
from hf_sparse_attn.masks.mask_function import PADDED_QUERY, signed_positions

PAD = PADDED_QUERY


class TestDocuments:
    def test_no_mask(self):
        assert split(batch_size=2, q_length=3, kv_length=3) == [
            (0, [0, 1, 2], [0, 1, 2], 0, 0),
            (1, [0, 1, 2], [0, 1, 2], 0, 0),
        ]

    def test_no_mask_with_cached_keys(self):
        assert split(q_length=2, kv_length=5) == [(0, [0, 1], span(0, 5), 3, 0)]

    def test_left_padding(self):
        signed = signed_positions(1, 5, 5, attention_mask=mask([0, 0, 1, 1, 1]))
        assert split(signed, q_length=5, kv_length=5) == [(0, [2, 3, 4], [2, 3, 4], 0, 0)]

    def test_right_and_mixed_padding(self):
        signed = signed_positions(3, 4, 4, attention_mask=mask([1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]))
        assert split(signed, 3, 4, 4) == [
            (0, [0, 1], [0, 1], 0, 0),
            (1, [1, 2], [1, 2], 0, 0),
            (2, [0, 2, 3], [0, 2, 3], 0, 0),
        ]

    def test_a_row_of_padding_alone_has_no_document(self):
        signed = signed_positions(2, 2, 2, attention_mask=mask([0, 0], [1, 1]))
        assert split(signed, 2, 2, 2) == [(1, [0, 1], [0, 1], 0, 0)]

    def test_a_finished_row_of_a_batch_that_goes_on(self):
        """The row's query is padding, its keys are not."""
        signed = signed_positions(2, 1, 4, 3, attention_mask=mask([1, 1, 1, 0], [1, 1, 1, 1]))
        assert split(signed, 2, 1, 4) == [(1, [0], [0, 1, 2, 3], 3, 0)]

    def test_decode_after_left_padding(self):
        signed = signed_positions(2, 1, 5, 4, attention_mask=mask([0, 0, 1, 1, 1], [1, 1, 1, 1, 1]))
        assert split(signed, 2, 1, 5) == [(0, [0], [2, 3, 4], 2, 0), (1, [0], span(0, 5), 4, 0)]

    def test_decode_after_right_padding(self):
        signed = signed_positions(1, 1, 5, 4, attention_mask=mask([1, 1, 0, 0, 1]))
        assert split(signed, 1, 1, 5) == [(0, [0], [0, 1, 4], 2, 0)]

    def test_static_cache(self):
        signed = signed_positions(1, 2, 9, torch.tensor(3))
        assert split(signed, 1, 2, 9) == [(0, [0, 1], span(0, 5), 3, 0)]

    def test_sliding_cache(self):
        signed = signed_positions(1, 2, 4, 7, 5)
        assert split(signed, 1, 2, 4) == [(0, [0, 1], span(0, 4), 7, 5)]

    def test_sliding_cache_with_left_padding(self):
        rows = mask([0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1])
        signed = signed_positions(2, 1, 4, 6, 3, rows)
        assert split(signed, 2, 1, 4) == [(0, [0], span(0, 4), 4, 1), (1, [0], [1, 2, 3], 2, 0)]

    @pytest.mark.parametrize(
        "starts", [[[0, 0, 0, 1, 1, 0]], [[1, 0, 0, 1, 1, 0]]], ids=["after the first row", "with the first row"]
    )
    def test_packed(self, starts):
        assert split(None, 1, 6, 6, torch.tensor(starts).bool()) == [
            (0, [0, 1, 2], [0, 1, 2], 0, 0),
            (0, [3], [3], 0, 0),
            (0, [4, 5], [4, 5], 0, 0),
        ]

    def test_packed_differently_by_row(self):
        assert split(None, 2, 3, 3, torch.tensor([[0, 0, 1], [0, 0, 0]]).bool()) == [
            (0, [0, 1], [0, 1], 0, 0),
            (0, [2], [2], 0, 0),
            (1, [0, 1, 2], [0, 1, 2], 0, 0),
        ]

    def test_one_row_of_starts_for_the_batch(self):
        assert split(None, 2, 3, 3, torch.tensor([[0, 0, 1]]).bool()) == [
            (batch, queries, queries, 0, 0) for batch in (0, 1) for queries in ([0, 1], [2])
        ]

    def test_packed_beside_a_mask(self):
        signed = signed_positions(1, 6, 6, attention_mask=mask([1, 1, 1, 1, 0, 0]))
        starts = torch.tensor([[1, 0, 1, 0, 0, 0]]).bool()
        assert split(signed, 1, 6, 6, starts) == [(0, [0, 1], [0, 1], 0, 0), (0, [2, 3], [2, 3], 0, 0)]

    def test_the_first_document_goes_on_from_cached_keys(self):
        starts = torch.tensor([[1, 0, 1, 0]]).bool()
        assert split(None, 1, 4, 7, starts) == [(0, [0, 1], span(0, 5), 3, 0), (0, [2, 3], [5, 6], 0, 0)]

    @pytest.mark.parametrize(
        ("cu_seq_lens", "seq_idx"),
        [([0, 3, 4, 6], None), (None, [[0, 0, 0, 1, 2, 2]]), ([0, 4, 6], [[0, 0, 0, 1, 1, 1]])],
        ids=["cu_seq_lens", "seq_idx", "both"],
    )
    def test_packed_as_collators_say_it(self, cu_seq_lens, seq_idx):
        starts = document_starts(*(None if x is None else torch.tensor(x) for x in (cu_seq_lens, seq_idx)), 6)
        assert split(None, 1, 6, 6, starts) == [
            (0, [0, 1, 2], [0, 1, 2], 0, 0),
            (0, [3], [3], 0, 0),
            (0, [4, 5], [4, 5], 0, 0),
        ]

    def test_consecutive_indices_are_slices(self):
        """Indexing with them makes no copy."""
        (document,) = documents(None, 1, 2, 5)
        assert document == Document(0, slice(0, 2), slice(0, 5), 3, 0)

    @pytest.mark.parametrize(
        "custom",
        [
            torch.ones(1, 1, 3, 3, dtype=torch.bool),
            torch.zeros(1, 1, 3, 3),
            torch.ones(1, 1, 1, 3, dtype=torch.bool),
            torch.ones(1, 1, 1, 4, dtype=torch.int32),
            torch.ones(1, 3, dtype=torch.int32),
        ],
        ids=["bool", "float", "bool of one row", "other length", "2D"],
    )
    def test_a_mask_of_the_callers_own_is_refused(self, custom):
        with pytest.raises(
            ValueError, match=r"takes a 2D attention_mask \[batch, tokens\], .* or none; got one of shape"
        ):
            documents(custom, 1, 3, 3)
