"""The checks can fail: each variant of the implementation below is broken on purpose, and a check must notice."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from helpers import checks
from matrix import batches, masks

from hf_sparse_attn import integration, ops, routing
from hf_sparse_attn.hashing import BucketHash
from hf_sparse_attn.masks import documents as masking
from hf_sparse_attn.masks import read
from hf_sparse_attn.masks.documents import documents
from hf_sparse_attn.ops import dispatch
from hf_sparse_attn.ops import torch as torch_ops
from hf_sparse_attn.ops.common import gather
from hf_sparse_attn.ops.common.band import Band
from hf_sparse_attn.ops.numba import chunks as numba_ops
from hf_sparse_attn.ops.numba import rules as numba_rules
from hf_sparse_attn.patterns import layer_pattern
from hf_sparse_attn.routing import BucketIndex, RowChunk

document_attention = ops.document_attention
CHECKS = checks.CHECKS | {
    "softcap": functools.partial(checks.check_matches_reference, "gemma2"),
    "sinks": functools.partial(checks.check_matches_reference, "gpt_oss"),
    "gradients-sinks": functools.partial(checks.check_gradients, "gpt_oss"),
    "packed-cu_seq_lens": functools.partial(batches.packed_by_lengths, "llama"),
    "own-mask-packed": functools.partial(masks.packed_mask, "llama"),
    "own-mask-padded": functools.partial(masks.padded_mask, "mistral-sliding"),
}


def ignore_padding(monkeypatch):
    def mutant(attention_mask, *args):
        return documents(None, *args)

    monkeypatch.setattr(read, "documents", mutant)


def forget_packing(monkeypatch):
    split = masking._split
    monkeypatch.setattr(masking, "_split", lambda *args: split(*args[:4], torch.zeros_like(args[4])))


def packing_from_position_ids(monkeypatch):
    """Also with a cache, where Transformers does not look at them."""
    monkeypatch.setattr(integration, "asks_what_is_packed", lambda config: False)


def ignore_cu_seq_lens(monkeypatch):
    monkeypatch.setattr(read, "document_starts", lambda *args: None)


def own_masks_are_causal(monkeypatch):
    """Whatever a caller's own 4D mask says."""
    monkeypatch.setattr(read, "read_custom_mask", lambda mask, position_ids, window: (None, window))


def own_masks_keep_the_models_window(monkeypatch):
    read_mask = read.read_custom_mask
    monkeypatch.setattr(read, "read_custom_mask", lambda mask, ids, window: (read_mask(mask, ids, window)[0], window))


def without(name):
    """The operation is not given something."""

    def mutate(monkeypatch):
        def mutant(*args, **kwargs):
            return document_attention(*args, **{**kwargs, name: None})

        monkeypatch.setattr(ops, "document_attention", mutant)

    return mutate


def sinks_of_the_other_heads(monkeypatch):
    def mutant(*args, sinks=None, **kwargs):
        return document_attention(*args, sinks=None if sinks is None else sinks.flip(0), **kwargs)

    monkeypatch.setattr(ops, "document_attention", mutant)


def no_gradient_of_sinks(monkeypatch):
    """The reference is left alone."""

    def mutant(*args, pattern, sinks=None, **kwargs):
        if sinks is not None and pattern.config.implementation != "reference":
            sinks = sinks.detach() + 0 * sinks
        return document_attention(*args, pattern=pattern, sinks=sinks, **kwargs)

    monkeypatch.setattr(ops, "document_attention", mutant)


def positions_from_the_slot(monkeypatch):
    """Padding before a row, or documents packed before it, count."""

    def mutant(attention_mask, batch_size, q_length, kv_length, starts):
        moved = []
        for document in documents(attention_mask, batch_size, q_length, kv_length, starts):
            slot = int(torch.arange(kv_length)[document.keys][0])
            query_offset, key_offset = document.query_offset + slot, document.key_offset + slot
            moved.append(dataclasses.replace(document, query_offset=query_offset, key_offset=key_offset))
        return moved

    monkeypatch.setattr(read, "documents", mutant)


def only_the_first_row_of_the_batch(monkeypatch):
    def mutant(*args):
        return documents(*args)[:1]

    monkeypatch.setattr(read, "documents", mutant)


