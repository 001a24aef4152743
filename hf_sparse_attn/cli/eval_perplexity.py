"""Perplexity of a model over long documents, dense and sparse, on the same tokens.

    hf-sparse-attn eval-perplexity --model demo --dataset demo --context-length 8192 --output perplexity.json
    hf-sparse-attn eval-perplexity --model converted --dataset book.txt --context-length 4096 \
        --sparse-attention '{"window_size": 512}'

Each document is cut to its first --context-length tokens; shorter documents are left out.
"""

from typing import Any

from hf_sparse_attn.cli.arguments import OneLineErrors, print_table, report
from hf_sparse_attn.cli.options import add, command_parser
from hf_sparse_attn.commands import evaluate_perplexity


def make_parser() -> OneLineErrors:
    parser = command_parser(__doc__)
    add(parser, "model", "dataset", "split", "context-length")
    add(parser, "max-documents", default=4)
    add(parser, "sparse-attention", "device", "dtype", "output")
    return parser


def main() -> None:
    given = vars(make_parser().parse_args())
    output = given.pop("output")
    report(evaluate_perplexity(**given), output, print_result)


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
