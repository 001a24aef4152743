"""How much memory a training takes, estimated from the model's config and the arguments alone.

Words as in `hf_sparse_attn.memory`: D is the hidden size, I that of the feed-forward layer (of all experts that a token
is given), H and K the numbers of query and KV heads, d the head_dim, L the number of layers, N the tokens of a step, V
the vocabulary. c is the bytes of a number that is computed with (2 with --bf16 or half-precision weights, else 4), w
that of a hidden state between layers (the weights' dtype). Bytes:

    weights       counted in the model itself, with LoRA if it is trained, built without numbers
    gradients     as many as weights that are trained, in their dtype
    optimizer     its states: a table by the optimizer's name below, for what is trained
    copies        with --bf16, float32 weights of linear layers in bfloat16: 2 for each
    activations   what each layer keeps for the backward,

                      kept = N (norms D (4 + w + c) + c (2 H + 2 K) d + 4 c I),

                  where norms are those of a layer (usually 2; hidden states of half precision add w to each, for
                  a norm computes in float32), and, with LoRA over half precision, c (5 D + H d + I) for what PEFT
                  casts; L kept in all. With gradient checkpointing it is L N D w and one layer's kept.
    backward      N max(3 c I, 16 (H + K) d): the gradients in a layer
    logits        4 chunks of R V numbers in float32, with R rows as in `logits.rows_of_chunk`; and the gradient of the
                  head where that is trained, which comes first
    distillation  3 more chunks of logits, and for each compared row D w, and 2 L D w where layers are compared, too
    attention     N K (8 d + 512) for each thread of a CPU
    libraries     of Python, as in `hf_sparse_attn.memory`, and those that read data

Gradients appear while activations go. The peak is the larger of two moments: when the loss is computed (activations
and logits), and at the end of the backward (gradients and what one layer keeps). Where gradients are accumulated over
several rows, they are there in both. With --offload-activations, L N D w is in the CPU's memory and not in the peak.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_sparse_attn.memory import LIBRARIES, ModelSize, available_memory
from hf_sparse_attn.training.lora import add_lora

if TYPE_CHECKING:
    from hf_sparse_attn.training.arguments import FinetuneArguments
    from hf_sparse_attn.training.distillation import Distillation

logger = logging.getLogger(__name__)

# Numbers of an optimizer's states for each one that is trained; of a number's own dtype unless the name tells bits.
_STATES = {"adamw": 2, "stable_adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "lomo": 0}
_UNKNOWN = 2
_DATA_LIBRARIES = 100 * 10**6


@dataclass(frozen=True)
class TrainingMemory:
    """Estimated memory of a training, in bytes; see the formulas above.

    Args:
        parts: by name, in the order of the formulas.
        layer: what one layer keeps for its backward.
        accumulates: gradients are there from the start.
        offloaded: held in the CPU's memory while a GPU computes.
    """

    parts: dict[str, int]
    layer: int
    accumulates: bool
    offloaded: int

    @property
    def peak(self) -> int:
        always = sum(
            self.parts[name] for name in ("weights", "optimizer", "copies", "attention", "backward", "libraries")
        )
        gradients = self.parts["gradients"]
        loss = sum(self.parts[name] for name in ("activations", "logits", "distillation"))
        return always + max(gradients + self.layer, loss + (gradients if self.accumulates else 0))

    def __str__(self) -> str:
        told = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in self.parts.items() if size >= 5e7)
        offloaded = f", and {self.offloaded / 1e9:.1f} GB of the CPU's" if self.offloaded else ""
        apart = "" if self.accumulates else "; gradients are not there at once with all activations"
        return f"{self.peak / 1e9:.1f} GB ({told}{apart}){offloaded}"


def training_memory(
    size: ModelSize, num_tokens: int, arguments: FinetuneArguments, distillation: Distillation | None = None
) -> TrainingMemory:
    """What a training takes.

    Args:
        size: of the model.
        num_tokens: of a row.
        arguments: of the training.
        distillation: how it learns from its dense self, if it does.
    """
    model: Any = size.skeleton()
    norms = sum(
        parameter.numel()
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    )
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    lora = arguments.lora_rank is not None
    if lora:
        model = add_lora(model, arguments)
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]

    tokens = num_tokens * arguments.per_device_train_batch_size
    in_half = size.dtype.itemsize < torch.float32.itemsize
    computed = torch.bfloat16.itemsize if arguments.bf16 or arguments.fp16 or in_half else size.dtype.itemsize
    kept = _kept(size, tokens, computed, norms // size.num_layers, lora)
    hidden_states = size.num_layers * size.hidden_states(tokens)
    offloaded = hidden_states if arguments.offload_activations else 0
    _, inner, (heads, kv_heads, head_dim) = size.widths()
    on_cpu = arguments.device.type == "cpu"
    parts = {
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": sum(weight.nbytes for weight in trained),
        "optimizer": optimizer_bytes(model, str(getattr(arguments.optim, "value", arguments.optim))),
        "copies": 2 * linear if computed < size.dtype.itemsize and not lora else 0,
        "activations": hidden_states - offloaded + kept if arguments.gradient_checkpointing else size.num_layers * kept,
        "backward": tokens * max(3 * computed * inner, 16 * (heads + kv_heads) * head_dim),
        "logits": size.logits() + _trained_head(model),
        "distillation": _taught(size, tokens, distillation) if distillation is not None else 0,
        "attention": torch.get_num_threads() * size.layer_in_float32(tokens) if on_cpu else 0,
        "libraries": LIBRARIES + _DATA_LIBRARIES,
    }
    return TrainingMemory(parts, kept, arguments.gradient_accumulation_steps > 1, offloaded)


def tell_memory(
    size: ModelSize,
    num_tokens: int,
    arguments: FinetuneArguments,
    tell: Callable[[str], None],
    distillation: Distillation | None = None,
) -> TrainingMemory:
    """Tell how much memory a training takes, and log a warning if that is more than there is.

    Args:
        size, num_tokens, arguments, distillation: see `training_memory`.
        tell: called with the line.
    """
    needs, free = training_memory(size, num_tokens, arguments, distillation), available_memory(arguments.device)
    there = "" if free is None else f"; {free / 1e9:.1f} GB are free"
    tell(f"estimated peak memory: {needs}{there}")
    if free is not None and needs.peak > free:
        logger.warning(
            "the estimate is more than the memory that is free on %s: try, in this order, %s",
            arguments.device,
            ", ".join(_remedies(size, arguments)),
        )
    return needs


def _remedies(size: ModelSize, arguments: FinetuneArguments) -> list[str]:
    """The options that make a training take less memory and are not used yet, the least harmful first."""
    on_gpu = arguments.device.type == "cuda"
    remedies = {
        "--gradient-checkpointing": arguments.gradient_checkpointing,
        "--per-device-train-batch-size 1": arguments.per_device_train_batch_size == 1,
        "--offload-activations": arguments.offload_activations or not on_gpu,
        "--lora-rank 16 with --dtype bfloat16": arguments.lora_rank is not None and size.dtype.itemsize == 2,
        "--optim adamw_8bit": "8bit" in str(arguments.optim) or not on_gpu,
        "--lora-train-embeddings-and-norms false": arguments.lora_rank is None
        or not arguments.lora_train_embeddings_and_norms,
        "a smaller --context-length": False,
    }
    return [option for option, is_used in remedies.items() if not is_used]


def optimizer_bytes(model: nn.Module, name: str) -> int:
    """Bytes of the states of an optimizer of TrainingArguments; of one that is not in the table, as those of AdamW.

    Trainer has 8-bit optimizers of bitsandbytes keep embeddings in 32 bits; Adafactor has a number per row and column.
    """
    kind = name.removeprefix("paged_")
    tables = [] if "torch" in kind else [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    total = 0.0
    for weight in {id(weight): weight for weight in model.parameters() if weight.requires_grad}.values():
        if kind == "adafactor":
            rows, columns = weight.shape[-2:] if weight.ndim > 1 else (weight.numel(), 0)
            total += 4 * (rows + columns)
            continue
        states = next((count for start, count in _STATES.items() if kind.startswith(start)), _UNKNOWN)
        each: float = weight.itemsize
        if kind.endswith("32bit") or kind == "ademamix":
            each = 4
        elif kind.endswith("8bit"):
            each = 4 if any(weight is table for table in tables) else 1
        elif kind.endswith("4bit"):
            each = 0.5
        total += states * each * weight.numel()
    return int(total)


def _taught(size: ModelSize, tokens: int, distillation: Distillation) -> int:
    hidden, _, _ = size.widths()
    layers = 2 * size.num_layers if distillation.layer_weight else 0
    return size.logits() * 3 // 4 + min(distillation.rows, tokens) * (1 + layers) * hidden * size.dtype.itemsize


def _trained_head(model: Any) -> int:
    head = model.get_output_embeddings()
    return 0 if head is None else sum(weight.nbytes for weight in head.parameters() if weight.requires_grad)


def _kept(size: ModelSize, tokens: int, computed: int, norms: int, lora: bool) -> int:
    """What a layer keeps for its backward.

    Args:
        computed: bytes of a number in linear layers.
        norms: numbers of a token that norms of a layer are given.
    """
    hidden, inner, (heads, kv_heads, head_dim) = size.widths()
    between = size.dtype.itemsize
    in_float32 = torch.float32.itemsize
    each = norms * (in_float32 + between + computed + (between if between < in_float32 else 0))
    each += computed * (2 * (heads + kv_heads) * head_dim + 4 * inner)
    if lora and computed < in_float32:
        each += computed * (5 * hidden + heads * head_dim + inner)
    return tokens * each
