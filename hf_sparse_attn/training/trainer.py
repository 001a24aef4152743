"""Transformers' Trainer, with what fine-tuning on long documents needs beyond it."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_sparse_attn.errors import RunError, add_note, one_line
from hf_sparse_attn.logits import loss_in_chunks
from hf_sparse_attn.output_files import finite, write_json
from hf_sparse_attn.training.checkpoints import checkpoints

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_sparse_attn.data import StreamedRows


def finetune(
    model: PreTrainedModel,
    tokenizer: Any,
    train_rows: Dataset | StreamedRows,
    arguments: TrainingArguments,
    eval_rows: Dataset | None = None,
) -> dict[str, Any]:
    """Fine-tune on rows from `hf_sparse_attn.data` and save model, tokenizer and trainer state.

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
    train_rows: Dataset | StreamedRows,
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
