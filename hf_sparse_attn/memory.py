"""How much memory work on a model takes, estimated from the model's config alone.

Sizes are in bytes. D is the hidden size, I that of the feed-forward layer (of all experts that a token is given), H and
K the numbers of query and KV heads, d the head_dim, V the vocabulary, N the tokens, s the bytes of a number:

    weights             counted in the model itself, built without numbers
    forward of a layer  N (s (5 D + 3 I + 3 (H + 2 K) d) + 8 H d): 8 H d are an observer's copies in float32
    its backward        N (s (6 D + 7 I + 6 (H + 2 K) d) + 16 D): its activations, their gradients, norms in float32
    logits              4 chunks of R V numbers in float32, with R rows as in `logits.rows_of_chunk`

A conversion's calibration takes the largest of

    gradients           of 2048 tokens: the hidden states N D s that each layer gets, a layer's backward, logits
    queries and keys    a layer's forward, and 2 N K d s for each layer: a document's keys and values, kept
    costs               these keys and values, and N K (8 d + 512) for each thread: a layer's, in float32

and its evaluation a layer's forward, hidden states of both sides, 2 N D s, and logits. The keys and values of other
documents are on the disk, mapped.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import set_zero3_state

from hf_sparse_attn.config import SparseAttentionConfig, layer_shape, sliding_windows, text_config
from hf_sparse_attn.logits import rows_of_chunk
from hf_sparse_attn.patterns import is_local

_MEMINFO = Path("/proc/meminfo")
LIBRARIES = 700 * 10**6  # Python, PyTorch, Transformers, Matplotlib, and what allocators keep for the next time


@dataclass(frozen=True)
class ModelSize:
    """What a model's config says about the memory that it takes, in bytes; tokens are those of one document.

    Args:
        config: the model's.
        dtype: of the weights and of what is computed.
    """

    config: Any
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype | str = "auto") -> ModelSize:
        """The size in a dtype; "auto" is the checkpoint's own."""
        if isinstance(dtype, str):
            dtype = getattr(config, "dtype", None) or text_config(config).dtype or torch.float32
        return cls(config, dtype)

    def skeleton(self) -> PreTrainedModel:
        """The model without numbers, on the device meta."""
        with torch.device("meta"), set_zero3_state():  # or DeepSpeed, where ZeRO-3 is on, would share it out
            model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(self.config), dtype=self.dtype)
        return model

    def weights(self) -> tuple[int, int]:
        """All weights, those that are tied once; and the most that are in use at once where they are offloaded."""
        model = self.skeleton()
        parts = (GradientCheckpointingLayer, nn.Linear, nn.Embedding)
        return _bytes(model), max(_bytes(module) for module in model.modules() if isinstance(module, parts))

    def hidden_states(self, num_tokens: int) -> int:
        return num_tokens * self._text.hidden_size * self.dtype.itemsize

    def keys_and_values(self, num_tokens: int, layer: int) -> int:
        _, num_kv_heads, head_dim = self._heads(layer)
        return 2 * num_tokens * num_kv_heads * head_dim * self.dtype.itemsize

    def forward(self, num_tokens: int) -> int:
        """The most that exists at once in a layer's forward without gradients."""
        hidden, inner, (heads, kv_heads, head_dim) = self.widths()
        in_dtype = 5 * hidden + 3 * inner + 3 * (heads + 2 * kv_heads) * head_dim
        return num_tokens * (self.dtype.itemsize * in_dtype + 8 * heads * head_dim)

    def backward(self, num_tokens: int) -> int:
        """The most that exists at once while a layer is computed again and differentiated, its weights frozen."""
        hidden, inner, (heads, kv_heads, head_dim) = self.widths()
        in_dtype = 6 * hidden + 7 * inner + 6 * (heads + 2 * kv_heads) * head_dim
        return num_tokens * (self.dtype.itemsize * in_dtype + 16 * hidden)

    def logits(self) -> int:
        """What a chunk of logits takes, with its softmax and gradient."""
        vocab_size = self._text.vocab_size
        return 4 * rows_of_chunk(vocab_size) * vocab_size * torch.float32.itemsize

    def layer_in_float32(self, num_tokens: int) -> int:
        """Keys and values of a layer in float32, and the scores of its buckets."""
        _, num_kv_heads, head_dim = self._heads()
        return num_tokens * num_kv_heads * (8 * head_dim + 512)

    def widths(self) -> tuple[int, int, tuple[int, int, int]]:
        """The hidden size, that of the feed-forward layer, and the most query heads, KV heads and head_dim."""
        return self._text.hidden_size, self._inner, self._heads()

    @property
    def num_layers(self) -> int:
        return self._text.num_hidden_layers

    @property
    def _text(self) -> Any:
        return text_config(self.config)

    @property
    def _inner(self) -> int:
        experts = getattr(self._text, "num_experts_per_tok", None) or 1
        of_an_expert = getattr(self._text, "moe_intermediate_size", None) if experts > 1 else None
        return experts * (of_an_expert or getattr(self._text, "intermediate_size", None) or 4 * self._text.hidden_size)

    def _heads(self, layer: int | None = None) -> tuple[int, int, int]:
        layers = sliding_windows(self.config) if layer is None else [layer]
        shapes = [layer_shape(self.config, layer) for layer in layers]
        return max((shape for shape in shapes if shape is not None), default=(0, 0, 0))


