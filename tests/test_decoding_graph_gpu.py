"""A decoding step that CUDA captures, which refuses whatever waits for the device, and replays."""

import pytest
import torch
from helpers.batches import padded_batch, tokens
from helpers.families import tiny_model

from hf_sparse_attn import DecodingGraph, SparseCache, configure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PROMPT, LENGTH = 24, 90
FIELDS = [
    {},
    {"num_random_keys": 3, "stride": 7, "slash_distances": (9, 13), "min_weight": 0.1},
    {"dense_layers": (1,)},
    {"dense_below": 40},
]


def on_the_gpu(**fields):
    model = tiny_model(dtype=torch.float32, **fields).cuda()
    configure(model, implementation="triton")
    return model


def decode(step, ids, start):
    return torch.cat([step(ids[:, i : i + 1]) for i in range(start, ids.shape[1])], 1)


def assert_alike(found, expected):
    """Rounding may decide between two buckets of a row."""
    off = (found - expected).norm(dim=-1) > 0.01 * expected.norm(dim=-1)
    assert float(off.float().mean()) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: " ".join(fields))
def test_replays(fields):
    model, ids = on_the_gpu(**fields), tokens(LENGTH).cuda()
    expected = model(ids).logits
    cache = SparseCache(model.config, max_cache_len=LENGTH)
    model(ids[:, :PROMPT], past_key_values=cache)
    step = DecodingGraph(model, cache)
    assert_alike(decode(step, ids[:, :70], PROMPT), expected[:, PROMPT:70])
    replay = step._replay
    assert replay is not None
    cache.crop(-10)
    assert_alike(decode(step, ids, 60), expected[:, 60:])
    assert step._replay is replay


@torch.no_grad()
def test_a_left_padded_batch():
    model, rows = on_the_gpu(), [tokens(length, seed=length)[0] for length in (LENGTH, LENGTH - 11)]
    expected = torch.stack([model(row[None].cuda()).logits[0, -20:] for row in rows])
    ids, mask, position_ids = (x.cuda() for x in padded_batch(rows, "left", 0))
    cache, prompt = SparseCache(model.config, max_cache_len=LENGTH), LENGTH - 20
    inputs = {"attention_mask": mask[:, :prompt], "position_ids": position_ids[:, :prompt]}
    model(ids[:, :prompt], **inputs, past_key_values=cache)
    step = DecodingGraph(model, cache, mask[:, :prompt])
    assert_alike(decode(step, ids, prompt), expected)
    assert step._replay is not None


@torch.no_grad()
def test_a_cache_that_grows():
    model, ids = on_the_gpu(), tokens(LENGTH + 60).cuda()
    expected = model(ids).logits
    cache = SparseCache(model.config, max_cache_len=PROMPT + 20)
    model(ids[:, :PROMPT], past_key_values=cache)
    assert_alike(decode(DecodingGraph(model, cache), ids, PROMPT), expected[:, PROMPT:])
