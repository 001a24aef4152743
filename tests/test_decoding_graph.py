"""A decoding step that is recorded once and replayed, by a tape in Triton's interpreter."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.batches import padded_batch, tokens
from helpers.families import tiny_model
from helpers.specification import TOLERANCE
from transformers import DynamicCache

from hf_sparse_attn import DecodingGraph, Recent, SparseCache, configure, decoding_graph
from hf_sparse_attn.benchmarking import decoding
from hf_sparse_attn.cache import SparseLayer
from hf_sparse_attn.cache.document_indexes import KeyIndexes

pytest.importorskip("triton")
from helpers import tape

from hf_sparse_attn.ops import self_check
from hf_sparse_attn.ops.triton import find_cached
from hf_sparse_attn.ops.triton import index as triton_index
from hf_sparse_attn.ops.triton import launch as triton_launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_decoding_graph_gpu.py has more")
PROMPT, LENGTH = 24, 35  # two pages of 4 tokens begin in between, and at every step a key is older than the window of 5
EVERYTHING = {
    "num_random_keys": 3,
    "stride": 7,
    "slash_distances": (9, 13),
    "min_weight": 0.1,
    "key_budget": ((6, 4), (4, 6)),
}


@pytest.fixture(autouse=True)
def tapes(monkeypatch):
    """Recording works everywhere, and blocks are small."""
    monkeypatch.setattr(decoding_graph, "check_device", lambda device: None)
    monkeypatch.setattr(decoding_graph, "record", tape.record)
    monkeypatch.setattr(self_check, "_applies_to", lambda device: False)
    monkeypatch.setattr(triton_launch, "block_keys", lambda keys, dim: 16)
    monkeypatch.setattr(find_cached, "_BLOCK_KEYS", 32)


def expected_logits(ids, **fields):
    with torch.no_grad():
        return tiny_model(**fields)(ids).logits


def prepared(ids, max_cache_len=LENGTH, prompt=PROMPT, **fields):
    """A model whose steps are Triton's, a cache that holds the prompt, and the step."""
    model = tiny_model(**fields)
    cache = SparseCache(model.config, max_cache_len=max_cache_len)
    with torch.no_grad():
        configure(model, implementation="torch")  # one whole prompt takes the interpreter long
        model(ids[:, :prompt], past_key_values=cache)
        configure(model, implementation="triton")
        return model, cache, DecodingGraph(model, cache)


def kinds_of_steps(monkeypatch):
    """How often a step was recorded, and how often replayed."""
    counts = Counter()

    def record(work, device):
        counts["recorded"] += 1
        replay, output = tape.record(work, device)

        def count_and_replay():
            counts["replayed"] += 1
            replay()

        return count_and_replay, output

    monkeypatch.setattr(decoding_graph, "record", record)
    return counts


def decode(step, ids, start=PROMPT):
    return torch.cat([step(ids[:, i : i + 1]) for i in range(start, ids.shape[1])], 1)


def check_replays(length=LENGTH, **fields):
    ids = tokens(length)
    _, cache, step = prepared(ids, **fields)
    torch.testing.assert_close(decode(step, ids), expected_logits(ids, **fields)[:, PROMPT:], **TOLERANCE)
    assert cache.get_seq_length() == length


@pytest.mark.parametrize(
    "fields", [{}, EVERYTHING, {"dense_layers": (1,)}, {"window_size": 30}], ids=lambda fields: " ".join(fields)
)
def test_replays_answer_as_forwards_do(fields, monkeypatch):
    counts = kinds_of_steps(monkeypatch)
    check_replays(**fields)
    assert counts == {"recorded": 1, "replayed": LENGTH - PROMPT - 2}


