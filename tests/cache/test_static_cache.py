"""`SparseStaticCache`: a static cache whose layers keep the indexes of their keys, in compiled graphs too."""

import gc

import pytest
import torch
from helpers.batches import tokens
from helpers.families import tiny_model
from helpers.specification import assert_specified, specified
from helpers.spies import count_hashed_keys
from transformers import GenerationConfig, StaticCache
from transformers.generation import CompileConfig

from hf_sparse_attn import SparseStaticCache, record_density
from hf_sparse_attn.cache import static
from hf_sparse_attn.cache.static import SparseStaticLayer, indexes_at
from hf_sparse_attn.errors import ArgumentError

NUM_LAYERS, LENGTH, PROMPT = 2, 40, 28

pytestmark = pytest.mark.usefixtures("fresh_graphs")


def compiled(model, backend="eager"):
    """Dynamo's graph, in which tensors carry no attributes either."""
    return torch.compile(model.forward, fullgraph=True, backend=backend)


def new_cache(model):
    return SparseStaticCache(model.config, max_cache_len=LENGTH)


@torch.no_grad()
def prefill(forward, cache, ids):
    return forward(ids, past_key_values=cache, use_cache=True).logits


def steps(forward, cache, ids, start=PROMPT):
    """Logits of tokens given one by one."""
    with torch.no_grad():
        pieces = [
            forward(ids[:, p : p + 1], past_key_values=cache, use_cache=True).logits for p in range(start, ids.shape[1])
        ]
    return torch.cat(pieces, 1)


def assert_each_specified(found, ids):
    for part, row in zip(found, ids, strict=True):
        assert_specified(part, "llama", row)


