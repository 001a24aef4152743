"""Convert a dense checkpoint: fit the hash and what every head reads on sample documents.

    hf-sparse-attn convert --model demo --output converted
    hf-sparse-attn convert --model demo --output converted --target-density 0.13
    hf-sparse-attn convert --model demo --output converted --max-loss 0.01
    hf-sparse-attn convert --model meta-llama/Llama-3.2-1B --output converted --calibration-dataset books.jsonl

The weights stay as they are. The output directory loads with stock `from_pretrained(DIR, attn_implementation="sparse")`
once `hf_sparse_attn` is imported, and as an ordinary dense model without it. Where it cannot be finished, what was
fitted stays in a file beside it, which other scripts take as `--sparse-attention @FILE`.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hf_sparse_attn.cli.argument_types import count, json_object, output_directory, positive_int, positive_number, share
from hf_sparse_attn.cli.arguments import (
    OneLineErrors,
    argument,
    choose_device,
    load_model,
    print_table,
    read_checkpoint,
    warn,
)
from hf_sparse_attn.cli.output_files import RunError, check_space, kept_on_failure, one_line, reason
from hf_sparse_attn.config import text_config

TARGET_DENSITY = 0.19


def positions_or_auto(text: str) -> int | str:
    """The type of --dense-below."""
    return text if text == "auto" else count(text)


def parse_arguments(words: list[str] | None = None) -> Any:
    """The arguments of the command line, or of a list of its words.

    Raises:
        UserError: they cannot be.
    """
    parser = OneLineErrors(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id, directory, or demo")
    parser.add_argument(
        "--output", type=output_directory, required=True, help="directory to write; must not exist or be empty"
    )
    parser.add_argument(
        "--calibration-dataset", default="demo", help="Hub id[:config[:split[:column]]], file, directory, or demo"
    )
    parser.add_argument("--num-calibration-documents", type=positive_int, default=3, help="default: %(default)s")
    parser.add_argument("--context-length", type=positive_int, default=8192, help="tokens of each (default: 8192)")
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument(
        "--target-density",
        type=share,
        help=f"share of the (row, key) pairs that may be read, 0 to 1 (default: {TARGET_DENSITY})",
    )
    aim.add_argument(
        "--max-loss",
        type=positive_number,
        help="instead: read as little as keeps the loss of a calibration document from rising by more, nats per token",
    )
    parser.add_argument(
        "--key-budget",
        type=positive_int,
        default=1024,
        help="keys that may be found for a row, mean over layers and KV heads: time, where density is what is read "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--sparse-attention", type=json_object, default={}, help="JSON object of fields to set, or @FILE"
    )
    parser.add_argument(
        "--dense-below",
        type=positions_or_auto,
        help='rows at positions under it read everything: a number, or "auto" to measure where sparse starts to win',
    )
    parser.add_argument(
        "--num-evaluation-documents",
        type=count,
        default=1,
        help="documents for the model card's figures; 0 leaves them out (default: %(default)s)",
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    return parser.parse_args(words)


def main() -> None:
    report(*convert(parse_arguments()))


def convert(arguments: Any) -> tuple[Path, Any, list[Any], Any, dict[str, Any] | None]:
    """Convert as `parse_arguments` says: the directory, the configuration, the choices at other densities, the choice,
    and what was measured (None: nothing)."""
    import matplotlib  # noqa: F401  whether it is there is to be known before the work
    import torch
    from tqdm import tqdm

    from hf_sparse_attn.calibration.budget_allocation import FIXED, least_density
    from hf_sparse_attn.calibration.calibrate import calibrate, choose_by_loss, describe_budgets, num_steps
    from hf_sparse_attn.calibration.model_card import write_model_card
    from hf_sparse_attn.cli.environment import describe_environment
    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.visualization import plot_trade

    with argument("--sparse-attention"):
        for name in ("key_budget", "min_weight", "hash", "calibrated_hash"):
            if name in arguments.sparse_attention:
                raise ValueError(f"{name} is what the conversion fits; use --target-density, --max-loss, --key-budget")
        base = SparseAttentionConfig.from_dict(arguments.sparse_attention)
    density = TARGET_DENSITY if arguments.target_density is None else arguments.target_density
    dense_below = arguments.dense_below
    device = choose_device(arguments.device)
    with argument("--calibration-dataset"):
        texts = load_documents(arguments.calibration_dataset, "train")
    path, config, tokenizer, _ = read_checkpoint(arguments.model, {})
    if isinstance(dense_below, int):
        base = base.replace(dense_below=dense_below)
    check_context_length(arguments.context_length, base)
    with argument("--calibration-dataset"):
        documents = long_documents(
            texts, tokenizer, arguments.context_length, max_documents=arguments.num_calibration_documents
        )
    with argument("--target-density"):
        least = least_density(base, text_config(config).num_hidden_layers, arguments.context_length)
        if arguments.max_loss is None and density < least:
            raise ValueError(
                f"must be at least {least:.4f} at {arguments.context_length} tokens: {FIXED} take that; see "
                "--sparse-attention"
            )
    held_out = evaluation_documents(arguments, documents, tokenizer)
    model = load_model(arguments.model, path, device=device, num_tokens=arguments.context_length)
    with argument(f"--model {arguments.model}"):
        model.generation_config.validate(strict=True)  # one that is not valid cannot be saved
    with argument("--output"):
        check_space(arguments.output, model.get_memory_footprint())
    if dense_below == "auto":
        measured = measure_on_model(model, documents[0]["input_ids"], base.replace(key_budget=arguments.key_budget))
        print(f"sparse attention starts to win at {measured} tokens here")
        base = base.replace(dense_below=measured)
        check_context_length(arguments.context_length, base)
    with argument("--calibration-dataset"), tqdm(total=num_steps(len(documents)), desc="calibrating") as bar:

        def progress(step: str) -> None:
            bar.update(1 if bar.postfix else 0)  # the step before this one is done
            bar.set_postfix_str(step)

        rows = [torch.tensor(document["input_ids"]) for document in documents]
        try:
            calibration = calibrate(model, rows, base, progress)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise RunError(f"what the model computes on these documents cannot be calibrated on: {error}") from error
        bar.update()
    kept = arguments.output.with_name(f"{arguments.output.name}-{os.getpid()}.sparse_attention.json")
    unfinished = unfinished_directory(arguments.output)
    with kept_on_failure(kept, "what was fitted, for --sparse-attention @FILE,") as keep:
        reachable = max(density, calibration.costs.least_density)
        keep(calibration.choose(reachable, arguments.key_budget)[0].to_dict())
        if arguments.max_loss is None:
            with argument("--target-density"):
                fitted, choice = calibration.choose(density, arguments.key_budget)
        else:
            with argument("--max-loss"):
                fitted, choice = choose_by_loss(
                    model, calibration, rows[-1], arguments.max_loss, arguments.key_budget, progress=print
                )
        keep(fitted.to_dict())
        trade = calibration.trade(arguments.key_budget)
        text_config(model.config).sparse_attention = fitted.to_dict()
        result = evaluate(model, held_out)
        with removed_on_failure(unfinished):
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            plot_trade(trade, choice, unfinished / "trade.png")
            write_model_card(
                unfinished / "README.md",
                source=arguments.model,
                config=fitted,
                budgets=describe_budgets(choice),
                trade=trade,
                choice=choice,
                calibration=[document["name"] for document in documents],
                result=result,
                environment=describe_environment(device),
            )
    put_in_place(unfinished, arguments.output)
    return arguments.output, fitted, trade, choice, result


def check_context_length(context_length: int, config: Any) -> None:
    from hf_sparse_attn.calibration.calibrate import minimum_tokens

    with argument("--context-length"):
        if context_length < minimum_tokens(config):
            raise ValueError(f"must be at least {minimum_tokens(config)}, so that some rows are sparse")


def measure_on_model(model: Any, input_ids: list[int], config: Any) -> int:
    """`measure_dense_below` on what the middle layer gets for up to 4096 tokens."""
    import torch

    from hf_sparse_attn.benchmarking.speed import layer_inputs, measure_dense_below
    from hf_sparse_attn.tracing import input_device

    layer = text_config(model.config).num_hidden_layers // 2
    ids = torch.tensor([input_ids[:4096]], device=input_device(model))
    return measure_dense_below(config, layer_inputs(model, ids, layer), layer)


def evaluation_documents(arguments: Any, calibration: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Documents of the validation split, or later ones of a dataset without splits; none that calibrated anything."""
    from hf_sparse_attn.data import load_documents, long_documents

    used = {document["name"] for document in calibration}
    wanted = arguments.num_evaluation_documents
    if not wanted:
        return []
    try:
        texts = load_documents(arguments.calibration_dataset, "validation")
        found = long_documents(texts, tokenizer, arguments.context_length, max_documents=wanted + len(used))
    except ValueError:
        return []
    return [document for document in found if document["name"] not in used][:wanted]


