"""`SparseCache`: a cache like every other, whose layers grow in place and keep the indexes of their keys."""

import copy
import gc
import weakref

import pytest
import torch
from helpers.batches import padded_batch, tokens
from helpers.families import tiny_model
from helpers.specification import TOLERANCE, assert_specified, cached_logits
from helpers.spies import count_hashed_keys
from transformers import AutoTokenizer, DynamicCache

from hf_sparse_attn import SparseCache, configure, record_density
from hf_sparse_attn.cache import SparseLayer
from hf_sparse_attn.data import load_documents
from hf_sparse_attn.demo import demo_model_directory
from hf_sparse_attn.loading import load_sparse_model
from hf_sparse_attn.side_channels import INDEXES

NUM_LAYERS = 2


def states(length, seed=0, batch_size=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch_size, 3, length, 4, generator=generator).unbind()


def both(sizes=(), max_cache_len=None):
    """A layer of ours and a stock one, given the same."""
    ours, stock = SparseLayer(max_cache_len), DynamicCache().layer_class_to_replicate()
    for i, size in enumerate(sizes):
        for layer in (ours, stock):
            layer.update(*states(size, i))
    return ours, stock


def assert_same(ours, stock):
    assert torch.equal(ours.keys, stock.keys)
    assert torch.equal(ours.values, stock.values)
    assert ours.get_seq_length() == stock.get_seq_length()
    assert ours.get_mask_sizes(3) == stock.get_mask_sizes(3)


CHANGES = {
    "crop": lambda layer: layer.crop(-3),
    "crop nothing": lambda layer: layer.crop(0),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda layer: layer.batch_repeat_interleave(3),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "select by a mask": lambda layer: layer.batch_select_indices(torch.tensor([False, True])),
    "offload": lambda layer: (layer.offload(), layer.prefetch()),
}


@pytest.mark.parametrize("max_cache_len", [None, 10, 200])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_like_a_stock_layer(change, max_cache_len):
    ours, stock = both((5, 1, 70, 1, 1), max_cache_len)
    assert_same(ours, stock)
    for layer in (ours, stock):
        change(layer)
    assert_same(ours, stock)
    for size in (1, 90):
        for layer in (ours, stock):
            layer.update(*states(size, 9, len(stock.keys)))
        assert_same(ours, stock)


def test_reset():
    for max_cache_len in (None, 100):
        ours, _ = both((5, 3), max_cache_len)
        before = ours._allocated
        ours.reset()
        assert ours.get_seq_length() == 0
        fresh, _ = both((4,))
        ours.update(*states(4))
        assert torch.equal(ours.keys, fresh.keys)
        assert (ours._allocated is before) == (max_cache_len is not None)
        ours.reset()
        ours.update(*states(4, batch_size=1))  # another batch
        assert ours.keys.shape[0] == 1


def test_appending_copies_nothing():
    layer, _ = both((100,))
    keys = layer.keys
    for i in range(12):
        layer.update(*states(1, i))
    assert layer.keys.data_ptr() == keys.data_ptr()


def test_a_given_length_is_allocated_once():
    layer, _ = both((5,), max_cache_len=300)
    first, size = layer.keys.data_ptr(), layer.nbytes
    for _ in range(5):
        layer.update(*states(50))
    assert (layer.keys.data_ptr(), layer.nbytes) == (first, size)
    layer.update(*states(50))
    assert layer.get_seq_length() == 305
    assert layer.nbytes > size


def test_what_was_given_out_stays_as_it_was():
    """Of a cache that is cropped and goes on, the rows of another one that was copied from it are unchanged."""
    layer, _ = both((20,))
    kept = layer.keys[:, :, :10].clone()
    layer.crop(-10)
    layer.update(*states(10, 5))
    assert torch.equal(layer.keys[:, :, :10], kept)


def test_keys_that_someone_else_put_there():
    """As tools do that change caches by hand: nothing of the old ones is used."""
    ids, other = tokens(40), tokens(40, seed=1)
    model = tiny_model()
    cache, wrong = SparseCache(model.config), SparseCache(model.config)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache, use_cache=True)
        model(other[:, :30], past_key_values=wrong, use_cache=True)
        model(other[:, 30:31], past_key_values=wrong, use_cache=True)
        for layer, source in zip(wrong.layers, cache.layers, strict=True):
            layer.keys = torch.cat([source.keys, source.keys[:, :, :2]], 2)
            layer.values = torch.cat([source.values, source.values[:, :, :2]], 2)
        wrong.crop(-2)
        pieces = [model(ids[:, i : i + 1], past_key_values=wrong, use_cache=True).logits for i in range(30, 40)]
    assert_specified(torch.cat(pieces, 1)[0], "llama", ids[0])


def test_inference_mode_and_back():
    model, ids = tiny_model(), tokens(40)
    cache = SparseCache(model.config)
    with torch.inference_mode():
        pieces = [model(ids[:, :20], past_key_values=cache, use_cache=True).logits.clone()]
    with torch.no_grad():
        pieces += [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(20, 40)]
    assert_specified(torch.cat(pieces, 1)[0], "llama", ids[0])


