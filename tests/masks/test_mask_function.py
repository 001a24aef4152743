import inspect

import pytest
import torch
from helpers.masks import mask, span, split
from transformers import LlamaConfig, masking_utils

import hf_sparse_attn  # noqa: F401  (registers the mask function)
from hf_sparse_attn.masks.documents import documents
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
        with pytest.raises(
            ValueError, match="does not support causal attention with blocks of tokens that see each other"
        ):
            documents(signed, 2, 8, 8)
