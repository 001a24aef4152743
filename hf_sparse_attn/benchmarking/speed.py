"""Time and memory of the attention alone or of a whole model, dense (SDPA) against sparse, alternating in one run."""

from __future__ import annotations

import gc
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from hf_sparse_attn.attention import Inputs, attention
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.evaluation.dense_attention import dense_implementation
from hf_sparse_attn.integration import observe, record_density
from hf_sparse_attn.ops import compute_dtype, find_keys
from hf_sparse_attn.patterns import LayerPattern, layer_pattern
from hf_sparse_attn.recording import DensityRecorder

_MOST_TURNS = 1000
_CHECKED_ROWS = 256
_MOST_ERROR = 0.05
_MOST_ROWS = 0.1


def compare_speed(
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    config: SparseAttentionConfig,
    layer_idx: int = 0,
    passes: str = "forward",
    repeats: int = 5,
    backends: Sequence[str] = (),
) -> dict[str, Any]:
    """Time and memory of one attention, batch 1: medians over alternating runs.

    Before anything is timed, the sparse side's last rows are compared with the "torch" implementation's.

    Args:
        inputs: query [1, num_heads, N, head_dim], key and value [1, num_key_value_heads, N, head_dim].
        config: the sparse attention's configuration; both sides end in [1, N, num_heads, head_dim].
        layer_idx: layer whose budgets and hash apply.
        passes: "forward" or "forward_backward".
        repeats: timed runs of each side, after two that are not counted; short ones are repeated for half a second.
        backends: what is timed besides what SDPA chooses by itself: "flash", "cudnn" and "efficient" are SDPA's own
            backends, "flex" is FlexAttention over the sparse side's window and leading global keys alone.

    Returns:
        One row of the benchmark: "pass", "seq_len", "dense_ms", "sparse_ms", "routing_ms" (hashing the keys and finding
        every row's keys, alone; part of the sparse forward), "floor_ms" (the products that the sparse side forms, at
        the rate that SDPA reaches in this run), "speedup", "density", "scored_density", and "dense_peak_bytes" and
        "sparse_peak_bytes": the most memory held above what was held before, inputs excluded; and for each of
        `backends` its "..._ms", None where it cannot compute this. "dense_ms" is the fastest dense one.

    Raises:
        RuntimeError: if the sparse side's output is wrong.
    """
    case = _Case(inputs, config, layer_idx, passes == "forward_backward")
    case.check()
    recorder = case.densities()
    routing = partial(find_keys, case.query[0].detach(), case.key[0].detach(), case.pattern)
    timed: dict[str, Callable[[], None]] = {"dense": case.dense, "sparse": case.sparse, "routing": routing}
    timed |= {name: partial(case.dense, name) for name in backends if case.can_compute(name)}
    # The run before lets libraries take their working memory.
    peaks = {}
    for side, work in (("dense", case.dense), ("sparse", case.sparse)):
        work()
        peaks[side] = peak_bytes(work, case.query.device)
    row: dict[str, Any] = _compared(timed, case.query.device, repeats, peaks)
    others = {f"{name}_ms": row.get(f"{name}_ms") for name in backends}
    row["dense_ms"] = min([row["dense_ms"], *(others[f"{name}_ms"] or math.inf for name in backends if name != "flex")])
    row["speedup"] = row["dense_ms"] / row["sparse_ms"]
    share = (recorder.scored_density + recorder.density) / 2  # products with keys, and with values
    return {
        "pass": passes,
        "seq_len": case.query.shape[2],
        **row,
        **others,
        "floor_ms": row["dense_ms"] * share,
        "density": recorder.density,
        "scored_density": recorder.scored_density,
    }


