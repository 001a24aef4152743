"""Fine-tune a model with sparse attention on long documents, with Transformers' Trainer.

    hf-sparse-attn finetune --model converted --dataset demo --context-length 2048 --output tuned --max-steps 20
    hf-sparse-attn finetune --model converted --dataset demo --context-length 2048 --output tuned --max-steps 40 \
        --resume_from_checkpoint last
    hf-sparse-attn finetune --model converted --dataset demo --context-length 8192 --output tuned --max-steps 100 \
        --lora-rank 16 --learning-rate 2e-4 --dtype bfloat16 --gradient-checkpointing true
    hf-sparse-attn finetune --model demo --dataset demo --context-length 16384 --rope-scaling yarn --rows windowed \
        --output longer --max-steps 50 --eval-dataset demo

Every argument of Transformers' TrainingArguments is accepted as well, with dashes or underscores. Ctrl-C ends the
training after the step at hand, with a checkpoint; `--resume_from_checkpoint last` takes the last one that is whole.
"""

from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from hf_sparse_attn.cli.argument_types import json_object
from hf_sparse_attn.cli.arguments import OneLineErrors, UserError, argument, print_table, report, warn
from hf_sparse_attn.cli.options import DATASETS_HELP, FIELDS_HELP, MODEL_HELP, description_and_epilog
from hf_sparse_attn.cli.training_rows import SourceOfRows
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.data import parse_mixture
from hf_sparse_attn.environment import describe_environment
from hf_sparse_attn.errors import OtherProcessError, is_first_process, one_line
from hf_sparse_attn.loading import library_errors, load_model, parse_dtype, read_checkpoint
from hf_sparse_attn.memory import ModelSize
from hf_sparse_attn.output_files import check_output_directory, check_space
from hf_sparse_attn.pattern_fields import check_causal
from hf_sparse_attn.training import (
    Distillation,
    FinetuneArguments,
    FinetuneTrainer,
    check_first_loss,
    check_hub,
    check_packages,
    check_parts_of_rows,
    check_resumable,
    checkpoints,
    damage,
    extend_context,
    make_trainer,
    tell_memory,
    train,
)
from hf_sparse_attn.training.allocator import return_freed_memory
from hf_sparse_attn.training.distillation import check_distillation
from hf_sparse_attn.training.processes import agreed, made_once
from hf_sparse_attn.training.refits import check_refits

