"""Draw which keys each row attends to, on one document.

    hf-sparse-attn plot --model converted --output pattern.png
    hf-sparse-attn plot --model demo --dataset book.txt --context-length 4096 --layers 0 12 --heads 0 4 \
        --output pattern.png
"""

from hf_sparse_attn.cli.argument_types import picture_file, positive_int
from hf_sparse_attn.cli.arguments import OneLineErrors
from hf_sparse_attn.cli.options import SUFFIXES, add, command_parser
from hf_sparse_attn.commands import plot_pattern


def make_parser() -> OneLineErrors:
    parser = command_parser(__doc__)
    add(parser, "model")
    add(
        parser,
        "dataset",
        required=False,
        default="demo",
        help="Read the first document of this dataset that is long enough (default: %(default)s).",
    )
    add(parser, "split")
    add(
        parser,
        "context-length",
        type=positive_int,
        required=False,
        default=8192,
        help="Read the first N tokens of the document (default: %(default)s).",
    )
    for name, places in (("layers", "three across the depth"), ("heads", "three across the heads")):
        parser.add_argument(
            f"--{name}", type=int, nargs="+", metavar="N", help=f"Draw the {name} of these indices (default: {places})."
        )
    parser.add_argument(
        "--bins", type=positive_int, default=128, metavar="N", help="Draw N cells a side (default: %(default)s)."
    )
    add(parser, "sparse-attention", "device")
    add(parser, "output", type=picture_file, required=True, help=f"Draw to this {SUFFIXES} file.")
    return parser


def main() -> None:
    print(plot_pattern(**vars(make_parser().parse_args())))
