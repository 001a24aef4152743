"""A backend: the contract of `reference`, `torch`, `numba` and `triton` with the operation."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hf_sparse_attn.ops.common.call import AttentionCall
from hf_sparse_attn.patterns import LayerPattern


class Index(Protocol):
    """The keys of one cached document, by bucket. An implementation has its own, and appends to it as keys come."""

    pattern: LayerPattern
    key_offset: int
    length: int
    knows_sliding_windows: bool
    has_fixed_steps: bool  # it is a `FixedStepIndex`

    def crop(self, length: int) -> None:
        """Forget the keys after the first `length`."""

    def copy(self) -> Index:
        """Another one, of the same keys."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""


class FixedStepIndex(Index, Protocol):
    """An index that takes in one token after another by the same launches; see `AttentionCall.newest`."""

    def reserve(self, length: int) -> None:
        """Make room for so many keys, at once."""

    def is_ready(self, num_keys: int, room: int) -> bool:
        """Whether the step of the token after `num_keys` keys can be one of them, over keys with this room."""

    def advance(self, room: int) -> None:
        """Count on after such a step."""

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that such a step reads and writes in place."""


class StartIndex(Protocol):
    """Makes an implementation's empty index; in practice its class."""

    knows_sliding_windows: bool
    has_fixed_steps: bool

    def __call__(self, pattern: LayerPattern, num_kv_heads: int, key_offset: int) -> Index:
        """An index of no keys yet."""


class AttendDocument(Protocol):
    """Attention of one document."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """Rows at positions call.query_offset .. call.query_offset + Q - 1 attend to keys from call.key_offset on.

        Args:
            query: [num_heads, Q, head_dim], in a dtype of `Backend.dtype`.
            key, value: [num_key_value_heads, N, head_dim], in the same dtype.
            call: the rest.

        Returns:
            [num_heads, Q, head_dim].
        """


class FindKeys(Protocol):
    """Hashes a document's keys and finds every sparse row's keys, nothing else."""

    def __call__(self, query: Tensor, key: Tensor, pattern: LayerPattern) -> None: ...


class Backend:
    """An implementation. Each module of one has a `BACKEND`.

    Args:
        document_attention: the attention of one document.
        find_keys: to measure what routing costs; None where keys are not found by themselves.
        index: makes the index of a cached document's keys; None where a step groups them anew.
        keeps_half: inputs of half precision are not converted to float32.
        plain: it drops weights out and takes candidates that are given.
        both_sides: has non-causal attention.
        needs_check: its first use on a device is checked by `self_check`.
        dense_rows: rows that read everything have a way of its own, faster than SDPA.
    """

    def __init__(
        self,
        document_attention: AttendDocument,
        *,
        find_keys: FindKeys | None = None,
        index: StartIndex | None = None,
        keeps_half: bool = False,
        plain: bool = False,
        both_sides: bool = False,
        needs_check: bool = False,
        dense_rows: bool = False,
    ) -> None:
        self.document_attention = document_attention
        self.find_keys = find_keys
        self.index = index
        self.keeps_half = keeps_half
        self.plain = plain
        self.both_sides = both_sides
        self.needs_check = needs_check
        self.dense_rows = dense_rows

    def dtype(self, query: Tensor, key: Tensor) -> torch.dtype:
        """The gradients of the tensors that it is given."""
        return torch.promote_types(query.dtype, key.dtype) if self.keeps_half else compute_dtype(query, key)


def compute_dtype(query: Tensor, key: Tensor) -> torch.dtype:
    """float64 if an input is, else float32."""
    return torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