def shifted(query_by=0, key_by=0):
    """Offsets of the calls with cached keys; the reference is left alone."""

    def mutate(monkeypatch):
        def mutant(query, key, value, *, pattern, query_offset, key_offset, **kwargs):
            if query_offset > key_offset and pattern.config.implementation != "reference":
                query_offset, key_offset = query_offset + query_by, key_offset + key_by
            offsets = {"query_offset": query_offset, "key_offset": key_offset}
            return document_attention(query, key, value, pattern=pattern, **offsets, **kwargs)

        monkeypatch.setattr(ops, "document_attention", mutant)

    return mutate


def zero_output(monkeypatch):
    def mutant(*args, **kwargs):
        return 0 * document_attention(*args, **kwargs)

    monkeypatch.setattr(ops, "document_attention", mutant)


def other_scaling(monkeypatch):
    def mutant(*args, scaling, **kwargs):
        return document_attention(*args, scaling=2 * scaling, **kwargs)

    monkeypatch.setattr(ops, "document_attention", mutant)


def patterns(**changes):
    """Every layer gets a pattern with some fields replaced; the reference is left alone."""

    def mutate(monkeypatch):
        def mutant(config, *args, **kwargs):
            pattern = layer_pattern(config, *args, **kwargs)
            if config.implementation == "reference":
                return pattern
            return dataclasses.replace(pattern, **{name: change(pattern) for name, change in changes.items()})

        monkeypatch.setattr(integration, "layer_pattern", mutant)

    return mutate


def one_future_key_in_the_window(monkeypatch):
    band_bias = Band.bias

    def mutant(self, keys, num_keys):
        bias = band_bias(self, keys, num_keys).clone()
        row = torch.arange(bias.shape[1] - 1)
        bias[:, row, row + self.before + 1] = 0
        return bias

    monkeypatch.setattr(Band, "bias", mutant)


def window_one_too_narrow(monkeypatch):
    band_bias = Band.bias

    def mutant(self, keys, num_keys):
        bias = band_bias(self, keys, num_keys).clone()
        row = torch.arange(bias.shape[1])
        bias[:, row, row] = -torch.inf
        return bias

    monkeypatch.setattr(Band, "bias", mutant)


def one_future_key_among_the_routed(monkeypatch):
    select_slots = RowChunk.select_slots

    def mutant(self, query, budget):
        slots, count = select_slots(self, query, budget)
        later = (torch.arange(self.start, self.stop) + 1 - self.index.key_offset).clamp(max=len(self.index.key) - 1)
        slots[:, 0] = torch.where(count > 0, self.index.order.argsort()[later].int(), slots[:, 0])
        return slots, count

    monkeypatch.setattr(RowChunk, "select_slots", mutant)


def routed_candidates_one_key_too_late(monkeypatch):
    """The oldest key of the window is routed as well."""
    row_counts = BucketIndex._row_counts

    def mutant(self, start, stop, lag):
        return row_counts(self, start, stop, lag - (lag == self.window_size))

    monkeypatch.setattr(BucketIndex, "_row_counts", mutant)


def bucket_means_of_the_whole_document(monkeypatch):
    rows = BucketIndex.rows

    def mutant(self, start, stop):
        chunk = rows(self, start, stop)
        inside = torch.nn.functional.one_hot(self.bucket, self.num_buckets + 1)[:, :-1].to(self.key)
        means = inside.T @ self.key / inside.sum(0).clamp(min=1).unsqueeze(-1)
        return dataclasses.replace(chunk, means=means.expand_as(chunk.means))

    monkeypatch.setattr(BucketIndex, "rows", mutant)


