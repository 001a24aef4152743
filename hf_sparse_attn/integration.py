"""The two functions that Transformers calls, and their registration; the only file that knows its registries."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn import ops
from hf_sparse_attn.attention import Inputs, attention
from hf_sparse_attn.attributes import replaced_attribute
from hf_sparse_attn.config import SparseAttentionConfig, layer_config, layer_shape, text_config
from hf_sparse_attn.custom_op import compiled_attention
from hf_sparse_attn.global_tokens import mark_global_tokens
from hf_sparse_attn.masks.mask_function import asks_what_is_packed, reads_both_sides, signed_positions
from hf_sparse_attn.masks.unsupported import unsupported
from hf_sparse_attn.notices import notice_positions
from hf_sparse_attn.patterns import LayerPattern, layer_pattern, marks_are_missing
from hf_sparse_attn.recording import DensityRecorder, Recorder, together
from hf_sparse_attn.side_channels import MARKS, PATTERN, WATCHED
from hf_sparse_attn.tensor_parallel import HeadSplit, head_split
from hf_sparse_attn.tracing import input_device, is_traced, refuse_transforms
from hf_sparse_attn.watching import CHOOSERS, OBSERVERS, RECORDERS, watchers, watching

NAME = "sparse"

# Arguments that some families also pass and that would change the answer: biases, the choices of an own indexer.
_NOT_READ = ("position_bias", "indices", "block_indices", "sinks", "cache")

# Arguments by which an attention layer takes the states of other tokens than its own.
_OTHER_STATES = ("key", "context", "key_value_states", "encoder_hidden_states", "cross_attention_states")

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
        attention_mask: what `masking.signed_positions` returned, or a caller's own 4D mask [batch, 1, Q, KV].
        scaling: factor on query . key; head_dim ** -0.5 if None.
        position_ids: [1 or batch, Q]; shows where packed documents start.
        sliding_window: the model's own window for this layer.
        is_causal: False: rows read on both sides; None: what the module says. A mask that Transformers made for
            non-causal attention tells it by itself.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: [num_heads], attention sinks.
        cu_seq_lens_q, seq_idx: where packed documents start, as DataCollatorWithFlattening says it.

    Returns:
        output [batch, Q, num_heads, head_dim] in query's dtype, and None for the weights, which are never formed.

    Raises:
        ValueError: for an impossible config, impossible numbers, or what this implementation does not support.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and not reads_both_sides(attention_mask)
    if not causal and _may_be_cross_attention(module):
        raise unsupported(f"cross-attention, which {type(module).__name__} may be")
    if dropout > 0:
        raise unsupported(f"attention dropout (attention_dropout={dropout})")
    if output_attentions:
        raise unsupported("output_attentions=True, because attention weights are never formed")
    for name in _NOT_READ:
        if kwargs.get(name) is not None:
            raise unsupported(f"the argument {name} of {type(module).__name__}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    split = head_split(module, query.shape[1], key.shape[1])
    if split.by_sequence and s_aux is not None and len(s_aux) != query.shape[1]:
        s_aux = s_aux.chunk(split.size)[split.rank]
    if split.by_sequence and attention_mask is None:  # whatever was said of packing is said of a part of the tokens
        cu_seq_lens_q, seq_idx = None, _gathered_documents(position_ids, query)
    elif not causal and cu_seq_lens_q is None and seq_idx is None:
        seq_idx = _restarts(position_ids, query, key)
    elif attention_mask is None and cu_seq_lens_q is None and seq_idx is None:
        seq_idx = packed_documents(module, position_ids, query, key)
    fields, marks = getattr(module.config, "sparse_attention", None), kwargs.get(MARKS)
    if marks is None and fields and fields.get("global_token_ids"):
        raise marks_are_missing()
    if marks is not None and split.by_sequence:
        raise unsupported("global_token_ids where rows are divided among processes (Ulysses)")
    inputs = Inputs(query, key, value, attention_mask, position_ids, cu_seq_lens_q, seq_idx, marks, s_aux)
    if is_traced(query):
        layer_idx = _traced_layer_idx(module, key, fields)
        layer = repr(fields), layer_idx, split, sliding_window, scaling, softcap, causal
        return compiled_attention(inputs, *layer, watched=_traced_number(module, WATCHED)), None
    refuse_transforms()
    pattern = _module_pattern(module, query, key, sliding_window, split, causal)
    notice_positions(module.config, inputs, pattern)
    recorder, choosers = together(watchers(module, RECORDERS)), watchers(module, CHOOSERS)
    choose = choosers[-1] if choosers else None
    output = attention(inputs, pattern, scaling, softcap, recorder, choose=choose)
    if observers := watchers(module, OBSERVERS):
        with torch.autocast(query.device.type, enabled=False):
            for observer in observers:
                observer(pattern, query, key, value, scaling, output)
    return output, None


def packed_documents(module: nn.Module, position_ids: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Number of each token's document [1 or batch, Q] by Transformers' own rule, for families that do not ask it."""
    if asks_what_is_packed(module.config) or query.shape[2] != key.shape[2]:
        return None
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return None
    return _numbered_documents(position_ids, query)


