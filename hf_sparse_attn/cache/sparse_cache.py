"""The KV cache that makes decoding sparse: its layers carry the hash index of their keys, or keep few of them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from hf_sparse_attn.cache.document_indexes import KeyIndexes
from hf_sparse_attn.cache.evicting import KeptKeys, is_writable, size_ahead
from hf_sparse_attn.cache.policies import Composition, Policy, UniformBudget
from hf_sparse_attn.config import text_config
from hf_sparse_attn.notices import tell_once
from hf_sparse_attn.side_channels import INDEXES, KEPT
from hf_sparse_attn.tracing import is_traced


class SparseCache(DynamicCache):
    """A `DynamicCache` in which a decoding step reads a few keys, and appending a token copies none.

    `model.generate(..., past_key_values=SparseCache(model.config))`, or in any forward. Answers are those of every
    other cache; only the time differs. Layers with a sliding window of the model's own are Transformers' own, whose
    keys are few.

    With a policy the cache stays small: `SparseCache(model.config, policy=Sinks(4) + Recency(), budget=1024)`. Each KV
    head of each row keeps the keys that the policy chooses, and the answers are those of attention to these. A call
    attends to all of its own tokens before any are evicted, so a long prompt is best given in pieces
    (`generate(..., prefill_chunk_size=128)`): no more than the budget and one piece are then held at any time.

    Args:
        config: the model's config.
        max_cache_len: tokens that every layer allocates at once; it grows beyond. None: it grows with the tokens.
        policy: which keys are kept, see `hf_sparse_attn.eviction`; None: all.
        budget: how many keys each KV head keeps, or a budget of `hf_sparse_attn.eviction`; goes with a policy.

    Raises:
        ValueError: for a max_cache_len that is not a positive integer or comes with a policy, a policy or budget that
            is none or comes alone, and a policy for a model whose attn_implementation is not "sparse" or whose layers
            share keys.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_cache_len: int | None = None,
        policy: Policy | None = None,
        budget: int | UniformBudget | None = None,
    ) -> None:
        if max_cache_len is not None and (
            isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int) or max_cache_len < 1
        ):
            raise ValueError(f"max_cache_len must be a positive integer or None, got {max_cache_len!r}")
        self._memory = _Memory()
        of_text = text_config(config)
        switch = getattr(of_text, "original_max_position_embeddings", None)
        if isinstance(switch, int):
            tell_once(
                of_text,
                f"{of_text.model_type} changes its rotary embeddings beyond {switch} tokens: when a text that "
                "began below grows beyond, generate() reads it anew and drops the cache that it was given, with its "
                "policy",
            )
        if policy is None and budget is None:
            super().__init__(config=config)
            self.layers = [
                SparseLayer(max_cache_len) if type(layer) is DynamicLayer else layer for layer in self.layers
            ]
            return
        for name, value, other in (("policy", policy, "budget"), ("budget", budget, "policy")):
            if value is None:
                raise ValueError(f"{name} is missing: {other}={policy if other == 'policy' else budget!r} needs one")
        if max_cache_len is not None:
            raise ValueError(f"max_cache_len={max_cache_len} cannot go with a policy: its budget is the length")
        parts = Composition.of(policy)
        whole = UniformBudget.of(budget, parts)
        num_shared = getattr(of_text, "num_kv_shared_layers", None)
        if num_shared:
            raise ValueError(
                "policy cannot serve layers that read the keys of other layers, of which each may want others kept; "
                f"{of_text.model_type} has num_kv_shared_layers={num_shared}"
            )
        implementation = of_text._attn_implementation
        if implementation != "sparse":
            raise ValueError(
                'policy needs a model with attn_implementation="sparse", as other attention would see new keys only; '
                f"this one's is {implementation!r}"
            )
        super().__init__(config=config)
        self.layers = [
            EvictingLayer(KeptKeys(parts, whole, partial(self._memory.report, index)))
            if type(layer) is DynamicLayer
            else layer
            for index, layer in enumerate(self.layers)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values [batch, num_key_value_heads, new tokens, head_dim] of a layer."""
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        by_itself = isinstance(self.layers[layer_idx], EvictingLayer)
        if not by_itself and not is_traced(key_states):
            self._memory.report(layer_idx, layer_bytes(self.layers[layer_idx]))
        return found

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._memory.forget()

    @property
    def nbytes(self) -> int:
        """Bytes of all that the layers hold (keys, values, indexes, positions and weights of policies), room ahead
        included."""
        return sum(map(layer_bytes, self.layers))

    @property
    def peak_nbytes(self) -> int:
        """The most that `nbytes` ever was, the tokens of a call included before any of them are evicted."""
        return max(self._memory.peak, self.nbytes)


class _Memory:
    """Bytes that the layers of a cache hold, as they report them, and the most they ever held together."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.total = self.peak = 0

    def report(self, layer_idx: int, nbytes: int) -> None:
        self.total += nbytes - self.held.get(layer_idx, 0)
        self.held[layer_idx] = nbytes
        self.peak = max(self.peak, self.total)

    def forget(self) -> None:
        self.held.clear()
        self.total = 0


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
        self._known: Tensor | None = None  # `keys` as they were left

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values [batch, num_key_value_heads, new tokens, head_dim]; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._known = self.keys
        self._notice_other_keys()
        parts = (key_states, value_states, self.keys, self.values)
        carries_gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parts)
        if carries_gradients or is_traced(key_states):
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
        if room is None or not _can_hold(room[0], key_states, stop):
            size = max(self.max_cache_len or 0, stop)
            if size == stop:
                size = size_ahead(stop)
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


def _can_hold(room: Tensor, states: Tensor, num_tokens: int) -> bool:
    same = (room.dtype, room.device, room.shape[:2]) == (states.dtype, states.device, states.shape[:2])
    return is_writable(room) and same and room.shape[2] >= num_tokens


def layer_bytes(layer: Any) -> int:
    """Bytes that a cache layer of any kind holds."""
    if isinstance(layer, (SparseLayer, EvictingLayer)):
        return layer.nbytes
    return sum(x.nbytes for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None)