def measure_stages(
    inputs: tuple[Tensor, Tensor, Tensor], *, config: SparseAttentionConfig, layer_idx: int = 0, repeats: int = 5
) -> dict[str, Any]:
    """Where the time of the compiled implementation goes, on a CPU: differences of medians of runs that end earlier.

    Args:
        inputs, config, layer_idx, repeats: as of `compare_speed`; some rows must be sparse.

    Returns:
        "pass" ("stages"), "seq_len", "dense_ms" and "dense_backward_ms" (SDPA's forward, and what its backward adds),
        "density", "scored_density", and "stages": a list of "stage", "ms", "gflop" (of its products; for the bucket
        scores at most), "floor_ms" (these at the rate that SDPA's forward reaches in this run) and "gbyte" (keys and
        values loaded, from whatever cache they are in).

    Raises:
        ValueError: if all rows are dense.
    """
    from hf_sparse_attn.ops.numba.chunks import STAGES, run_stages

    case, trained = (_Case(inputs, config, layer_idx, backward) for backward in (False, True))
    query, key, value = (x[0] for x in (case.query, case.key, case.value))
    (num_heads, num_tokens, head_dim), num_kv_heads = query.shape, len(key)
    dense_rows = case.pattern.dense_rows()
    if dense_rows is None or dense_rows >= num_tokens:
        raise ValueError(f"all of the {num_tokens} rows are dense: there are no stages")
    timed: dict[str, Callable[[], None]] = {
        last: partial(run_stages, query, key, value, case.pattern, head_dim**-0.5, last) for last in STAGES
    }
    others = {"dense": case.dense, "sparse": case.sparse, "dense both": trained.dense, "sparse both": trained.sparse}
    total = _medians(timed | others, query.device, repeats)

    recorder = case.densities()
    pairs = num_heads * num_tokens * (num_tokens + 1) / 2
    dense_pairs = num_heads * dense_rows * (dense_rows + 1) / 2
    scored, attended = (pairs * share - dense_pairs for share in (recorder.scored_density, recorder.density))
    product = 2 * head_dim / 1e9  # of one query with one key
    rate = 2 * pairs * product / total["dense"]  # GFLOP per ms
    own_key, own_value = 4 * head_dim * scored * num_kv_heads / num_heads / 1e9, 4 * head_dim * attended / 1e9
    weight = case.pattern.bucket_hash.weight
    sparse_rows = num_kv_heads * (num_tokens - dense_rows)
    work = {  # GFLOP and GB
        "hash": (num_tokens * weight[..., 0].numel() * weight.shape[-1] * 2 / 1e9, 0.0),
        "bucket scores": (sparse_rows * case.pattern.bucket_hash.num_buckets * product, 0.0),
        "key scores": (scored * product, own_key),
        "values": (attended * product, own_value),
        "dense rows": (2 * dense_pairs * product, 0.0),
        "gradients": (4 * attended * product + 5 * dense_pairs * product, 0.0),
    }
    milliseconds = {stage: total[stage] - (total[STAGES[i - 1]] if i else 0.0) for i, stage in enumerate(STAGES)}
    milliseconds["dense rows"] = total["sparse"] - total["values"]
    milliseconds["recomputation"] = total["softmax"]
    milliseconds["gradients"] = total["sparse both"] - total["sparse"] - total["softmax"]
    return {
        "pass": "stages",
        "seq_len": num_tokens,
        "dense_ms": total["dense"],
        "dense_backward_ms": total["dense both"] - total["dense"],
        "density": recorder.density,
        "scored_density": recorder.scored_density,
        "stages": [
            {"stage": stage, "ms": spent, "gflop": gflop, "floor_ms": gflop / rate, "gbyte": gbyte}
            for stage, spent in milliseconds.items()
            for gflop, gbyte in [work.get(stage, (0.0, 0.0))]
        ],
    }