def _gathered_documents(position_ids: Tensor | None, query: Tensor) -> Tensor | None:
    """As above where sequence parallelism has gathered the tokens, and no mask function has seen more than its part."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != query.shape[2]:
        given = None if position_ids is None else tuple(position_ids.shape)
        raise ValueError(
            f"sequence parallelism must give position_ids of all {query.shape[2]} tokens to the attention function, "
            f"which show where packed documents start; got {'none' if given is None else f'shape {given}'}"
        )
    return _numbered_documents(position_ids, query)


def _restarts(position_ids: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """As above where attention is not causal: a document starts at position 0, as for Transformers' flash attention.

    Its bidirectional masks do not ask for position_ids.
    """
    if position_ids is None or position_ids.ndim != 2 or not position_ids.shape[1] == query.shape[2] == key.shape[2]:
        return None
    documents = (position_ids == 0).cumsum(-1)
    return documents if is_traced(query) or bool((documents > 1).any()) else None


def _may_be_cross_attention(module: nn.Module) -> bool:
    """Whether a layer takes the states of other tokens and does not say that it is an encoder's own.

    Its tensors do not tell: there may be as many keys as queries.
    """
    takes = _takes_other_states(type(module).forward)
    return "Cross" in type(module).__name__ or (takes and getattr(module, "is_decoder", None) is not False)


@cache
def _takes_other_states(forward: Callable[..., Any]) -> bool:
    return any(name in inspect.signature(forward).parameters for name in _OTHER_STATES)


def _numbered_documents(position_ids: Tensor, query: Tensor) -> Tensor | None:
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not is_traced(query) and not bool(starts.any()):
        return None
    return nn.functional.pad(starts.cumsum(-1), (1, 0))


def _module_pattern(
    module: nn.Module, query: Tensor, key: Tensor, sliding_window: int | None, split: HeadSplit, causal: bool
) -> LayerPattern:
    """The layer's pattern, built once per module and rebuilt when the configuration, device or dtype changes."""
    fields = getattr(module.config, "sparse_attention", None)
    dtype = ops.compute_dtype(query, key)
    layer = (sliding_window, query.shape[1], key.shape[1], query.shape[-1], query.device, dtype, split, causal)
    cached = module.__dict__.get(PATTERN)
    if cached is None or cached[0] != fields or cached[1] != layer:
        pattern = layer_pattern(
            SparseAttentionConfig.from_dict(fields),
            _number(module, "layer_idx"),
            query.shape[1],
            key.shape[1],
            query.shape[-1],
            query.device,
            dtype,
            sliding_window,
            split,
            causal,
        )
        cached = (copy.deepcopy(fields), layer, pattern)  # a copy: the model's own may be changed in place
        module.__dict__[PATTERN] = cached
    return cached[2]


def known_patterns(model: nn.Module) -> dict[int, LayerPattern]:
    """The patterns that a model's forwards had so far, by the index of the layer."""
    found = (module.__dict__.get(PATTERN) for module in model.modules())
    return {cached[2].layer_idx: cached[2] for cached in found if cached is not None}


def _number(module: nn.Module, name: str) -> int:
    return int(getattr(module, name, None) or 0)


