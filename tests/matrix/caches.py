"""Paths through caches: pieces, steps, slots, and caches that are cut, reordered or moved."""

import itertools

import torch
from helpers.batches import padded_batch, tokens
from helpers.checks import check_chunks
from helpers.families import FAMILIES, tiny_model
from helpers.specification import assert_specified
from transformers import DynamicCache, StaticCache

from hf_sparse_attn import SparseCache, SparseStaticCache
from hf_sparse_attn.cache.policies import HeavyHitters, Sinks


def new_dynamic(config):
    """Layers slide where the model's own do."""
    return DynamicCache(config=config)


def new_keeping_everything(config):
    return DynamicCache()


def new_sparse(config):
    """The indexes of the keys stay with them; layers slide where the model's own do."""
    return SparseCache(config)


def new_with_a_policy(config):
    return SparseCache(config, policy=Sinks(2) + HeavyHitters(), budget=64)


def new_static(config):
    return StaticCache(config=config, max_cache_len=64)


def new_sparse_static(config):
    return SparseStaticCache(config, max_cache_len=64)


def dynamic_cache(family):
    """Prefill in pieces of several sizes, then token by token, with `DynamicCache(config=...)`, whose layers slide
    where the model's own do."""
    for sizes in ((7, 13), (1,), (39, 1), (3, 16, 4)):
        check_chunks(family, sizes)


def cache_of_every_key(family):
    """The same with `DynamicCache()`, which keeps every key under sliding layers too."""
    for sizes in ((7, 13), (31, 1)):
        check_chunks(family, sizes, new_cache=new_keeping_everything)


def sparse_cache(family):
    """The same with `SparseCache`, growing or with all its room from the start."""
    for sizes in ((7, 13), (1,), (39, 1), (3, 16, 4)):
        check_chunks(family, sizes, new_cache=new_sparse)
    check_chunks(family, (31, 1), new_cache=lambda config: SparseCache(config, max_cache_len=64))


def policy_cache(family):
    """`SparseCache` with a policy that has room for every key, prompts padded on the left included; what is evicted
    where it has not is tested by `tests/cache/test_evicting.py`."""
    for sizes in ((7, 13), (31, 1)):
        check_chunks(family, sizes, new_cache=new_with_a_policy)
    check_padded_cache(family, "left", new_with_a_policy)


def static_cache(family):
    """Prefill in one piece or several, then token by token, with `StaticCache`, up to its last slot."""
    check_static_cache(family, StaticCache)


def sparse_static_cache(family):
    """The same with `SparseStaticCache`, which keeps the indexes of the keys."""
    check_static_cache(family, SparseStaticCache)


def check_static_cache(family, of_class):
    for sizes in ((40,), (31, 1), (7, 13)):
        check_chunks(family, sizes, new_cache=lambda config: of_class(config=config, max_cache_len=64))
    check_chunks(family, (21, 1), 24, lambda config: of_class(config=config, max_cache_len=24))


def left_padded_cache(family):
    """A batch padded on the left, prefilled and then fed token by token, in each kind of cache."""
    for new_cache in (new_dynamic, new_keeping_everything, new_static, new_sparse, new_sparse_static):
        check_padded_cache(family, "left", new_cache)


def right_padded_cache(family):
    """A batch padded on the right, prefilled and then fed token by token. With `DynamicCache()` where layers slide:
    what slides drops keys by the column, padding included."""
    check_padded_cache(family, "right", new_keeping_everything)
    if not FAMILIES[family][2].get("sliding_window"):
        check_padded_cache(family, "right", new_dynamic)
        check_padded_cache(family, "right", new_static)
        check_padded_cache(family, "right", new_sparse)
        check_padded_cache(family, "right", new_sparse_static)


def check_padded_cache(family, side, new_cache):
    rows = [tokens(length, seed=length)[0] for length in (36, 20, 9)]
    prompts, continuations = [row[:-6] for row in rows], torch.stack([row[-6:] for row in rows])
    model = tiny_model(family)
    cache = new_cache(model.config)
    ids, mask, position_ids = padded_batch(prompts, side, 2)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True)
        pieces = [output.logits]
        for step in continuations.T:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            output = model(
                step[:, None],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            )
            pieces.append(output.logits)
    together = torch.cat(pieces, 1)
    assert together.isfinite().all()
    for i, row in enumerate(rows):
        assert_specified(together[i][mask[i].bool()], family, row)


def cropped_cache(family):
    """Tokens are taken back with `cache.crop` and others follow, as in assisted generation."""
    ids, other = tokens(40), tokens(40, seed=1)
    for new_cache in (new_dynamic, new_keeping_everything, new_sparse):
        model = tiny_model(family)
        cache = new_cache(model.config)
        cache.activate_past_recording()
        with torch.no_grad():
            for start, kept, stop in ((0, 9, 12), (9, 25, 30)):
                model(torch.cat([ids[:, start:kept], other[:, kept:stop]], 1), past_key_values=cache, use_cache=True)
                cache.crop(kept - stop)
            pieces = [model(ids[:, 25:30], past_key_values=cache, use_cache=True).logits]
            pieces += [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(30, 40)]
        assert_specified(torch.cat(pieces, 1)[0], family, ids[0])


def rows_of_a_cache(family):
    """Rows of a cache are reordered, selected and repeated, as in beam search."""
    ids, prompt = tokens(40, 3), 25
    changes = {
        (2, 0, 0): lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        (2, 1): lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
        (0, 0, 1, 1, 2, 2): lambda cache: cache.batch_repeat_interleave(2),
    }
    for (rows, change), new_cache in itertools.product(changes.items(), (new_dynamic, new_sparse)):
        model = tiny_model(family)
        cache = new_cache(model.config)
        with torch.no_grad():
            model(ids[:, :prompt], past_key_values=cache, use_cache=True)
            change(cache)
            chosen = ids[list(rows)]
            steps = (slice(prompt, prompt + 1), slice(prompt + 1, None))
            found = [model(chosen[:, step], past_key_values=cache, use_cache=True).logits for step in steps]
        for part, row in zip(torch.cat(found, 1), chosen, strict=True):
            assert_specified(part, family, row)


PATHS = {
    "dynamic cache": dynamic_cache,
    "cache of every key": cache_of_every_key,
    "sparse cache": sparse_cache,
    "cache with a policy": policy_cache,
    "static cache": static_cache,
    "sparse static cache": sparse_static_cache,
    "left-padded batch in a cache": left_padded_cache,
    "right-padded batch in a cache": right_padded_cache,
    "cropped cache": cropped_cache,
    "rows of a cache": rows_of_a_cache,
}
