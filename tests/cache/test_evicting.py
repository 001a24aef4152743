"""Caches that stay small, against a slow oracle that keeps a list of tokens for each KV head."""

import copy
import dataclasses

import pytest
import torch
from helpers.batches import padded_batch, tokens
from helpers.eviction import (
    DENSE,
    ONE_ROW,
    ROWS,
    RULES,
    SPARSE,
    Rule,
    attend,
    check_oracle,
    every_rule,
    positions,
    small_cache,
    sparse_config,
)
from helpers.families import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS, tiny_model
from helpers.specification import TOLERANCE, cached_logits

from hf_sparse_attn import SparseCache, record_density
from hf_sparse_attn.cache import evicting as kept
from hf_sparse_attn.cache import policies as eviction
from hf_sparse_attn.cache.policies import (
    AdaptiveBudget,
    HeavyHitters,
    KeyNorm,
    Ranker,
    Recency,
    Recent,
    Sinks,
    UniformBudget,
)
from hf_sparse_attn.integration import record


class TestOracle:
    @every_rule
    @pytest.mark.parametrize("sizes", [(30,), (1,) * 30, (5,) * 6, (12, 9, *(1,) * 9)], ids=["1", "30", "6", "mixed"])
    def test_one_row(self, rule, sizes):
        check_oracle(rule, ONE_ROW, sizes)

    @every_rule
    def test_padded_rows(self, rule):
        check_oracle(rule, ROWS, (10, 6, 5, *(1,) * 9))

    @pytest.mark.parametrize("rule", [RULES[3], RULES[6]], ids=str)
    def test_softcap_and_sinks(self, rule):
        sinks = torch.tensor([0.5, 2.0, -1.0, 1.0], dtype=torch.float64)
        check_oracle(rule, ONE_ROW, (8, 4, *(1,) * 18), softcap=1.5, sinks=sinks)

    @pytest.mark.parametrize("rule", [Rule(sinks=2, tokens=16), Rule(recent=2, ranker="heavy", floor=0.3, tokens=16)])
    def test_the_pattern_counts_kept_keys(self, rule):
        check_oracle(rule, ONE_ROW, (20, 4, *(1,) * 6), sparse=SPARSE)

    @pytest.mark.parametrize("rule", [RULES[3], RULES[6]], ids=str)
    def test_weights_are_added_up_in_blocks(self, rule, monkeypatch):
        monkeypatch.setattr(kept, "_BLOCK_WEIGHTS", 200)
        check_oracle(rule, ONE_ROW, (17, 13))


def without_sinks(patch):
    patch.setattr(Sinks, "guarded", lambda self, position, seen: torch.zeros_like(position, dtype=torch.bool))


def one_recent_too_few(patch):
    guarded = Recent.guarded
    patch.setattr(Recent, "guarded", lambda self, position, seen: guarded(self, position, seen + 1))


def the_oldest_first(patch):
    patch.setattr(Recency, "scores", lambda self, key, position, weight: -position.double())


def large_norms(patch):
    patch.setattr(KeyNorm, "scores", lambda self, key, position, weight: key.norm(dim=-1))


def light_hitters(patch):
    patch.setattr(HeavyHitters, "scores", lambda self, key, position, weight: -weight)


def received(change):
    """Weights are added up otherwise; `change` takes the arguments of `received_weights`."""

    def mutate(patch):
        original = kept.received_weights
        patch.setattr(kept, "received_weights", lambda *args: original(*change(*args)))

    return mutate


def no_floor(patch):
    counts = AdaptiveBudget.counts
    patch.setattr(AdaptiveBudget, "counts", lambda self, scores: counts(dataclasses.replace(self, floor=0.0), scores))


def heads_are_equal(patch):
    patch.setattr(AdaptiveBudget, "counts", UniformBudget.counts)


def evict_after_every_call(patch):
    evict = kept.KeptKeys._evict
    patch.setattr(kept.KeptKeys, "_evict", lambda self, row, num_new: evict(self, row, 10_000))


def never_evict(patch):
    patch.setattr(kept.KeptKeys, "_evict", lambda *args: None)