def test_gradients_flow_through_it():
    """As through any cache: a prefix is trained by what follows."""
    ids, grads = tokens(30), []
    for new_cache in (SparseCache, lambda config: DynamicCache(config=config)):
        model = tiny_model()
        cache = new_cache(model.config)
        model(ids[:, :12], past_key_values=cache, use_cache=True)
        model(ids[:, 12:], past_key_values=cache, use_cache=True).logits.sum().backward()
        grads.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_no_key_is_hashed_twice(monkeypatch):
    hashed = count_hashed_keys(monkeypatch)
    model, ids = tiny_model(), tokens(40)
    cached_logits(model, ids, (20, 1, 3, 1), SparseCache(model.config))
    assert sum(hashed) == NUM_LAYERS * 40
    hashed.clear()
    cached_logits(model, ids, (20, 1, 3, 1), DynamicCache(config=model.config))
    assert sum(hashed) > NUM_LAYERS * 40 * 5


def test_nothing_is_hashed_while_all_rows_are_dense(monkeypatch):
    hashed = count_hashed_keys(monkeypatch)
    model = tiny_model(dense_below=30)
    rows = [tokens(length, seed=length)[0] for length in (25, 20)]
    ids, mask, position_ids = padded_batch(rows, "left", 0)
    cache, inputs = SparseCache(model.config), {"attention_mask": mask, "position_ids": position_ids}
    with torch.no_grad():
        model(ids, **inputs, past_key_values=cache, use_cache=True)
        assert hashed == []
        for _ in range(8):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            inputs = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
            model(ids[:, :1], **inputs, past_key_values=cache, use_cache=True)
    assert sum(hashed) == NUM_LAYERS * 33  # of the longer row alone, all at once and then one by one


def test_another_configuration_starts_the_indexes_anew():
    model, ids = tiny_model(), tokens(40)
    cache = SparseCache(model.config)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache, use_cache=True)
        for i, fields in ((30, {"key_budget": 3}), (31, {"num_hash_bits": 4}), (32, {"implementation": "torch"})):
            configure(model, **fields)
            found = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            fresh = tiny_model()
            configure(fresh, **model.config.sparse_attention)
            dense_prefix = DynamicCache(config=model.config)
            for layer_idx, layer in enumerate(cache.layers):
                dense_prefix.update(layer.keys[:, :, :i], layer.values[:, :, :i], layer_idx)
            expected = fresh(ids[:, i : i + 1], past_key_values=dense_prefix, use_cache=True).logits
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_two_models_share_nothing():
    first, second, ids = tiny_model(), tiny_model(key_budget=2), tokens(40)
    caches = [SparseCache(model.config) for model in (first, second)]
    pieces = [[], []]
    with torch.no_grad():
        for i in range(40):
            for model, cache, found in zip((first, second), caches, pieces, strict=True):
                found.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    assert_specified(torch.cat(pieces[0], 1)[0], "llama", ids[0])
    assert_specified(torch.cat(pieces[1], 1)[0], "llama", ids[0], key_budget=2)


def test_a_batch_that_is_chosen_from_decodes_on():
    """Rows of unequal length, then a choice of them with repeats: each index goes with its row."""
    rows = [tokens(length, seed=length)[0] for length in (36, 20, 9)]
    model = tiny_model()
    cache = SparseCache(model.config)
    ids, mask, position_ids = padded_batch([row[:-4] for row in rows], "left", 0)
    chosen = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True)
        cache.reorder_cache(chosen)
        mask, found = mask[chosen], []
        for step in range(4):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            following = torch.stack([rows[i][len(rows[i]) - 4 + step] for i in chosen])[:, None]
            inputs = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
            found.append(model(following, **inputs, past_key_values=cache, use_cache=True).logits)
    for i, logits in zip(chosen, torch.cat(found, 1), strict=True):
        assert_specified(logits, "llama", rows[i])


def test_layers_that_slide_stay_transformers_own():
    cache = SparseCache(tiny_model("gemma2").config)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "SparseLayer"]


def test_memory_is_freed_with_the_cache():
    model = tiny_model()
    cache = SparseCache(model.config)
    cached_logits(model, tokens(20), (10, 1), cache)
    keys = weakref.ref(cache.layers[0].keys)
    gc.disable()
    try:
        del cache
        assert keys() is None
    finally:
        gc.enable()


def test_bytes():
    model = tiny_model(dtype=torch.float32)
    cache = SparseCache(model.config, max_cache_len=50)
    assert cache.nbytes == 0
    cached_logits(model, tokens(20), (10, 1), cache)
    keys_and_values = 2 * NUM_LAYERS * 2 * 50 * 8 * 4
    assert cache.nbytes == keys_and_values + sum(layer.indexes.nbytes for layer in cache.layers)
    assert cache.nbytes > keys_and_values


@pytest.mark.parametrize("length", [0, -1, 2.5, True, "8"])
def test_impossible_lengths(length):
    with pytest.raises(ValueError, match="max_cache_len must be a positive integer or None, got"):
        SparseCache(tiny_model().config, max_cache_len=length)