def check_launches(length=LENGTH):
    """Steps over the beginnings of pages, recorded one by one, are the same in everything but the tensors' values."""
    ids, tapes = tokens(length), []
    _, _, step = prepared(ids, **EVERYTHING)

    def record(work, device):
        with tape.recording() as one:
            output = work()
        tapes.append(one)
        return lambda: None, output

    decoding_graph.record, original = record, decoding_graph.record
    try:
        for i in range(PROMPT, length):
            step._replay = None
            step(ids[:, i : i + 1])
    finally:
        decoding_graph.record = original
    first, *others = (one.described() for one in tapes)
    assert len(others) == length - PROMPT - 3
    names = Counter(name.partition("_kernel")[0] for name, _, _ in first if "_kernel" in name)
    kernels = ["append_and_score", "choose_ranks", "list_found", "score_listed", "sum_listed"]
    assert names == dict.fromkeys(kernels, 2)  # layers
    for other in others:
        assert other == first


def test_steps_launch_the_same():
    check_launches()


def slot_of_the_host(monkeypatch):
    def put(self, slot, keys, values):
        return original(self, torch.full_like(slot, self.get_seq_length()), keys, values)

    original = SparseLayer._put
    monkeypatch.setattr(SparseLayer, "_put", put)


def keys_counted_by_the_host(monkeypatch):
    def index_attend(self, call, *tensors):
        if call.newest is not None:
            call = replace(call, newest=torch.full_like(call.newest, self.length))
        return original(self, call, *tensors)

    original = triton_index.Index.attend
    monkeypatch.setattr(triton_index.Index, "attend", index_attend)


def sums_that_stand_still(monkeypatch):
    monkeypatch.setattr(triton_index, "ONE_TOKEN", triton_index.ONE_TOKEN._replace(since_known=0))


def older_keys_that_stand_still(monkeypatch):
    monkeypatch.setattr(triton_index, "ONE_TOKEN", triton_index.ONE_TOKEN._replace(since_older=0))


def position_of_the_host(monkeypatch):
    def forward(self, position_ids, *others):
        return original(self, torch.full_like(position_ids, self.cache.get_seq_length()), *others)

    original = DecodingGraph._forward
    monkeypatch.setattr(DecodingGraph, "_forward", forward)