def evaluate(model: Any, documents: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The model card's figures, if there are documents for them and the losses are finite."""
    from tqdm import tqdm

    from hf_sparse_attn.evaluation.perplexity import compare_perplexity

    try:
        return compare_perplexity(model, documents, progress=partial(tqdm, desc="evaluating")) if documents else None
    except ValueError as error:
        warn(f"not evaluated: {one_line(error)}")
        return None


def unfinished_directory(output: Path) -> Path:
    """Where the model is written before it is in its place: inside a directory that is there already, or beside."""
    return (output if output.exists() else output.parent) / f".{output.name}.unfinished-{os.getpid()}"


@contextmanager
def removed_on_failure(directory: Path) -> Iterator[None]:
    """Write a directory; what cannot be finished is removed.

    Raises:
        RunError: it cannot be written.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(f"cannot write {str(directory)!r}: {reason(error)}") from error
        raise


def put_in_place(finished: Path, output: Path) -> None:
    """Rename a finished directory; of an output that is there already, if still empty, the files become part.

    Raises:
        RunError: it cannot be done, and the finished directory stays where it is.
    """
    try:
        if not output.exists():
            finished.rename(output)
            return
        if any(entry != finished for entry in output.iterdir()):
            raise FileExistsError("it was filled meanwhile")
        for file in sorted(
            finished.iterdir(), key=lambda file: file.name == "config.json"
        ):  # the last makes it a model
            file.rename(output / file.name)
        finished.rmdir()
    except OSError as error:
        message = f"cannot write to {str(output)!r}: {reason(error)}; the finished model is in {str(finished)!r}"
        raise RunError(message) from error


def report(output: Path, config: Any, trade: list[Any], choice: Any, result: dict[str, Any] | None) -> None:
    print_table(
        "What density costs (predicted; the real loss is higher, the order is what counts)",
        ["density", "rise of the loss, nats", "keys found per row", "dense layers"],
        [
            [
                f"{point.density:.3f}" + (" (chosen)" if point is choice else ""),
                f"{point.loss:.5f}",
                f"{point.mean_key_budget:.0f}",
                ", ".join(map(str, point.dense_layers)) or "none",
            ]
            for point in sorted([*trade, choice], key=lambda point: point.density)
        ],
    )
    print(f"{output}: {len(config.calibrated_hash) / 1e6:.2f} MB of calibrated hash in config.json")
    if result is None:
        print("not evaluated: run scripts/eval_perplexity.py on documents that did not calibrate it")
    else:
        print(
            f"perplexity {result['dense']['perplexity']:.4f} dense, {result['sparse']['perplexity']:.4f} sparse "
            f"(x {result['perplexity_ratio']:.4f}) at density {result['sparse']['density']:.4f}"
        )
