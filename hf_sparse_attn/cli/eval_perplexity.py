"""Perplexity of a model over long documents, dense and sparse, on the same tokens.

    hf-sparse-attn eval-perplexity --model demo --dataset demo --context-length 8192 --output perplexity.json
    hf-sparse-attn eval-perplexity --model converted --dataset book.txt --context-length 4096 \
        --sparse-attention '{"window_size": 512}'

Each document is cut to its first --context-length tokens; shorter documents are left out.
"""

from functools import partial
from typing import Any

from hf_sparse_attn.cli.argument_types import json_object, output_file, positive_int
from hf_sparse_attn.cli.arguments import (
    OneLineErrors,
    UserError,
    argument,
    choose_device,
    choose_dtype,
    load_model,
    print_table,
    read_checkpoint,
    report,
    written_fields,
)


def parse_arguments(words: list[str] | None = None) -> Any:
    """The arguments of the command line, or of a list of its words.

    Raises:
        UserError: they cannot be.
    """
    parser = OneLineErrors(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id, directory, or demo")
    parser.add_argument("--dataset", required=True, help="Hub id[:config[:split[:column]]], file, directory, or demo")
    parser.add_argument("--split", default="validation", help="where a dataset has splits (default: %(default)s)")
    parser.add_argument("--context-length", type=positive_int, required=True, help="tokens read of each document")
    parser.add_argument("--max-documents", type=positive_int, default=4, help="default: %(default)s")
    parser.add_argument(
        "--sparse-attention", type=json_object, default={}, help="JSON object of fields to override, or @FILE"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, ... (default: the checkpoint's own)")
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    arguments = parser.parse_args(words)
    if arguments.context_length < 2:
        raise UserError("argument --context-length: must be at least 2: the first token is not predicted")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    report(evaluate(arguments), arguments.output, print_result)


def evaluate(arguments: Any) -> dict[str, Any]:
    """Evaluate as `parse_arguments` says; see `compare_perplexity`."""
    from tqdm import tqdm

    from hf_sparse_attn.cli.environment import describe_environment
    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.evaluation.perplexity import compare_perplexity

    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype)
    with argument("--dataset"):
        texts = load_documents(arguments.dataset, arguments.split)
    path, _, tokenizer, sparse_attention = read_checkpoint(arguments.model, arguments.sparse_attention)
    with argument("--dataset"):
        documents = long_documents(texts, tokenizer, arguments.context_length, arguments.max_documents)
    num_tokens = arguments.context_length
    model = load_model(
        arguments.model, path, arguments.sparse_attention, device=device, num_tokens=num_tokens, dtype=dtype
    )
    with argument(f"--model {arguments.model}"):
        result = compare_perplexity(model, documents, progress=partial(tqdm, desc="evaluating", unit="forward"))
    result |= {
        "model": arguments.model,
        "dataset": arguments.dataset,
        "sparse_attention": written_fields(sparse_attention),
        "environment": describe_environment(device),
    }
    return result


def print_result(result: dict[str, Any]) -> None:
    dense, sparse = result["dense"], result["sparse"]
    low, high = result["delta_nll"]["ci95"]
    worst = max(result["documents"], key=lambda document: document["perplexity_ratio"])
    print_table(
        f"{result['model']}: {len(result['documents'])} documents of {result['context_length']} tokens",
        ["", "dense", "sparse"],
        [
            ["perplexity", f"{dense['perplexity']:.4f}", f"{sparse['perplexity']:.4f}"],
            ["seconds", f"{dense['seconds']:.1f}", f"{sparse['seconds']:.1f}"],
            ["density", "1", f"{sparse['density']:.4f}"],
            ["scored density", "1", f"{sparse['scored_density']:.4f}"],
            ["perplexity ratio", "", f"{result['perplexity_ratio']:.4f}"],
            ["nll difference per token", "", f"{result['delta_nll']['mean']:+.5f}"],
            ["  95% interval", "", f"{low:+.5f} .. {high:+.5f}"],
            ["worst document", worst["name"], f"{worst['perplexity_ratio']:.4f}"],
        ],
    )
    print_table(
        "By position",
        ["tokens", "dense nll", "sparse nll", "perplexity ratio"],
        [
            [
                f"{span['start']} .. {span['end'] - 1}",
                f"{span['dense_nll']:.4f}",
                f"{span['sparse_nll']:.4f}",
                f"{span['ratio']:.4f}",
            ]
            for span in result["by_position"]
        ],
    )
