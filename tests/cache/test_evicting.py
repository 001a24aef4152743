"""Caches that stay small, against a slow oracle that keeps a list of tokens for each KV head."""

import copy
import dataclasses
import math
from dataclasses import dataclass, field

import pytest
import torch
from helpers.batches import padded_batch, tokens
from helpers.families import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS, tiny_model
from helpers.operation import make_pattern
from helpers.specification import TOLERANCE, cached_logits
from transformers import DynamicCache, Gemma3nTextConfig, LlamaConfig

from hf_sparse_attn import SparseAttentionConfig, SparseCache, record_density
from hf_sparse_attn.attention import Inputs, attention
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
from hf_sparse_attn.masks.mask_function import signed_positions
from hf_sparse_attn.ops import reference

SCALING = 0.4
DENSE = {"dense_below": 10_000}
SPARSE = {"window_size": 4, "num_global_tokens": 1, "key_budget": 3, "min_weight": 0.0, "dense_below": 0}
SPARSE |= {"num_hash_bits": 2, "page_size": 4, "implementation": "torch"}


@dataclass
class Rule:
    """A policy and a budget, as the oracle reads them and as the package spells them."""

    sinks: int = 0
    recent: int = 0
    ranker: str = "recency"
    floor: float | None = None
    tokens: int = 7
    slack: int = 4

    @property
    def policy(self):
        policy = {"recency": Recency, "heavy": HeavyHitters, "norm": KeyNorm}[self.ranker]()
        for guard, tokens_ in ((Recent, self.recent), (Sinks, self.sinks)):
            policy = guard(tokens_) + policy if tokens_ else policy
        return policy

    @property
    def budget(self):
        if self.floor is None:
            return UniformBudget(self.tokens, slack=self.slack)
        return AdaptiveBudget(self.tokens, floor=self.floor, slack=self.slack)

    def __str__(self):
        return " ".join(f"{name}={value}" for name, value in vars(self).items() if value)


RULES = [
    Rule(sinks=2),
    Rule(),
    Rule(ranker="heavy"),
    Rule(recent=3, ranker="heavy"),
    Rule(ranker="norm"),
    Rule(sinks=2, recent=2, ranker="norm"),
    Rule(ranker="heavy", floor=0.2),
    Rule(recent=3, ranker="heavy", floor=0.5),
    Rule(sinks=1, recent=1, ranker="norm", floor=0.0),
    Rule(sinks=3, ranker="norm", floor=1.0),
    Rule(sinks=3, recent=4, ranker="norm", floor=0.1),
    Rule(sinks=2, recent=2, ranker="heavy", tokens=10, slack=1),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)


@dataclass
class Token:
    position: int
    key: torch.Tensor
    value: torch.Tensor
    weight: float = 0.0


