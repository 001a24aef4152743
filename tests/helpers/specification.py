"""Logits of models, with the specification and with the family's own eager attention, to be compared with."""

import contextlib
import functools
import json
from unittest import mock

import torch
from transformers import DynamicCache

from helpers.families import tiny_model

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def cached_logits(model, ids, sizes, cache=None):
    """Logits of a forward in pieces of the given sizes, the last one repeated to the end."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    pieces, start = [], 0
    for size in (*sizes, *[sizes[-1]] * ids.shape[1]):
        if start == ids.shape[1]:
            break
        piece = ids[:, start : start + size]
        pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
        start += piece.shape[1]
    return torch.cat(pieces, 1)


@functools.cache
def cached_specification(family, ids, position_ids, own_window, fields):
    model = tiny_model(family, **json.loads(fields))
    model.config.sparse_attention["implementation"] = "reference"
    if not own_window:
        for layer in model.model.layers:
            holder = layer.self_attn if hasattr(layer.self_attn, "sliding_window") else model.config
            holder.sliding_window = None
    row = torch.tensor([ids])
    # Under a mask, position_ids do not say what is packed.
    return logits(model, row, position_ids=torch.tensor([position_ids]), attention_mask=torch.ones_like(row))[0]


def specified(family, ids, position_ids=None, own_window=True, **sparse):
    """Logits [tokens, vocabulary] of a document `ids` [tokens] alone, in one plain forward of the specification.

    own_window: whether the sliding windows of the family itself hold.
    """
    position_ids = range(len(ids)) if position_ids is None else position_ids.tolist()
    return cached_specification(family, tuple(ids.tolist()), tuple(position_ids), own_window, json.dumps(sparse))


def assert_specified(found, family, ids, position_ids=None, **options):
    """`found` [tokens, vocabulary] are the specification's logits of a document, or of its last tokens."""
    torch.testing.assert_close(found, specified(family, ids, position_ids, **options)[-len(found) :], **TOLERANCE)


def assert_each_specified(found, family, rows, **options):
    """`found` [1, tokens, vocabulary] holds each document's own logits, one after another."""
    for part, row in zip(found[0].split([len(row) for row in rows]), rows, strict=True):
        assert_specified(part, family, row, **options)


@contextlib.contextmanager
def softmax_in_float64():
    """Keep the softmax that models ask for in float32 in the dtype of its input."""
    softmax = torch.nn.functional.softmax
    with mock.patch("torch.nn.functional.softmax", lambda scores, dim=None, dtype=None: softmax(scores, dim)):
        yield


def dense_logits(family, ids, **kwargs):
    """Logits of the family's own eager attention, its softmax in float64."""
    with softmax_in_float64():
        return logits(tiny_model(family, "eager"), ids, **kwargs)
