"""Paths of a caller's own 4D masks, bool or added to the scores; and what else a caller may ask for and is refused."""

import torch
from helpers.batches import packed_documents, padded_batch, tokens
from helpers.families import FAMILIES, tiny_model
from helpers.specification import TOLERANCE, assert_specified, dense_logits, logits, softmax_in_float64
from transformers import DynamicCache, StaticCache

WINDOW = 14
SLIDING_EVERYWHERE = {"mistral-sliding", "phi3-sliding"}
MOST_NEGATIVE = torch.finfo(torch.float64).min


def causal(num_queries, num_keys=None, start=0):
    """[1, 1, Q, KV], True where the query in slot start + row may attend."""
    slot = torch.arange(num_queries if num_keys is None else num_keys)
    return (slot <= torch.arange(num_queries)[:, None] + start)[None, None]


def inside_window(mask, start=0):
    row, slot = torch.arange(mask.shape[2])[:, None] + start, torch.arange(mask.shape[3])
    return mask & (slot > row - WINDOW)


def added(mask, masked=MOST_NEGATIVE):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, masked)


def each_form(family, mask, start=0):
    """The forms of a mask that say the same, each with whether the windows of the family itself hold under it.

    A 4D mask replaces Transformers' own, windows included; it holds for every layer, so one with a window fits only
    families that slide in every layer.
    """
    own_window = not FAMILIES[family][2].get("sliding_window")
    for form in (mask, added(mask), added(mask, -torch.inf)):
        yield form, own_window
    if family in SLIDING_EVERYWHERE:
        yield inside_window(mask, start), True
        yield added(inside_window(mask, start)), True


def causal_mask(family):
    """A causal mask, with the model's own window where every layer has it; and dense, as the family's eager
    attention reads it."""
    ids, mask = tokens(40, 2), causal(40)
    for form, own_window in each_form(family, mask):
        for part, row in zip(logits(tiny_model(family), ids, attention_mask=form), ids, strict=True):
            assert_specified(part, family, row, own_window=own_window)
    with softmax_in_float64():
        ours = logits(tiny_model(family, window_size=60), ids, attention_mask=mask)
    torch.testing.assert_close(ours, dense_logits(family, ids, attention_mask=added(mask)), **TOLERANCE)


def padded_mask(family):
    """A causal mask with padding on the left, the right or both sides."""
    rows = [tokens(length, seed=length)[0] for length in (40, 23, 1)]
    for side in ("left", "right", "mixed"):
        ids, present, position_ids = padded_batch(rows, side, 3)
        present = present.bool()
        mask = causal(ids.shape[1]) & present[:, None, None, :] & present[:, None, :, None]
        for form, own_window in each_form(family, mask):
            together = logits(tiny_model(family), ids, attention_mask=form, position_ids=position_ids)
            for i, row in enumerate(rows):
                assert_specified(together[i][present[i]], family, row, own_window=own_window)


def packed_mask(family):
    """A block-diagonal mask of packed documents, whether position_ids show them or not."""
    rows, restarting = packed_documents()
    ids, number = torch.cat(rows)[None], restarting.eq(0).cumsum(-1)
    mask = causal(ids.shape[1]) & (number[0] == number[0][:, None])
    lengths = [len(row) for row in rows]
    for position_ids in (restarting, torch.arange(ids.shape[1])[None]):
        for form, own_window in each_form(family, mask):
            together = logits(tiny_model(family), ids, attention_mask=form, position_ids=position_ids)[0]
            parts = zip(together.split(lengths), rows, position_ids[0].split(lengths), strict=True)
            for part, row, positions in parts:
                assert_specified(part, family, row, positions, own_window=own_window)


