"""A `StaticCache` in which decoding is sparse, for generation that is compiled."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer

from hf_sparse_attn.cache.document_indexes import KeyIndexes
from hf_sparse_attn.errors import check_integer
from hf_sparse_attn.side_channels import INDEXES
from hf_sparse_attn.tracing import is_traced

_LAYERS = WeakValueDictionary[int, "SparseStaticLayer"]()  # by the place of their keys


class SparseStaticLayer(StaticLayer):
    """Keys and values [batch, num_key_value_heads, max_cache_len, head_dim] of one layer, and their index.

    A graph writes them where they are, and its tensors carry no attributes: the operation in it asks `indexes_at`.
    """

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__(max_cache_len, **kwargs)
        self.indexes = KeyIndexes()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all slots."""
        super().lazy_initialization(key_states, value_states)
        self._announce()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values [batch, num_key_value_heads, new tokens, head_dim]; returns all slots.

        Raises:
            ValueError: there is no room for them; on a GPU, which would have to be waited for, only where a call alone
                has too many.
        """
        if not is_traced(key_states):
            held = int(self.cumulative_length) if self.cumulative_length.device.type == "cpu" else 0
            if held + key_states.shape[-2] > self.max_cache_len:
                raise ValueError(
                    f"max_cache_len={self.max_cache_len} leaves no room for {key_states.shape[-2]} tokens after {held}"
                )
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self._announce()
        return keys, values

    def _announce(self) -> None:
        """Let the attention function find the index, in graphs too."""
        keys = self.keys
        if keys is not None and not is_traced(keys):
            setattr(keys, INDEXES, self.indexes)  # which hold no keys
            _LAYERS[keys.data_ptr()] = self

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and index."""
        return sum(x.nbytes for x in (self.keys, self.values) if x is not None) + self.indexes.nbytes

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        super().reset()
        self.indexes.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.indexes.select(beam_idx.tolist())
        self._announce()


class SparseStaticCache(StaticCache):
    """A `StaticCache` in which a decoding step reads a few keys, also where `generate` or you compile the step.

    `model.generate(..., past_key_values=SparseStaticCache(model.config, max_cache_len=N))`, or in any forward. Answers
    are those of every other cache; only the time differs. Layers with a sliding window of the model's own are
    Transformers' own, whose keys are few.

    Args:
        config: the model's config.
        max_cache_len: tokens that every layer allocates at once; there is no room for more.
        kwargs: of `StaticCache`.

    Raises:
        ValueError: for a max_cache_len that is not a positive integer.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int, **kwargs: Any) -> None:
        check_integer("max_cache_len", max_cache_len, 1)
        super().__init__(config, max_cache_len, **kwargs)
        self.layers = [SparseStaticLayer(max_cache_len) if type(x) is StaticLayer else x for x in self.layers]


def indexes_at(key: Tensor) -> KeyIndexes | None:
    """Those of the layer whose keys a tensor is, if there is one: the same memory with the same shape.

    Where a graph works on a copy there is none, and keys are grouped anew.
    """
    layer = _LAYERS.get(key.data_ptr())
    keys = None if layer is None else layer.keys
    if layer is None or keys is None or keys.data_ptr() != key.data_ptr():
        return None
    same = (keys.shape, keys.stride(), keys.dtype, keys.device) == (key.shape, key.stride(), key.dtype, key.device)
    return layer.indexes if same else None
