"""What fine-tuning on long documents needs beyond Transformers' Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class FinetuneArguments(TrainingArguments):
    """Transformers' TrainingArguments with defaults for short runs over long rows; any of them can be given."""

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

    Args:
        eval_rows: evaluated before and after training, if given.

    Returns:
        "steps", "first_loss" and "last_loss" (as logged: nats a token), and "eval_loss_before" and "eval_loss_after"
        with `eval_rows`.
    """
    use_cache = model.config.use_cache
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        # No padding and no attention_mask: with one, Transformers would not see that rows are packed.
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    results: dict[str, Any] = {}
    if eval_rows is not None:
        results["eval_loss_before"] = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    results |= {"steps": trainer.state.global_step, "first_loss": losses[0], "last_loss": losses[-1]}
    if eval_rows is not None:
        results["eval_loss_after"] = trainer.evaluate()["eval_loss"]

    # Trainer switches the cache off for training; the saved model is for generation as well.
    model.config.use_cache = use_cache
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("all", results, combined=False)
    return results
