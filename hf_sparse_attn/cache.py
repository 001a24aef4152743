"""The KV cache that makes decoding sparse: its layers carry the hash index of their keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from hf_sparse_attn.indexes import INDEXES, KeyIndexes

_ROOM = 1 / 8  # of its length that a layer allocates ahead when it grows
_LEAST_ROOM = 64  # tokens


class SparseCache(DynamicCache):
    """A `DynamicCache` in which a decoding step reads a few keys, and appending a token copies none.

    `model.generate(..., past_key_values=SparseCache(model.config))`, or in any forward. Answers are those of every
    other cache; only the time differs. Layers with a sliding window of the model's own are Transformers' own, whose
    keys are few.

    Args:
        config: the model's config.
        max_cache_len: tokens that every layer allocates at once; it grows beyond. None: it grows with the tokens.

    Raises:
        ValueError: for a max_cache_len that is no positive integer.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int | None = None) -> None:
        if max_cache_len is not None and (
            isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int) or max_cache_len < 1
        ):
            raise ValueError(f"max_cache_len must be a positive integer or None, got {max_cache_len!r}")
        super().__init__(config=config)
        self.layers = [SparseLayer(max_cache_len) if type(layer) is DynamicLayer else layer for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and indexes, those allocated ahead included."""
        return sum(layer.nbytes if isinstance(layer, SparseLayer) else _bytes_of(layer) for layer in self.layers)


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

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values [batch, num_key_value_heads, new tokens, head_dim]; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        carries_gradients = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if carries_gradients or torch.compiler.is_compiling():
            self._allocated = None
            keys, values = super().update(key_states, value_states)
        else:
            start, stop = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
            room = self._with_room(key_states, value_states, stop)
            for whole, new in zip(room, (key_states, value_states), strict=True):
                whole[:, :, start:stop] = new
            keys, values = self.keys, self.values = room[0][:, :, :stop], room[1][:, :, :stop]
        setattr(keys, INDEXES, self.indexes)  # which hold no keys
        return keys, values

    def _with_room(self, key_states: Tensor, value_states: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """Memory for `stop` tokens or more in which the present ones stand."""
        room = self._allocated
        if room is None or not _can_hold(room[0], key_states, stop):
            size = max(self.max_cache_len or 0, stop)
            if size == stop:
                size += max(int(stop * _ROOM), _LEAST_ROOM)
            start = self.get_seq_length()
            old, grown = (self.keys, self.values), []
            for states, present in zip((key_states, value_states), old, strict=True):
                whole = _allocate(states, size)
                if start and present is not None:
                    whole[:, :, :start] = present
                grown.append(whole)
            room = self._allocated = grown[0], grown[1]
        return room

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and index, those allocated ahead included."""
        held = self._allocated or (self.keys, self.values)
        return sum(x.nbytes for x in held if x is not None) + self.indexes.nbytes

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (a positive number: keep so many, as older releases of
        Transformers ask for)."""
        length = self.get_seq_length()
        kept = min(tokens_to_remove, length) if tokens_to_remove > 0 else max(length + tokens_to_remove, 0)
        if kept < length and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :kept], self.values[:, :, :kept]
            self.indexes.crop(kept)

    def reset(self) -> None:
        """Forget all tokens; the memory stays only if `max_cache_len` was given."""
        if self.max_cache_len is None:
            self._allocated = None
        super().reset()
        self.indexes.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self._rows_changed(beam_idx.tolist())
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.keys is not None:
            self._rows_changed([row for row in range(len(self.keys)) for _ in range(repeats)])
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        if self.keys is not None:
            self._rows_changed(torch.arange(len(self.keys))[indices.cpu()].tolist())
        super().batch_select_indices(indices)

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        self._allocated = None
        super().offload()

    def prefetch(self) -> None:
        """Move keys and values back to the layer's device."""
        self._allocated = None
        super().prefetch()

    def _rows_changed(self, rows: list[int]) -> None:
        self._allocated = None
        self.indexes.select(rows)


def _allocate(states: Tensor, num_tokens: int) -> Tensor:
    """Room for that many tokens of [batch, num_key_value_heads, tokens, head_dim]; on a CPU in huge pages if it can.

    Decoding reads keys from all over the memory, where small pages cost as much to look up as to read. NumPy asks the
    system for huge ones, PyTorch does not.
    """
    shape = *states.shape[:2], num_tokens, states.shape[3]
    if states.device.type != "cpu":
        return states.new_empty(shape)
    memory = np.empty(math.prod(shape) * states.element_size(), np.uint8)
    return torch.from_numpy(memory).view(states.dtype).view(shape)


def _can_hold(room: Tensor, states: Tensor, num_tokens: int) -> bool:
    writable = not room.is_inference() or torch.is_inference_mode_enabled()
    same = (room.dtype, room.device, room.shape[:2]) == (states.dtype, states.device, states.shape[:2])
    return writable and same and room.shape[2] >= num_tokens


def _bytes_of(layer: Any) -> int:
    return sum(x.nbytes for x in (layer.keys, layer.values) if x is not None)
