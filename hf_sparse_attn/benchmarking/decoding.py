"""Time of decoding, dense (SDPA) against sparse over the same `SparseCache`: one attention, or a whole model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse_attn.attention import Inputs, attention
from hf_sparse_attn.benchmarking.speed import check_rows, synchronize
from hf_sparse_attn.cache import SparseCache, SparseLayer, SparseStaticCache, layer_bytes
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.decoding_graph import DecodingGraph
from hf_sparse_attn.evaluation.dense_attention import SPARSE, dense_implementation
from hf_sparse_attn.integration import record_density
from hf_sparse_attn.ops import compute_dtype
from hf_sparse_attn.patterns import layer_pattern
from hf_sparse_attn.recording import DensityRecorder

WARM_STEPS = 2
_UNRECORDED_STEPS = 4  # of a graph: eager ones, one that compiles, the recording
_BYTES = 2**28  # of the caches that steps go through in turn: more than a processor keeps near
_MOST_LAYERS = 32
_CHECKED_STEPS = 16


def decoded_tokens(repeats: int) -> int:
    """How many tokens after the context `compare_decoding` needs."""
    return WARM_STEPS + max(8 * repeats, _CHECKED_STEPS)


@torch.no_grad()
def compare_decoding(
    inputs: tuple[Tensor, Tensor, Tensor], *, config: SparseAttentionConfig, layer_idx: int = 0, repeats: int = 5
) -> dict[str, Any]:
    """Time of one decoding step of one attention, batch 1, over a full cache: medians over alternating steps.

    As in a model, steps go from layer to layer: as many copies of the cache as no processor keeps near. A step appends
    a token's key and value and attends to them all; the sparse side also appends to its index. Before anything is
    timed, the sparse side's outputs are compared with the "torch" implementation's over a plain cache.

    Args:
        inputs: query [1, num_heads, T, head_dim], key and value [1, num_key_value_heads, T, head_dim]; all but the last
            `decoded_tokens(repeats)` tokens are the context.
        config, layer_idx: as of `speed.compare_speed`.
        repeats: eight steps each.

    Returns:
        "pass" ("decode"), "seq_len" (tokens of context), "dense_ms", "sparse_ms", "speedup", "density" (of the steps),
        and "dense_peak_bytes" and "sparse_peak_bytes": keys and values of the context, and the same with the index and
        the room for more. On a GPU also "dense_device_ms" and "sparse_device_ms": the last step again, without the time
        in which the host launches it, and without appending.

    Raises:
        RuntimeError: if the sparse side's output is wrong.
    """
    query, key, value = inputs
    context = query.shape[2] - decoded_tokens(repeats)
    heads = query.shape[1], key.shape[1], query.shape[-1]
    dtype, scaling = compute_dtype(query, key), query.shape[-1] ** -0.5
    pattern = layer_pattern(config, layer_idx, *heads, query.device, dtype)
    context_bytes = key[:, :, :context].nbytes + value[:, :, :context].nbytes
    layers = [SparseLayer() for _ in range(min(-(-_BYTES // context_bytes), _MOST_LAYERS))]
    for layer in layers:
        layer.update(key[:, :, :context], value[:, :, :context])

    def dense(token: slice, keys: Tensor, values: Tensor) -> Tensor:
        output = F.scaled_dot_product_attention(query[:, :, token], keys, values, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous()

    def sparse(token: slice, keys: Tensor, values: Tensor, recorder: DensityRecorder | None = None) -> Tensor:
        return attention(Inputs(query[:, :, token], keys, values), pattern, scaling, None, recorder)

    outputs, recorder = [], DensityRecorder()
    for step in range(_CHECKED_STEPS):
        token = slice(context + step, context + step + 1)
        outputs.append(sparse(token, *layers[0].update(key[:, :, token], value[:, :, token])))
    checked = slice(context, context + _CHECKED_STEPS)
    sparse(checked, *_held(layers[0]), recorder)
    plain = layer_pattern(config.replace(implementation="torch"), layer_idx, *heads, query.device, dtype)
    seen = key[:, :, : checked.stop], value[:, :, : checked.stop]
    check_rows(torch.cat(outputs, 1), attention(Inputs(query[:, :, checked], *seen), plain, scaling, None))
    layers[0].crop(-_CHECKED_STEPS)
    sparse_bytes = layers[0].nbytes

    spent: dict[Callable[..., Tensor], list[float]] = {dense: [], sparse: []}
    for step in range(WARM_STEPS + 8 * repeats):
        token = slice(context + step, context + step + 1)
        append = 0.0
        for side in (sparse, dense):
            synchronize(query.device)
            start = time.perf_counter()
            if side is sparse:
                for layer in layers:
                    layer.update(key[:, :, token], value[:, :, token])
                synchronize(query.device)
                append = time.perf_counter() - start
                start += append
            for layer in layers:
                side(token, *_held(layer))
            synchronize(query.device)
            spent[side].append((time.perf_counter() - start + append) / len(layers))
    medians = {side: 1e3 * statistics.median(seconds[WARM_STEPS:]) for side, seconds in spent.items()}
    others: dict[str, float] = {}
    if query.device.type == "cuda":
        for name, side in (("dense", dense), ("sparse", sparse)):
            last = [partial(side, token, *_held(layer)) for layer in layers]
            others[f"{name}_device_ms"] = device_milliseconds(last) / len(last)
    return {
        "pass": "decode",
        "seq_len": context,
        "dense_ms": medians[dense],
        "sparse_ms": medians[sparse],
        **others,
        "speedup": medians[dense] / medians[sparse],
        "density": recorder.density,
        "dense_peak_bytes": context_bytes,
        "sparse_peak_bytes": sparse_bytes,
    }


def _held(layer: SparseLayer) -> tuple[Tensor, Tensor]:
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def device_milliseconds(works: Sequence[Callable[[], object]]) -> float:
    """Time that a GPU spends on pieces of work, recorded once and replayed: the median of several replays."""
    for work in works:
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    spent = []
    for _ in range(WARM_STEPS + _CHECKED_STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        spent.append(float(start.elapsed_time(end)))
    return statistics.median(spent[WARM_STEPS:])


@torch.no_grad()
def compare_generation(
    model: PreTrainedModel, input_ids: Tensor, repeats: int = 3, compiled: bool = False
) -> dict[str, Any]:
    """Time of one generated token of a whole model: medians over steps that alternate between dense and sparse.

    One sparse prefill fills one `SparseCache`, in which both sides go on; each appends its tokens in place.

    Args:
        model: with attn_implementation="sparse"; left so.
        input_ids: [1, N] int64, the context.
        repeats: eight timed tokens of each side.
        compiled: both sides' steps are compiled by torch.compile, over one `SparseStaticCache`.

    Returns:
        As `compare_decoding`, with "pass" "generation" or "compiled_generation"; the bytes are of all layers. On a GPU
        also "sparse_graph_ms", unless compiled: the sparse side by a `DecodingGraph`, None for a model that has none.
    """
    step: Callable[..., Any] = torch.compile(model.forward) if compiled else model
    cache: SparseCache | SparseStaticCache
    if compiled:
        num_tokens = input_ids.shape[1] + 1 + 2 * (WARM_STEPS + 8 * repeats)
        cache = SparseStaticCache(model.config, max_cache_len=num_tokens)
    else:
        cache = SparseCache(model.config)
    logits = model(input_ids=input_ids, past_key_values=cache, logits_to_keep=1).logits
    spent: dict[str, list[float]] = {SPARSE: [], dense_implementation(model): []}
    try:
        with record_density(model) as counted:
            logits = model(input_ids=logits[:, -1:].argmax(-1), past_key_values=cache).logits
        layers: list[Any] = cache.layers
        held = sum(map(layer_bytes, layers))
        dense_bytes = sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))
        for _ in range(WARM_STEPS + 8 * repeats):
            for implementation, seconds in spent.items():
                model.set_attn_implementation(implementation)
                synchronize(input_ids.device)
                start = time.perf_counter()
                logits = step(input_ids=logits[:, -1:].argmax(-1), past_key_values=cache).logits
                synchronize(input_ids.device)
                seconds.append(time.perf_counter() - start)
    finally:
        model.set_attn_implementation("sparse")
    graph: dict[str, float | None] = {}
    if input_ids.device.type == "cuda" and isinstance(cache, SparseCache):
        graph["sparse_graph_ms"] = graph_milliseconds(model, cache, logits[:, -1:].argmax(-1), repeats)
    sparse_ms, dense_ms = (1e3 * statistics.median(seconds[WARM_STEPS:]) for seconds in spent.values())
    return {
        "pass": "compiled_generation" if compiled else "generation",
        "seq_len": input_ids.shape[1],
        "dense_ms": dense_ms,
        "sparse_ms": sparse_ms,
        **graph,
        "speedup": dense_ms / sparse_ms,
        "density": counted.density,
        "dense_peak_bytes": dense_bytes,
        "sparse_peak_bytes": held,
    }


def graph_milliseconds(model: PreTrainedModel, cache: SparseCache, token: Tensor, repeats: int) -> float | None:
    """Time of one generated token after `token` [1, 1] by a `DecodingGraph`: the median of eight steps per repeat.

    None where there is no such graph of the model.
    """
    spent = []
    try:
        step = DecodingGraph(model, cache)
        for _ in range(_UNRECORDED_STEPS + 8 * repeats):
            synchronize(token.device)
            start = time.perf_counter()
            token = step(token)[:, -1:].argmax(-1)
            synchronize(token.device)
            spent.append(time.perf_counter() - start)
    except ValueError:
        return None
    return 1e3 * statistics.median(spent[_UNRECORDED_STEPS:])