class _Case:
    """One attention, dense and sparse, with or without gradients, from Transformers' layout to Transformers' layout.

    The pattern is built once, as a model builds it.
    """

    def __init__(
        self, inputs: tuple[Tensor, Tensor, Tensor], config: SparseAttentionConfig, layer_idx: int, backward: bool
    ) -> None:
        self.query, self.key, self.value = (x.detach().requires_grad_(backward) for x in inputs)
        query, key = self.query, self.key
        dtype = compute_dtype(query, key)
        heads = query.shape[1], key.shape[1], query.shape[-1]
        self.pattern = layer_pattern(config, layer_idx, *heads, query.device, dtype)
        self.gradient = torch.randn_like(query.transpose(1, 2)).contiguous() if backward else None

    def dense(self, backend: str | None = None) -> None:
        """By SDPA, or by one of the `backends` of `compare_speed`."""
        attend: Callable[..., Tensor] = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        chosen: AbstractContextManager[Any] = nullcontext()
        if backend == "flex":
            attend = self._flex()
        elif backend is not None:
            chosen = sdpa_kernel(getattr(SDPBackend, f"{backend.upper()}_ATTENTION"))
        with chosen:
            self._run(lambda: attend(self.query, self.key, self.value).transpose(1, 2).contiguous())

    def can_compute(self, backend: str) -> bool:
        """Whether a backend takes these inputs."""
        try:
            self.dense(backend)
        except (RuntimeError, NotImplementedError):
            return False
        return True

    @cache  # noqa: B019  # lives as long as the case
    def _flex(self) -> Callable[..., Tensor]:
        """Compiled FlexAttention over the window and the leading global keys."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        window, num_global = self.pattern.config.window_size, self.pattern.config.num_global_tokens
        num_tokens = self.query.shape[2]

        def reads(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            return (key <= row) & ((key > row - window) | (key < num_global))

        mask = create_block_mask(reads, None, None, num_tokens, num_tokens, device=str(self.query.device))
        return partial(torch.compile(flex_attention), block_mask=mask, enable_gqa=True)

    @torch.no_grad()
    def check(self) -> None:
        """Compare the last rows with plain torch operations in float32 or more, over cached keys.

        Raises:
            RuntimeError: if more rows differ than those to which rounding may give another bucket.
        """
        ours = self._sparse()[:, -_CHECKED_ROWS:]
        inputs = Inputs(
            self.query[:, :, -_CHECKED_ROWS:].to(torch.promote_types(ours.dtype, torch.float32)), self.key, self.value
        )
        plain = replace(self.pattern, config=self.pattern.config.replace(implementation="torch"))
        expected = attention(inputs, plain, self.query.shape[-1] ** -0.5, None, None)
        check_rows(ours, expected)

    def sparse(self) -> None:
        self._run(self._sparse)

    def densities(self) -> DensityRecorder:
        recorder = DensityRecorder()
        with torch.no_grad():
            self._sparse(recorder)
        return recorder

    def _sparse(self, recorder: DensityRecorder | None = None) -> Tensor:
        inputs = Inputs(self.query, self.key, self.value)
        return attention(inputs, self.pattern, self.query.shape[-1] ** -0.5, None, recorder)

    def _run(self, attend: Callable[[], Tensor]) -> None:
        with torch.set_grad_enabled(self.gradient is not None):
            output = attend()
            if self.gradient is not None:
                torch.autograd.grad(output, (self.query, self.key, self.value), self.gradient)


def compare_model_speed(
    model: PreTrainedModel, input_ids: Tensor, passes: str = "prefill", repeats: int = 3
) -> dict[str, Any]:
    """Time and memory of a whole model, dense and sparse: medians over alternating runs.

    Args:
        model: with attn_implementation="sparse"; left so, without gradients.
        input_ids: [1, N] int64.
        passes: "prefill" (all layers, the last token's logits) or "training_step" (loss of all tokens, gradients of all
            weights; no optimizer).
        repeats: timed runs of each side, after one that is not counted.

    Returns:
        As `compare_speed`, without routing and floor.
    """

    def run(implementation: str) -> None:
        model.set_attn_implementation(implementation)
        if passes == "prefill":
            with torch.no_grad():
                model(input_ids=input_ids, logits_to_keep=1)
        else:
            model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
            model.zero_grad()

    def sparse() -> None:
        with record_density(model) as counted:
            run("sparse")
        densities.append((counted.density, counted.scored_density))

    densities: list[tuple[float, float]] = []
    device = input_ids.device
    try:
        dense = partial(run, dense_implementation(model))
        peaks = {"dense": peak_bytes(dense, device), "sparse": peak_bytes(sparse, device)}
        timed: dict[str, Callable[[], None]] = {"dense": dense, "sparse": partial(run, "sparse")}
        row = _compared(timed, device, repeats, peaks)
    finally:
        model.set_attn_implementation("sparse")
    density, scored_density = densities[0]
    shares = {"density": density, "scored_density": scored_density}
    return {"pass": passes, "seq_len": input_ids.shape[1], **row, **shares}


def _compared(
    timed: Mapping[str, Callable[[], None]], device: torch.device, repeats: int, peaks: dict[str, int]
) -> dict[str, float]:
    """Medians in ms, the speedup of sparse over dense, and the given peaks."""
    medians = _medians(timed, device, repeats, warm=True)
    return {
        **{f"{part}_ms": milliseconds for part, milliseconds in medians.items()},
        "speedup": medians["dense"] / medians["sparse"],
        "dense_peak_bytes": peaks["dense"],
        "sparse_peak_bytes": peaks["sparse"],
    }


def _medians(
    timed: Mapping[str, Callable[[], None]], device: torch.device, repeats: int, warm: bool = False
) -> dict[str, float]:
    """Milliseconds of each, in turns, after a run of each unless they are warm; short ones for half a second."""
    seconds: dict[str, list[float]] = {part: [] for part in timed}
    for turn in range(_MOST_TURNS):
        for part, work in timed.items():
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            if turn or warm:
                seconds[part].append(time.perf_counter() - started)
        if turn + warm >= repeats and sum(map(sum, seconds.values())) > 0.5 * len(timed):
            break
    return {part: 1e3 * statistics.median(spent) for part, spent in seconds.items()}


@torch.no_grad()
def layer_inputs(model: PreTrainedModel, input_ids: Tensor, layer_idx: int) -> tuple[Tensor, Tensor, Tensor]:
    """What reaches the attention of one layer, in float32, when the sparse model reads a text.

    Args:
        model: with attn_implementation="sparse".
        input_ids: [1, N] int64.
        layer_idx: which layer; later ones are not computed.

    Returns:
        query [1, num_heads, N, head_dim], key and value [1, num_key_value_heads, N, head_dim].
    """

    class Done(Exception):  # noqa: N818  # no error
        pass

    found: list[Tensor] = []

    def observer(
        pattern: LayerPattern, query: Tensor, key: Tensor, value: Tensor, scaling: float, output: Tensor
    ) -> None:
        if pattern.layer_idx == layer_idx:
            found.extend(x.float().contiguous() for x in (query, key, value))
            raise Done

    with suppress(Done), observe(model, observer):
        model.base_model(input_ids=input_ids, use_cache=False)
    if not found:
        raise ValueError(f"layer {layer_idx} of the model has no attention")
    return found[0], found[1], found[2]


def fitted_exponent(seq_lens: Sequence[int], milliseconds: Sequence[float]) -> float:
    """Slope of the straight line through the logarithms: 2 for quadratic, 1 for linear time."""
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (seq_lens, milliseconds))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def measure_dense_below(config: SparseAttentionConfig, inputs: tuple[Tensor, Tensor, Tensor], layer_idx: int) -> int:
    """The position from which on a sparse row is cheaper than a dense one, on this machine.

    A dense row at position p takes time proportional to p, a sparse one the same everywhere; both are taken from the
    second half of the tokens, so that the budgets are full.

    Args:
        config: the sparse attention's configuration; its own `dense_below` is not used.
        inputs: query [1, num_heads, N, head_dim], key and value [1, num_key_value_heads, N, head_dim], of one layer.
        layer_idx: which layer that is.
    """
    seq_len = inputs[0].shape[2]
    half = seq_len // 2
    timed: dict[str, Callable[[], None]] = {}
    for n in (half, seq_len):
        cut = inputs[0][:, :, :n], inputs[1][:, :, :n], inputs[2][:, :, :n]
        case = _Case(cut, config.replace(dense_below=0, dense_layers=()), layer_idx, False)
        timed |= {f"dense {n}": case.dense, f"sparse {n}": case.sparse}
    spent = _medians(timed, inputs[0].device, 3)
    dense_row, sparse_row = (
        (spent[f"{side} {seq_len}"] - spent[f"{side} {half}"]) / half for side in ("dense", "sparse")
    )
    position = sparse_row / dense_row * (0.75 * seq_len)  # a dense row at the mean position takes dense_row
    return max(0, round(position / config.page_size) * config.page_size)


def make_inputs(
    seq_len: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded normal query [1, num_heads, N, head_dim], key and value [1, num_kv_heads, N, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, seq_len, head_dim, generator=generator, dtype=torch.float32).to(device, dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return query, key, value


def check_rows(ours: Tensor, expected: Tensor) -> None:
    """Compare two outputs [..., head_dim] row by row.

    Raises:
        RuntimeError: if more rows differ than those to which rounding may give another bucket.
    """
    off = ~((ours - expected).norm(dim=-1) <= _MOST_ERROR * expected.norm(dim=-1))
    share = float(off.float().mean())
    if share > _MOST_ROWS:
        raise RuntimeError(f"the sparse attention is wrong: {share:.0%} of its rows are over {_MOST_ERROR:.0%} off")


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock sees finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Most memory held during `run` above what was held before it.

    On a GPU the allocator's own count; on a CPU the process's resident set, sampled every millisecond.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = highest = _resident_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, _resident_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    run()
    done.set()
    sampler.join()
    return highest - before


def _resident_bytes() -> int:
    try:
        import psutil

        return int(psutil.Process().memory_info().rss)
    except ImportError:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096
