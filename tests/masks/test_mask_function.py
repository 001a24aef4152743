import inspect

import pytest
import torch
from transformers import LlamaConfig, masking_utils

import hf_sparse_attn  # noqa: F401  (registers the mask function)
from hf_sparse_attn.masks.documents import Document, document_starts, documents
from hf_sparse_attn.masks.mask_function import PADDED_QUERY, signed_positions

PAD = PADDED_QUERY
needs_blocks = pytest.mark.skipif(
    "block_sequence_ids" not in inspect.signature(masking_utils.create_causal_mask).parameters,
    reason="this Transformers has no blocks of tokens that see each other",
)


def values(**kwargs):
    signed = signed_positions(**kwargs)
    batch_size = kwargs["batch_size"]
    assert signed.dtype == torch.int32
    assert signed.shape == (batch_size, 1, 1, kwargs["kv_length"])
    return signed[:, 0, 0].tolist()


def mask(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def split(attention_mask=None, batch_size=1, q_length=1, kv_length=1, starts=None):
    """The documents with plain lists for indices."""
    return [
        (
            document.batch,
            torch.arange(q_length)[document.queries].tolist(),
            torch.arange(kv_length)[document.keys].tolist(),
            document.query_offset,
            document.key_offset,
        )
        for document in documents(attention_mask, batch_size, q_length, kv_length, starts)
    ]


def span(start, stop):
    return list(range(start, stop))


class TestSignedPositions:
    @pytest.mark.parametrize("q_offset", [0, 4], ids=["one shot", "cached"])
    def test_nothing_to_say(self, q_offset):
        assert signed_positions(2, 3, 3 + q_offset, q_offset) is None

    def test_left_right_and_mixed_padding(self):
        rows = mask([0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1])
        assert values(batch_size=5, q_length=4, kv_length=4, attention_mask=rows) == [
            [PAD, PAD, -1, -2],
            [-1, -2, -3, PAD],
            [-1, -2, -3, -4],
            [PAD, PAD, PAD, PAD],
            [PAD, -1, PAD, -2],
        ]

    def test_an_integer_mask_means_the_same(self):
        rows = torch.tensor([[0, 2, 1]])
        assert values(batch_size=1, q_length=3, kv_length=3, attention_mask=rows) == [[PAD, -1, -2]]

    def test_cached_keys_before_the_queries(self):
        rows = mask([0, 1, 1, 1, 1], [1, 1, 0, 1, 0])
        assert values(batch_size=2, q_length=2, kv_length=5, q_offset=3, attention_mask=rows) == [
            [0, 1, 2, -3, -4],
            [1, 2, 0, -3, PAD],
        ]

    @pytest.mark.parametrize("q_offset", [2, torch.tensor(2)], ids=["number", "tensor"])
    def test_slots_of_a_static_cache_that_are_not_filled_yet(self, q_offset):
        assert values(batch_size=2, q_length=2, kv_length=6, q_offset=q_offset) == [[1, 2, -3, -4, 0, 0]] * 2

    @pytest.mark.parametrize("length", [4, 6], ids=["mask of the tokens", "mask of all slots"])
    def test_static_cache_with_padding(self, length):
        rows = mask([0, 1, 1, 1, 1, 1][:length], [1, 1, 1, 1, 1, 1][:length])
        q_offset = torch.tensor(3)
        assert values(batch_size=2, q_length=1, kv_length=6, q_offset=q_offset, attention_mask=rows) == [
            [0, 1, 2, -3, 0, 0],
            [1, 2, 3, -4, 0, 0],
        ]

    def test_a_tensor_offset_that_moves_on_does_not_change_the_mask(self):
        counter = torch.tensor(2)
        signed = signed_positions(1, 1, 5, counter)
        before = signed.clone()
        counter += 1
        assert torch.equal(signed, before)

    def test_a_full_static_cache_still_gives_a_mask(self):
        """Whether it is full is known on the device alone."""
        assert values(batch_size=1, q_length=1, kv_length=3, q_offset=torch.tensor(2)) == [[1, 2, -3]]

    def test_sliding_cache_that_dropped_the_first_keys(self):
        assert values(batch_size=1, q_length=2, kv_length=4, q_offset=7, kv_offset=5) == [[6, 7, -8, -9]]

    def test_sliding_cache_with_padding(self):
        rows = mask([0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1])
        assert values(batch_size=3, q_length=1, kv_length=4, q_offset=6, kv_offset=3, attention_mask=rows) == [
            [2, 3, 4, -5],
            [4, 5, 6, -7],
            [0, 1, 2, -3],
        ]

    def test_arguments_of_other_implementations_are_ignored(self):
        assert signed_positions(1, 2, 2, dtype=torch.float32, allow_is_causal_skip=True, config=None) is None


class TestRefusals:
    """What Transformers' own functions pass on for masks that are neither causal nor a sliding window."""

    def make(self, create=masking_utils.create_causal_mask, config=None, position_ids=None, **kwargs):
        config = LlamaConfig(attn_implementation="sparse", attention_chunk_size=4, sliding_window=3, **(config or {}))
        arguments = {"inputs_embeds": torch.zeros(2, 8, 4), "attention_mask": None, "past_key_values": None}
        return create(config, **arguments, position_ids=position_ids, **kwargs)

    @pytest.mark.parametrize("create", ["create_causal_mask", "create_sliding_window_causal_mask"])
    def test_accepted(self, create):
        assert self.make(getattr(masking_utils, create)) is None

    @pytest.mark.parametrize("create", ["create_causal_mask", "create_sliding_window_causal_mask"])
    @pytest.mark.parametrize(
        "position_ids", [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 7, 8, 9, 10, 11]], ids=["restart", "gap"]
    )
    def test_packed_as_transformers_sees_it(self, create, position_ids):
        """A gap in position_ids is a new document to Transformers as well."""
        signed = self.make(getattr(masking_utils, create), position_ids=torch.tensor([position_ids]))
        assert signed[:, 0, 0].tolist() == [[-1, -2, -3, -1, -2, -3, -4, -5]] * 2
        assert split(signed, 2, 8, 8) == [
            (batch, span(*ends), span(*ends), 0, 0) for batch in (0, 1) for ends in ((0, 3), (3, 8))
        ]

    @needs_blocks
    def test_blocks_of_one_token_are_causal(self):
        signed = self.make(block_sequence_ids=torch.full((2, 8), -1))
        assert split(signed, 2, 8, 8) == split(None, 2, 8, 8)

    def test_chunked(self):
        with pytest.raises(ValueError, match=r'^attn_implementation="sparse" does not support chunked attention'):
            self.make(masking_utils.create_chunked_causal_mask)

    @pytest.mark.parametrize("argument", ["or_mask_function", "and_mask_function"])
    def test_mask_function(self, argument):
        with pytest.raises(ValueError, match="does not support a mask function of the model's own"):
            self.make(**{argument: lambda batch, head, q, kv: q % 2 == 0})

    @needs_blocks
    def test_bidirectional_blocks(self):
        blocks = torch.full((2, 8), -1)
        blocks[1, 5:7] = 0
        signed = self.make(block_sequence_ids=blocks)
        with pytest.raises(ValueError, match="does not support non-causal attention"):
            documents(signed, 2, 8, 8)


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
