"""Checks of what the attention promises, shared by the tests and by the broken variants that must fail them."""

import functools
from itertools import pairwise

import torch
from transformers import DynamicCache

from helpers.batches import packed_documents, padded_batch, tokens
from helpers.families import VOCABULARY, tiny_model
from helpers.operation import make_pattern
from helpers.specification import (
    TOLERANCE,
    assert_each_specified,
    assert_specified,
    cached_logits,
    dense_logits,
    logits,
    softmax_in_float64,
    specified,
)
from hf_sparse_attn import SparseAttentionConfig, record_density
from hf_sparse_attn.integration import observe
from hf_sparse_attn.ops import reference


def check_matches_reference(family="llama", length=40, **sparse):
    """The fast implementation gives the logits of the specification, which differ from dense attention's."""
    ids = tokens(length, 2)
    expected = torch.stack([specified(family, row, **sparse) for row in ids])
    assert (expected - dense_logits(family, ids))[:, 20:].abs().amax() > 1e-2
    torch.testing.assert_close(logits(tiny_model(family, **sparse), ids), expected, **TOLERANCE)


def check_full_coverage(family="llama", **sparse):
    """Rows that read everything, by way of the window, give the logits of the family's own dense attention."""
    ids = tokens(40, 2)
    model = tiny_model(family, **{"window_size": 60, **sparse})
    with softmax_in_float64():
        ours = logits(model, ids)
    torch.testing.assert_close(ours, dense_logits(family, ids), **TOLERANCE)


def check_chunks(
    family="llama", sizes=(7, 13), length=40, new_cache=lambda config: DynamicCache(config=config), **sparse
):
    """A forward in pieces with a cache gives the logits of the specification."""
    ids = tokens(length, 2)
    model = tiny_model(family, **sparse)
    found = cached_logits(model, ids, sizes, new_cache(model.config))
    for part, row in zip(found, ids, strict=True):
        assert_specified(part, family, row, **sparse)


def check_padding(family="llama", side="left", extra=3, **sparse):
    """Padded rows of several lengths in one batch give each row's own logits; padding gives finite numbers.

    Under position_ids as `generate` makes them, and under those of the columns, which do not show the padding.
    """
    model = tiny_model(family, **sparse)
    rows = [tokens(length, seed=length)[0] for length in (40, 33, 21, 1)]
    ids, mask, positions = padded_batch(rows, side, extra)
    for position_ids in (positions, torch.arange(ids.shape[1]).expand_as(ids)):
        together = logits(model, ids, attention_mask=mask, position_ids=position_ids)
        assert together.isfinite().all()
        for i, row in enumerate(rows):
            columns = mask[i].bool()
            assert_specified(together[i][columns], family, row, position_ids[i, columns], **sparse)


def check_packed(family="llama", **sparse):
    """Documents packed into one row, told apart by position_ids, give each document's own logits."""
    rows, position_ids = packed_documents()
    together = logits(tiny_model(family, **sparse), torch.cat(rows)[None], position_ids=position_ids)
    assert_each_specified(together, family, rows, **sparse)


def check_position_ids(family="llama", **sparse):
    """position_ids that start anew, repeat or fall under a mask of ones or with a cache: one document, as to any other
    attention of Transformers, in one piece and in two."""
    ids = tokens(60)
    _, anew = packed_documents()
    for position_ids in (anew, anew // 2, torch.arange(60)[None] // 3, torch.arange(60).flip(0)[None]):
        model = tiny_model(family, **sparse)
        assert_specified(
            logits(model, ids, position_ids=position_ids, attention_mask=torch.ones_like(ids))[0],
            family,
            ids[0],
            position_ids[0],
            **sparse,
        )
        inputs = {"position_ids": position_ids, "attention_mask": torch.ones_like(ids)}
        with softmax_in_float64():
            everything = logits(tiny_model(family, **{**sparse, "window_size": 60}), ids, **inputs)
        torch.testing.assert_close(everything, dense_logits(family, ids, **inputs), **TOLERANCE)
        if family == "gpt_oss":  # its model does not ask Transformers what is packed: without a mask, position_ids tell
            continue
        for cuts in ((0, 60), (0, 31, 60)):
            cache, pieces = DynamicCache(config=model.config), []
            with torch.no_grad():
                for start, stop in pairwise(cuts):
                    inputs = {"position_ids": position_ids[:, start:stop], "past_key_values": cache, "use_cache": True}
                    pieces.append(model(ids[:, start:stop], **inputs).logits)
            assert_specified(torch.cat(pieces, 1)[0], family, ids[0], position_ids[0], **sparse)


def check_later_tokens(family="llama", length=44, **sparse):
    """Changing the tokens from any place on changes no earlier logit, to the last bit."""
    model = tiny_model(family, **sparse)
    ids = tokens(length)
    before = logits(model, ids)
    for cut in (1, 6, 21, 32, length - 1):
        changed = ids.clone()
        changed[:, cut:] = changed[:, cut:] % (VOCABULARY - 1) + 1
        after = logits(model, changed)
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert not torch.equal(after[:, cut:], before[:, cut:])


def check_gradients(family="llama", **sparse):
    """Gradients of all weights are those of the specification."""
    gradients = []
    for implementation in ("auto", "reference"):
        model = tiny_model(family, implementation="sparse", **sparse)
        model.config.sparse_attention["implementation"] = implementation
        ids = tokens(40, seed=1)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients, **TOLERANCE)


def check_density(family="llama", length=40, **sparse):
    """The recorded pairs are those that the specification counts from the model's own queries and keys."""
    model = tiny_model(family, **sparse)
    model_window = getattr(model.config, "sliding_window", None)
    windows = [getattr(layer.self_attn, "sliding_window", model_window) for layer in model.model.layers]
    attended = scored = admissible = 0

    def count(observed, query, key, value, scaling, _output):
        nonlocal attended, scored, admissible
        layer_idx = observed.layer_idx
        assert observed.sliding_window == windows[layer_idx]
        config = SparseAttentionConfig.from_dict(model.config.sparse_attention)
        pattern = make_pattern(config, query.shape[1], key.shape[1], key.shape[-1], layer_idx, windows[layer_idx])
        for q, k in zip(query, key, strict=True):
            layer = model.model.layers[layer_idx].self_attn
            others = {"softcap": getattr(layer, "attn_logit_softcapping", None), "sinks": getattr(layer, "sinks", None)}
            attended += int(reference.attended_keys(q, k, pattern, 0, scaling=scaling, **others).sum())
            scored += int(reference.scored_keys(q, k, pattern, 0)[0].sum())
        for p in range(length):
            admissible += query.shape[0] * query.shape[1] * min(p + 1, windows[layer_idx] or length)

    with observe(model, count), record_density(model) as recorder:
        logits(model, tokens(length, 2))
    assert 0 < attended < scored < admissible
    assert (recorder.attended, recorder.scored, recorder.admissible) == (attended, scored, admissible)
    assert recorder.density == attended / admissible


# One of each kind, quick enough to be run against every broken variant.
CHECKS = {
    "reference": check_matches_reference,
    "reference-sliding": functools.partial(check_matches_reference, "mistral-sliding"),
    "full-coverage": check_full_coverage,
    "chunks": check_chunks,
    "left-padding": check_padding,
    "right-padding": functools.partial(check_padding, side="right"),
    "packed": check_packed,
    "position-ids": check_position_ids,
    "later-tokens": check_later_tokens,
    "gradients": check_gradients,
    "density": check_density,
}