@dataclass
class Oracle:
    """One batch row: the tokens that each KV head keeps, in plain Python."""

    rule: Rule
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    heads: list = field(default_factory=lambda: [[] for _ in range(NUM_KV_HEADS)])
    seen: int = 0

    def attend(self, query, key, value, reads=None):
        """[num_heads, Q, head_dim] for new queries, keys and values.

        reads(kv_head, keys, row) -> which of a row's keys are read, given those of the whole shorter document; all.
        """
        num_new, group = query.shape[1], NUM_HEADS // NUM_KV_HEADS
        output = torch.zeros_like(query)
        for kv_head, held in enumerate(self.heads):
            held += [Token(self.seen + i, key[kv_head, i], value[kv_head, i]) for i in range(num_new)]
            for head in range(kv_head * group, (kv_head + 1) * group):
                for i in range(num_new):
                    row = len(held) - num_new + i
                    weights = self.weights(query[head, i], held[: row + 1], head)
                    for token, weight in zip(held, weights.tolist(), strict=False):
                        token.weight += weight
                    if reads is not None:
                        admitted = reads(kv_head, head, held, row, query)
                        weights = self.weights(
                            query[head, i], [t for t, a in zip(held, admitted, strict=True) if a], head
                        )
                        values = [t.value for t, a in zip(held, admitted, strict=True) if a]
                    else:
                        values = [token.value for token in held[: row + 1]]
                    output[head, i] = sum(w * v for w, v in zip(weights, values, strict=True))
        self.seen += num_new
        self.evict(num_new)
        return output

    def weights(self, query, held, head):
        scores = torch.stack([query @ token.key for token in held]) * SCALING
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks[head : head + 1]])
        return scores.softmax(0)[: len(held)]

    def evict(self, num_new):
        rule, count = self.rule, sum(map(len, self.heads))
        most = rule.tokens * NUM_KV_HEADS
        if count <= most or count + num_new * NUM_KV_HEADS <= most + rule.slack * NUM_KV_HEADS:
            return
        ranked = [sorted(held, key=self.rank, reverse=True) for held in self.heads]
        if rule.floor is None:
            chosen = [held[: rule.tokens] for held in ranked]
        else:
            chosen, left = [], []
            for kv_head, held in enumerate(ranked):
                own = max(math.ceil(rule.floor * rule.tokens), sum(self.guarded(token) for token in held))
                chosen.append(held[:own])
                left += [(self.rank(token), kv_head, token.position) for token in held[own:]]
            room = most - sum(map(len, chosen))
            for _, kv_head, position in sorted(left, reverse=True)[: max(room, 0)]:
                chosen[kv_head] += [token for token in self.heads[kv_head] if token.position == position]
        self.heads = [sorted(held, key=lambda token: token.position) for held in chosen]

    def guarded(self, token):
        return token.position < self.rule.sinks or token.position >= self.seen - self.rule.recent

    def rank(self, token):
        if self.guarded(token):
            return math.inf
        return {"recency": token.position, "heavy": token.weight, "norm": -token.key.norm().item()}[self.rule.ranker]


def sparse_config(**changes):
    return LlamaConfig(
        num_hidden_layers=1, num_attention_heads=NUM_HEADS, num_key_value_heads=NUM_KV_HEADS, hidden_size=32,
        attn_implementation="sparse", **changes,
    )  # fmt: skip


def check_oracle(rule, mask, sizes, softcap=None, sinks=None, sparse=None, seed=0):
    """A layer given [rows, tokens] of which `mask` says which are no padding, in calls of `sizes`, is the oracle.

    The second KV head has longer keys, so that adaptive budgets part the heads.
    """
    mask = torch.tensor(mask, dtype=torch.bool)
    num_rows, length = mask.shape
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(num_rows, heads, length, HEAD_DIM, generator=generator, dtype=torch.float64)
        for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    )
    key[:, 1] *= 1.5
    config = SparseAttentionConfig(**(DENSE if sparse is None else sparse))
    pattern = make_pattern(config, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)
    cache = SparseCache(sparse_config(), policy=rule.policy, budget=rule.budget)
    oracles = [Oracle(rule, softcap, sinks) for _ in range(num_rows)]

    def reads(kv_head, head, held, row, query):
        keys, group = torch.stack([token.key for token in held]), NUM_HEADS // NUM_KV_HEADS
        own = kept._of_heads(pattern, slice(kv_head, kv_head + 1), slice(kv_head * group, (kv_head + 1) * group))
        first = len(held) - query.shape[1]
        queries = query[kv_head * group : (kv_head + 1) * group]
        found = reference.attended_keys(queries, keys[None], own, first, scaling=SCALING, softcap=softcap)
        return found[head - kv_head * group, row - first].tolist()

    start = 0
    for size in sizes:
        stop = start + size
        new = [x[:, :, start:stop] for x in (query, key, value)]
        signed = signed_positions(num_rows, size, stop, start, attention_mask=mask[:, :stop])
        keys, values = cache.update(new[1], new[2], 0)
        found = attention(Inputs(new[0], keys, values, signed, sinks=sinks), pattern, SCALING, softcap)
        assert cache.get_seq_length() == stop
        for row, oracle in enumerate(oracles):
            real = mask[row, start:stop]
            assert (found[row, ~real] == 0).all()
            if real.any():
                expected = oracle.attend(*(x[row][:, real] for x in new), reads if sparse else None)
                torch.testing.assert_close(found[row, real], expected.transpose(0, 1), **TOLERANCE)
            assert positions(cache, row) == [[token.position for token in held] for held in oracle.heads]
        start = stop
    assert start == length