@pytest.mark.parametrize("mutate", [slot_of_the_host, keys_counted_by_the_host, position_of_the_host])
def test_numbers_of_the_host_are_noticed(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check_launches(LENGTH - 7)


@pytest.mark.parametrize("mutate", [position_of_the_host, sums_that_stand_still, older_keys_that_stand_still])
def test_replays_that_stand_still_are_noticed(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        check_replays()


def test_a_left_padded_batch():
    rows = [tokens(length, seed=length)[0] for length in (LENGTH - 4, LENGTH - 11)]
    ids, mask, position_ids = padded_batch(rows, "left", 0)
    num_slots, prompt = ids.shape[1], ids.shape[1] - 6
    model = tiny_model()
    cache = SparseCache(model.config, max_cache_len=num_slots)
    expected = [expected_logits(row[None])[0, -6:] for row in rows]
    configure(model, implementation="torch")
    with torch.no_grad():
        inputs = {"attention_mask": mask[:, :prompt], "position_ids": position_ids[:, :prompt]}
        model(ids[:, :prompt], **inputs, past_key_values=cache)
    configure(model, implementation="triton")
    step = DecodingGraph(model, cache, mask[:, :prompt])
    torch.testing.assert_close(decode(step, ids, prompt), torch.stack(expected), **TOLERANCE)
    assert step._replay is not None


def test_what_is_not_alike_is_a_forward(monkeypatch):
    """Tokens are taken back, others come several at a time, the cache grows, the configuration changes."""
    counts, ids = kinds_of_steps(monkeypatch), tokens(44)
    model, cache, step = prepared(ids, max_cache_len=38)
    expected = expected_logits(ids)
    decode(step, ids[:, :29])
    assert counts == {"recorded": 1, "replayed": 3}
    cache.crop(-3)
    with torch.no_grad():
        found = [model(ids[:, 26:29], past_key_values=cache).logits]
    found.append(decode(step, ids[:, :32], 29))
    assert counts == {"recorded": 1, "replayed": 6}
    found.append(decode(step, ids[:, :42], 32))  # 38 fit
    torch.testing.assert_close(torch.cat(found, 1), expected[:, 26:42], **TOLERANCE)
    assert counts["recorded"] == 2
    configure(model, key_budget=3)
    decode(step, ids, 42)
    assert counts["recorded"] == 2


def test_rows_that_read_everything_are_forwards(monkeypatch):
    counts, ids = kinds_of_steps(monkeypatch), tokens(LENGTH)
    _, _, step = prepared(ids, dense_below=28)
    found = decode(step, ids)
    torch.testing.assert_close(found, expected_logits(ids, dense_below=28)[:, PROMPT:], **TOLERANCE)
    assert counts == {"recorded": 1, "replayed": LENGTH - 28 - 2}


def test_an_interrupted_step_is_not_half_done(monkeypatch):
    ids = tokens(LENGTH)
    _, _, step = prepared(ids)
    found = [step(ids[:, 24:25])]
    original, calls = KeyIndexes.of, []

    def fail_at_the_second_layer(self, *args):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(KeyIndexes, "of", fail_at_the_second_layer)
    with pytest.raises(KeyboardInterrupt):
        step(ids[:, 25:26])
    found.append(decode(step, ids[:, :30], 25))
    torch.testing.assert_close(torch.cat(found, 1), expected_logits(ids)[:, 24:30], **TOLERANCE)


def test_a_step_is_of_one_pattern():
    """Whoever changes it during a step is told."""
    ids = tokens(LENGTH)
    model, cache, step = prepared(ids)
    decode(step, ids[:, :26])
    configure(model, key_budget=3)
    with step._computing(), pytest.raises(RuntimeError, match="changed while a step"), torch.no_grad():
        model(ids[:, :1], past_key_values=cache)


class TestErrors:
    def check(self, message, make):
        with pytest.raises(ValueError, match=message):
            make()

    def test_of_another_device(self, monkeypatch):
        monkeypatch.undo()
        self.check("must be on a GPU", lambda: DecodingGraph(tiny_model(), None))

    def test_of_another_model(self):
        self.check("attn_implementation", lambda: DecodingGraph(tiny_model(implementation="sdpa"), None))

    def test_of_another_cache(self):
        model = tiny_model()
        self.check("must be a SparseCache, got DynamicCache", lambda: DecodingGraph(model, DynamicCache()))
        self.check("is empty", lambda: DecodingGraph(model, SparseCache(model.config)))
        small = SparseCache(model.config, policy=Recent(5), budget=8)
        self.check("without a policy", lambda: DecodingGraph(model, small))

    def test_of_another_mask(self):
        model, cache, _ = prepared(tokens(PROMPT))
        ones = torch.ones(1, PROMPT)
        self.check(r"\(1, 24\), got shape \(1, 25\)", lambda: DecodingGraph(model, cache, torch.ones(1, PROMPT + 1)))
        self.check("on the left alone", lambda: DecodingGraph(model, cache, ones.index_fill(1, torch.tensor([5]), 0)))

    def test_of_other_tokens(self):
        _, _, step = prepared(tokens(PROMPT))
        self.check(r"\(1, 1\), got shape \(1, 2\)", lambda: step(tokens(2)))

    def test_of_another_implementation(self):
        model, _, step = prepared(tokens(PROMPT))
        configure(model, implementation="torch")
        step(tokens(1))
        self.check("layer 0 has no steps", lambda: step(tokens(1)))


def test_its_time_is_measured():
    ids = tokens(PROMPT)
    model, cache, _ = prepared(ids)
    assert decoding.graph_milliseconds(model, cache, ids[:, :1], repeats=1) > 0
    configure(model, implementation="torch")
    assert decoding.graph_milliseconds(model, cache, ids[:, :1], repeats=1) is None
