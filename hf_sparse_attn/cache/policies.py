"""Which keys a cache keeps where it may not keep all (policies), and how many of them (budgets).

A policy is a sum of parts: guards, whose keys are always kept, and one ranker, which orders all others:

    Sinks(4) + Recency()              StreamingLLM, arXiv 2309.17453
    Recent(256) + HeavyHitters()      H2O, arXiv 2306.14048
    Sinks(4) + Recent(256) + KeyNorm()

Another ranker is a subclass of `Ranker` with one method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor


class Policy:
    """A part of a policy, or several of them added up."""

    def __add__(self, other: Policy) -> Composition:
        return Composition(_parts(self) + _parts(other)) if isinstance(other, Policy) else NotImplemented


@dataclass(frozen=True)
class Guard(Policy):
    """Keys that are always kept.

    Args:
        tokens: how many, for each KV head; at least 1.
    """

    tokens: int

    def __post_init__(self) -> None:
        _require_count(f"tokens of {type(self).__name__}", self.tokens)

    def guarded(self, position: Tensor, num_seen: int) -> Tensor:
        """Which of the keys at `position` (any shape, int32) of a document of `num_seen` tokens: bool."""
        raise NotImplementedError


class Sinks(Guard):
    """The first tokens of the document, which take up attention that goes nowhere else (arXiv 2309.17453)."""

    def guarded(self, position: Tensor, num_seen: int) -> Tensor:
        return position < self.tokens


class Recent(Guard):
    """The last tokens of the document."""

    def guarded(self, position: Tensor, num_seen: int) -> Tensor:
        return position >= num_seen - self.tokens


@dataclass(frozen=True)
class Ranker(Policy):
    """The order in which keys are kept."""

    reads_weights: ClassVar[bool] = False  # whether the attention weights of all rows must be computed for `scores`

    def scores(self, key: Tensor, position: Tensor, weight: Tensor | None) -> Tensor:
        """Those with the highest scores are kept.

        Args:
            key: [heads, K, head_dim], with their rotary positions.
            position: [heads, K] int32, in their document.
            weight: [heads, K] float32, the softmax weights that all rows so far gave each key, added up over rows and
                over the query heads of its KV head; None without `reads_weights`.

        Returns:
            [heads, K], finite, any float dtype.
        """
        raise NotImplementedError


class Recency(Ranker):
    """The newest first; with `Sinks` this is StreamingLLM (arXiv 2309.17453)."""

    def scores(self, key: Tensor, position: Tensor, weight: Tensor | None) -> Tensor:
        return position.double()


class HeavyHitters(Ranker):
    """Those that got the most attention so far first: the heavy hitters of H2O (arXiv 2306.14048)."""

    reads_weights = True

    def scores(self, key: Tensor, position: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return weight


class KeyNorm(Ranker):
    """Those with the smallest Euclidean norm first, which tend to be attended to most (arXiv 2406.11430)."""

    def scores(self, key: Tensor, position: Tensor, weight: Tensor | None) -> Tensor:
        return -torch.linalg.vector_norm(key, dim=-1, dtype=torch.promote_types(key.dtype, torch.float32))


class Composition(Policy):
    """Guards and one ranker; what `+` makes.

    Args:
        parts: guards, and a ranker or none (`Recency`).

    Raises:
        ValueError: for several rankers.
    """

    def __init__(self, parts: Sequence[Policy]) -> None:
        rankers = [part for part in parts if isinstance(part, Ranker)]
        if len(rankers) > 1:
            raise ValueError(f"a policy has at most one ranker, got {' + '.join(map(repr, rankers))}")
        self.guards = tuple(part for part in parts if isinstance(part, Guard))
        self.ranker = rankers[0] if rankers else Recency()

    @classmethod
    def of(cls, policy: Any) -> Composition:
        """What a caller gave as `policy`.

        Raises:
            ValueError: for anything but a policy.
        """
        if not isinstance(policy, Policy):
            raise ValueError(f"policy must be a sum of guards and a ranker of hf_sparse_attn.eviction, got {policy!r}")
        return cls(_parts(policy))

    def __repr__(self) -> str:
        return " + ".join(map(repr, _parts(self)))

    @property
    def num_guarded(self) -> int:
        """Keys of each KV head that the guards keep, at most."""
        return sum(guard.tokens for guard in self.guards)

    def priorities(self, key: Tensor, position: Tensor, weight: Tensor | None, num_seen: int) -> Tensor:
        """As `Ranker.scores`, and infinite for guarded keys, of a document of `num_seen` tokens: [heads, K]."""
        scores = self.ranker.scores(key, position, weight)
        for guard in self.guards:
            scores = scores.masked_fill(guard.guarded(position, num_seen), torch.inf)
        return scores


@dataclass(frozen=True)
class UniformBudget:
    """Every KV head keeps equally many keys.

    Args:
        tokens: keys that each KV head keeps, guarded ones included.
        slack: keys beyond these that come together before any are evicted, so that a step seldom evicts.

    Raises:
        ValueError: for a number that is not a positive integer.
    """

    tokens: int
    slack: int = field(default=64, kw_only=True)
    by_head: ClassVar[bool] = False  # whether the KV heads of a layer may keep different numbers

    def __post_init__(self) -> None:
        _require_count("tokens of the budget", self.tokens)
        _require_count("slack of the budget", self.slack)

    @staticmethod
    def of(budget: Any, policy: Composition) -> UniformBudget:
        """What a caller gave as `budget`: an integer means that number for every KV head.

        Raises:
            ValueError: for anything else, and where the policy guards more keys than the budget has.
        """
        if not isinstance(budget, UniformBudget):
            _require_count("budget", budget, " or a budget of hf_sparse_attn.eviction")
            budget = UniformBudget(budget)
        if policy.num_guarded > budget.tokens:
            raise ValueError(
                f"budget must be at least {policy.num_guarded}, the keys that {policy} always keeps; "
                f"got {budget.tokens}"
            )
        return budget

    def counts(self, priorities: list[Tensor]) -> list[int]:
        """How many keys to keep.

        Args:
            priorities: of all keys of a layer, what `Composition.priorities` gives: one [heads, K] for each group of KV
                heads that keep equally many (all, or each one alone if `by_head`).

        Returns:
            For each of these groups, the keys that each of its heads keeps.
        """
        return [min(self.tokens, scores.shape[1]) for scores in priorities]


@dataclass(frozen=True)
class AdaptiveBudget(UniformBudget):
    """The keys of a layer go to its KV heads by their scores: Ada-KV (arXiv 2407.11550).

    Args:
        tokens: keys that a KV head keeps on average, guarded ones included.
        floor: share of `tokens` that every KV head keeps at least, 0 to 1.
        slack: as for `UniformBudget`.

    Raises:
        ValueError: for a number outside its range.
    """

    floor: float = 0.2
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.floor, bool) or not isinstance(self.floor, (int, float)) or not 0 <= self.floor <= 1:
            raise ValueError(f"floor of the budget must be a number from 0 to 1, got {self.floor!r}")

    def counts(self, priorities: list[Tensor]) -> list[int]:
        ordered = [scores[0].sort(descending=True).values for scores in priorities]
        floor = math.ceil(self.floor * self.tokens)
        own = [min(max(floor, int(scores.isposinf().sum())), len(scores)) for scores in ordered]
        others = torch.cat([scores[count:] for scores, count in zip(ordered, own, strict=True)])
        head = torch.repeat_interleave(torch.tensor([len(s) - count for s, count in zip(ordered, own, strict=True)]))
        best = others.sort(descending=True, stable=True).indices[: self.tokens * len(own) - sum(own)].cpu()
        more = torch.bincount(head[best], minlength=len(own)).tolist()
        return [count + extra for count, extra in zip(own, more, strict=True)]


def _parts(policy: Policy) -> tuple[Policy, ...]:
    return (*policy.guards, policy.ranker) if isinstance(policy, Composition) else (policy,)


def _require_count(name: str, value: Any, others: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer{others}, got {value!r}")
