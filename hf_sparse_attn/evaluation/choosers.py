"""Other ways to choose the keys that the buckets would give a row, to be compared with.

Our own implementations of the rules, with what the comparison needs: the query heads of a KV head share their keys, and
a row chooses as many as its head's `key_budget` of those that neither its window nor the static keys give it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_sparse_attn.ops import AttentionCall, find_candidates
from hf_sparse_attn.ops.common.chunked import cap
from hf_sparse_attn.patterns import static_positions

PAGE_SIZE = 16
NUM_VOTERS = 64
_CHUNK_PAIRS = 2**24  # of rows and keys of a head, whose scores exist at once

# Query heads of a KV head [group, R, head_dim], its keys [N, head_dim], which keys rows may see [R, N] -> [R, pages].
Scores = Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]


def oracle(query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
    """The keys with the largest weights of the dense softmax, added up over the query heads; see `ops.Chooser`."""
    return _chosen(query, key, call, _weights)


def quest(query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
    """The pages of 16 keys with the largest bounds of a score, added up over the query heads; see `ops.Chooser`.

    Quest, Tang et al. 2024, arXiv 2406.10774, section 3: of each page and channel the least and the largest key are
    known, and the bound is the sum over channels of the larger product with the query. Theirs is for decoding, each
    query head with pages of its own; here each row chooses as a decoded token would, of the pages that end before it.
    """
    return _chosen(query, key, call, _page_bounds, PAGE_SIZE)


@torch.no_grad()
def voted(query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
    """The keys that most rows of a block of 64 find through their buckets, for all of its rows; see `ops.Chooser`.

    Not causal: later rows have a vote on what earlier ones read, so that a loss with it means nothing. It is there to
    be compared with the same buckets asked row by row, and to be found out by a leak test.
    """
    pattern, num_keys = call.pattern, key.shape[1]
    own = find_candidates(query, key, pattern=pattern, query_offset=call.query_offset, key_offset=call.key_offset)
    free = _Free(call, num_keys, key.device)
    found = torch.full_like(own, -1)
    for rows in torch.arange(query.shape[1], device=key.device).split(NUM_VOTERS):
        others, _ = free.of(rows)
        for kv_head, budget in enumerate(pattern.budgets):
            ballots = own[kv_head, rows]
            votes = ballots[ballots >= 0].bincount(minlength=num_keys)
            best = votes.argsort(descending=True, stable=True)[: min(budget, int((votes > 0).sum()))]
            found[kv_head, rows, : len(best)] = best.int().masked_fill(~others[:, best], -1)
    return found


def _weights(query: Tensor, key: Tensor, admissible: Tensor, call: AttentionCall) -> Tensor:
    scores = cap(query @ key.T * call.scaling, call.softcap)
    return scores.masked_fill_(~admissible, -math.inf).softmax(-1).sum(0)


def _page_bounds(query: Tensor, key: Tensor, admissible: Tensor, call: AttentionCall) -> Tensor:
    num_pages = len(key) // PAGE_SIZE  # whole ones; later keys are in none
    pages = key[: num_pages * PAGE_SIZE].unflatten(0, (num_pages, PAGE_SIZE))
    bounds = (query.clamp(min=0) @ pages.amax(1).T + query.clamp(max=0) @ pages.amin(1).T).sum(0)
    ends_before = admissible[:, PAGE_SIZE - 1 : num_pages * PAGE_SIZE : PAGE_SIZE]  # the row sees its last key
    return bounds.masked_fill(~ends_before, -math.inf)


@torch.no_grad()
def _chosen(query: Tensor, key: Tensor, call: AttentionCall, score: Scores, page_size: int = 1) -> Tensor:
    """The pages of keys with the largest scores: see `ops.Chooser`."""
    pattern, (num_kv_heads, num_keys, _) = call.pattern, key.shape
    grouped, free = query.unflatten(0, (num_kv_heads, -1)), _Free(call, num_keys, key.device)
    num_pages, in_page = num_keys // page_size, torch.arange(page_size, device=key.device)
    width = min(max(pattern.budgets) // page_size, num_pages) * page_size
    found = torch.full((num_kv_heads, query.shape[1], width), -1, dtype=torch.int32, device=key.device)
    size = max(1, _CHUNK_PAIRS // (num_keys * grouped.shape[1]))
    for rows in torch.arange(query.shape[1], device=key.device).split(size):
        others, admissible = free.of(rows)
        pages = others[:, : num_pages * page_size].unflatten(1, (num_pages, page_size)).any(-1)
        for kv_head, budget in enumerate(pattern.budgets):
            scores = score(grouped[kv_head, :, rows], key[kv_head], admissible, call).masked_fill_(~pages, -math.inf)
            values, best = scores.topk(min(budget // page_size, num_pages))
            keys = (best.unsqueeze(-1) * page_size + in_page).flatten(1)
            chosen = others.gather(1, keys) & (values > -math.inf).repeat_interleave(page_size, 1)
            found[kv_head, rows, : keys.shape[1]] = keys.int().masked_fill_(~chosen, -1)
    return found


class _Free:
    """Which keys rows may choose: those that they may see, without those that their window and the static keys give."""

    def __init__(self, call: AttentionCall, num_keys: int, device: torch.device) -> None:
        self._pattern, self._window = call.pattern, call.pattern.window(num_keys)
        self._first = call.query_offset - call.key_offset
        self._keys = torch.arange(num_keys, device=device)
        end = call.key_offset + num_keys
        static = static_positions(self._pattern.config, end, device, marked=self._pattern.marked)
        self._static = static[static >= call.key_offset] - call.key_offset

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The free keys of rows and all that they may see: [R, num_keys] bool twice."""
        older = rows[:, None] + self._first - self._keys
        admissible: Tensor = self._pattern.admissible(older)
        others = admissible & (older >= self._window)
        others[:, self._static] = False
        return others, admissible
