"""The one configuration object: what each row of the attention reads."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

HASHES = ("random", "calibrated")
IMPLEMENTATIONS = ("auto", "reference", "torch")
MAX_HASH_BITS = 12


@dataclass(frozen=True)
class SparseAttentionConfig:
    """Which keys a row (one query token of one query head) attends to.

    With positions counted from the first token of the row's own document, a row at position `p` reads, out of the
    keys that are admissible (same document, not padding, `j <= p`, inside the model's own sliding window):

        every key                                         if p < dense_below, or in a dense layer
        window    p - window_size < j <= p                window_size keys, the row's own included
        static    j < num_global_tokens, j in global_token_indices, or j % stride == 0 (stride > 0)
        random    num_random_keys positions drawn from a fixed hash of (seed, p)
        routed    key_budget of the remaining keys j <= p - window_size, found through hash buckets

    Routed keys: every key falls into one bucket of its KV head's hash. The row scores each bucket by the product of
    its own query with the mean of the bucket's keys, and takes buckets from the best down until `key_budget` keys
    are taken; of the last bucket, the most recent ones. The bucket means are refreshed every `page_size` positions
    and hold only keys that were older than the window then, so nothing later than the row decides what it reads.

    Args:
        window_size: keys of the local window, the row's own included; at least 1.
        num_global_tokens: leading keys of the document that every row reads; at least 0.
        global_token_indices: further positions that every later row reads.
        stride: every `stride`-th key is read by every later row; 0 turns it off.
        num_random_keys: draws of the seeded random pattern per row; 0 turns it off.
        key_budget: routed keys per row: one number, one per layer, or one per layer and query head.
        hash: "random" (seeded random hyperplanes, SimHash) or "calibrated" (fitted by `convert.py`).
        num_hash_bits: hyperplanes per KV head of the random hash, hence 2**num_hash_bits buckets; 1 to 12.
        seed: of the random hash and the random pattern; under 2**32.
        page_size: positions between two refreshes of the bucket means; at least 1.
        dense_layers: indices of layers whose rows read everything.
        dense_below: rows at positions under it read everything; 0 turns it off.
        implementation: "auto", "reference" or "torch".
        calibrated_hash: the fitted hash as text (`routing.encode_calibrated_hash`); needed by hash="calibrated".

    Raises:
        ValueError: for a value outside its range, naming the field, what was given and what is allowed.
    """

    window_size: int = 256
    num_global_tokens: int = 16
    global_token_indices: tuple[int, ...] = ()
    stride: int = 0
    num_random_keys: int = 0
    key_budget: int | tuple[int, ...] | tuple[tuple[int, ...], ...] = 512
    hash: str = "random"
    num_hash_bits: int = 10
    seed: int = 0
    page_size: int = 64
    dense_layers: tuple[int, ...] = ()
    dense_below: int = 1024
    implementation: str = "auto"
    calibrated_hash: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, minimum in _MINIMA.items():
            _require_int(name, getattr(self, name), minimum)
        for name, maximum in (("num_hash_bits", MAX_HASH_BITS), ("seed", 2**32 - 1)):
            if getattr(self, name) > maximum:
                raise ValueError(f"{name} must be at most {maximum}, got {getattr(self, name)}")
        for name in ("global_token_indices", "dense_layers"):
            object.__setattr__(self, name, _int_tuple(name, getattr(self, name)))
        object.__setattr__(self, "key_budget", _budget("key_budget", self.key_budget))
        _require_choice("hash", self.hash, HASHES)
        _require_choice("implementation", self.implementation, IMPLEMENTATIONS)
        if self.calibrated_hash is not None and not isinstance(self.calibrated_hash, str):
            raise ValueError(
                f"calibrated_hash must be text written by convert.py, got {type(self.calibrated_hash).__name__}"
            )
        if self.hash == "calibrated" and self.calibrated_hash is None:
            raise ValueError(
                'hash is "calibrated" but calibrated_hash is missing; convert the checkpoint with scripts/convert.py '
                'or set hash to "random"'
            )

    @classmethod
    def from_dict(cls, fields: dict[str, Any] | None) -> SparseAttentionConfig:
        """Build a config from `config.sparse_attention`; `None` gives the defaults.

        Raises:
            ValueError: for an unknown field name or an impossible value.
        """
        if fields is None:
            return cls()
        if not isinstance(fields, dict):
            raise ValueError(f"sparse_attention must be a dict of config fields, got {type(fields).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"sparse_attention has no field {name!r}{hint} Allowed: {', '.join(known)}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The plain, JSON-ready dict that goes into `config.sparse_attention`; fields at their default are left out."""
        return {
            field.name: _listed(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def replace(self, **changes: Any) -> SparseAttentionConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def head_budgets(self, layer_idx: int, num_heads: int) -> list[int]:
        """Routed keys per row for each of a layer's query heads.

        Raises:
            ValueError: if key_budget lists another number of layers or heads than the model has.
        """
        budget = self.key_budget
        if isinstance(budget, int):
            return [budget] * num_heads
        if layer_idx >= len(budget):
            raise ValueError(f"key_budget lists {len(budget)} layers, but the model has a layer {layer_idx}")
        layer = budget[layer_idx]
        if isinstance(layer, int):
            return [layer] * num_heads
        if len(layer) != num_heads:
            raise ValueError(f"key_budget lists {len(layer)} heads in layer {layer_idx}, but the model has {num_heads}")
        return list(layer)


_MINIMA = {
    "window_size": 1,
    "num_global_tokens": 0,
    "stride": 0,
    "num_random_keys": 0,
    "num_hash_bits": 1,
    "seed": 0,
    "page_size": 1,
    "dense_below": 0,
}


def _require_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def _require_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _int_tuple(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name} must be a list of integers, got {values!r}")
    for value in values:
        _require_int(name, value, 0)
    return tuple(values)


def _budget(name: str, value: Any) -> Any:
    """`key_budget` as nested tuples: a number, one per layer, or one per layer and head (the two may be mixed)."""
    if not isinstance(value, (list, tuple)):
        _require_int(name, value, 0)
        return value
    return tuple(
        _int_tuple(name, layer) if isinstance(layer, (list, tuple)) else _budget(name, layer) for layer in value
    )


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