def assert_nearly_specified(found, ids):
    """What Inductor compiles computes norms and rotary embeddings in float32, as the model says, in other steps."""
    for part, row in zip(found, ids, strict=True):
        torch.testing.assert_close(part.double(), specified("llama", row)[-len(part) :], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
def test_a_step_hashes_its_own_key_alone(backend, monkeypatch):
    model, ids = tiny_model(), tokens(LENGTH)
    forward = model.forward if backend is None else compiled(model, backend)
    cache = new_cache(model)
    prefill(model, cache, ids[:, :PROMPT])
    hashed = count_hashed_keys(monkeypatch)
    found = steps(forward, cache, ids)
    if backend is not None:  # a graph has patterns of its own, so that it groups what the prefill has left once
        assert hashed[:NUM_LAYERS] == [PROMPT + 1] * NUM_LAYERS
        hashed[:NUM_LAYERS] = [1] * NUM_LAYERS
    assert hashed == [1] * NUM_LAYERS * (LENGTH - PROMPT)
    (assert_nearly_specified if backend == "inductor" else assert_each_specified)(found, ids)
    stock = StaticCache(config=model.config, max_cache_len=LENGTH)
    prefill(model, stock, ids[:, :PROMPT])
    hashed.clear()
    steps(model.forward, stock, ids)
    assert hashed == [n for n in range(PROMPT + 1, LENGTH + 1) for _ in range(NUM_LAYERS)]


def test_a_compiled_prefill():
    """Whose slots were allocated before, as Transformers asks for."""
    model, ids = tiny_model(), tokens(LENGTH, 2)
    cache = new_cache(model)
    cache.early_initialization(2, 2, model.config.head_dim, torch.float64, torch.device("cpu"))
    forward = compiled(model)
    first = prefill(forward, cache, ids[:, :PROMPT])
    assert_each_specified(torch.cat([first, steps(forward, cache, ids)], 1), ids)


def test_a_graph_that_works_on_copies(monkeypatch):
    """Finds no index and gives the same."""
    model, ids = tiny_model(), tokens(LENGTH, 2)
    cache = new_cache(model)
    prefill(model, cache, ids[:, :PROMPT])
    hashed = count_hashed_keys(monkeypatch)
    found = steps(compiled(model, "aot_eager"), cache, ids)
    assert min(hashed) > PROMPT
    assert_each_specified(found, ids)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kept", [0, 9, PROMPT - 1])
def test_slots_that_are_written_again(kept, is_compiled):
    """By `reset`, or by whoever sets the counter back, as tools that reuse a prefix do."""
    model, ids, other = tiny_model(), tokens(PROMPT + 3), tokens(LENGTH, seed=1)
    other[:, :kept] = ids[:, :kept]
    forward = compiled(model) if is_compiled else model.forward
    cache = new_cache(model)
    prefill(model, cache, ids[:, :PROMPT])
    steps(forward, cache, ids)
    if kept:
        for layer in cache.layers:
            layer.cumulative_length.fill_(kept)
    else:
        cache.reset()
    first = prefill(model, cache, other[:, kept : PROMPT + 5])
    assert_each_specified(torch.cat([first, steps(forward, cache, other, PROMPT + 5)], 1), other)


def test_slots_that_are_written_again_with_gradients():
    """In a call that uses no index."""
    model, ids, other = tiny_model(), tokens(PROMPT), tokens(LENGTH, seed=1)
    other[:, :9] = ids[:, :9]
    cache = new_cache(model)
    prefill(model, cache, ids)
    for layer in cache.layers:
        layer.cumulative_length.fill_(9)
    first = model(other[:, 9:PROMPT], past_key_values=cache, use_cache=True).logits.detach()
    assert first.isfinite().all()
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    assert_each_specified(torch.cat([first, steps(model.forward, cache, other)], 1), other)


def test_reordered_rows():
    model, ids = tiny_model(), tokens(LENGTH, 3)
    cache = new_cache(model)
    prefill(model, cache, ids[:, :PROMPT])
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert_each_specified(steps(model.forward, cache, ids[[2, 0, 0]]), ids[[2, 0, 0]])


def test_generate_compiles_the_step(monkeypatch):
    model, ids = tiny_model(), tokens(PROMPT)
    compile_config = CompileConfig(mode=None, backend="eager")
    compile_config._compile_all_devices = True
    options = GenerationConfig(max_new_tokens=6, do_sample=False, compile_config=compile_config, output_logits=True)
    options.return_dict_in_generate = True
    hashed = count_hashed_keys(monkeypatch)
    found = model.generate(ids, past_key_values=new_cache(model), generation_config=options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert hashed == [n for n in (PROMPT, PROMPT + 1, 1, 1, 1, 1) for _ in range(NUM_LAYERS)]
    assert_nearly_specified(torch.stack(found.logits, 1), found.sequences[:, :-1])


def test_recorders_see_the_few_keys():
    """A compiled step tells what an eager one does."""
    model, ids = tiny_model(), tokens(LENGTH)
    counts = []
    for forward in (model.forward, compiled(model)):
        cache = new_cache(model)
        prefill(model, cache, ids[:, :PROMPT])
        with record_density(model) as density:
            steps(forward, cache, ids)
        counts.append((density.attended, density.scored, density.admissible))
    assert counts[0] == counts[1]
    assert counts[0][0] < counts[0][2]


def test_no_other_keys_are_taken_for_a_layers():
    """Not a part of them, nor what comes to stand where a layer's keys were."""
    layer = SparseStaticLayer(8)
    layer.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    keys = layer.keys
    assert indexes_at(keys) is layer.indexes
    assert indexes_at(keys.view_as(keys)) is layer.indexes
    for other in (keys[:, :, :3], keys[:, :1], keys.view(1, 2, 4, 8), keys.view(torch.int32), keys.clone()):
        assert indexes_at(other) is None
    layer.keys = keys.clone()
    assert indexes_at(keys) is None
    del layer
    gc.collect()
    assert keys.data_ptr() not in static._LAYERS


def test_memory_is_counted():
    model, ids = tiny_model(), tokens(LENGTH)
    cache = new_cache(model)
    prefill(model, cache, ids)
    layer = cache.layers[0]
    assert layer.nbytes == layer.keys.nbytes + layer.values.nbytes + layer.indexes.nbytes
    assert layer.indexes.nbytes > 0


@pytest.mark.parametrize("length", [0, -1, True, 4.0, "8", None])
def test_bad_lengths(length):
    with pytest.raises(ArgumentError, match="max_cache_len: must be an integer of at least 1"):
        SparseStaticCache(tiny_model().config, max_cache_len=length)


def test_too_many_tokens():
    model, ids = tiny_model(), tokens(LENGTH + 1)
    with pytest.raises(ValueError, match="max_cache_len=40 leaves no room for 41 tokens after 0"):
        prefill(model, new_cache(model), ids)
    cache = new_cache(model)
    prefill(model, cache, ids[:, :LENGTH])
    with pytest.raises(ValueError, match="max_cache_len=40 leaves no room for 1 tokens after 40"):
        prefill(model, cache, ids[:, LENGTH:])