def order_by_priority(patch):
    keep = kept.HeadGroup.keep
    patch.setattr(kept.HeadGroup, "keep", lambda self, index, size: keep(self, index.flip(-1), size))


def positions_from_the_slot(patch):
    begin = kept.KeptKeys.begin

    def mutant(self, documents, batch_size, num_kv_heads):
        begin(self, documents, batch_size, num_kv_heads)
        self.num_seen = [seen + (3 if row else 0) * (not seen) for row, seen in enumerate(self.num_seen)]

    patch.setattr(kept.KeptKeys, "begin", mutant)


MUTANTS = {
    without_sinks: RULES[0],
    one_recent_too_few: RULES[5],
    the_oldest_first: RULES[1],
    large_norms: RULES[4],
    light_hitters: RULES[2],
    received(lambda query, *others: (query[:2].repeat(2, 1, 1)[: len(query)], *others)): RULES[2],
    received(lambda query, key, scaling, *others: (query, key, 3 * scaling, *others)): RULES[2],
    no_floor: RULES[9],
    heads_are_equal: RULES[6],
    evict_after_every_call: RULES[0],
    never_evict: RULES[0],
    order_by_priority: RULES[0],
    positions_from_the_slot: RULES[0],
}


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__qualname__)
def test_the_oracle_notices(mutate, monkeypatch):
    sizes = (10, 6, 5, *(1,) * 9)
    check_oracle(MUTANTS[mutate], ROWS, sizes)
    mutate(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        check_oracle(MUTANTS[mutate], ROWS, sizes)


class TestModel:
    @pytest.mark.parametrize("family", ["llama", "qwen2-mixed", "gemma2", "gpt_oss"])
    @pytest.mark.parametrize("policy", [Sinks(2) + Recency(), HeavyHitters(), KeyNorm()], ids=str)
    def test_a_budget_larger_than_the_document_changes_nothing(self, family, policy):
        model, ids = tiny_model(family), tokens(40, 2)
        expected = cached_logits(model, ids, (7, 13, 1), SparseCache(model.config))
        for budget in (40, AdaptiveBudget(40)):
            cache = SparseCache(model.config, policy=policy, budget=budget)
            torch.testing.assert_close(cached_logits(model, ids, (7, 13, 1), cache), expected, **TOLERANCE)

    @pytest.mark.parametrize("rule", [RULES[i] for i in (0, 3, 5, 7)], ids=str)
    def test_pieces_of_the_slack_are_steps(self, rule):
        """Keys are evicted when the slack is full, so pieces that fill it evenly all see the same keys."""
        model, ids = tiny_model(), tokens(31, 2)
        steps = cached_logits(model, ids, (11, 1), small_cache(model, rule))
        assert (steps - cached_logits(model, ids, (11, 1))).abs().amax() > 1e-2
        for sizes in ((11, 4), (11, 2), (11, 4, 2, 2, 1)):
            torch.testing.assert_close(cached_logits(model, ids, sizes, small_cache(model, rule)), steps, **TOLERANCE)

    @pytest.mark.parametrize("rule", [RULES[0], RULES[7]], ids=str)
    def test_rows_are_independent(self, rule):
        model = tiny_model()
        rows = [tokens(length, seed=length)[0] for length in (36, 20, 9)]
        ids, mask, position_ids = padded_batch(rows, "left", 2)
        cache, pieces = small_cache(model, rule), []
        with torch.no_grad():
            for start in range(0, ids.shape[1], 3):
                stop = min(start + 3, ids.shape[1])
                inputs = {"attention_mask": mask[:, :stop], "position_ids": position_ids[:, start:stop]}
                pieces.append(model(ids[:, start:stop], past_key_values=cache, **inputs).logits)
        together = torch.cat(pieces, 1)
        for i, row in enumerate(rows):
            # The same calls: the first one has what the padding leaves of three tokens.
            first = (3 - (ids.shape[1] - len(row)) % 3) % 3 or 3
            alone = cached_logits(model, row[None], (first, 3), small_cache(model, rule))[0]
            torch.testing.assert_close(together[i][mask[i].bool()], alone, **TOLERANCE)

    def test_generate_in_chunks(self):
        model, ids = tiny_model(), tokens(31, 2)
        mask = torch.ones_like(ids)
        rule = Rule(sinks=2, recent=2, ranker="heavy", tokens=8, slack=8)
        cache = small_cache(model, rule)
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12}
        output = model.generate(ids, past_key_values=cache, prefill_chunk_size=8, **options)
        assert cache.get_seq_length() == 42
        assert max(map(len, positions(cache))) <= 16
        expected = cached_logits(model, output, (8, 8, 8, 7, 1), small_cache(model, rule))
        assert torch.equal(expected[:, 30:-1].argmax(-1), output[:, 31:])

    def test_beam_search_reorders(self):
        model, ids = tiny_model(), tokens(21, 2)
        options = {"attention_mask": torch.ones_like(ids), "num_beams": 3, "do_sample": False, "max_new_tokens": 9}
        expected = model.generate(ids, past_key_values=SparseCache(model.config), **options)
        cache = SparseCache(model.config, policy=HeavyHitters(), budget=AdaptiveBudget(64))
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)

    def test_density_is_that_of_kept_keys(self):
        model, ids = tiny_model(**DENSE), tokens(30)
        with record_density(model) as density:
            cached_logits(model, ids, (11, 1), small_cache(model))
        rows = [*range(1, 12), *(8 + step % 4 for step in range(19))]
        assert density.attended == density.admissible == NUM_LAYERS * NUM_HEADS * sum(rows)

    def test_a_recorder_is_told_the_layers_heads(self):
        """Also where KV heads keep different keys, so that they are computed one by one."""
        model, ids = tiny_model(), tokens(60)
        cache, heads = small_cache(model, Rule(ranker="heavy", floor=0.2, tokens=12, slack=4)), set()

        class Heads:
            def add(self, pattern, head, *rows):
                heads.add((pattern.layer_idx, head))

        cached_logits(model, ids[:, :56], (4,), cache)
        with record(model, Heads()):
            cached_logits(model, ids[:, 56:], (4,), cache)
        assert heads == {(layer, head) for layer in range(NUM_LAYERS) for head in range(NUM_HEADS)}

    def test_another_ranker_is_one_method(self):
        class First(Ranker):
            def scores(self, key, position, weight):
                assert weight is None
                return -position.float()

        cache = SparseCache(sparse_config(), policy=First() + Recent(2), budget=UniformBudget(5, slack=1))
        x = torch.randn(1, NUM_KV_HEADS, 9, HEAD_DIM)
        attend(cache, x)
        assert positions(cache) == [[0, 1, 2, 7, 8]] * NUM_KV_HEADS


