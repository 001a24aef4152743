"""The one configuration object: what each row of the attention reads."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from hf_sparse_attn.pattern_fields import MAX_ROW_KEYS, OVERRIDABLE, Overrides, check_patterns, plain, read_overrides
from hf_sparse_attn.retired_fields import current_fields

HASHES = ("random", "calibrated")
IMPLEMENTATIONS = ("auto", "reference", "torch", "numba", "triton")
MAX_HASH_BITS = 12
MAX_NUMBER = 2**30  # of positions, keys and the like: sums of two of them are 32-bit integers


@dataclass(frozen=True)
class SparseAttentionConfig:
    """Which keys a row (one query token of one query head) attends to.

    With positions counted from the first token of the row's own document, a row at position `p` reads, out of the
    keys that are admissible (same document, not padding, `j <= p`, inside the model's own sliding window):

        every key                                         if at most dense_below are admissible, or in a dense layer
        window    p - window_size < j <= p                window_size keys, the row's own included
        static    j < num_global_tokens, j in global_token_indices, the token at j is one of global_token_ids, or,
                  with a stride, stride_offset <= j % stride < stride_offset + stride_width
        random    num_random_keys positions drawn from a fixed hash of (seed, p)
        dilated   p - i * dilation for i = 1 .. dilated_window_size
        slash     p - d for d in slash_distances
        blocks    the row's own block of block_size keys up to p, num_neighbouring_blocks before it, and
                  num_random_blocks of the earlier ones, drawn from a fixed hash of (seed, number of the row's block)
        voted     in a prefill, num_voted_blocks of the earlier ones, for which the block's rows vote together
        routed    up to key_budget of the remaining keys j <= p - window_size, found through hash buckets

    Routed keys: every key falls into one bucket of its KV head's hash. The queries of the KV head's group at the row's
    own token are added up, each bucket is scored by the product of that sum with the mean of the bucket's keys, and
    buckets are taken from the best down until `key_budget` keys are taken; of the last bucket, the most recent ones.
    Every row of the group scores these keys with its own query, beside its other keys, and reads those whose softmax
    weight among all that it scored is at least `min_weight`. The bucket means are refreshed every `page_size`
    positions with all keys before that position, so nothing later than the row decides what it reads. Voted blocks are
    the one exception (`block_votes.py`); they are refused in training.

    Where attention is not causal, admissible keys lie on both sides, the window is |p - j| < window_size, rows of
    global tokens (num_global_tokens, global_token_indices) read everything, random keys are drawn from the whole
    document, buckets' means are those of all its keys, the nearest ones of the last bucket are taken, and dense_below
    goes by the document's length, as there are no earlier rows that read less (docs/bidirectional.md).

    docs/patterns.md draws each pattern; `presets.py` names combinations of them that papers use.

    Args:
        window_size: keys of the local window, the row's own included; at least 1.
        num_global_tokens: leading keys of the document that every row reads; at least 0.
        global_token_indices: further positions that every later row reads.
        global_token_ids: ids of tokens, such as those of BOS, a separator or a heading mark: wherever one of them
            stands, every later row reads its key. They need `mark_global_tokens`, which loading functions call.
        stride: every `stride`-th key is read by every later row; 0 turns it off.
        stride_offset, stride_width: which keys of every `stride` these are: so many, from this one on; by default the
            first one. Both lie inside the stride.
        num_random_keys: draws of the seeded random pattern per row, at most 4096; 0 turns it off.
        dilated_window_size, dilation: so many keys, each so far before the last one; 0 keys turn it off.
        slash_distances: distances to keys that every row reads.
        block_size: keys of a block; a row reads its own block up to itself; 0 turns blocks off.
        block_offset: position of the first block that is whole, under block_size; the keys before it are one, too.
        num_neighbouring_blocks: blocks right before the row's own that it reads.
        num_random_blocks: draws of blocks before the row's own, which may draw one twice.
        num_voted_blocks: blocks before the row's own that all of its block's rows choose together, in place of
            key_budget, which has to be 0. Not causal: for the prefill of inference alone.
        by_layer: fields of patterns that differ by layer, as a list of dicts: layer i takes entry i modulo the list's
            length. The fields are those from window_size to num_voted_blocks, and by_kv_head.
        by_kv_head: the same for parts of a layer's KV heads, which are given to the entries in order and evenly: of two
            entries, the second is the second half's. Such a layer keeps no index of its cached keys.
        key_budget: keys found for a row through the buckets: one number, one per layer, or one per layer and KV head.
        min_weight: softmax weight under which a row does not read a key found through the buckets, at least 0 and under
            1; one number, one per layer, or one per layer and query head. 0 reads them all.
        hash: "random" (seeded random hyperplanes, SimHash) or "calibrated" (fitted by `convert.py`).
        num_hash_bits: hyperplanes per KV head of the random hash, hence 2**num_hash_bits buckets; 1 to 12.
        seed: of the random hash and the random pattern; under 2**32.
        page_size: positions between two refreshes of the bucket means; at least 1.
        dense_layers: indices of layers whose rows read everything.
        dense_below: rows with at most so many admissible keys read everything: those at positions under it, and all
            rows of a layer whose own sliding window is no larger; 0 turns it off.
        implementation: "reference", "torch" (any device), "numba" (CPU), "triton" (GPU), or "auto":
            numba on a CPU and triton on an NVIDIA GPU (compute capability 8.0 and newer) where they are installed, else
            torch.
        calibrated_hash: the fitted hash as text (`routing.encode_calibrated_hash`); needed by hash="calibrated".

    Raises:
        ValueError: for a value outside its range, naming the field, what was given and what is allowed; also for a
            field that does nothing because another one turns its pattern off, and where a row would have more than
            16384 keys of its own (random, dilated, slash, blocks).
    """

    window_size: int = 256
    num_global_tokens: int = 16
    global_token_indices: tuple[int, ...] = ()
    global_token_ids: tuple[int, ...] = ()
    stride: int = 0
    stride_offset: int = 0
    stride_width: int = 1
    num_random_keys: int = 0
    dilated_window_size: int = 0
    dilation: int = 1
    slash_distances: tuple[int, ...] = ()
    block_size: int = 0
    block_offset: int = 0
    num_neighbouring_blocks: int = 0
    num_random_blocks: int = 0
    num_voted_blocks: int = 0
    by_layer: Overrides = ()
    by_kv_head: Overrides = ()
    key_budget: int | tuple[int | tuple[int, ...], ...] = 1024
    min_weight: float | tuple[float | tuple[float, ...], ...] = 2e-4
    hash: str = "random"
    num_hash_bits: int = 10
    seed: int = 0
    page_size: int = 64
    dense_layers: tuple[int, ...] = ()
    dense_below: int = 2048
    implementation: str = "auto"
    calibrated_hash: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, (minimum, maximum) in _RANGES.items():
            _require_int(name, getattr(self, name), minimum, maximum)
        for name in ("global_token_indices", "global_token_ids", "slash_distances", "dense_layers"):
            object.__setattr__(self, name, _int_tuple(name, getattr(self, name)))
        check_patterns(self)
        for name in OVERRIDABLE:
            object.__setattr__(self, name, read_overrides(self, name))
        repeated = [token for i, token in enumerate(self.global_token_ids) if token in self.global_token_ids[:i]]
        if repeated:
            raise ValueError(f"global_token_ids must not name a token twice, got {repeated[0]} again")
        object.__setattr__(
            self, "key_budget", _by_head(self.key_budget, partial(_require_int, "key_budget", minimum=0))
        )
        object.__setattr__(self, "min_weight", _by_head(self.min_weight, _require_weight))
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
        object.__setattr__(self, "_text", repr(self.to_dict()))

    @property
    def text(self) -> str:
        """`to_dict` as Python spells it, for graphs: Dynamo makes a variable of a number that another graph had not."""
        return str(self.__dict__["_text"])

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SparseAttentionConfig:
        """The pattern of a paper, by name; see `presets.py`.

        Raises:
            ValueError: for an unknown name, listing the names, or an impossible field.
        """
        return cls.from_dict({"preset": name, **overrides})

    @classmethod
    def from_dict(cls, fields: dict[str, Any] | None) -> SparseAttentionConfig:
        """Build a config from `config.sparse_attention`; `None` gives the defaults.

        `{"preset": name, ...}` gives a preset's fields, and the others in their place.

        Raises:
            ValueError: for an unknown field name or an impossible value.
        """
        if fields is None:
            return cls()
        if not isinstance(fields, dict):
            raise ValueError(f"sparse_attention must be a dict of config fields, got {type(fields).__name__}")
        fields = expand_preset(fields)
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"sparse_attention has no field {name!r}{hint} Allowed: {', '.join(known)}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The plain, JSON-ready dict that goes into `config.sparse_attention`.

        Defaults are written out, so that a checkpoint reads the same after another release has changed them.
        """
        return {
            field.name: plain(field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
        }

    def check_vocabulary(self, vocab_size: object) -> None:
        """Make sure that a model with so many tokens has those of `global_token_ids`; None: nobody knows how many.

        Raises:
            ValueError: it has not.
        """
        beyond = [token for token in self.global_token_ids if isinstance(vocab_size, int) and token >= vocab_size]
        if beyond:
            raise ValueError(f"global_token_ids must be below the model's vocab_size={vocab_size}, got {beyond[0]}")

    def replace(self, **changes: Any) -> SparseAttentionConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def with_fields(self, fields: Mapping[str, Any]) -> SparseAttentionConfig:
        """A copy with fields as `from_dict` takes them in place of its own, a `preset` among them.

        Raises:
            ValueError: as `from_dict`.
        """
        return self.from_dict({**self.to_dict(), **expand_preset(dict(fields))})

    def check_heads(self, layer_idx: int, num_heads: int, num_key_value_heads: int) -> None:
        """Make sure that what differs by head fits a layer.

        Raises:
            ValueError: if it lists other numbers of layers or heads, or more parts than there are KV heads.
        """
        self.key_budgets(layer_idx, num_key_value_heads)
        self.min_weights(layer_idx, num_heads)
        self.of_layer(layer_idx).kv_head_entries(num_key_value_heads)

    def of_layer(self, layer_idx: int) -> SparseAttentionConfig:
        """The config of one layer, without `by_layer`."""
        if not self.by_layer:
            return self
        return self.replace(by_layer=(), **dict(self.by_layer[layer_idx % len(self.by_layer)]))

    def of_entry(self, entry: int) -> SparseAttentionConfig:
        """The config of the KV heads that take an entry of `by_kv_head`, without it."""
        return self.replace(by_kv_head=(), **dict(self.by_kv_head[entry]))

    def kv_head_entries(self, num_key_value_heads: int) -> list[int]:
        """Which entry of `by_kv_head` each of a layer's KV heads takes; an empty list if there are none.

        Raises:
            ValueError: if there are more entries than KV heads.
        """
        num_entries = len(self.by_kv_head)
        if num_entries > num_key_value_heads:
            raise ValueError(
                f"by_kv_head must list at most as many parts as the layer has KV heads, {num_key_value_heads}, "
                f"got {num_entries}"
            )
        return [head * num_entries // num_key_value_heads for head in range(num_key_value_heads) if num_entries]

    def key_budgets(self, layer_idx: int, num_key_value_heads: int) -> list[int]:
        """Keys found through the buckets for a row, for each of a layer's KV heads.

        Raises:
            ValueError: if key_budget lists another number of layers or KV heads than the model has.
        """
        return _of_layer("key_budget", self.key_budget, layer_idx, num_key_value_heads, "KV heads")

    def min_weights(self, layer_idx: int, num_heads: int) -> list[float]:
        """Smallest weight of a routed key, for each of a layer's query heads.

        Raises:
            ValueError: if min_weight lists another number of layers or heads than the model has.
        """
        return _of_layer("min_weight", self.min_weight, layer_idx, num_heads, "heads")


_RANGES = {
    "window_size": (1, MAX_NUMBER),
    "num_global_tokens": (0, MAX_NUMBER),
    "stride": (0, MAX_NUMBER),
    "stride_offset": (0, MAX_NUMBER),
    "stride_width": (1, MAX_NUMBER),
    "num_random_keys": (0, 4096),
    "dilated_window_size": (0, 4096),
    "dilation": (1, MAX_NUMBER),
    "block_size": (0, MAX_ROW_KEYS),
    "block_offset": (0, MAX_ROW_KEYS),
    "num_neighbouring_blocks": (0, MAX_ROW_KEYS),
    "num_random_blocks": (0, MAX_ROW_KEYS),
    "num_voted_blocks": (0, MAX_ROW_KEYS),
    "num_hash_bits": (1, MAX_HASH_BITS),
    "seed": (0, 2**32 - 1),
    "page_size": (1, MAX_NUMBER),
    "dense_below": (0, 2**63 - 1),
}


def expand_preset(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config by their names of today, `preset` replaced by the fields that it stands for.

    Raises:
        ValueError: for an unknown preset, listing the names, or a retired field that cannot be read.
    """
    fields = current_fields(fields)
    if "preset" not in fields:
        return fields
    from hf_sparse_attn.presets import preset_fields

    return {**preset_fields(fields["preset"]), **{name: fields[name] for name in fields if name != "preset"}}


def _require_int(name: str, value: Any, minimum: int, maximum: int = MAX_NUMBER) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    if value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")


def _require_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _int_tuple(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name} must be a list of integers, got {values!r}")
    for value in values:
        _require_int(name, value, 0)
    return tuple(values)


def _require_weight(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"min_weight must be a number of at least 0 and under 1, got {value!r}")


def _by_head(value: Any, require: Callable[[Any], None], depth: int = 2) -> Any:
    """One value, one per layer, or one per layer and head (mixed, too), as nested tuples."""
    if depth and isinstance(value, (list, tuple)):
        return tuple(_by_head(item, require, depth - 1) for item in value)
    require(value)
    return value


def _of_layer(name: str, value: Any, layer_idx: int, num_heads: int, unit: str) -> list[Any]:
    """A layer's part of a field that may differ by layer and head: one value per head."""
    if not isinstance(value, tuple):
        return [value] * num_heads
    if layer_idx >= len(value):
        raise ValueError(f"{name} lists {len(value)} layers, but the model has a layer {layer_idx}")
    layer = value[layer_idx]
    if not isinstance(layer, tuple):
        return [layer] * num_heads
    if len(layer) != num_heads:
        raise ValueError(f"{name} lists {len(layer)} {unit} in layer {layer_idx}, but the model has {num_heads}")
    return list(layer)


def text_config(config: Any) -> Any:
    """The part of a model's config that its attention layers see: of a vision-language model, that of its text model.

    `sparse_attention`, num_hidden_layers and the like stand there.
    """
    return config.get_text_config(decoder=True)


def sparse_config(config: Any) -> SparseAttentionConfig:
    """The sparse attention of a model's config, the default one where it has none."""
    return SparseAttentionConfig.from_dict(getattr(text_config(config), "sparse_attention", None))


def attends_sparsely(config: Any) -> bool:
    """Whether a text model's attention is this package's, be it called "sparse" or by the name of a Hub kernel."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    return getattr(function, "__module__", "").partition(".")[0] == __package__


def longest_context(config: Any) -> int | None:
    """The most tokens that a model was made for, by the config of its text model; None if that does not say.

    That is max_position_embeddings, but dynamic scaling of rotary embeddings multiplies it.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        return None
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention") or parameters
    return int(longest * parameters["factor"]) if parameters.get("rope_type") == "dynamic" else longest


def layer_config(config: Any, layer_idx: int) -> Any:
    """What a model's config says of one layer; some families give their layers different heads.

    Of those, Transformers lets nobody read the fields that differ from the config itself.
    """
    config = text_config(config)
    by_layer = getattr(config, "per_layer_config", None)  # newer versions of Transformers
    return config if by_layer is None else by_layer[layer_idx]


def layer_shape(config: Any, layer_idx: int) -> tuple[int, int, int] | None:
    """Query heads, KV heads and head_dim of a layer by a model's config, or None if it does not count heads."""
    layer = layer_config(config, layer_idx)
    num_heads = getattr(layer, "num_attention_heads", None)
    if not isinstance(num_heads, int):
        return None
    num_kv_heads = getattr(layer, "num_key_value_heads", None)
    head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // num_heads
    return num_heads, num_heads if num_kv_heads is None else num_kv_heads, head_dim


# Of Transformers' kinds of layers.
_SLIDING = ("sliding_attention", "hybrid_sliding")
_WITHOUT_ATTENTION = ("linear_attention", "conv", "moe", "mlp")


def sliding_windows(config: Any) -> dict[int, int | None]:
    """The layers with attention by a model's config: index -> the layer's own sliding window, None without one.

    Layers of other kinds, such as linear attention, are left out. What a forward passes to the attention function is
    what holds; this tells it before there are weights.
    """
    config = text_config(config)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window = window if getattr(config, "use_sliding_window", True) else None
        return dict.fromkeys(range(config.num_hidden_layers), window)
    with_attention = {layer: kind for layer, kind in enumerate(kinds) if kind not in _WITHOUT_ATTENTION}
    return {layer: window if kind in _SLIDING else None for layer, kind in with_attention.items()}
