"""A model's decoding step as one CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse_attn import ops
from hf_sparse_attn.cache import SparseCache, SparseLayer
from hf_sparse_attn.cache.document_indexes import FixedStep
from hf_sparse_attn.config import attends_sparsely, sparse_config, text_config
from hf_sparse_attn.integration import known_patterns

_NOTHING_YET = object()


class DecodingGraph:
    """A model's decoding step, recorded once as a CUDA graph: a token costs one replay in place of all its launches.

        cache = SparseCache(model.config, max_cache_len=len(prompt) + 1000)
        logits = model(prompt, past_key_values=cache).logits
        step = DecodingGraph(model, cache)
        for _ in range(1000):
            logits = step(logits[:, -1:].argmax(-1))

    The answers are those of `model(input_ids, past_key_values=cache)`. A step that the recorded one does not fit is
    such a forward: the first one, those of rows that still read everything, the next after forwards of other kinds or
    `cache.crop`, all where the cache is full and grows. Then, and after `configure`, a graph is recorded anew if it has
    to be. The model's weights stay where they are, and the rows of the cache what they are, as long as this is used.

    Args:
        model: with attn_implementation="sparse", on a GPU; its rotary embeddings do not change with the length.
        cache: holds the prompt. All its layers keep all keys: none has a sliding window of the model's own.
        attention_mask: [batch, tokens in the cache], of a left-padded batch.

    Raises:
        ValueError: for another model, device, cache or mask.
    """

    def __init__(self, model: PreTrainedModel, cache: SparseCache, attention_mask: Tensor | None = None) -> None:
        _check_model(model)
        self._layers = _layers(cache)
        self.model, self.cache = model, cache
        self._padding = _padding(self._layers[0], attention_mask)
        self._input_ids = torch.zeros(len(self._padding), 1, dtype=torch.int64, device=model.device)
        self._position_ids = torch.zeros_like(self._input_ids)
        self._first_slots = torch.tensor(self._padding, device=model.device)[:, None]
        self._step = FixedStep(self._input_ids.new_zeros(1), self._padding)
        self._fields: Any = _NOTHING_YET  # the model's sparse attention in the last step
        self._indexed: list[list[int]] | None = None  # the model's layers whose indexes each layer of the cache has
        self._tensors: list[Tensor] = []  # what is recorded reads and writes these
        self._replay: Callable[[], object] | None = None
        self._logits: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Append one token for each row, [batch, 1] int64, to the cache; returns the logits, [batch, 1, vocabulary].

        Raises:
            ValueError: for tokens of another shape, and layers whose step cannot be recorded.
        """
        if input_ids.shape != self._input_ids.shape:
            raise ValueError(
                f"input_ids must be one token for each row of the cache, {tuple(self._input_ids.shape)}, "
                f"got shape {tuple(input_ids.shape)}"
            )
        slot = self.cache.get_seq_length()
        self._input_ids.copy_(input_ids)
        self._step.slot.fill_(slot)
        torch.sub(self._step.slot, self._first_slots, out=self._position_ids)
        if not self._is_ready():
            return self._forward(self._position_ids.clone(), self._mask(slot + 1))
        logits = self._fixed_step()
        for layer in self._layers:
            layer.advance()
        return logits

    def _forward(self, position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        inputs = {"position_ids": position_ids, "attention_mask": attention_mask, "past_key_values": self.cache}
        logits: Tensor = self.model(input_ids=self._input_ids, **inputs, use_cache=True).logits
        return logits

    def _fixed_step(self) -> Tensor:
        """The first time a forward, which compiles what it needs; the second time it is recorded; then replayed."""
        tensors = [x for layer in self._layers for x in layer.tensors]
        if not _same(tensors, self._tensors):
            self._tensors, self._replay = tensors, None
            with self._computing():
                return self._forward(self._position_ids)
        if self._replay is None:
            with self._computing():
                self._replay, self._logits = record(partial(self._forward, self._position_ids), self.model.device)
        self._replay()
        assert self._logits is not None
        return self._logits.clone()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        for layer in self._layers:
            layer.indexes.step = self._step
        try:
            yield
        except BaseException:  # some layers have taken the token in
            for layer in self._layers:
                layer.indexes.clear()
            raise
        finally:
            for layer in self._layers:
                layer.indexes.step = None

    def _is_ready(self) -> bool:
        """Whether the next step can be a fixed one, for which the cache makes room."""
        fields = getattr(text_config(self.model.config), "sparse_attention", None)
        if fields != self._fields:  # the next forward starts patterns and indexes anew
            self._fields, self._indexed, self._tensors = copy.deepcopy(fields), None, []
            return False
        if self._indexed is None:
            self._indexed = self._indexed_layers()
        each = zip(self._layers, self._indexed, strict=True)
        return all(layer.is_ready(self._padding, indexed) for layer, indexed in each)

    def _indexed_layers(self) -> list[list[int]]:
        """The layers of the model whose indexes each layer of the cache has: its own one, or none."""
        patterns = known_patterns(self.model)
        if sorted(patterns) != list(range(len(self._layers))):
            raise ValueError(
                f"model must have {len(self._layers)} layers of its own for those of the cache, and have filled "
                f"them; sparse attention ran in layers {sorted(patterns)}"
            )
        for layer_idx, pattern in patterns.items():
            if not ops.has_fixed_steps(pattern, self.model.device):
                raise ValueError(
                    f"layer {layer_idx} has no steps that can be recorded: by_kv_head and num_voted_blocks have none, "
                    f'nor has an implementation other than "triton"; it is {pattern.config.implementation!r}'
                )
        return [[] if patterns[i].dense_rows() is None else [i] for i in range(len(patterns))]

    def _mask(self, num_slots: int) -> Tensor | None:
        """Which slots of the cache are no padding, [batch, slots]; None: all."""
        if not any(self._padding):
            return None
        return (torch.arange(num_slots, device=self.model.device) >= self._first_slots).long()


def record(work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
    """Have a GPU's work recorded, without doing it: what replays it, and the tensor that its result is left in."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        output = work()
    return graph.replay, output


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether these are the same objects, hence at the same place."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _check_model(model: PreTrainedModel) -> None:
    config = text_config(model.config)
    if not attends_sparsely(config):
        raise ValueError(f'model must have attn_implementation="sparse", got {config._attn_implementation!r}')
    check_device(model.device)
    if sparse_config(config).global_token_ids:
        raise ValueError("model has global_token_ids, whose steps cannot be recorded: they ask which token came")


def _layers(cache: SparseCache) -> list[SparseLayer]:
    if not isinstance(cache, SparseCache):
        raise ValueError(f"cache must be a SparseCache, got {type(cache).__name__}")
    for layer_idx, layer in enumerate(cache.layers):
        if not isinstance(layer, SparseLayer):
            raise ValueError(
                "cache must keep all keys of all layers, without a policy and sliding windows of the model's own; "
                f"its layer {layer_idx} is of {type(layer).__name__}"
            )
    if not cache.get_seq_length():
        raise ValueError("cache is empty: run the prompt through the model with past_key_values=cache before")
    return cast("list[SparseLayer]", cache.layers)


def check_device(device: torch.device) -> None:
    """Raise a ValueError where there are no CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(f"model must be on a GPU, whose graphs are those of CUDA; it is on {device}")


def _padding(layer: SparseLayer, attention_mask: Tensor | None) -> list[int]:
    """How many slots each row of a cache begins with that hold no token."""
    assert layer.keys is not None
    batch_size, _, num_slots, _ = layer.keys.shape
    if attention_mask is None:
        return [0] * batch_size
    if attention_mask.shape != (batch_size, num_slots):
        raise ValueError(
            f"attention_mask must be [batch, tokens in the cache], {(batch_size, num_slots)}, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    present = attention_mask.bool()
    if not bool(present[:, -1].all()) or bool((present[:, :-1] & ~present[:, 1:]).any()):
        raise ValueError("attention_mask must have padding on the left alone")
    padding: list[int] = (~present).sum(-1).tolist()
    return padding
