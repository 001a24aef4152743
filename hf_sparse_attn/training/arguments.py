"""Transformers' TrainingArguments with defaults for long rows, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from hf_sparse_attn.errors import ArgumentError, argument, one_line
from hf_sparse_attn.training.lora import import_peft

_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "label_smoothing_factor": 0,
    "warmup_steps": 0,
    "refit_every": 1,
    "logging_steps": 0,
    "eval_steps": 0,
    "save_steps": 0,
    "eval_delay": 0,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
    "lora_rank": 1,
    "lora_alpha": 1,
}
_UNDER = {"adam_beta1": 1, "adam_beta2": 1, "label_smoothing_factor": 1, "seed": 2**32, "data_seed": 2**32}
_MAY_BE_INFINITE = ("max_grad_norm",)
_NEED_THE_MODEL = ("lomo", "adalomo", "galore", "apollo")  # optimizers, by how their names begin


@dataclass
class FinetuneArguments(TrainingArguments):
    """Transformers' TrainingArguments with defaults for short runs over long rows; any of them can be given.

    Raises:
        ValueError: for numbers with which nothing can be trained, naming the field.
    """

    output_dir: str = field(metadata={"aliases": ["--output"], "help": "directory to fill, new or empty"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "rows per device and step"})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "rows per device in evaluation"})
    learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate"})
    warmup_steps: float = field(default=0.1, metadata={"help": "warm-up: steps, or below 1 a share of all steps"})
    logging_steps: float = field(default=5, metadata={"help": "steps between two logged losses"})
    logging_first_step: bool = field(default=True, metadata={"help": "also log the loss of the first step"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    report_to: str | None = field(default="none", metadata={"help": "experiment tracker, or none"})
    # Trainer's default, true, warns where there is no accelerator to copy to.
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "pin rows in memory"})
    # The logits of an evaluation would be gathered otherwise: a long row's take more memory than the model.
    prediction_loss_only: bool = field(default=True, metadata={"help": "compute only the loss in evaluation"})
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train LoRA of rank N beside all linear layers but the head, with PEFT, not the weights. "
            "Checkpoints hold the adapter alone; in the end, the output directory holds the model with the adapter "
            "merged into its weights, and the adapter by itself in adapter/."
        },
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Scale LoRA by N over its rank (default: twice the rank)."}
    )
    lora_train_embeddings_and_norms: bool = field(
        default=True,
        metadata={"help": "With LoRA, also train embeddings and norms in full, as longer contexts need (LongLoRA)."},
    )
    offload_activations: bool = field(
        default=False,
        metadata={
            "help": "Hold what gradient checkpointing keeps of each layer in the CPU's memory, not in the GPU's."
        },
    )

    refit_every: int | None = field(
        default=None,
        metadata={
            "help": "Fit the hash of a converted model to its weights anew after every N steps, at the density that it "
            "has (default: never)."
        },
    )

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name, None)
            under = _UNDER.get(name, math.inf)
            if value is not None and not (least <= value < under or (value == math.inf and name in _MAY_BE_INFINITE)):
                allowed = f"at least {least} and under {under}" if name in _UNDER else f"finite and at least {least}"
                raise ValueError(f"{name} must be {allowed}, got {value}")
        if not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs must be finite and greater than 0, got {self.num_train_epochs}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps must be at least 1, or -1 for all of num_train_epochs, got {self.max_steps}")
        if self.lora_rank is None and self.lora_alpha is not None:
            raise ValueError(f"lora_alpha is of use with lora_rank alone, got {self.lora_alpha}")
        if self.lora_rank is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.lora_rank
        # Newer releases of Transformers have another name for gradient checkpointing, and warn about this one.
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            new = old.replace("gradient", "activation")
            if getattr(self, new, False) is None:
                setattr(self, new, getattr(self, old))
        # Trainer refuses bf16 on a machine without an accelerator otherwise.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        if self.gradient_checkpointing:
            given: Any = self.gradient_checkpointing_kwargs or {}
            self.gradient_checkpointing_kwargs = {"use_reentrant": False} | given
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError("offload_activations needs gradient_checkpointing, which keeps little of each layer")
        if self.offload_activations and self.device.type == "cpu":
            raise ValueError("offload_activations is of use on a GPU alone: here all is in the CPU's memory")


def check_packages(arguments: TrainingArguments) -> None:
    """Make sure that the packages that the optimizer and LoRA need are installed; quick, for before a model is loaded.

    Raises:
        ArgumentError: for "optim" or "lora_rank".
    """
    name = str(getattr(arguments.optim, "value", arguments.optim))
    with argument("optim", name):
        if not name.startswith(_NEED_THE_MODEL):
            Trainer.get_optimizer_cls_and_kwargs(arguments)
    if getattr(arguments, "lora_rank", None) is not None:
        with argument("lora_rank"):
            import_peft()


def check_hub(arguments: TrainingArguments) -> None:
    """Make sure that the Hub, if the model is to be pushed there, can be reached and knows who asks.

    Raises:
        ArgumentError: for "push_to_hub".
    """
    if not arguments.push_to_hub:
        return
    from huggingface_hub import HfApi

    try:
        HfApi().whoami(token=arguments.hub_token)
    except Exception as error:  # of several libraries, by what is wrong
        raise ArgumentError("push_to_hub", f"the Hub does not tell who you are: {one_line(error)}") from error