_METAVARS = {
    "model": "MODEL",
    "dataset": "DATASET",
    "eval_dataset": "DATASET",
    "sparse_attention": "JSON",
    "rope_scaling": "NAME",
    "output_dir": "DIR",
    "dtype": "DTYPE",
}
_METAVARS_BY_TYPE = {int: "N", float: "NUMBER"}


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": MODEL_HELP})
    dataset: list[str] = field(metadata={"help": DATASETS_HELP})
    context_length: int = field(metadata={"help": "Train on rows of N tokens."})
    rows: Literal["best-fit", "packed", "windowed"] = field(
        default="best-fit",
        metadata={
            "help": "Keep documents whole where they fit a row (best-fit, the default), put them end to end and cut "
            "them where a row ends (packed), or take whole rows of long documents alone (windowed)."
        },
    )
    eos: bool = field(default=True, metadata={"help": "End documents with the tokenizer's EOS token, or do not."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read documents while training, in their order, with a few in memory; needs --max-steps."},
    )
    rope_scaling: str | None = field(
        default=None,
        metadata={
            "help": "Scale the rotary embeddings to a --context-length beyond the trained one: linear, dynamic, yarn, "
            "llama3, theta (raise rope_theta), or a JSON object of rope_parameters."
        },
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Measure the loss on this dataset (its validation split) before and after training."},
    )
    eval_rows: int = field(default=8, metadata={"help": "Use N rows of --eval-dataset."})
    distill: bool = field(
        default=False, metadata={"help": "Learn also from the same weights with dense attention, where both differ."}
    )
    distill_weight: float = field(
        default=Distillation.weight,
        metadata={"help": "Weigh the divergence of the logits with this, the labels with the rest of 1."},
    )
    distill_rows: int = field(
        default=Distillation.rows, metadata={"help": "Compare the logits of at most N tokens of a batch."}
    )
    distill_every: int = field(default=Distillation.every, metadata={"help": "Compare in every Nth step."})
    distill_layer_weight: float = field(
        default=Distillation.layer_weight,
        metadata={"help": "Add the relative squared error of the attention layers' outputs with this weight."},
    )
    sparse_attention: str = field(default="{}", metadata={"help": FIELDS_HELP})
    dtype: str = field(default="float32", metadata={"help": "Train weights of this dtype."})


class Parser(OneLineErrors, HfArgumentParser):
    """An HfArgumentParser whose errors are one line."""


def make_parser() -> Parser:
    description, epilog = description_and_epilog(__doc__)
    parser = Parser(
        [ScriptArguments, FinetuneArguments],
        description=description,
        epilog=epilog,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.nargs != 0 and action.choices is None:
            by_type = _METAVARS_BY_TYPE.get(action.type, "VALUE")  # type: ignore[call-overload]
            action.metavar = _METAVARS.get(action.dest, by_type)
        action.help = action.help or "See TrainingArguments of Transformers."
    return parser


def parse_arguments() -> tuple[ScriptArguments, FinetuneArguments]:
    """The arguments of the command line.

    Raises:
        UserError: they cannot be.
    """
    try:
        script, training, unknown = make_parser().parse_args_into_dataclasses(return_remaining_strings=True)
    except UserError:
        raise
    except Exception as error:  # of many types, by which TrainingArguments refuses values
        raise UserError(one_line(error)) from error
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}")
    if script.context_length < 2:
        raise UserError(f"argument --context-length: must be at least 2, got {script.context_length}")
    if script.eval_rows < 1:
        raise UserError(f"argument --eval-rows: must be at least 1, got {script.eval_rows}")
    with argument("--dataset"):
        _, shares = parse_mixture(script.dataset)
    if script.streaming and training.max_steps < 1:
        raise UserError("argument --streaming: needs --max-steps, as a stream has no length")
    if script.streaming and shares is None and len(script.dataset) > 1:
        raise UserError(
            "argument --streaming: several datasets need shares (DATASET:SHARE), as nobody knows their sizes"
        )
    return script, training


def distillation(script: ScriptArguments) -> Distillation | None:
    """What was asked for, or None.

    Raises:
        ArgumentError: a number is out of its range.
    """
    settings = Distillation(
        script.distill_weight, script.distill_rows, script.distill_every, script.distill_layer_weight
    )
    return settings if script.distill else None


def extended_config(script: ScriptArguments, config: Any) -> Any:
    """The model's config with what `--rope-scaling` says."""
    given = str(script.rope_scaling)
    with argument("--rope-scaling"):
        scaling = json_object(given) if given.startswith(("{", "@")) else given
    return extend_context(config, scaling, script.context_length)


def resolve_checkpoint(training: FinetuneArguments) -> None:
    """Check the output directory against `--resume_from_checkpoint`, where "last" means the last whole one in it."""
    output = Path(str(training.output_dir))
    resume = training.resume_from_checkpoint
    if resume is None:
        with argument("--output"):
            training.output_dir = str(check_output_directory(output))
        return
    with argument("--resume_from_checkpoint"):
        if resume.lower() in ("last", "true"):
            training.resume_from_checkpoint = str(last_checkpoint(output))
            return
        checkpoint = Path(resume).expanduser()
        if not (checkpoint / "trainer_state.json").is_file():
            raise FileNotFoundError(f"no checkpoint {resume!r} to resume from: it holds no trainer_state.json")
        if damaged := damage(checkpoint):
            raise ValueError(f"{resume!r} cannot be resumed from: {damaged}")
        training.resume_from_checkpoint = str(checkpoint)
    if output.resolve() not in checkpoint.resolve().parents:
        with argument("--output"):
            training.output_dir = str(check_output_directory(output))


def last_checkpoint(output: Path) -> Path:
    """The newest checkpoint that is whole; a warning tells of those that are not."""
    damaged: dict[Path, str] = {}
    for checkpoint in checkpoints(output):
        reason = damage(checkpoint)
        if reason is None:
            for skipped in damaged:
                warn(f"{skipped} was skipped: {damaged[skipped]}")
            return checkpoint
        damaged[checkpoint] = reason
    found = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in damaged.items())
    raise FileNotFoundError(
        f"no checkpoint 'last' (of --output {str(output)!r}) to resume from{found and f' ({found})'}"
    )