CHANGES = {
    (2, 0, 0): lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    (2, 1): lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
    (0, 2): lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    (0, 0, 1, 1, 2, 2): lambda cache: cache.batch_repeat_interleave(2),
    (0, 1, 2): lambda cache: (cache.layers[0].offload(), cache.layers[0].prefetch()),
}  # fmt: skip


class TestRows:
    @pytest.mark.parametrize("rows", CHANGES, ids=str)
    @pytest.mark.parametrize("rule", [RULES[0], RULES[6]], ids=str)
    def test_rows_go_on_as_they_were(self, rows, rule):
        model, ids = tiny_model(), tokens(30, 3)
        cache = small_cache(model, rule)
        cached_logits(model, ids[:, :17], (17,), cache)
        CHANGES[rows](cache)
        found = cached_logits(model, ids[list(rows), 17:], (3,), cache)
        expected = cached_logits(model, ids[list(rows)], (17, 3), small_cache(model, rule))
        torch.testing.assert_close(found, expected[:, 17:], **TOLERANCE)
        assert cache.nbytes == sum(layer.nbytes for layer in cache.layers)

    def test_copies_are_independent(self):
        model, ids = tiny_model(), tokens(30)
        cache = small_cache(model)
        cached_logits(model, ids[:, :17], (17,), cache)
        other = copy.deepcopy(cache)
        cached_logits(model, ids[:, :13] * 0 + 5, (1,), other)
        found = cached_logits(model, ids[:, 17:], (1,), cache)
        torch.testing.assert_close(found, cached_logits(model, ids, (17, 1), small_cache(model))[:, 17:], **TOLERANCE)
        large, peak = tokens(300), cache.peak_nbytes
        cached_logits(model, large, (300,), other)
        assert other.peak_nbytes > cache.peak_nbytes == peak

    def test_reset(self):
        model, ids = tiny_model(), tokens(30)
        cache = small_cache(model)
        expected = cached_logits(model, ids, (5,), cache)
        cache.reset()
        assert (cache.nbytes, cache.get_seq_length(), cache.layers[0].is_croppable) == (0, 0, True)
        assert torch.equal(cached_logits(model, ids, (5,), cache), expected)

    def test_crop_before_anything_was_evicted(self):
        model, ids, other = tiny_model(), tokens(9), tokens(9, seed=1)
        cache = small_cache(model)
        cached_logits(model, torch.cat([ids[:, :4], other[:, 4:7]], 1), (7,), cache)
        assert cache.layers[0].is_croppable
        cache.crop(-3)
        assert cache.get_seq_length() == 4
        found = cached_logits(model, ids[:, 4:], (1,), cache)
        torch.testing.assert_close(found, cached_logits(model, ids, (1,))[:, 4:], **TOLERANCE)

    def test_prompt_lookup_crops(self):
        model, ids = tiny_model(), tokens(10).repeat(1, 2)
        options = {"do_sample": False, "max_new_tokens": 9, "attention_mask": torch.ones_like(ids), "eos_token_id": 0}
        expected = model.generate(ids, **options)
        cache = SparseCache(model.config, policy=HeavyHitters(), budget=64)
        assert torch.equal(model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **options), expected)

    def test_crop_after_eviction_is_refused(self):
        model = tiny_model()
        cache = small_cache(model)
        cached_logits(model, tokens(30), (30,), cache)
        assert not cache.layers[0].is_croppable
        with pytest.raises(ValueError, match="cannot be cropped after its policy has evicted"):
            cache.crop(-1)
        cache.crop(0)


