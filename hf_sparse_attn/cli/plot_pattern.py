"""Draw which keys each row attends to, on one document, and where the mass of the dense softmax lies.

    hf-sparse-attn plot --model converted --output pattern.png
    hf-sparse-attn plot --model converted --context-length 4096 --output pattern.html
    hf-sparse-attn plot --model demo --dataset book.txt --context-length 4096 --layers 0 12 --heads 0 4 \
        --output pattern.png

A picture shows the keys as a map, a page (.html) as highlighted text: click a token, and see what its row reads and
misses. The page is one file and needs no network.
"""

from hf_sparse_attn.cli.argument_types import drawing_file, positive_int
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
        "--rows",
        type=positive_int,
        metavar="N",
        help="Compute the dense softmax of N rows, spread over the document (default: 1048576 divided by the tokens, "
        "at least 128; every second one is left out of a page while it is larger than 5 MB).",
    )
    parser.add_argument(
        "--bins", type=positive_int, metavar="N", help="Draw N cells a side of a picture (default: 128)."
    )
    add(parser, "sparse-attention", "device")
    add(
        parser,
        "output",
        type=drawing_file,
        required=True,
        help=f"Draw to this {SUFFIXES} file, or write a page to this .html file.",
    )
    return parser


def main() -> None:
    print(plot_pattern(**vars(make_parser().parse_args())))