def prepare(script: ScriptArguments, training: FinetuneArguments) -> tuple[FinetuneTrainer, int, list[str]]:
    """What is to be trained, the number of held-out rows, and a line on each dataset."""
    distilled = distillation(script)
    resolve_checkpoint(training)
    with argument("--sparse-attention"):
        overrides = json_object(script.sparse_attention)
    dtype = parse_dtype(script.dtype)
    check_packages(training)
    check_hub(training)
    source = SourceOfRows(script.context_length, script.rows, script.eos, script.streaming)
    with argument("--dataset"):
        datasets, shares = parse_mixture(script.dataset)
    path, config, tokenizer, fields = read_checkpoint(script.model, overrides)
    sparse = SparseAttentionConfig.from_dict(fields)
    with argument("--sparse-attention"):
        check_causal(sparse)
    if distilled is not None:
        check_distillation(training, sparse, script.context_length)
    if training.refit_every is not None:
        check_refits(sparse, script.context_length)
    extended = None if script.rope_scaling is None else extended_config(script, config)
    if extended is not None:
        tokenizer.model_max_length = max(tokenizer.model_max_length, script.context_length)
        if sparse.hash == "calibrated":
            warn(
                "the calibrated hash was fitted to keys under the rotary embeddings of before: with scaled ones it "
                "finds less; --refit-every fits it anew while the model trains, convert --refit afterwards"
            )
    check_parts_of_rows(training, config, script.context_length, sparse)
    size = ModelSize.of(extended or config, dtype)
    if training.resume_from_checkpoint is not None:
        with argument("--resume_from_checkpoint"):
            check_resumable(Path(training.resume_from_checkpoint), size.skeleton(), training)

    if is_first_process():  # which makes the rows
        source.read("--dataset", datasets, "train")
        source.read("--eval-dataset", [script.eval_dataset] if script.eval_dataset else [], "validation")
    facts: list[str] = []

    def make_train_rows() -> Any:
        rows, lines = source.train_rows(datasets, shares, tokenizer, training)
        facts.extend(lines)
        return rows

    train_rows = make_train_rows() if script.streaming else made_once(make_train_rows)
    if shares and not script.streaming:
        training.train_sampling_strategy = "sequential"  # where another process has made the rows, too
    eval_rows = None
    if script.eval_dataset:
        eval_rows = made_once(lambda: source.eval_rows(str(script.eval_dataset), script.eval_rows, tokenizer))
    tell = print if is_first_process() else lambda *_: None
    tell_memory(size, script.context_length, training, tell, distilled)
    if training.device.type == "cpu":
        return_freed_memory()
    model = load_model(script.model, path, overrides, num_tokens=script.context_length, dtype=dtype, config=extended)
    with argument(f"--model {script.model}"):
        model.generation_config.validate(strict=True)  # one that is not valid cannot be saved
    with argument("--output"):
        check_space(Path(training.output_dir), model.get_memory_footprint())
    with argument("of TrainingArguments"), library_errors("what was given"):
        trainer = make_trainer(model, tokenizer, train_rows, training, eval_rows, distilled)

    if extended is not None and training.resume_from_checkpoint is None and not trainer.is_sharded:
        first: Any = next(iter(train_rows))
        problem = check_first_loss(model, first, config).problem()
        if problem is not None:
            warn(problem)
    if script.eos and tokenizer.eos_token_id is None:
        warn("the tokenizer has no EOS token: documents end without one")
    return trainer, 0 if eval_rows is None else len(eval_rows), facts


def main() -> None:
    try:
        script, training = parse_arguments()
    except UserError as error:
        if is_first_process():
            raise
        raise OtherProcessError("the same error") from error
    if not is_first_process():
        disable_progress_bar()
    trainer, num_eval_rows, facts = agreed(lambda: prepare(script, training))
    if is_first_process():
        print(*facts, sep="\n", flush=True)
    results = train(trainer)
    if trainer.is_world_process_zero():
        output = Path(str(training.output_dir))
        results |= {"output": str(output), "eval_rows": num_eval_rows}
        results |= {"environment": describe_environment(training.device)}
        report(results, output / "all_results.json", print_result)


def print_result(result: dict[str, Any]) -> None:
    print_table(f"Saved to {result['output']}", ["", ""], result_rows(result, result["eval_rows"]))


def result_rows(results: dict[str, Any], num_eval_rows: int) -> list[list[str]]:
    """The table of what `train` returned."""
    rows = [
        ["steps", str(results["steps"])],
        ["loss, first to last", change(results["first_loss"], results["last_loss"])],
    ]
    for name, told in (
        ("hash_recall", "share of the 64 heaviest keys that is read"),
        ("eval_loss", f"loss on {num_eval_rows} held-out rows"),
        ("dense_eval_loss", "the same with dense attention"),
    ):
        if f"{name}_after" in results:
            rows.append([told, change(results[f"{name}_before"], results[f"{name}_after"])])
    spans = [results.get(f"eval_by_position_{when}", []) for when in ("before", "after")]
    for before, after in zip(*spans, strict=True):
        span = f"  of their tokens {before['start']} .. {before['end'] - 1}"
        rows.append([span, change(before["nll"], after["nll"])])
    return rows


def change(*losses: float | None) -> str:
    return " -> ".join("not logged" if loss is None else f"{loss:.4f}" for loss in losses)