class TestMemory:
    @pytest.mark.parametrize("rule", [RULES[0], RULES[3], RULES[6]], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_bytes_after_a_long_prompt_and_while_decoding(self, rule, dtype):
        model, ids = tiny_model(dtype=dtype, implementation="sparse"), tokens(200, 2)
        cache = small_cache(model, rule)
        token = 2 * HEAD_DIM * dtype.itemsize + 4 + 4 * (rule.ranker == "heavy")
        small = 2 * NUM_LAYERS * NUM_KV_HEADS * (rule.tokens + rule.slack) * token
        cached_logits(model, ids, (190,), cache)
        storages = [
            x.untyped_storage() for layer in cache.layers for r in layer.kept.rows for g in r for x in g.tensors
        ]
        assert cache.nbytes == small == sum(storage.nbytes() for storage in storages)
        assert len({storage.data_ptr() for storage in storages}) == len(storages)
        # While the last row of the last layer is attended to, it alone is held whole.
        assert cache.peak_nbytes == small + NUM_KV_HEADS * (190 - rule.tokens - rule.slack) * token
        peak = cache.peak_nbytes
        cached_logits(model, ids[:, :13], (1,), cache)
        assert (cache.nbytes, cache.peak_nbytes) == (small, peak)

    def test_peak_in_chunks_is_the_budget_and_one_chunk(self):
        model, ids = tiny_model(), tokens(200)
        token = 2 * HEAD_DIM * 8 + 4
        for chunk, slack in ((16, 16), (32, 16)):
            cache = small_cache(model, Rule(sinks=2, tokens=64, slack=slack))
            cached_logits(model, ids, (chunk,), cache)
            assert cache.nbytes == NUM_LAYERS * NUM_KV_HEADS * (64 + slack) * token
            held = (NUM_LAYERS - 1) * (64 + slack) + 64 + chunk
            assert cache.peak_nbytes == NUM_KV_HEADS * held * token

    def test_adaptive_budgets_hold_as_much_in_all(self):
        model = tiny_model()
        cache = small_cache(model, Rule(ranker="heavy", floor=0.2, tokens=12, slack=4))
        for start in range(0, 60, 4):
            cached_logits(model, tokens(60)[:, start : start + 4], (4,), cache)
        counts = [[len(head) for head in positions(cache, layer=layer)] for layer in range(NUM_LAYERS)]
        assert [sum(count) for count in counts] == [12 * NUM_KV_HEADS] * NUM_LAYERS
        assert any(len(set(count)) > 1 for count in counts)
        assert cache.nbytes == NUM_LAYERS * NUM_KV_HEADS * (12 + 4) * (2 * HEAD_DIM * 8 + 8)

    def test_a_step_copies_no_keys(self):
        model, ids = tiny_model(), tokens(40)
        cache = small_cache(model, Rule(sinks=2, tokens=12, slack=6))
        cached_logits(model, ids[:, :18], (18,), cache)

        def places():
            return [x.data_ptr() for layer in cache.layers for group in layer.kept.rows[0] for x in group.tensors]

        before = places()
        cached_logits(model, ids[:, 18:], (1,), cache)
        assert places() == before

    def test_a_step_copies_no_keys_of_a_short_row_beside_a_long_one(self):
        model = tiny_model()
        ids, mask, position_ids = padded_batch([tokens(20)[0], tokens(5)[0]], "left", 0)
        cache = small_cache(model, Rule(sinks=2, tokens=12, slack=6))
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache)
        assert [len(positions(cache, row)[0]) for row in (0, 1)] == [12, 5]
        before = [x.data_ptr() for group in cache.layers[0].kept.rows[1] for x in group.tensors]
        for _ in range(12):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            with torch.no_grad():
                model(ids[:, :1], attention_mask=mask, past_key_values=cache)
            assert [x.data_ptr() for group in cache.layers[0].kept.rows[1] for x in group.tensors] == before
        assert cache.nbytes == 2 * NUM_LAYERS * NUM_KV_HEADS * 18 * (2 * HEAD_DIM * 8 + 4)

    def test_a_small_document_takes_little_room(self):
        model = tiny_model()
        cache = SparseCache(model.config, policy=KeyNorm(), budget=10_000)
        cached_logits(model, tokens(4), (4,), cache)
        assert cache.nbytes == NUM_LAYERS * NUM_KV_HEADS * (4 + 64) * (2 * HEAD_DIM * 8 + 4)

    def test_the_peak_of_a_cache_without_policy(self):
        model = tiny_model()
        cache = SparseCache(model.config)
        cached_logits(model, tokens(40), (40,), cache)
        assert cache.peak_nbytes == cache.nbytes > 0
        cache.reset()
        assert cache.peak_nbytes > cache.nbytes == 0

    def test_inference_mode_and_then_none(self):
        model, ids = tiny_model(), tokens(30)
        cache = small_cache(model)
        with torch.inference_mode():
            model(ids[:, :17], past_key_values=cache)
        found = cached_logits(model, ids[:, 17:], (1,), cache)
        torch.testing.assert_close(found, cached_logits(model, ids, (17, 1), small_cache(model))[:, 17:], **TOLERANCE)


def test_adaptive_counts_by_hand():
    scores = [torch.tensor([[9.0, 8.0, 7.0, 1.0]]), torch.tensor([[2.0, 6.0, torch.inf, 0.5]])]
    assert AdaptiveBudget(2, floor=0.0).counts(scores) == [3, 1]
    assert AdaptiveBudget(2, floor=1.0).counts(scores) == [2, 2]
    assert AdaptiveBudget(3, floor=0.5).counts(scores) == [3, 3]
    assert AdaptiveBudget(9, floor=0.5).counts(scores) == [4, 4]
    assert eviction.UniformBudget(3).counts(scores) == [3, 3]
