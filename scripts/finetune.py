"""Fine-tune a model with sparse attention on long documents, with Transformers' Trainer.

    python scripts/finetune.py --model converted --dataset demo --context-length 2048 --output tuned --max-steps 20
    python scripts/finetune.py --model converted --dataset demo --context-length 2048 --output tuned --max-steps 40 \
        --resume_from_checkpoint last

Every argument of Transformers' TrainingArguments is accepted as well, with dashes or underscores.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from hf_sparse_attn.command_line import (
    OneLineErrors,
    UserError,
    argument,
    check_output_directory,
    json_object,
    print_table,
    read_checkpoint,
    run,
)
from hf_sparse_attn.data import load_documents, packed, tokenize, windowed
from hf_sparse_attn.loading import load_sparse_model, parse_dtype
from hf_sparse_attn.training import FinetuneArguments, finetune


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Hub id, directory, or demo"})
    dataset: str = field(metadata={"help": "Hub id[:config[:split[:column]]], file, directory, or demo"})
    context_length: int = field(metadata={"help": "tokens per row"})
    rows: Literal["packed", "windowed"] = field(
        default="packed", metadata={"help": "packed: documents end to end; windowed: each row inside one document"}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "dataset (its validation split) for the loss before and after training"}
    )
    eval_rows: int = field(default=8, metadata={"help": "rows of --eval-dataset to use"})
    sparse_attention: str = field(default="{}", metadata={"help": "JSON object of fields to override"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights in training"})


class Parser(OneLineErrors, HfArgumentParser):
    """HfArgumentParser whose errors are one line."""


def parse_arguments() -> tuple[ScriptArguments, FinetuneArguments]:
    parser = Parser([ScriptArguments, FinetuneArguments], description=__doc__.splitlines()[0], allow_abbrev=False)
    try:
        script, training, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    except (ValueError, TypeError) as error:
        raise UserError(str(error).splitlines()[0]) from error
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}")
    if script.context_length < 2:
        raise UserError(f"argument --context-length: must be at least 2, got {script.context_length}")
    if script.eval_rows < 1:
        raise UserError(f"argument --eval-rows: must be at least 1, got {script.eval_rows}")
    return script, training


def resolve_checkpoint(training: FinetuneArguments) -> None:
    """Check the output directory against `--resume_from_checkpoint`, where "last" means the last one in it."""
    resume = training.resume_from_checkpoint
    if resume is None:
        with argument("--output"):
            check_output_directory(training.output_dir)
        return
    with argument("--resume_from_checkpoint"):
        output = Path(training.output_dir)
        checkpoint = resume
        if resume.lower() in ("last", "true"):
            checkpoint = get_last_checkpoint(str(output)) if output.is_dir() else None
        if checkpoint is None or not (Path(checkpoint) / "trainer_state.json").is_file():
            raise FileNotFoundError(f"no checkpoint {resume!r} (of --output {training.output_dir!r}) to resume from")
    training.resume_from_checkpoint = checkpoint


def main() -> None:
    script, training = parse_arguments()
    resolve_checkpoint(training)
    overrides = {}
    if script.sparse_attention:
        with argument("--sparse-attention"):
            overrides = json_object(script.sparse_attention)
    with argument("--dtype"):
        dtype = parse_dtype(script.dtype)
    with argument("--dataset"):
        documents = load_documents(script.dataset, "train")
    path, _, tokenizer, _ = read_checkpoint(script.model, overrides)

    make_rows = packed if script.rows == "packed" else windowed
    with argument("--dataset"):
        train_rows = make_rows(tokenize(documents, tokenizer), script.context_length)
    eval_rows = None
    if script.eval_dataset:
        with argument("--eval-dataset"):
            eval_rows = make_rows(
                tokenize(load_documents(script.eval_dataset, "validation"), tokenizer), script.context_length
            )
            # Spread over the documents: the first rows are all of the first one.
            eval_rows = eval_rows.select(range(0, len(eval_rows), -(-len(eval_rows) // script.eval_rows)))
    with argument(f"--model {script.model}"):
        model = load_sparse_model(path, overrides, dtype=dtype)

    results = finetune(model, tokenizer, train_rows, training, eval_rows)
    rows = [
        ["rows in the dataset", f"{len(train_rows)} of {script.context_length} tokens"],
        ["steps", str(results["steps"])],
        ["loss, first to last", f"{results['first_loss']:.4f} -> {results['last_loss']:.4f}"],
    ]
    if eval_rows is not None:
        before, after = results["eval_loss_before"], results["eval_loss_after"]
        rows.append([f"loss on {len(eval_rows)} held-out rows", f"{before:.4f} -> {after:.4f}"])
    print_table(f"Saved to {training.output_dir}", ["", ""], rows)


if __name__ == "__main__":
    run(main)