@dataclass(frozen=True)
class ConversionMemory:
    """Estimated memory of a conversion, in bytes; see the formulas above.

    Args:
        weights: of the model.
        in_use: the most of them that must be in memory at once.
        calibration, evaluation: what they take beside weights and libraries on the device.
        kept: queries, keys and values of a document, always in the CPU's memory.
    """

    weights: int
    in_use: int
    calibration: int
    evaluation: int
    kept: int

    @property
    def work(self) -> int:
        """What is needed beside the weights on the device."""
        return max(self.calibration, self.evaluation)

    @property
    def peak(self) -> int:
        return LIBRARIES + self.weights + self.work

    @property
    def offloaded_peak(self) -> int:
        """The least that will do where weights are offloaded."""
        return LIBRARIES + self.in_use + self.work

    def __str__(self) -> str:
        parts = {"weights": self.weights, "calibration": self.calibration, "evaluation": self.evaluation}
        told = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        return f"{self.peak / 1e9:.1f} GB ({told}, libraries {LIBRARIES / 1e9:.1f})"


def conversion_memory(
    size: ModelSize, base: SparseAttentionConfig, num_tokens: int, gradient_tokens: int, *, on_cpu: bool = True
) -> ConversionMemory:
    """What a conversion takes.

    Args:
        size: of the model.
        base: what is not fitted; it says which layers are local, of which nothing is kept.
        num_tokens: of a document.
        gradient_tokens: the most of a document that gradients are computed of.
        on_cpu: the CPU computes; otherwise what is kept of a document is not in the device's memory.
    """
    weights, in_use = size.weights()
    windows = sliding_windows(size.config) or dict.fromkeys(range(size.num_layers))
    kept = sum(
        size.keys_and_values(num_tokens, layer) for layer, window in windows.items() if not is_local(base, window)
    )
    some = min(num_tokens, gradient_tokens)
    gradients = size.num_layers * size.hidden_states(some) + size.backward(some) + size.logits()
    reading = size.forward(num_tokens)
    evaluation = reading + 2 * size.hidden_states(num_tokens) + size.logits()
    if on_cpu:
        costs = torch.get_num_threads() * size.layer_in_float32(num_tokens)
        reading = kept + max(reading, costs)
    return ConversionMemory(weights, in_use, max(gradients, reading), evaluation, kept)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = _MEMINFO.read_text().splitlines()
        return 1024 * int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
