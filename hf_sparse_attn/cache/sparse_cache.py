"""The KV cache that makes decoding sparse: which layers it has, and the memory that they take."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from hf_sparse_attn.cache.evicting import KeptKeys
from hf_sparse_attn.cache.layers import EvictingLayer, SparseLayer, layer_bytes
from hf_sparse_attn.cache.policies import Composition, Policy, UniformBudget
from hf_sparse_attn.config import attends_sparsely, sparse_config, text_config
from hf_sparse_attn.notices import tell_once
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
        if sparse_config(config).global_token_ids:
            raise ValueError("a policy cannot go with global_token_ids, of which it would not know which are kept")
        parts = Composition.of(policy)
        whole = UniformBudget.of(budget, parts)
        num_shared = getattr(of_text, "num_kv_shared_layers", None)
        if num_shared:
            raise ValueError(
                "policy cannot serve layers that read the keys of other layers, of which each may want others kept; "
                f"{of_text.model_type} has num_kv_shared_layers={num_shared}"
            )
        implementation = of_text._attn_implementation
        if not attends_sparsely(of_text):
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