def _traced_layer_idx(module: nn.Module, key: Tensor, fields: dict[str, Any] | None) -> int:
    """The layer's index for a graph, so that one graph serves many layers that are compiled one by one.

    While all rows are dense, any index means the same.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    dense_below = SparseAttentionConfig.dense_below if fields is None else fields.get("dense_below")
    if isinstance(dense_below, int) and statically_known_true(key.shape[2] <= dense_below):
        return 0
    return _traced_number(module, "layer_idx")


def _traced_number(module: nn.Module, name: str) -> int:
    """A number that a module holds, or 0."""
    if torch.compiler.is_dynamo_compiling():
        # Dynamo makes a graph for every such number, unless it may take it for a variable.
        with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
            return _number(module, name)
    return _number(module, name)


def configure(model: nn.Module, **fields: Any) -> SparseAttentionConfig:
    """Change single fields of a loaded model's sparse attention; they take effect at the next forward.

    With `global_token_ids` it calls `mark_global_tokens`.

    Args:
        model: a Transformers model, converted or not.
        fields: fields of `SparseAttentionConfig`; the others stay as they are.

    Returns:
        The whole configuration; `model.config.sparse_attention` holds it as a plain dict.

    Raises:
        ValueError: for an unknown field or an impossible value, naming the field; the model is left as it was.
    """
    merged = merge_sparse_attention(model.config, fields)
    if merged["global_token_ids"]:
        mark_global_tokens(model)
    text_config(model.config).sparse_attention = merged
    return SparseAttentionConfig.from_dict(merged)


@torch.no_grad()
def check_model(model: nn.Module) -> None:
    """Make sure that sparse attention really runs in a model, by a forward of eight tokens.

    Some families (Mamba, for one) take any attn_implementation and never call it: everything measured would be dense.
    Weights that DeepSpeed has shared out among processes while they were loaded (ZeRO-3) cannot be tried like this.

    Raises:
        ValueError: if the model does not call it, or asks for something that it does not support.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=input_device(model))
    with record_density(model) as density:
        model(input_ids=tokens, use_cache=False)
    if density.admissible == density.local == 0:
        raise unsupported(f"{type(model).__name__}, which never calls its attention through Transformers' registry")


def merge_sparse_attention(config: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """A model config's own `sparse_attention` (none: the defaults) with single fields replaced, validated.

    Raises:
        ValueError: for an unknown field, an impossible value, budgets or a calibrated hash of another model's shape, or
            numbers of heads that cannot be; the message names the field.
    """
    config = text_config(config)
    num_layers = config.num_hidden_layers
    for layer in range(max(num_layers, 1)):
        for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim"):
            number = getattr(config if num_layers < 1 else layer_config(config, layer), name, None)
            if isinstance(number, int) and number < 1:
                raise ValueError(f"{name} in its config.json must be at least 1, got {number}")
    fields = getattr(config, "sparse_attention", None)
    if fields is not None and not isinstance(fields, dict):
        raise ValueError(f"sparse_attention in its config.json must be an object, got {type(fields).__name__}")
    own = SparseAttentionConfig.from_dict(fields)
    merged = own.with_fields(overrides or {})
    merged.check_vocabulary(getattr(config, "vocab_size", None))
    shapes = {layer: layer_shape(config, layer) for layer in range(num_layers) if layer not in merged.dense_layers}
    known = {layer: shape for layer, shape in shapes.items() if shape is not None}
    for layer, (num_heads, num_kv_heads, _) in known.items():
        merged.check_heads(layer, num_heads, num_kv_heads)
    for shape, layer in {shape: layer for layer, shape in known.items()}.items():  # the hash, once for each shape
        layer_pattern(merged, layer, *shape, torch.device("cpu"), torch.float32)
    return merged.to_dict()


def record(model: nn.Module, recorder: Recorder) -> AbstractContextManager[None]:
    """Have `recorder` told what every row reads in this thread's forwards of this block, beside other recorders."""
    return watching(model, RECORDERS, recorder)


def observe(model: nn.Module, observer: Observer) -> AbstractContextManager[None]:
    """Call `observer(pattern, query, key, value, scaling, output)` after each attention of this thread's forwards of
    this block."""
    return watching(model, OBSERVERS, observer)


def choosing(model: nn.Module, choose: ops.Chooser) -> AbstractContextManager[None]:
    """Have `choose` find the keys that the buckets would give in this thread's forwards of this block."""
    return watching(model, CHOOSERS, choose)


@contextmanager
def observe_dense(model: nn.Module, observer: Observer) -> Iterator[None]:
    """As `observe`, while every row of the model reads everything; its configuration is put back afterwards."""
    with reading_everything(model), observe(model, observer):
        yield


def reading_everything(model: nn.Module) -> AbstractContextManager[None]:
    """In this block every row of the model reads everything; its configuration is put back afterwards."""
    return configured(model, {"dense_below": sys.maxsize})


@contextmanager
def configured(model: nn.Module, fields: dict[str, Any]) -> Iterator[None]:
    """Give a model another `sparse_attention` for a block; its own is put back afterwards."""
    with replaced_attribute(text_config(model.config), "sparse_attention", fields):
        yield


@contextmanager
def record_density(model: nn.Module) -> Iterator[DensityRecorder]:
    """Count attended and admissible (row, key) pairs of the forwards in this block; see `DensityRecorder`."""
    recorder = DensityRecorder()
    with record(model, recorder):
        yield recorder