def bucket_means_are_sums(monkeypatch):
    rows = BucketIndex.rows

    def mutant(self, start, stop):
        chunk = rows(self, start, stop)
        pages = range(start // self.page_size, -(-stop // self.page_size))
        counts = self._page_state(pages, self._entered, routing.MEANS_LAG)[1]
        return dataclasses.replace(chunk, means=chunk.means * counts.unsqueeze(-1))

    monkeypatch.setattr(BucketIndex, "rows", mutant)


def worst_buckets_first(monkeypatch):
    select_slots = RowChunk.select_slots
    monkeypatch.setattr(RowChunk, "select_slots", lambda self, query, budget: select_slots(self, -query, budget))


def keys_beside_the_last_bucket(monkeypatch):
    expand = routing._expand

    def mutant(start, length, before, width):
        full = (before + length < width) | (length == 0)
        return expand(torch.where(full, start, start + 1), length, before, width)

    monkeypatch.setattr(routing, "_expand", mutant)


def drop_the_globals(monkeypatch):
    monkeypatch.setattr(torch_ops, "static_positions", lambda *_, **__: torch.arange(0))


def statistics_of_the_whole_sequence(monkeypatch):
    """Keys are centred on their mean before they are hashed."""
    assign = BucketHash.assign
    monkeypatch.setattr(BucketHash, "assign", lambda self, key: assign(self, key - key.mean(1, keepdim=True)))


def planes_drawn_at_call_time(monkeypatch):
    def mutant(self, key):
        codes = (key @ torch.randn_like(self.weight[..., 0])) > 0
        return (codes * 2 ** torch.arange(codes.shape[-1])).sum(-1)

    monkeypatch.setattr(BucketHash, "assign", mutant)


def no_gradient_through_routed_keys(monkeypatch):
    scatter_sum = gather._scatter_sum
    monkeypatch.setattr(gather, "_scatter_sum", lambda *args: 0 * scatter_sum(*args))


def no_gradient_of_queries_through_routed_keys(monkeypatch):
    gather_dot = torch_ops.GatherDot.apply

    class Mutant:
        @staticmethod
        def apply(rows, *others):
            return gather_dot(rows.detach(), *others)

    monkeypatch.setattr(torch_ops, "GatherDot", Mutant)


def count_a_key_twice(monkeypatch):
    def mutant(self, pattern, head, position, num_attended, num_scored, read):
        self.attended += num_attended + 1
        self.admissible += int((position + 1).sum())

    monkeypatch.setattr(integration.DensityRecorder, "add", mutant)


def compiled(name, change):
    """A function of the compiled implementation gets other arguments, which it may change."""

    def mutate(monkeypatch):
        function = getattr(numba_ops, name)
        monkeypatch.setattr(numba_ops, name, lambda *args: function(*change(*args)))

    return mutate


def rules(**changes):
    """The compiled implementation's rows follow other rules."""

    def mutate(monkeypatch):
        real = numba_ops.make_rules

        def mutant(*args):
            rules = real(*args)
            return rules._replace(**{name: change(rules) for name, change in changes.items()})

        monkeypatch.setattr(numba_ops, "make_rules", mutant)

    return mutate


def no_gradient_through_found_keys(monkeypatch):
    differentiate = numba_ops.differentiate_rows

    def mutant(upstream, query, head, softcap, read, *others):
        weights, column = read.weights.copy(), np.arange(read.weights.shape[2])
        found = (column >= read.sizes[:, 1, None]) & (column < read.sizes[:, 2, None])
        weights *= ~found[:, None]
        differentiate(upstream, query, head, softcap, read._replace(weights=weights), *others)

    monkeypatch.setattr(numba_ops, "differentiate_rows", mutant)


def found_keys_are_not_recorded(monkeypatch):
    record = numba_ops.record

    def mutant(call, kv_head, position, read, order):
        read.sizes[:, 2] = read.sizes[:, 1]
        record(call, kv_head, position, read, order)

    monkeypatch.setattr(numba_ops, "record", mutant)


# Of the compiled implementation; the others are of the one in torch operations or of what both share.
COMPILED_MUTANTS = {
    "compiled: rows one position too late": compiled("attend_rows", lambda position, *args: (position + 1, *args)),
    "compiled: bucket means of later keys": lambda monkeypatch: monkeypatch.setattr(numba_rules, "MEANS_LAG", -20),
    "compiled: drop the globals": lambda monkeypatch: monkeypatch.setattr(
        numba_ops, "static_positions", lambda *_, **__: torch.arange(0)
    ),
    "compiled: worst buckets first": compiled(
        "attend_rows", lambda position, query, summed, *args: (position, query, -summed, *args)
    ),
    "compiled: one head chooses the buckets": compiled(
        "attend_rows", lambda position, query, summed, *args: (position, query, query[:, 0].copy(), *args)
    ),
    "compiled: one key too few": rules(budget=lambda rules: max(rules.budget - 1, 0)),
    "compiled: light keys are read": rules(min_weights=lambda rules: 0 * rules.min_weights),
    "compiled: no gradient through found keys": no_gradient_through_found_keys,
    "compiled: found keys are not recorded": found_keys_are_not_recorded,
}

MUTANTS = {
    "ignore padding": ignore_padding,
    "forget the packing": forget_packing,
    "packing from position_ids": packing_from_position_ids,
    "ignore cu_seq_lens": ignore_cu_seq_lens,
    "a caller's own masks are causal": own_masks_are_causal,
    "a caller's own masks keep the model's window": own_masks_keep_the_models_window,
    "ignore softcap": without("softcap"),
    "ignore sinks": without("sinks"),
    "sinks of the other heads": sinks_of_the_other_heads,
    "no gradient of sinks": no_gradient_of_sinks,
    "count positions from the cache slot": positions_from_the_slot,
    "compute only the first document": only_the_first_row_of_the_batch,
    "query offset one too small": shifted(query_by=-1),
    "positions one too large": shifted(query_by=1, key_by=1),
    "zero the output": zero_output,
    "another scaling": other_scaling,
    "forget the routed keys": patterns(budgets=lambda pattern: [0] * len(pattern.budgets)),
    "one routed key too few": patterns(budgets=lambda pattern: [budget - 1 for budget in pattern.budgets]),
    "budget of the first KV head alone": patterns(budgets=lambda pattern: [pattern.budgets[0], 0]),
    "light keys are read": patterns(min_weights=lambda pattern: [0.0] * 4),
    "smallest weight of the next head": patterns(min_weights=lambda pattern: [*pattern.min_weights[1:], 0.0]),
    "forget the model's own window": patterns(sliding_window=lambda pattern: None),
    "hash of another layer": patterns(
        bucket_hash=lambda pattern: dataclasses.replace(pattern.bucket_hash, weight=pattern.bucket_hash.weight.flip(1))
    ),
    "one future key in the window": one_future_key_in_the_window,
    "window one key too narrow": window_one_too_narrow,
    "one future key among the routed": one_future_key_among_the_routed,
    "routed candidates one key too late": routed_candidates_one_key_too_late,
    "bucket means of the whole document": bucket_means_of_the_whole_document,
    "bucket means are sums": bucket_means_are_sums,
    "worst buckets first": worst_buckets_first,
    "keys beside the last bucket": keys_beside_the_last_bucket,
    "drop the globals": drop_the_globals,
    "statistics of the whole sequence": statistics_of_the_whole_sequence,
    "planes drawn at call time": planes_drawn_at_call_time,
    "no gradient through routed keys": no_gradient_through_routed_keys,
    "no gradient of queries through routed keys": no_gradient_of_queries_through_routed_keys,
    "count a key twice": count_a_key_twice,
}


NOTICED = (AssertionError, ValueError)  # other answers, or numbers that do not fit together


def fails(check):
    try:
        check()
    except NOTICED:
        return True
    return False


@pytest.fixture(scope="module", autouse=True)
def specifications():
    """Those of the real implementation are remembered before anything is broken."""
    for check in CHECKS.values():
        check()


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_the_real_implementation_passes(check):
    check()


@pytest.fixture
def torch_alone(monkeypatch):
    """As if Numba were not installed."""
    monkeypatch.setattr(dispatch, "_installed", lambda package: False)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_the_implementation_in_torch_operations_passes(check, torch_alone):
    check()


@pytest.mark.parametrize("mutate", COMPILED_MUTANTS.values(), ids=COMPILED_MUTANTS.keys())
def test_compiled_caught(mutate, monkeypatch):
    mutate(monkeypatch)
    assert any(fails(check) for check in CHECKS.values())


@pytest.mark.parametrize("mutate", MUTANTS.values(), ids=MUTANTS.keys())
def test_caught(mutate, monkeypatch, torch_alone):
    mutate(monkeypatch)
    assert any(fails(check) for check in CHECKS.values())


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        ("ignore padding", "left-padding"),
        ("forget the packing", "packed"),
        ("packing from position_ids", "position-ids"),
        ("ignore cu_seq_lens", "packed-cu_seq_lens"),
        ("a caller's own masks are causal", "own-mask-packed"),
        ("a caller's own masks keep the model's window", "own-mask-padded"),
        ("ignore softcap", "softcap"),
        ("ignore sinks", "sinks"),
        ("no gradient of sinks", "gradients-sinks"),
        ("count positions from the cache slot", "left-padding"),
        ("query offset one too small", "chunks"),
        ("positions one too large", "chunks"),
        ("zero the output", "full-coverage"),
        ("drop the globals", "reference"),
        ("forget the routed keys", "reference"),
        ("one future key in the window", "later-tokens"),
        ("one future key among the routed", "later-tokens"),
        ("bucket means of the whole document", "later-tokens"),
        ("statistics of the whole sequence", "later-tokens"),
        ("forget the model's own window", "reference-sliding"),
        ("no gradient through routed keys", "gradients"),
        ("count a key twice", "density"),
    ],
    ids=lambda value: value,
)
def test_each_kind_of_check_catches_its_own_kind(mutant, check, monkeypatch, torch_alone):
    MUTANTS[mutant](monkeypatch)
    with pytest.raises(NOTICED):
        CHECKS[check]()
