"""Transformers' Trainer, with what fine-tuning on long documents needs beyond it."""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
import threading
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_sparse_attn.calibration.remote_code import write_remote_code
from hf_sparse_attn.config import sparse_config
from hf_sparse_attn.errors import ArgumentError, RunError, add_note, is_first_process, one_line
from hf_sparse_attn.evaluation.perplexity import loss_by_position
from hf_sparse_attn.logits import Taught, loss_in_chunks
from hf_sparse_attn.output_files import finite, write_json
from hf_sparse_attn.training.arguments import FinetuneArguments, check_packages
from hf_sparse_attn.training.checkpoints import checkpoints
from hf_sparse_attn.training.distillation import Distillation, Teacher, check_distillation, other_loss
from hf_sparse_attn.training.lora import add_lora, autocast_dtype, merge_lora
from hf_sparse_attn.training.processes import TrainerOfProcesses, any_process
from hf_sparse_attn.training.refits import Refits, check_refits, hash_recall, some_documents

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_sparse_attn.data import StreamedRows

logger = logging.getLogger(__name__)
_EXACT_UPDATES = ("bf16_stochastic_round", "kahan_sum", "use_kahan_summation")  # arguments of optimizers


def finetune(
    model: PreTrainedModel,
    tokenizer: Any,
    train_rows: Dataset | StreamedRows,
    arguments: TrainingArguments,
    eval_rows: Dataset | None = None,
    distillation: Distillation | None = None,
) -> dict[str, Any]:
    """Fine-tune on rows from `hf_sparse_attn.data` and save model, tokenizer and trainer state.

    `arguments.output_dir` is then loaded like any other checkpoint, and holds `trainer_state.json` and
    `all_results.json`. Training continues from `arguments.resume_from_checkpoint` where that is set: a checkpoint
    directory, or True for the last one in the output directory.

    The first Ctrl-C ends the training after the step at hand, with a checkpoint; a second one ends it at once. Where
    saving fails, the weights go to a temporary directory, which a note of the error names.

    Args:
        eval_rows: evaluated before and after training, if given.
        distillation: how the model learns from its dense self; None leaves that out.

    Returns:
        "steps", "first_loss" and "last_loss" (as logged: nats a token; None if none was logged); where rows are sparse
        "hash_recall_before" and "hash_recall_after", see `refits.hash_recall`; with `eval_rows` "eval_loss_before" and
        "eval_loss_after", with `distillation` also "dense_eval_loss_before" and "dense_eval_loss_after" (those of the
        same weights with dense attention), and unless the model is sharded "eval_by_position_before" and
        "eval_by_position_after", see `hf_sparse_attn.evaluation.perplexity.loss_by_position`.

    Raises:
        RunError: a loss is not finite, or the checkpoint to resume from cannot be loaded.
    """
    return train(make_trainer(model, tokenizer, train_rows, arguments, eval_rows, distillation))


def make_trainer(
    model: PreTrainedModel,
    tokenizer: Any,
    train_rows: Dataset | StreamedRows,
    arguments: TrainingArguments,
    eval_rows: Dataset | None = None,
    distillation: Distillation | None = None,
) -> FinetuneTrainer:
    """The Trainer of `finetune`.

    Raises:
        ArgumentError: for "optim" or "lora_rank": a package is not installed.
    """
    check_packages(arguments)
    Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # some optimizers need the model, too
    if isinstance(arguments, FinetuneArguments) and arguments.lora_rank is not None:
        model = add_lora(model, arguments)
    _warn_of_lost_updates(model, arguments)
    return FinetuneTrainer(
        model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        # No padding and no attention_mask: with one, Transformers would not see that rows are packed.
        data_collator=default_data_collator,
        processing_class=tokenizer,
        distillation=distillation,
    )


def train(trainer: FinetuneTrainer) -> dict[str, Any]:
    """What `finetune` does with its Trainer."""
    arguments = trainer.args
    results: dict[str, Any] = {}
    recall = trainer.hash_recall()
    if trainer.eval_dataset is not None:
        trainer.at_beginning(lambda: results.update(trainer.held_out_losses("before")))
    watch = _Watch()
    trainer.add_callback(watch)
    try:
        with watch:
            trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
        watch.raise_if_interrupted(trainer)
        trainer.restore_use_cache()
        trainer.merge_lora()
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
    if recall is not None:
        results |= {"hash_recall_before": recall, "hash_recall_after": trainer.hash_recall()}
    _save_results(trainer, results)
    if trainer.eval_dataset is not None:
        results |= trainer.held_out_losses("after")
        trainer.save_state()
        _save_results(trainer, results)
    return results