def positions(cache, row=0, layer=0):
    """Of the kept tokens, for each KV head."""
    layer_kept = cache.layers[layer].kept
    return [head.tolist() for group in layer_kept.rows[row] for head in group.positions]


ONE_ROW = [[1] * 30]
ROWS = [[1] * 30, [0] * 9 + [1] * 21, [1] * 17 + [0] * 13, [0] * 3 + [1, 0] * 12 + [1] * 3]


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


def small_cache(model, rule=RULES[0]):
    return SparseCache(model.config, policy=rule.policy, budget=rule.budget)


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

    def test_another_ranker_is_one_method(self):
        class First(Ranker):
            def scores(self, key, position, weight):
                assert weight is None
                return -position.float()

        cache = SparseCache(sparse_config(), policy=First() + Recent(2), budget=UniformBudget(5, slack=1))
        x = torch.randn(1, NUM_KV_HEADS, 9, HEAD_DIM)
        attend(cache, x)
        assert positions(cache) == [[0, 1, 2, 7, 8]] * NUM_KV_HEADS


def attend(cache, key, query=None, **inputs):
    """One call of a layer with the keys as values, of a config without a sliding window."""
    pattern = make_pattern(SparseAttentionConfig(**DENSE), NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, dtype=key.dtype)
    keys, values = cache.update(key, key.clone(), 0)
    query = torch.randn(len(key), NUM_HEADS, *key.shape[2:], dtype=key.dtype) if query is None else query
    return attention(Inputs(query, keys, values, **inputs), pattern, SCALING, None)


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


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"policy": Recency()}, "budget is missing"),
            ({"budget": 8}, "policy is missing"),
            ({"policy": "h2o", "budget": 8}, "policy must be a sum .* got 'h2o'"),
            ({"policy": Recency(), "budget": 0}, "budget must be a positive integer .* got 0"),
            ({"policy": Recency(), "budget": True}, "budget must be .* got True"),
            ({"policy": Recency(), "budget": 0.5}, "budget must be .* got 0.5"),
            ({"policy": Sinks(4) + Recent(5), "budget": 8}, "budget must be at least 9, .*Sinks.*Recent.* got 8"),
            ({"policy": Recent(9) + KeyNorm(), "budget": AdaptiveBudget(8)}, "budget must be at least 9"),
            ({"policy": Recency(), "budget": 8, "max_cache_len": 9}, "max_cache_len=9 cannot go with a policy"),
        ],
    )
    def test_construction(self, options, words):
        with pytest.raises(ValueError, match=words):
            SparseCache(sparse_config(), **options)

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: Recency() + KeyNorm(), r"at most one ranker, got Recency\(\) \+ KeyNorm\(\)"),
            (lambda: Sinks(1) + HeavyHitters() + Recent(1) + KeyNorm(), "at most one ranker, got HeavyHitters"),
            (lambda: Sinks(0), "tokens of Sinks must be a positive integer, got 0"),
            (lambda: Recent(2.0), "tokens of Recent must be"),
            (lambda: UniformBudget(-1), "tokens of the budget must be"),
            (lambda: UniformBudget(3, slack=0), "slack of the budget must be"),
            (lambda: AdaptiveBudget(3, floor=1.5), "floor of the budget must be a number from 0 to 1, got 1.5"),
        ],
    )
    def test_parts(self, make, words):
        with pytest.raises(ValueError, match=words):
            make()

    def test_adding_something_else(self):
        with pytest.raises(TypeError):
            Sinks(1) + 3
        assert str(Sinks(1) + Recent(2)) == "Sinks(tokens=1) + Recent(tokens=2) + Recency()"

    def test_another_attention_implementation(self):
        model = tiny_model(implementation="sdpa")
        with pytest.raises(ValueError, match=r'policy needs .* attn_implementation="sparse".* is \'sdpa\''):
            SparseCache(model.config, policy=Recency(), budget=8)

    def test_an_implementation_that_was_changed_afterwards(self):
        model = tiny_model()
        cache = small_cache(model)
        model.set_attn_implementation("sdpa")
        cached_logits(model, tokens(5), (5,), cache)
        with pytest.raises(ValueError, match="never came to the sparse attention"):
            cached_logits(model, tokens(1), (1,), cache)

    def test_gradients(self):
        model = tiny_model()
        with pytest.raises(ValueError, match="carries no gradients"):
            model(tokens(5), past_key_values=small_cache(model))

    def test_packed_documents(self):
        model = tiny_model()
        ends = torch.tensor([0, 3, 5], dtype=torch.int32)
        with pytest.raises(ValueError, match="does not take several packed ones"), torch.no_grad():
            model(tokens(5), cu_seq_lens_q=ends, past_key_values=small_cache(model))

    def test_earlier_tokens_become_padding(self):
        model = tiny_model()
        cache = small_cache(model)
        cached_logits(model, tokens(20), (20,), cache)
        mask = torch.cat([torch.zeros(1, 20), torch.ones(1, 5)], 1)
        with pytest.raises(ValueError, match=r"has seen 20 tokens of row 0, but .* follow 0"), torch.no_grad():
            model(tokens(5), attention_mask=mask, past_key_values=cache)

    def test_layers_that_share_keys(self):
        config = Gemma3nTextConfig(num_hidden_layers=4, num_kv_shared_layers=2)
        with pytest.raises(ValueError, match="num_kv_shared_layers=2"):
            SparseCache(config, policy=Sinks(4), budget=9)

    def test_keys_that_were_attended_to_already(self):
        cache = small_cache(tiny_model())
        pattern = make_pattern(SparseAttentionConfig(), NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)
        x = torch.randn(1, NUM_KV_HEADS, 3, HEAD_DIM, dtype=torch.float64)
        inputs = Inputs(x.repeat(1, 2, 1, 1), *cache.update(x, x.clone(), 0))
        attention(inputs, pattern, SCALING, None)
        with pytest.raises(ValueError, match="without new keys"):
            attention(inputs, pattern, SCALING, None)

    def test_another_batch_size(self):
        model = tiny_model()
        cache = small_cache(model)
        cached_logits(model, tokens(20, 2), (20,), cache)
        with pytest.raises(ValueError, match="holds 2 rows, got 3"):
            cached_logits(model, tokens(1, 3), (1,), cache)

    def test_a_sliding_window(self):
        cache = small_cache(tiny_model())
        pattern = make_pattern(SparseAttentionConfig(), NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, sliding_window=4)
        x = torch.randn(1, NUM_KV_HEADS, 3, HEAD_DIM, dtype=torch.float64)
        key, value = cache.update(x, x.clone(), 0)
        with pytest.raises(ValueError, match="sliding window"):
            attention(Inputs(x.repeat(1, 2, 1, 1), key, value), pattern, SCALING, None)

    def test_layers_that_slide_are_transformers_own(self):
        model = tiny_model("qwen2-mixed")
        kinds = [type(layer).__name__ for layer in small_cache(model).layers]
        assert kinds == [type(layer).__name__.replace("DynamicLayer", "EvictingLayer") for layer in DynamicCache(config=model.config).layers]  # fmt: skip  # noqa: E501
        assert "EvictingLayer" in kinds

    def test_torch_compile(self):
        model = tiny_model()
        cache = small_cache(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with (
            pytest.raises(Exception, match="SparseCache with a policy"),
            torch.no_grad(),
        ):
            compiled(tokens(5), past_key_values=cache)


def test_adaptive_counts_by_hand():
    scores = [torch.tensor([[9.0, 8.0, 7.0, 1.0]]), torch.tensor([[2.0, 6.0, torch.inf, 0.5]])]
    assert AdaptiveBudget(2, floor=0.0).counts(scores) == [3, 1]
    assert AdaptiveBudget(2, floor=1.0).counts(scores) == [2, 2]
    assert AdaptiveBudget(3, floor=0.5).counts(scores) == [3, 3]
    assert AdaptiveBudget(9, floor=0.5).counts(scores) == [4, 4]
    assert eviction.UniformBudget(3).counts(scores) == [3, 3]
