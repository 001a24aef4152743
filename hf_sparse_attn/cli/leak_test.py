"""Show that no logit knows of later tokens: change a token of a real document and compare all logits before it.

    hf-sparse-attn leak-test --model converted --dataset demo --context-length 4096
    hf-sparse-attn leak-test --model demo --dataset book.txt --context-length 2000 --attn-implementation sdpa \\
        --positions 8 --output leak.json

The document is the first that is long enough. The exit status is 0 where nothing moves, and 1 where something does, or
where forwards repeat too badly to tell. `hf_sparse_attn/evaluation/leak_test.py` says how it is measured.
"""

from functools import partial
from typing import Any

from hf_sparse_attn.cli.argument_types import positive_int
from hf_sparse_attn.cli.arguments import OneLineErrors, print_table, report
from hf_sparse_attn.cli.options import add, command_parser
from hf_sparse_attn.errors import ArgumentError, RunError, argument


def make_parser() -> OneLineErrors:
    parser = command_parser(__doc__)
    add(parser, "model", "dataset", "split", "context-length")
    parser.add_argument(
        "--attn-implementation",
        default="sparse",
        metavar="NAME",
        help="Test this attention, such as eager, sdpa or flash_attention_2 (default: %(default)s).",
    )
    parser.add_argument(
        "--positions",
        type=positive_int,
        default=1,
        metavar="N",
        help="Change tokens at N equally spaced places, one after another (default: %(default)s, the last token).",
    )
    add(parser, "sparse-attention", "device", "dtype", "output")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()

    from tqdm import tqdm

    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.environment import describe_environment, written_fields
    from hf_sparse_attn.evaluation.leak_test import find_leaks, places
    from hf_sparse_attn.loading import check_attention, load_model, parse_device, parse_dtype, read_checkpoint

    name, num_tokens = arguments.attn_implementation, arguments.context_length
    is_sparse = name == "sparse"
    if arguments.sparse_attention and not is_sparse:
        raise ArgumentError(
            "sparse_attention", f"is not read with {{attn_implementation}} {name}", others=("attn_implementation",)
        )
    with argument("positions"):
        positions = places(num_tokens, arguments.positions)
    device, dtype = parse_device(arguments.device), parse_dtype(arguments.dtype)
    with argument("dataset"):
        texts = load_documents(arguments.dataset, arguments.split)
    path, config, tokenizer, fields = read_checkpoint(arguments.model, arguments.sparse_attention)
    with argument("attn_implementation"):
        check_attention(config, name)
    with argument("dataset"):
        (document,) = long_documents(texts, tokenizer, num_tokens, max_documents=1)
    model = load_model(
        arguments.model,
        path,
        arguments.sparse_attention,
        device=device,
        num_tokens=num_tokens,
        dtype=dtype,
        attn_implementation=name,
    )
    with argument("model", arguments.model):
        progress = partial(tqdm, desc="changing", unit="token")
        result = find_leaks(model, document["input_ids"], positions, progress=progress)
    result |= {
        "model": arguments.model,
        "document": document["name"],
        "attn_implementation": name,
        "sparse_attention": written_fields(fields) if is_sparse else None,
        "environment": describe_environment(device),
    }
    report(result, arguments.output, print_result)
    if result["leaks"]:
        raise RunError(
            f"{name} attention leaks: a later token moves the logits of position {result['earliest_moved']}; the "
            f"largest difference is {result['largest_difference']:.3g} (tolerance {result['tolerance']:.3g})"
        )


def print_result(result: dict[str, Any]) -> None:
    print_table(
        f"{result['model']}, {result['attn_implementation']} attention, {result['context_length']} tokens of "
        f"{result['document']}: {'a leak' if result['leaks'] else 'no leak'} (tolerance {result['tolerance']:.3g})",
        ["changed token", "moves its own logits by", "earlier ones by", "earlier tokens moved", "the first of them"],
        [
            [
                str(change["position"]),
                f"{change['own_difference']:.3g}",
                f"{change['largest_difference']:.3g}",
                str(change["moved"]),
                "" if change["earliest_moved"] is None else str(change["earliest_moved"]),
            ]
            for change in result["changes"]
        ],
    )