def cached_mask(family):
    """Causal masks over cached keys, with padding; a cache that keeps every key, and a static one."""
    rows = [tokens(length, seed=length)[0] for length in (38, 21)]
    ids, present, position_ids = padded_batch(rows, "left", 2)
    present = torch.nn.functional.pad(present.bool(), (0, 24))  # slots that only a static cache has
    slides = FAMILIES[family][2].get("sliding_window")
    for static in (False,) if slides else (False, True):
        for index in range(5 if family in SLIDING_EVERYWHERE else 3):
            model = tiny_model(family)
            cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache()
            pieces = []
            for start, stop in ((0, 30), (30, 37), (37, 38), (38, 39), (39, 40)):
                num_keys = 64 if static else stop
                mask = causal(stop - start, num_keys, start) & present[:, None, None, :num_keys]
                mask = mask & present[:, None, start:stop, None]
                form, own_window = list(each_form(family, mask, start))[index]
                inputs = {"attention_mask": form, "position_ids": position_ids[:, start:stop]}
                with torch.no_grad():
                    output = model(ids[:, start:stop], past_key_values=cache, use_cache=True, **inputs)
                pieces.append(output.logits)
            together = torch.cat(pieces, 1)
            for i, row in enumerate(rows):
                assert_specified(together[i][present[i, :40]], family, row, own_window=own_window)


def masks_by_layer_type(family, implementation="sparse"):
    """A dict with one causal mask for each of the model's layer types, the sliding one with the window."""
    ids = tokens(40, 2)
    for form in (lambda mask: mask, added):
        masks = {"full_attention": form(causal(40)), "sliding_attention": form(inside_window(causal(40)))}
        together = logits(tiny_model(family, implementation), ids, attention_mask=masks)
        for part, row in zip(together, ids, strict=True):
            assert_specified(part, family, row)


def prefix_mask(family):
    """A mask under which the tokens of a prefix see each other, as in a prefix LM."""
    mask = causal(40)
    mask[..., :8, :8] = True
    logits(tiny_model(family), tokens(40), attention_mask=mask)


def not_causal(family):
    """`model(..., is_causal=False)`."""
    check_not_causal(family, lambda model: {"is_causal": False})


def not_causal_by_config(family):
    """`model.config.is_causal = False`, with which Transformers makes bidirectional masks."""

    def prepare(model):
        model.config.is_causal = False
        return {}

    check_not_causal(family, prepare)


def check_not_causal(family, prepare):
    """Rows of padded batches that read everything give the logits of the family's own attention on both sides; others
    those of the specification, which differ."""
    rows = [tokens(length, seed=length)[0] for length in (40, 33)]
    ids, mask, _ = padded_batch(rows, "right", 2)
    models = {
        "eager": tiny_model(family, "eager"),
        "everything": tiny_model(family, window_size=60),
        "auto": tiny_model(family),
        "reference": tiny_model(family, implementation="sparse"),
    }
    models["reference"].config.sparse_attention["implementation"] = "reference"
    with softmax_in_float64():
        found = {
            name: logits(model, ids, attention_mask=mask, **prepare(model))[mask.bool()]
            for name, model in models.items()
        }
    torch.testing.assert_close(found["everything"], found["eager"], **TOLERANCE)
    torch.testing.assert_close(found["auto"], found["reference"], **TOLERANCE)
    assert (found["auto"] - found["eager"]).abs().amax() > 1e-2
    assert (found["eager"][:20] - dense_logits(family, ids[:1])[0, :20]).abs().amax() > 1e-2


def output_attentions(family):
    """`model(..., output_attentions=True)`."""
    logits(tiny_model(family), tokens(40), output_attentions=True)


PATHS = {
    "4D mask": causal_mask,
    "4D mask with padding": padded_mask,
    "4D mask of packed documents": packed_mask,
    "4D mask over a cache": cached_mask,
    "4D masks by layer type": masks_by_layer_type,
    "4D mask of a prefix LM": prefix_mask,
    "is_causal=False": not_causal,
    "config.is_causal=False": not_causal_by_config,
    "output_attentions": output_attentions,
}
