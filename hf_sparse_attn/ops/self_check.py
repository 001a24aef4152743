"""Whether a backend computes on a device what PyTorch's operations do there: a small attention, by both.

Kernels for GPUs meet GPUs, drivers and compilers that nobody has tried them on, so the first call that needs them
checks them: forward, backward and decoding steps, once in a process for each device, dtype, head_dim and GQA group.
The check takes the scaling, softcap, hash size and refresh interval of that call, so that most of what is compiled for
it is what the call needs anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from logging import getLogger
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.hashing import BucketHash
from hf_sparse_attn.ops.backend import Backend, compute_dtype
from hf_sparse_attn.ops.common.call import AttentionCall
from hf_sparse_attn.ops.dispatch import find_backend
from hf_sparse_attn.patterns import LayerPattern, layer_pattern

PARTS = ("forward", "backward", "decoding")
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 1e-3, torch.float64: 1e-8}
_LONGEST_INTERVAL = 64
_STEPS = 2  # that decode one token each


class Kind(NamedTuple):
    """What is checked apart from others, as kernels are compiled for it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    group: int

    def __str__(self) -> str:
        heads = f"{self.group} query {'head' if self.group == 1 else 'heads'} per KV head"
        return f"{self.dtype} on {self.device}, head_dim {self.head_dim}, {heads}"


_problems: dict[Kind, str | None] = {}
_one_at_a_time = Lock()


