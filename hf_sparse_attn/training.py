"""What fine-tuning on long documents needs beyond Transformers' Trainer."""

from __future__ import annotations

import json
import math
import signal
import sys
import tempfile
import threading
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_sparse_attn.config import text_config
from hf_sparse_attn.errors import RunError, add_note, one_line
from hf_sparse_attn.loading import read_config
from hf_sparse_attn.logits import loss_in_chunks
from hf_sparse_attn.output_files import finite, write_json

if TYPE_CHECKING:
    from datasets import Dataset

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
    "logging_steps": 0,
    "eval_steps": 0,
    "save_steps": 0,
    "eval_delay": 0,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
}
_UNDER = {"adam_beta1": 1, "adam_beta2": 1, "label_smoothing_factor": 1, "seed": 2**32, "data_seed": 2**32}
_MAY_BE_INFINITE = ("max_grad_norm",)

# What makes a checkpoint one of another model.
_SHAPE = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
)


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
        super().__post_init__()


def finetune(
    model: PreTrainedModel,
    tokenizer: Any,
    train_rows: Dataset,
    arguments: TrainingArguments,
    eval_rows: Dataset | None = None,
) -> dict[str, Any]:
    """Fine-tune on rows from `hf_sparse_attn.data.packed` or `windowed` and save model, tokenizer and trainer state.

    `arguments.output_dir` is then loaded like any other checkpoint, and holds `trainer_state.json` and
    `all_results.json`. Training continues from `arguments.resume_from_checkpoint` where that is set: a checkpoint
    directory, or True for the last one in the output directory.

    The first Ctrl-C ends the training after the step at hand, with a checkpoint; a second one ends it at once. Where
    saving fails, the weights go to a temporary directory, which a note of the error names.

    Args:
        eval_rows: evaluated before and after training, if given.

    Returns:
        "steps", "first_loss" and "last_loss" (as logged: nats a token; None if none was logged), and
        "eval_loss_before" and "eval_loss_after" with `eval_rows`.

    Raises:
        RunError: a loss is not finite, or the checkpoint to resume from cannot be loaded.
    """
    return train(make_trainer(model, tokenizer, train_rows, arguments, eval_rows))


def make_trainer(
    model: PreTrainedModel,
    tokenizer: Any,
    train_rows: Dataset,
    arguments: TrainingArguments,
    eval_rows: Dataset | None = None,
) -> FinetuneTrainer:
    """The Trainer of `finetune`."""
    Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # an optimizer may need a package
    return FinetuneTrainer(
        model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        # No padding and no attention_mask: with one, Transformers would not see that rows are packed.
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )


def train(trainer: FinetuneTrainer) -> dict[str, Any]:
    """What `finetune` does with its Trainer."""
    arguments = trainer.args
    results: dict[str, Any] = {}
    if trainer.eval_dataset is not None:
        results["eval_loss_before"] = trainer.evaluate()["eval_loss"]
    watch = _Watch()
    trainer.add_callback(watch)
    try:
        with watch:
            trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
        watch.raise_if_interrupted(trainer)
        trainer.restore_use_cache()
        trainer.save_model()
        trainer.save_state()
    except RunError:
        raise
    except Exception as error:
        if arguments.resume_from_checkpoint and not watch.begun:
            raise RunError(f"cannot go on from {arguments.resume_from_checkpoint!r}: {one_line(error)}") from error
        _save_elsewhere(trainer, error)
        raise

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    results |= {"steps": trainer.state.global_step}
    results |= {"first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None}
    _save_results(trainer, results)
    if trainer.eval_dataset is not None:
        results["eval_loss_after"] = trainer.evaluate()["eval_loss"]
        trainer.save_state()
        _save_results(trainer, results)
    return results


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints that Trainer left in a directory, the newest first."""
    folders = [folder for folder in output.glob("checkpoint-*") if folder.is_dir()]
    numbered = {int(number): folder for folder in folders if (number := folder.name.partition("-")[2]).isdecimal()}
    return [numbered[step] for step in sorted(numbered, reverse=True)]


def damage(checkpoint: Path) -> str | None:
    """Why no training can go on from a checkpoint, such as one that was half written; None if its files are whole."""
    try:
        if not isinstance(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")), dict):
            return "its trainer_state.json is damaged"
        for index in checkpoint.glob("*.index.json"):
            for shard in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
                (checkpoint / shard).stat()
    except FileNotFoundError as error:  # Trainer writes trainer_state.json last
        return f"it has no {Path(str(error.filename)).name}"
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return "its JSON files are damaged"
    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):  # compares the header with the length of the file
                    pass
            elif file.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(file).close()  # what torch.save writes; its table stands at the end
        except (OSError, SafetensorError, zipfile.BadZipFile):
            return f"its {file.name} is damaged"
    return None


def check_resumable(checkpoint: Path, model: PreTrainedModel) -> None:
    """Make sure that a checkpoint without damage has the weights of such a model.

    Raises:
        ValueError: it has none, or those of a model of another shape.
    """
    weights = [file for pattern in ("*.safetensors", "*.bin", "*/*") for file in checkpoint.glob(pattern)]
    if {file.name for file in weights} <= {"training_args.bin"}:
        raise ValueError(f"{str(checkpoint)!r} holds no weights")
    if not (checkpoint / "config.json").is_file():
        return
    theirs, own = (text_config(config) for config in (read_config(str(checkpoint)), model.config))
    for name in _SHAPE:
        if getattr(theirs, name, None) != getattr(own, name, None):
            values = f"{name} is {getattr(theirs, name, None)}, not {getattr(own, name, None)}"
            raise ValueError(f"{str(checkpoint)!r} is of another model: its {values}")


class FinetuneTrainer(Trainer):
    """A Trainer that stops at a loss which is not finite, before the weights and the checkpoints are lost to it."""

    def __init__(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self._config: Any = model.config
        self._use_cache = model.config.use_cache
        super().__init__(model=model, **kwargs)

    def restore_use_cache(self) -> None:
        """Undo that Trainer switches the cache off for training; the model is for generation as well."""
        self._config.use_cache = self._use_cache

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        all_logits = "labels" not in inputs or self._needs_all_logits(return_outputs)
        with nullcontext() if all_logits else loss_in_chunks(model):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _needs_all_logits(self, return_outputs: bool) -> bool:
        """Whether logits are asked for, or something else than this very model's forward computes the loss."""
        args = self.args
        return (
            self.label_smoother is not None
            or self.compute_loss_func is not None
            or (return_outputs and not args.prediction_loss_only)
            or args.n_gpu > 1  # torch.nn.DataParallel
            or args.torch_compile
            or args.use_liger_kernel
            or args.parallelism_config is not None
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            folders = checkpoints(_output(self))
            left = f"the newest checkpoint is {str(folders[0])!r}" if folders else "there is no checkpoint"
            step = self.state.global_step + 1
            raise RunError(f"the loss of step {step} is {loss.item()}; try a smaller learning_rate; {left}")
        return loss


class _Watch(TrainerCallback):
    """Takes a first Ctrl-C as the wish to stop after the step at hand, and keeps NaN out of the logs."""

    def __init__(self) -> None:
        self.begun = self.interrupted = self._listening = False

    def __enter__(self) -> None:
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._listening = in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._listening:
            signal.signal(signal.SIGINT, self._interrupt)

    def __exit__(self, *_: object) -> None:
        if self._listening:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("stopping after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr)

    def raise_if_interrupted(self, trainer: Trainer) -> None:
        if self.interrupted:
            error = KeyboardInterrupt()
            for folder in checkpoints(_output(trainer))[:1]:
                add_note(
                    error, f"{str(folder)!r} holds what was trained; --resume_from_checkpoint last goes on from it"
                )
            raise error

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history[-1:] = finite(state.log_history[-1:])


def _output(trainer: Trainer) -> Path:
    return Path(str(trainer.args.output_dir))


def _save_results(trainer: Trainer, results: dict[str, Any]) -> None:
    if trainer.is_world_process_zero():
        write_json(_output(trainer) / "all_results.json", results)


def _save_elsewhere(trainer: FinetuneTrainer, error: Exception) -> None:
    """Save what was trained so far among the temporary files, and note it with an error."""
    if trainer.state.global_step > 0:
        with suppress(Exception):
            directory = tempfile.mkdtemp(prefix="hf_sparse_attn-")
            trainer.restore_use_cache()
            trainer.save_model(directory)
            add_note(error, f"the weights after step {trainer.state.global_step} are in {directory!r}")
