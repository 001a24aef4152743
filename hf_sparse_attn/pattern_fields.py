"""The fields of a config that make patterns: which of them fit together, and how they differ by layer and head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_sparse_attn.retired_fields import current_fields

if TYPE_CHECKING:
    from hf_sparse_attn.config import SparseAttentionConfig

MAX_ROW_KEYS = 2**14  # of a row's own: they are written out as a table for about a thousand rows at a time
_NEEDS = {
    "stride_offset": "stride",
    "stride_width": "stride",
    "dilation": "dilated_window_size",
    "block_offset": "block_size",
    "num_neighbouring_blocks": "block_size",
    "num_random_blocks": "block_size",
    "num_voted_blocks": "block_size",
}
FROM_THE_ROW = ("dilated_window_size", "slash_distances", "block_size")  # cross-attention cannot count from there
PATTERN_FIELDS = (
    "window_size",
    "num_global_tokens",
    "global_token_indices",
    "stride",
    "num_random_keys",
    *FROM_THE_ROW,
    *_NEEDS,
)
OVERRIDABLE = {"by_layer": (*PATTERN_FIELDS, "by_kv_head"), "by_kv_head": PATTERN_FIELDS}

Overrides = tuple[tuple[tuple[str, Any], ...], ...]  # dicts of fields, as pairs: a config can be hashed


def check_patterns(config: SparseAttentionConfig) -> None:
    """Whether fields of patterns, each in its own range, fit together.

    Raises:
        ValueError: if one does nothing, as another turns its pattern off, or they ask for too much.
    """
    for name, needed in _NEEDS.items():
        value = getattr(config, name)
        if value != getattr(type(config), name) and not getattr(config, needed):
            raise ValueError(f"{name} does nothing without {needed}, got {name}={value} and {needed}=0")
    if config.stride and config.stride_offset + config.stride_width > config.stride:
        raise ValueError(
            f"stride_offset + stride_width must be at most stride={config.stride}, got "
            f"{config.stride_offset} + {config.stride_width}"
        )
    if config.block_offset and config.block_offset >= config.block_size:
        raise ValueError(f"block_offset must be under block_size={config.block_size}, got {config.block_offset}")
    if config.num_voted_blocks and _is_any(config.key_budget):
        raise ValueError(
            "num_voted_blocks stand in place of keys found through buckets and need key_budget=0, got "
            f"num_voted_blocks={config.num_voted_blocks} and key_budget={config.key_budget}"
        )
    blocks = 1 + config.num_neighbouring_blocks + config.num_random_blocks
    own = config.num_random_keys + config.dilated_window_size + len(config.slash_distances) + config.block_size * blocks
    if own > MAX_ROW_KEYS:
        raise ValueError(
            "num_random_keys + dilated_window_size + the number of slash_distances + block_size * (1 + "
            f"num_neighbouring_blocks + num_random_blocks) must be at most {MAX_ROW_KEYS}, got {own}"
        )


def _is_any(budget: Any) -> bool:
    return any(map(_is_any, budget)) if isinstance(budget, (list, tuple)) else budget != 0


def looks_ahead(config: SparseAttentionConfig) -> bool:
    """Whether later tokens decide what a row reads: there are voted blocks, in some layer or head."""
    layers = [config.of_layer(layer) for layer in range(max(len(config.by_layer), 1))]
    heads = [layer.of_entry(entry) for layer in layers for entry in range(len(layer.by_kv_head))]
    return any(part.num_voted_blocks for part in layers + heads)


def check_causal(config: SparseAttentionConfig) -> None:
    """Make sure that no later token decides what a row reads, for what computes losses.

    Raises:
        ValueError: if one does.
    """
    if looks_ahead(config):
        raise ValueError(
            "num_voted_blocks look at later tokens, so a loss over them cannot be trained on or believed; they are for "
            "the causal prefill of inference alone"
        )


def read_overrides(config: SparseAttentionConfig, name: str) -> Overrides:
    """The validated value of a config's `by_layer` or `by_kv_head`.

    Raises:
        ValueError: if it is no list of dicts of fields, or one of these gives an impossible config.
    """
    entries, checked, allowed = getattr(config, name), [], OVERRIDABLE[name]
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"{name} must be a list of dicts of fields, got {entries!r}")
    for i, entry in enumerate(entries):
        is_pairs = isinstance(entry, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in entry)
        if not isinstance(entry, dict) and not is_pairs:
            raise ValueError(f"{name} must be a list of dicts of fields, got {entry!r} as entry {i}")
        fields = current_fields(dict(entry))
        for field in fields:
            if field not in allowed:
                raise ValueError(f"{name} may name {', '.join(allowed)}; got {field!r} in entry {i}")
        try:
            whole = config.replace(**{"by_layer": (), name: (), **fields})
        except ValueError as error:
            raise ValueError(f"{name}, entry {i}: {error}") from error
        checked.append(tuple((field, getattr(whole, field)) for field in sorted(fields)))
    return tuple(checked)


def plain(name: str, value: Any) -> Any:
    """A field's value, ready for JSON."""
    if name in OVERRIDABLE:
        return [{field: plain(field, own) for field, own in entry} for entry in value]
    return _listed(value)


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
