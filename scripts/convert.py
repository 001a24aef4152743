"""Convert a dense checkpoint: fit the hash and what every head reads on sample documents.

    python scripts/convert.py --model demo --output converted
    python scripts/convert.py --model demo --output converted --target-density 0.13
    python scripts/convert.py --model demo --output converted --max-loss 0.01
    python scripts/convert.py --model meta-llama/Llama-3.2-1B --output converted --calibration-dataset books.jsonl

The weights stay as they are. The output directory loads with stock `from_pretrained(DIR, attn_implementation="sparse")`
once `hf_sparse_attn` is imported, and as an ordinary dense model without it.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from hf_sparse_attn.command_line import (
    OneLineErrors,
    argument,
    check_output_directory,
    json_object,
    positive_int,
    print_table,
    run,
)

TARGET_DENSITY = 0.19
TEMPLATE = Path(__file__).resolve().parent.parent / "model_cards" / "template.md"


def parse_arguments() -> Any:
    parser = OneLineErrors(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id, directory, or demo")
    parser.add_argument("--output", required=True, help="directory to write; must not exist or be empty")
    parser.add_argument(
        "--calibration-dataset", default="demo", help="Hub id[:config[:split[:column]]], file, directory, or demo"
    )
    parser.add_argument("--num-calibration-documents", type=positive_int, default=3, help="default: %(default)s")
    parser.add_argument("--context-length", type=positive_int, default=8192, help="tokens of each (default: 8192)")
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument(
        "--target-density",
        type=float,
        help=f"share of the (row, key) pairs that may be read, 0 to 1 (default: {TARGET_DENSITY})",
    )
    aim.add_argument(
        "--max-loss",
        type=float,
        help="instead: read as little as keeps the loss of a calibration document from rising by more, nats per token",
    )
    parser.add_argument(
        "--key-budget",
        type=positive_int,
        default=1024,
        help="keys that may be found for a row, mean over layers and KV heads: time, where density is what is read "
        "(default: %(default)s)",
    )
    parser.add_argument("--sparse-attention", type=json_object, default={}, help="JSON object of fields to set")
    parser.add_argument(
        "--dense-below",
        help='rows at positions under it read everything: a number, or "auto" to measure where sparse starts to win',
    )
    parser.add_argument(
        "--num-evaluation-documents",
        type=int,
        default=1,
        help="documents for the model card's figures; 0 leaves them out (default: %(default)s)",
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with argument("--output"):
        output = check_output_directory(arguments.output)

    import torch
    from tqdm import tqdm
    from transformers import AutoConfig, AutoTokenizer

    from hf_sparse_attn.allocation import FIXED, least_density
    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.conversion import calibrate, choose_by_loss, describe_budgets, num_steps
    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.environment import describe_environment
    from hf_sparse_attn.evaluation.perplexity import compare_perplexity
    from hf_sparse_attn.loading import load_sparse_model, parse_device, resolve_model
    from hf_sparse_attn.model_card import write_model_card
    from hf_sparse_attn.visualization import plot_trade

    with argument("--sparse-attention"):
        for name in ("key_budget", "min_weight", "hash", "calibrated_hash"):
            if name in arguments.sparse_attention:
                raise ValueError(f"{name} is what the conversion fits; use --target-density, --max-loss, --key-budget")
        base = SparseAttentionConfig.from_dict(arguments.sparse_attention)
    with argument("--target-density"):
        density = TARGET_DENSITY if arguments.target_density is None else arguments.target_density
        if not 0 < density <= 1:
            raise ValueError(f"must be over 0 and at most 1, got {density}")
    with argument("--max-loss"):
        if arguments.max_loss is not None and not arguments.max_loss > 0:
            raise ValueError(f"must be over 0, got {arguments.max_loss}")
    with argument("--num-evaluation-documents"):
        if arguments.num_evaluation_documents < 0:
            raise ValueError(f"must be at least 0, got {arguments.num_evaluation_documents}")
    with argument("--dense-below"):
        dense_below = parse_dense_below(arguments.dense_below)
    with argument("--device"):
        device = parse_device(arguments.device)
    with argument("--calibration-dataset"):
        texts = load_documents(arguments.calibration_dataset, "train")
    with argument(f"--model {arguments.model}"):
        path = resolve_model(arguments.model)
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    if isinstance(dense_below, int):
        base = base.replace(dense_below=dense_below)
    check_context_length(arguments.context_length, base)
    with argument("--target-density"):
        least = least_density(base, config.get_text_config().num_hidden_layers, arguments.context_length)
        if arguments.max_loss is None and density < least:
            raise ValueError(
                f"must be at least {least:.4f} at {arguments.context_length} tokens: {FIXED} take that; see "
                "--sparse-attention"
            )
    with argument("--calibration-dataset"):
        documents = long_documents(
            texts, tokenizer, arguments.context_length, max_documents=arguments.num_calibration_documents
        )
    with argument(f"--model {arguments.model}"):
        model = load_sparse_model(path).to(device).eval()
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
        calibration = calibrate(model, rows, base, progress)
        bar.update()
    if arguments.max_loss is None:
        with argument("--target-density"):
            fitted, choice = calibration.choose(density, arguments.key_budget)
    else:
        with argument("--max-loss"):
            fitted, choice = choose_by_loss(
                model, calibration, rows[-1], arguments.max_loss, arguments.key_budget, progress=print
            )
    trade = calibration.trade(arguments.key_budget)
    model.config.sparse_attention = fitted.to_dict()

    result = None
    if arguments.num_evaluation_documents > 0:
        held_out = evaluation_documents(arguments, documents, tokenizer)
        if held_out:
            result = compare_perplexity(model, held_out, progress=lambda steps: tqdm(steps, desc="evaluating"))

    unfinished = output.with_name(f".{output.name}.unfinished-{os.getpid()}")
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        plot_trade(trade, choice, unfinished / "trade.png")
        write_model_card(
            unfinished / "README.md",
            TEMPLATE,
            source=arguments.model,
            config=fitted,
            budgets=describe_budgets(choice),
            trade=trade,
            choice=choice,
            calibration=[document["name"] for document in documents],
            result=result,
            environment=describe_environment(device),
        )
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    report(output, fitted, trade, choice, result)


def check_context_length(context_length: int, config: Any) -> None:
    from hf_sparse_attn.conversion import minimum_tokens

    with argument("--context-length"):
        if context_length < minimum_tokens(config):
            raise ValueError(f"must be at least {minimum_tokens(config)}, so that some rows are sparse")


def measure_on_model(model: Any, input_ids: list[int], config: Any) -> int:
    """`measure_dense_below` on what the middle layer gets for up to 4096 tokens."""
    import torch

    from hf_sparse_attn.evaluation.speed import layer_inputs, measure_dense_below

    layer = model.config.get_text_config().num_hidden_layers // 2
    ids = torch.tensor([input_ids[:4096]], device=model.device)
    return measure_dense_below(config, layer_inputs(model, ids, layer), layer)


def parse_dense_below(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not text.isdigit():
        raise ValueError(f'expected a number of positions or "auto", got {text!r}')
    return int(text)


def evaluation_documents(arguments: Any, calibration: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Documents of the validation split, or later ones of a dataset without splits; none that calibrated anything."""
    from hf_sparse_attn.data import load_documents, long_documents

    used = {document["name"] for document in calibration}
    wanted = arguments.num_evaluation_documents
    try:
        texts = load_documents(arguments.calibration_dataset, "validation")
        found = long_documents(texts, tokenizer, arguments.context_length, max_documents=wanted + len(used))
    except ValueError:
        return []
    return [document for document in found if document["name"] not in used][:wanted]


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


if __name__ == "__main__":
    run(main)