class FinetuneTrainer(TrainerOfProcesses):
    """A Trainer that stops at a loss which is not finite, before the weights and the checkpoints are lost to it."""

    def __init__(self, model: PreTrainedModel, *, distillation: Distillation | None = None, **kwargs: Any) -> None:
        self._config: Any = model.config
        self._use_cache = model.config.use_cache
        super().__init__(model=model, **kwargs)
        self._teacher: Teacher | None = None
        if distillation is not None:
            check_distillation(self.args, sparse_config(self._config), sys.maxsize)
            self._distillation, self._teacher = distillation, Teacher(model, distillation)
        every = getattr(self.args, "refit_every", None)
        if every is not None and self.is_sharded:
            raise ArgumentError("refit_every", "needs whole weights in each process, not FSDP or DeepSpeed")
        self._documents = [] if self.is_sharded else some_documents(kwargs.get("train_dataset") or ())
        if every is not None:
            check_refits(sparse_config(self._config), min(map(len, self._documents)))
        self.add_callback(Refits(self._documents, every))

    def hash_recall(self) -> float | None:
        """How well the model's hash finds what a few rows of the training data should read; see `refits.hash_recall`.

        None where no row is sparse, and where the weights are in parts.
        """
        model: Any = self.model
        found = hash_recall(model, self._documents)
        return None if found is None else found[0]

    def held_out_losses(self, when: str) -> dict[str, Any]:
        """What `finetune` tells of the loss on `eval_dataset`, in nats a token."""
        losses: dict[str, Any] = {f"eval_loss_{when}": self.evaluate()["eval_loss"]}
        if self._teacher is not None:
            with self._teacher.as_dense():
                losses[f"dense_eval_loss_{when}"] = self.evaluate(metric_key_prefix="eval_dense")["eval_dense_loss"]
        if not self.is_sharded:
            model, rows = cast(PreTrainedModel, self.model), cast(Any, self.eval_dataset)
            losses[f"eval_by_position_{when}"] = loss_by_position(model.eval(), rows)
        return losses

    def restore_use_cache(self) -> None:
        """Undo that Trainer switches the cache off for training; the model is for generation as well."""
        self._config.use_cache = self._use_cache

    def merge_lora(self) -> None:
        """Save LoRA, if it is trained, in a directory of its own, and go on with a model into which it is merged."""
        if getattr(self.args, "lora_rank", None) is not None:
            self.save_model(str(_output(self) / "adapter"), _internal_call=True)
            self.model = self.model_wrapped = merge_lora(self.accelerator.unwrap_model(self.model))
            self.accelerator._models.clear()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_remote_code(Path(output_dir or _output(self)))

    def compute_loss_context_manager(self) -> ExitStack:
        context: ExitStack = super().compute_loss_context_manager()
        model: Any = self.model
        if (dtype := autocast_dtype(model)) is not None:
            context.enter_context(torch.autocast(self.args.device.type, dtype))
        return context

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        all_logits = "labels" not in inputs or self._needs_all_logits(return_outputs)
        in_chunks = nullcontext() if all_logits else loss_in_chunks(model, self._taught(model, inputs))
        with in_chunks, self._offloaded():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _taught(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Taught | None:
        """What the model's dense self says of a batch, where this step is one of those that ask it."""
        if self._teacher is None or not model.training or self.state.global_step % self._distillation.every:
            return None
        return self._lessons.enter_context(self._teacher.lesson(model, inputs))

    def _offloaded(self) -> AbstractContextManager[None]:
        """Where what checkpointed layers keep is to be on the CPU: in layers themselves, checkpointing's hooks hold."""
        if not getattr(self.args, "offload_activations", False):
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.args.device.type == "cuda")

    def _needs_all_logits(self, return_outputs: bool) -> bool:
        """Whether logits are asked for, or something else than this very model's forward computes the loss."""
        return (
            self.compute_loss_func is not None
            or (return_outputs and not self.args.prediction_loss_only)
            or other_loss(self.args) is not None
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with ExitStack() as self._lessons:  # until the backward is done
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
        if is_first_process():
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
        self.interrupted = any_process(self.interrupted, args.device)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history[-1:] = finite(state.log_history[-1:])


def _warn_of_lost_updates(model: torch.nn.Module, arguments: TrainingArguments) -> None:
    half = next((p.dtype for p in model.parameters() if p.requires_grad and p.itemsize < torch.float32.itemsize), None)
    if half is not None and not any(name in str(arguments.optim_args) for name in _EXACT_UPDATES):
        logger.warning(
            "updates of less than %.1g of a weight are lost in weights of %s: train float32 weights with bf16 "
            "(--dtype float32 --bf16), or LoRA (--lora-rank)",
            torch.finfo(half).eps / 2,
            half,
        )


def _output(trainer: Trainer) -> Path:
    return Path(str(trainer.args.output_dir))


def _save_results(trainer: Trainer, results: dict[str, Any]) -> None:
    if trainer.is_world_process_zero():
        write_json(_output(trainer) / "all_results.json", results)


def _save_elsewhere(trainer: FinetuneTrainer, error: Exception) -> None:
    """Save what was trained so far among the temporary files, and note it with an error."""
    if trainer.state.global_step > 0 and trainer.can_save_alone:
        with suppress(Exception):
            directory = tempfile.mkdtemp(prefix="hf_sparse_attn-")
            trainer.restore_use_cache()
            trainer.save_model(directory)
            add_note(error, f"the weights after step {trainer.state.global_step} are in {directory!r}")