def checked(backend: Backend, query: Tensor, key: Tensor, call: AttentionCall) -> Backend:
    """The backend, if it computes here what PyTorch's operations do, or is not to be checked; else theirs.

    Nothing is checked while a CUDA graph is captured or a backward runs, whose thread gradients of the check would wait
    for: a warning says so, and a later call checks.

    Args:
        backend: chosen by the config's `implementation`.
        query, key: [num_heads, Q, head_dim] and [num_key_value_heads, N, head_dim] of a call with sparse rows.
        call: the rest.

    Raises:
        RuntimeError: if the results differ, and the config names the backend.
    """
    if not (backend.needs_check and _applies_to(query.device)):
        return backend
    implementation = call.pattern.config.implementation
    kind = Kind(query.device, backend.dtype(query, key), query.shape[-1], len(query) // len(key))
    hindrance = None if kind in _problems else _hindrance(query.device)
    if hindrance is not None:
        _tell_once(f"Triton kernels run before they are checked for {kind}: {hindrance}; run a forward before it")
        return backend
    problem = _problem(kind, backend, call)
    if problem is None:
        return backend
    what = f"the Triton kernels are not right for {kind}: {problem}"
    report = "please report this, with what `hf-sparse-attn info --gpu` prints"
    if implementation != "auto":
        raise RuntimeError(f'implementation="{implementation}": {what}; choose "auto" or "torch", and {report}')
    _tell_once(f"{what}; in this process PyTorch's operations, which are slower, compute these calls; {report}")
    return find_backend("torch", query.device)


def _applies_to(device: torch.device) -> bool:
    """Elsewhere kernels are interpreted, for tests."""
    return device.type == "cuda"


def _hindrance(device: torch.device) -> str | None:
    """Why nothing can be checked now."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured"
    return "a backward runs" if torch._C._current_graph_task_id() != -1 else None


@cache
def _tell_once(message: str) -> None:
    getLogger("hf_sparse_attn").warning(message)


def _problem(kind: Kind, backend: Backend, call: AttentionCall) -> str | None:
    """What is wrong with the backend for this kind, as found by the first call of it."""
    with _one_at_a_time:
        if kind not in _problems:
            trial = _small_trial(kind, call)
            with ThreadPoolExecutor(1) as thread:  # autograd, autocast and hooks are there as in a new process
                _problems[kind] = thread.submit(find_problem, backend, trial).result()
        return _problems[kind]


def _small_trial(kind: Kind, call: AttentionCall) -> Trial:
    """Few tokens, an odd number, of which most rows are sparse."""
    pattern = call.pattern
    interval = min(pattern.config.page_size, _LONGEST_INTERVAL)
    config = SparseAttentionConfig(
        window_size=32,
        num_global_tokens=3,
        num_random_keys=min(pattern.config.num_random_keys, 8),
        key_budget=40,
        min_weight=0.01 if any(pattern.min_weights) else 0.0,
        page_size=interval,
        dense_below=19,
    )
    codes = pattern.bucket_hash.weight.shape[2:]
    return Trial(kind, 2, 2 * interval + 77, config, (codes[0], codes[1]), call.scaling, call.softcap)


class Trial(NamedTuple):
    """One attention that a backend and PyTorch's operations both compute.

    Args:
        kind: device, dtype, head_dim, query heads per KV head.
        num_kv_heads, num_tokens: see there.
        config: its pattern; without a sliding window of the model's own.
        codebooks: of its hash, and codes of each.
        scaling, softcap: see `AttentionCall`.
    """

    kind: Kind
    num_kv_heads: int
    num_tokens: int
    config: SparseAttentionConfig
    codebooks: tuple[int, int]
    scaling: float
    softcap: float | None = None

    def inputs(self, seed: int) -> list[Tensor]:
        """Seeded query, key, value and gradient of the output, [heads, num_tokens, head_dim]; scores of about 1."""
        generator = torch.Generator().manual_seed(seed)
        num_heads, head_dim = self.num_kv_heads * self.kind.group, self.kind.head_dim
        query, key, value, grad = (
            torch.randn(heads, self.num_tokens, head_dim, generator=generator, dtype=torch.float64)
            for heads in (num_heads, self.num_kv_heads, self.num_kv_heads, num_heads)
        )
        query = query / (self.scaling * head_dim**0.5)
        return [x.to(self.kind.device, self.kind.dtype) for x in (query, key, value, grad)]

    def pattern(self, dtype: torch.dtype) -> LayerPattern:
        """Its pattern, with a seeded hash in this dtype."""
        heads = self.num_kv_heads * self.kind.group, self.num_kv_heads, self.kind.head_dim
        generator, shape = torch.Generator().manual_seed(0), (self.num_kv_heads, self.kind.head_dim, *self.codebooks)
        weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.kind.device, dtype)
        pattern = layer_pattern(self.config, 0, *heads, self.kind.device, dtype)
        return replace(pattern, bucket_hash=BucketHash(weight, torch.zeros_like(weight[:, 0])))


def find_problem(backend: Backend, trial: Trial) -> str | None:
    """What is wrong with a backend, in words, or None.

    Rounding may decide which of two buckets a row takes, so two trials have to fail.
    """
    try:
        for seed in (0, 1):
            off = share_off(backend, trial, seed)
            if not any(off.values()):
                return None
    except Exception as error:  # compilers and drivers raise all kinds of them
        first_line = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first_line}"
    told = ", ".join(f"{share:.2g} of the rows of {part}" for part, share in off.items() if share)
    return f"{told} differ from PyTorch's operations by more than {TOLERANCE[trial.kind.dtype]:g}"


def share_off(backend: Backend, trial: Trial, seed: int = 0) -> dict[str, float]:
    """The share of rows of each of PARTS that are off by more than TOLERANCE, beside PyTorch's operations in float64.

    A row is a vector of the output or of a gradient; its error is held against its length and the mean length.
    """
    inputs = trial.inputs(seed)
    ours = _results(backend, inputs, trial)
    expected = _results(find_backend("torch", trial.kind.device), [x.double() for x in inputs], trial)
    tolerance = TOLERANCE[trial.kind.dtype]
    return {part: _share_off(ours[part], expected[part], tolerance) for part in PARTS}


def _share_off(ours: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> float:
    off = []
    for x, y in zip(ours, expected, strict=True):
        length = y.norm(dim=-1)
        right = (x.double() - y).norm(dim=-1) <= tolerance * (length + length.mean())
        off.append(~right.flatten())  # so are rows that are not finite
    return float(torch.cat(off).double().mean())


def _results(backend: Backend, inputs: list[Tensor], trial: Trial) -> dict[str, Sequence[Tensor]]:
    """The tensors of each of PARTS."""
    query, key, value = (x.clone().requires_grad_() for x in inputs[:3])
    call = AttentionCall(trial.pattern(compute_dtype(query, key)), 0, 0, trial.scaling, trial.softcap)
    output = backend.document_attention(query, key, value, call)
    gradients = torch.autograd.grad(output, (query, key, value), inputs[3])
    steps = output.detach() if backend.index is None else _in_steps(backend, inputs, call)
    return {"forward": [output.detach()], "backward": gradients, "decoding": [steps]}


@torch.no_grad()
def _in_steps(backend: Backend, inputs: list[Tensor], call: AttentionCall) -> Tensor:
    """The output [num_heads, N, head_dim] over a cache: all but the last tokens together, these one at a time."""
    query, key, value, _ = inputs
    assert backend.index is not None
    index = backend.index(call.pattern, len(key), 0)
    num_tokens, outputs, start = key.shape[1], [], 0
    for stop in range(num_tokens - _STEPS, num_tokens + 1):
        step = AttentionCall(call.pattern, start, 0, call.scaling, call.softcap, index=index)
        outputs.append(backend.document_attention(query[:, start:stop], key[:, :stop], value[:, :stop], step))
        start = stop
    return torch.cat(outputs, 1)
