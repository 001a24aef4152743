"""The layers of a `SparseCache`: all keys with their index, or the keys that a policy keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hf_sparse_attn.cache.buffers import allocate, can_hold, is_writable, size_ahead
from hf_sparse_attn.cache.document_indexes import KeyIndexes
from hf_sparse_attn.cache.evicting import KeptKeys
from hf_sparse_attn.side_channels import INDEXES, KEPT
from hf_sparse_attn.tracing import carries_gradients, is_traced


class SparseLayer(DynamicLayer):
    """Keys and values [batch, num_key_value_heads, tokens, head_dim] of one layer, with room for more, and their index.

    Args:
        max_cache_len: tokens to allocate at once, or None.
    """

    def __init__(self, max_cache_len: int | None = None) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.indexes = KeyIndexes()
        self._allocated: tuple[Tensor, Tensor] | None = None  # `keys` and `values` are their first tokens
        self._blank: tuple[Tensor, Tensor] | None = None  # as `_allocated`, where it holds a number everywhere
        self._known: Tensor | None = None  # `keys` as they were left

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values [batch, num_key_value_heads, new tokens, head_dim]; returns all of them."""
        if self.indexes.step is not None:
            return self._put(self.indexes.step.slot, key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._known = self.keys
        self._notice_other_keys()
        if carries_gradients(key_states, value_states, self.keys, self.values) or is_traced(key_states):
            self._allocated = None
            keys, values = super().update(key_states, value_states)
        else:
            start, stop = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
            room = self._with_room(key_states, value_states, stop)
            for whole, new in zip(room, (key_states, value_states), strict=True):
                whole[:, :, start:stop] = new
            keys, values = self.keys, self.values = room[0][:, :, :stop], room[1][:, :, :stop]
        setattr(keys, INDEXES, self.indexes)  # which hold no keys
        self._known = self.keys
        return keys, values

    def _with_room(self, key_states: Tensor, value_states: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """Memory for `stop` tokens or more in which the present ones stand."""
        room = self._allocated
        if room is None or not can_hold(room[0], key_states, stop):
            size = max(self.max_cache_len or 0, stop)
            if size == stop:
                size = size_ahead(stop)
            start = self.get_seq_length()
            old, grown = (self.keys, self.values), []
            for states, present in zip((key_states, value_states), old, strict=True):
                whole = allocate(states, size)
                if start and present is not None:
                    whole[:, :, :start] = present
                grown.append(whole)
            room = self._allocated = grown[0], grown[1]
        return room

    def _put(self, slot: Tensor, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token's key and value into a slot [1]; returns all slots, filled or not."""
        assert self._allocated is not None
        for whole, new in zip(self._allocated, (key_states, value_states), strict=True):
            whole.index_copy_(2, slot, new)
        keys, values = (whole[:] for whole in self._allocated)
        setattr(keys, INDEXES, self.indexes)
        return keys, values

    def is_ready(self, padding: list[int], layers: list[int]) -> bool:
        """Whether the next token's step can be a `FixedStep`; see `KeyIndexes.is_ready`."""
        self._notice_other_keys()
        room, length = self._allocated, self.get_seq_length()
        if room is None or not is_writable(room[0]) or len(room[0]) != len(padding) or length >= room[0].shape[2]:
            return False
        if not layers and self._blank is not room:  # rows that read everything weigh what is not there by 0
            for whole in room:
                whole[:, :, length:] = 0
            self._blank = room
        return self.indexes.is_ready(length, room[0].shape[2], padding, layers)

    def advance(self) -> None:
        """Count on after a `FixedStep`."""
        assert self._allocated is not None
        stop = self.get_seq_length() + 1
        self.keys, self.values = (whole[:, :, :stop] for whole in self._allocated)
        setattr(self.keys, INDEXES, self.indexes)
        self._known = self.keys
        self.indexes.advance(self._allocated[0].shape[2])

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that a `FixedStep` reads and writes in place."""
        return [*(self._allocated or ()), *self.indexes.tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and index, those allocated ahead included."""
        held = self._allocated or (self.keys, self.values)
        return sum(x.nbytes for x in held if x is not None) + self.indexes.nbytes

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, or what else Transformers' release means by the number."""
        self._notice_other_keys()
        super().crop(tokens_to_remove)
        self.indexes.crop(self.get_seq_length())
        self._known = self.keys

    def reset(self) -> None:
        """Forget all tokens; the memory stays only if `max_cache_len` was given."""
        if self.max_cache_len is None:
            self._allocated = None
        self.keys = self.values = None
        self.is_initialized = False  # or older releases of Transformers keep the tokens as zeros
        super().reset()
        self.indexes.clear()
        self._known = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._rows_changed(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.keys is not None:
            self._rows_changed([row // repeats for row in range(len(self.keys))])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        num_rows = 0 if self.keys is None else len(self.keys)
        super().batch_select_indices(indices)
        if num_rows:
            self._rows_changed(torch.arange(num_rows)[indices.cpu()].tolist())

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        super().offload()
        self._moved()

    def prefetch(self) -> None:
        """Move keys and values back to the layer's device."""
        super().prefetch()
        self._moved()

    def _notice_other_keys(self) -> None:
        """Where someone put other keys into the layer, the index and the room are not theirs."""
        if self.keys is not self._known and not is_traced(self.keys):
            self._allocated = None
            self.indexes.clear()

    def _rows_changed(self, rows: list[int]) -> None:
        self.indexes.select(rows)
        self._moved()

    def _moved(self) -> None:
        """`keys` and `values` are other tensors now."""
        if self.keys is not self._known:
            self._allocated, self._known = None, self.keys


class EvictingLayer(DynamicLayer):
    """A layer that keeps the keys that a policy chooses; the attention function takes in the new ones and evicts.

    `update` returns the new keys and values alone.

    Args:
        kept: empty; holds the keys of all rows.
    """

    def __init__(self, kept: KeptKeys) -> None:
        super().__init__()
        self.kept = kept

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the device and dtype of new keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Announce new keys and values [batch, num_key_value_heads, new tokens, head_dim]; returns them."""
        if is_traced(key_states):
            raise ValueError("a SparseCache with a policy does not work under torch.compile, nor with fake tensors")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.kept.expect(key_states.shape[-2])
        setattr(key_states, KEPT, self.kept)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included."""
        return self.kept.num_slots

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether nothing was evicted yet."""
        return not self.kept.has_evicted

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, positions and weights, those allocated ahead included."""
        return self.kept.nbytes

    def crop(self, tokens_to_remove: int) -> None:
        """As `SparseLayer.crop`, before anything was evicted; a ValueError afterwards."""
        length = self.get_seq_length()
        removed = length - _cropped_length(length, tokens_to_remove)
        if removed:
            self.kept.crop(removed)

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        self.kept.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        if self.kept.rows:
            self.kept.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.kept.select([row for row in range(len(self.kept.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.kept.select(torch.arange(len(self.kept.rows))[indices.cpu()].tolist())

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        self.kept.move("cpu")

    def prefetch(self) -> None:
        """Move keys and values back to the layer's device."""
        if self.is_initialized:
            self.kept.move(self.device)


def _cropped_length(length: int, tokens_to_remove: int) -> int:
    """Tokens that are left of `length`: `tokens_to_remove` is negative, or how many to keep as older releases say."""
    return min(tokens_to_remove, length) if tokens_to_remove > 0 else max(length + tokens_to_remove, 0)


def layer_bytes(layer: Any) -> int:
    """Bytes that a cache layer of any kind holds."""
    own: int | None = getattr(layer, "nbytes", None)
    if own is not None:
        return own
    return sum(x.nbytes for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None)
