"""Perplexity of a model over long documents, dense and sparse, on the same tokens, and how far both are apart.

    hf-sparse-attn eval-perplexity --model demo --dataset demo --context-length 8192 --output perplexity.json
    hf-sparse-attn eval-perplexity --model converted --dataset book.txt --context-length 4096 \
        --sparse-attention '{"window_size": 512}'

Each document is cut to its first --context-length tokens; shorter documents are left out. KL(dense || sparse) is that
of what is predicted for each token; sparse lost most where the log-probability of the next token falls furthest.
"""

from typing import Any

from hf_sparse_attn.cli.arguments import OneLineErrors, print_table, report
from hf_sparse_attn.cli.options import add, command_parser
from hf_sparse_attn.commands import evaluate_perplexity

_SHOWN_CHARACTERS = 30


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
    kl = result["kl"]
    print_table(
        "KL(dense || sparse) per token, in nats",
        ["mean", "median", "99th percentile", "99.9th percentile", "top-1 agreement"],
        [[*(f"{kl[name]:.3g}" for name in ("mean", "median", "p99", "p99.9")), f"{result['top1_agreement']:.4f}"]],
    )
    print_table(
        "By position",
        ["tokens", "dense nll", "sparse nll", "perplexity ratio", "mean KL"],
        [
            [
                f"{span['start']} .. {span['end'] - 1}",
                f"{span['dense_nll']:.4f}",
                f"{span['sparse_nll']:.4f}",
                f"{span['ratio']:.4f}",
                f"{span['kl']:.3g}",
            ]
            for span in result["by_position"]
        ],
    )
    print_table(
        "Where sparse lost most: the log-probability of the token, in nats",
        ["text before", "token", "dense", "sparse", "KL", "position", "document"],
        [
            [
                _shown(token["before"])[-_SHOWN_CHARACTERS:],
                _shown(token["token"]),
                f"{token['dense_logprob']:.2f}",
                f"{token['sparse_logprob']:.2f}",
                f"{token['kl']:.2f}",
                str(token["position"]),
                token["document"],
            ]
            for token in result["worst_tokens"]
        ],
    )


def _shown(text: str) -> str:
    """In one line, without control characters."""
    return repr(text)[1:-1]