def forget_crop(monkeypatch):
    monkeypatch.setattr("hf_sparse_attn.indexes.KeyIndexes.crop", lambda self, num_slots: None)


def forget_select(monkeypatch):
    monkeypatch.setattr("hf_sparse_attn.indexes.KeyIndexes.select", lambda self, rows: None)


def check_crop():
    """Dense rows follow, which tell no index of their keys."""
    fields = {"dense_below": 12}
    ids, model = tokens(40), tiny_model(**fields)
    cache = SparseCache(model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache, use_cache=True)
        model(tokens(8, seed=1), past_key_values=cache, use_cache=True)
        cache.crop(-8)
        pieces = [model(ids[:, p : p + 1], past_key_values=cache, use_cache=True).logits for p in range(5, 40)]
    assert_specified(torch.cat(pieces, 1)[0], "llama", ids[0], **fields)


def check_reorder():
    ids, model = tokens(40, 2), tiny_model()
    cache = SparseCache(model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache, use_cache=True)
        cache.reorder_cache(torch.tensor([1, 0]))
        steps = [ids.flip(0)[:, i : i + 1] for i in range(20, 40)]
        pieces = [model(step, past_key_values=cache, use_cache=True).logits for step in steps]
    for logits, row in zip(torch.cat(pieces, 1), ids.flip(0), strict=True):
        assert_specified(logits, "llama", row)


@pytest.mark.parametrize(
    ("mutate", "check"),
    [(forget_crop, check_crop), (forget_select, check_reorder)],
    ids=lambda function: function.__name__,
)
def test_broken_variants_are_caught(mutate, check, monkeypatch):
    check()
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_key_tensors_carry_their_indexes():
    layer, _ = both()
    keys, _ = layer.update(*states(4))
    assert getattr(keys, INDEXES) is layer.indexes


def test_caches_are_copied(monkeypatch):
    """As a cached prefix is used again and again: copied before each use."""
    model, ids = tiny_model(), tokens(40)
    prefix = SparseCache(model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=prefix, use_cache=True)
    copies = [copy.deepcopy(prefix) for _ in range(2)]
    hashed = count_hashed_keys(monkeypatch)
    for cache in copies:
        assert_continues(model, cache, ids)
    assert sum(hashed) == 2 * NUM_LAYERS * 20  # nothing of the prefix
    assert prefix.get_seq_length() == 20


def assert_continues(model, cache, ids):
    with torch.no_grad():
        pieces = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(20, 40)]
    assert_specified(torch.cat(pieces, 1)[0], "llama", ids[0])


@pytest.mark.real_weights
@pytest.mark.parametrize("num_tokens", [128, pytest.param(512, marks=pytest.mark.nightly)])
def test_a_long_generation_is_the_one_shot_computation(num_tokens):
    """Greedy, of a left-padded batch: each token is the best one of one forward over all of the document."""
    path = demo_model_directory()
    tokenizer = AutoTokenizer.from_pretrained(path)
    fields = {"dense_below": 512, "window_size": 64, "key_budget": 128}
    model = load_sparse_model(path, fields).eval()
    documents = load_documents("demo", "validation")["text"]
    prompts = [
        torch.tensor(tokenizer(text, verbose=False)["input_ids"][:length])
        for text, length in zip(documents, (1500, 1100), strict=False)
    ]
    ids, mask, _ = padded_batch(prompts, "left", 0)
    with record_density(model) as density:
        sequences = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=SparseCache(model.config),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
        )
    assert density.density < 0.75
    for prompt, sequence in zip(prompts, sequences, strict=True):
        generated = sequence[-num_tokens:]
        with torch.no_grad():
            logits = model(torch.cat([prompt, generated])[None, :-1], use_cache=False).logits[0, -num_tokens:]
        logits[:, model.generation_config.eos_token_id] = -torch.inf  # min_new_tokens forbids the end
        assert torch.equal(logits.argmax(-1), generated)


def test_compiled_steps_and_back():
    """A graph of a step leaves the index alone, which catches up afterwards."""
    model, ids = tiny_model(), tokens(40)
    cache = SparseCache(model.config)
    torch.compiler.reset()
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        pieces = [model(ids[:, :30], past_key_values=cache, use_cache=True).logits]
        pieces += [step(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(30, 33)]
        pieces += [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(33, 40)]
    assert_specified(torch.cat(pieces, 1)[0], "llama", ids[0])


def test_patterns_by_layer_and_head():
    """In one shot, in chunks and step by step; a layer of one pattern keeps an index, the other one none."""
    model, ids = (
        tiny_model(by_layer=[{}, {"by_kv_head": [{"stride": 7}, {"block_size": 9, "window_size": 2}]}]),
        tokens(40),
    )
    cache = SparseCache(model.config)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(cached_logits(model, ids, (17, 1), cache), expected, **TOLERANCE)
    assert [layer.indexes.nbytes > 0 for layer in cache.layers] == [True, False]
