"""A slow oracle of caches that stay small: a list of tokens for each KV head, in plain Python."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from transformers import LlamaConfig

from helpers.families import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS
from helpers.operation import make_pattern
from helpers.specification import TOLERANCE
from hf_sparse_attn import SparseAttentionConfig, SparseCache
from hf_sparse_attn.attention import Inputs, attention
from hf_sparse_attn.cache.policies import (
    AdaptiveBudget,
    HeavyHitters,
    KeyNorm,
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
        own = pattern.of_kv_heads(slice(kv_head, kv_head + 1))
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


def small_cache(model, rule=RULES[0]):
    return SparseCache(model.config, policy=rule.policy, budget=rule.budget)


def attend(cache, key, query=None, **inputs):
    """One call of a layer with the keys as values, of a config without a sliding window."""
    pattern = make_pattern(SparseAttentionConfig(**DENSE), NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, dtype=key.dtype)
    keys, values = cache.update(key, key.clone(), 0)
    query = torch.randn(len(key), NUM_HEADS, *key.shape[2:], dtype=key.dtype) if query is None else query
    return attention(Inputs(query, keys, values, **inputs), pattern, SCALING, None)
