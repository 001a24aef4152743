"""The two functions that Transformers calls, and their registration; the only file that knows its registries."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn import ops
from hf_sparse_attn.attention import Inputs, attention
from hf_sparse_attn.compiled import compiled_attention
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.masking import signed_positions, unsupported
from hf_sparse_attn.parallel import head_split
from hf_sparse_attn.recording import DensityRecorder, Recorder
from hf_sparse_attn.routing import LayerPattern, layer_pattern

NAME = "sparse"
_CACHED = "_sparse_attention_pattern"
_RECORDER = "_sparse_attention_recorder"
_OBSERVER = "_sparse_attention_observer"

# What some families also pass, and what would change the answer: biases, the choices of an indexer of their own.
_NOT_READ = ("position_bias", "indices", "block_indices", "sinks", "cache")

Observer = Callable[[LayerPattern, Tensor, Tensor, Tensor, float, Tensor], None]


def register() -> None:
    """Register "sparse" with Transformers' attention and mask registries; idempotent."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, sparse_attention_forward)
    AttentionMaskInterface.register(NAME, signed_positions)


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function.

    Args:
        module: the attention layer; `module.config.sparse_attention` (a plain dict, or absent) is the configuration.
        query: [batch, num_heads, Q, head_dim].
        key, value: [batch, num_key_value_heads, KV, head_dim].
        attention_mask: what `masking.signed_positions` returned, or a caller's own causal 4D mask [batch, 1, Q, KV].
        scaling: factor on query . key; head_dim ** -0.5 if None.
        position_ids: [1 or batch, Q]; shows where packed documents start.
        sliding_window: the model's own window for this layer.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: [num_heads], attention sinks.
        cu_seq_lens_q, seq_idx: where packed documents start, as DataCollatorWithFlattening says it.

    Returns:
        output [batch, Q, num_heads, head_dim] in query's dtype, and None for the weights, which are never formed.

    Raises:
        ValueError: for an impossible config, or what this implementation does not support.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise unsupported("non-causal attention")
    if dropout > 0:
        raise unsupported(f"attention dropout (attention_dropout={dropout})")
    if output_attentions:
        raise unsupported("output_attentions=True, because attention weights are never formed")
    for name in _NOT_READ:
        if kwargs.get(name) is not None:
            raise unsupported(f"the argument {name} of {type(module).__name__}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = Inputs(query, key, value, attention_mask, position_ids, cu_seq_lens_q, seq_idx, s_aux)
    if torch.compiler.is_compiling():
        fields = getattr(module.config, "sparse_attention", None)
        split = head_split(module, query.shape[1], key.shape[1])
        return compiled_attention(inputs, fields, _layer_idx(module), split, sliding_window, scaling, softcap), None
    pattern = _module_pattern(module, query, key, sliding_window)
    output = attention(inputs, pattern, scaling, softcap, module.__dict__.get(_RECORDER))
    observer = module.__dict__.get(_OBSERVER)
    if observer is not None:
        observer(pattern, query, key, value, scaling, output)
    return output, None


def _module_pattern(module: nn.Module, query: Tensor, key: Tensor, sliding_window: int | None) -> LayerPattern:
    """The layer's pattern, built once per module and rebuilt when the configuration, device or dtype changes."""
    fields = getattr(module.config, "sparse_attention", None)
    dtype = ops.compute_dtype(query, key)
    layer = (sliding_window, query.shape[1], key.shape[1], query.shape[-1], query.device, dtype)
    cached = module.__dict__.get(_CACHED)
    if cached is None or cached[0] != fields or cached[1] != layer:
        heads = query.shape[1], key.shape[1]
        pattern = layer_pattern(
            SparseAttentionConfig.from_dict(fields),
            _layer_idx(module),
            *heads,
            query.shape[-1],
            query.device,
            dtype,
            sliding_window,
            head_split(module, *heads),
        )
        cached = (copy.deepcopy(fields), layer, pattern)  # a copy: the model's own may be changed in place
        module.__dict__[_CACHED] = cached
    return cached[2]


def _layer_idx(module: nn.Module) -> int:
    return int(getattr(module, "layer_idx", None) or 0)


def configure(model: nn.Module, **fields: Any) -> SparseAttentionConfig:
    """Change single fields of a loaded model's sparse attention; they take effect at the next forward.

    Args:
        model: a Transformers model, converted or not.
        fields: fields of `SparseAttentionConfig`; the others stay as they are.

    Returns:
        The whole configuration; `model.config.sparse_attention` holds it as a plain dict.

    Raises:
        ValueError: for an unknown field or an impossible value, naming the field; the model is left as it was.
    """
    text_config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    text_config.sparse_attention = merge_sparse_attention(text_config, fields)
    return SparseAttentionConfig.from_dict(text_config.sparse_attention)


@torch.no_grad()
def check_model(model: nn.Module) -> None:
    """Make sure that sparse attention really runs in a model, by a forward of eight tokens.

    Some families (Mamba, for one) take any attn_implementation and never call it: everything measured would be dense.

    Raises:
        ValueError: if the model does not call it, or asks for something that it does not support.
    """
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=next(model.parameters()).device)
    with record_density(model) as density:
        model(input_ids=tokens, use_cache=False)
    if density.admissible == 0:
        raise unsupported(f"{type(model).__name__}, which never calls its attention through Transformers' registry")


def merge_sparse_attention(config: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """A model config's own `sparse_attention` (none: the defaults) with single fields replaced, validated.

    Raises:
        ValueError: for an unknown field, an impossible value, or budgets or a calibrated hash of another model's shape;
            the message names the field.
    """
    own = getattr(config, "sparse_attention", None) or {}
    merged = SparseAttentionConfig.from_dict({**own, **(overrides or {})})
    num_heads = getattr(config, "num_attention_heads", None)
    if isinstance(num_heads, int):
        num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        last_layer = config.num_hidden_layers - 1
        layer_pattern(merged, last_layer, num_heads, num_kv_heads, head_dim, torch.device("cpu"), torch.float32)
    return merged.to_dict()


def record(model: nn.Module, recorder: Recorder) -> AbstractContextManager[None]:
    """Have `recorder` told what every row reads in the forwards of this block."""
    return _attached(model, _RECORDER, recorder)


def observe(model: nn.Module, observer: Observer) -> AbstractContextManager[None]:
    """Call `observer(pattern, query, key, value, scaling, output)` after each attention of this block's forwards."""
    return _attached(model, _OBSERVER, observer)


@contextmanager
def observe_dense(model: nn.Module, observer: Observer) -> Iterator[None]:
    """As `observe`, while every row of the model reads everything; its configuration is put back afterwards."""
    config: Any = model.config
    original = getattr(config, "sparse_attention", None)
    config.sparse_attention = {"dense_below": sys.maxsize}
    try:
        with observe(model, observer):
            yield
    finally:
        if original is None:
            del config.sparse_attention
        else:
            config.sparse_attention = original


@contextmanager
def record_density(model: nn.Module) -> Iterator[DensityRecorder]:
    """Count attended and admissible (row, key) pairs of the forwards in this block, over all sparse layers."""
    recorder = DensityRecorder()
    with record(model, recorder):
        yield recorder


@contextmanager
def _attached(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    modules = list(model.modules())
    for module in modules:
        module.__dict__[name] = value
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop(name, None)
