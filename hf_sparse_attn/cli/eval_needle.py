"""Hide facts in long real text and ask for them afterwards, dense and sparse on the same prompts (needle retrieval).

    hf-sparse-attn eval-needle --model converted --context-lengths 2048 4096 --depths 0 0.25 0.5 0.75 1 \
        --output needle.json --picture needle.png
    hf-sparse-attn eval-needle --model demo --dataset book.txt --context-lengths 4096 --depths 0.5 --num-samples 10 \
        --sparse-attention '{"key_budget": 256}'

Each sample is a document with --needles-per-depth facts at each depth, asked for one at a time after one prefill;
--num-single adds contexts with a single fact, one for each depth. Depth 0 is the first place after the global tokens,
depth 1 the last one outside the window of the question.
"""

from functools import partial
from typing import Any

from hf_sparse_attn.cli.argument_types import count
from hf_sparse_attn.cli.arguments import OneLineErrors, origin, print_table, report
from hf_sparse_attn.cli.needles import make_all_contexts
from hf_sparse_attn.cli.options import DATASET_HELP, add, command_parser
from hf_sparse_attn.errors import argument
from hf_sparse_attn.output_files import replaced


def make_parser() -> OneLineErrors:
    parser = command_parser(__doc__)
    add(parser, "model")
    add(parser, "context-lengths", help="Make contexts of N tokens, question and answer included.")
    add(parser, "depths", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    dataset_help = f"{DATASET_HELP[:-1]}, to hide facts in (default: %(default)s)."
    add(parser, "dataset", required=False, default="demo", help=dataset_help)
    add(parser, "split")
    add(parser, "num-samples", default=4)
    add(parser, "needles-per-depth")
    parser.add_argument(
        "--num-single",
        type=count,
        default=1,
        metavar="N",
        help="Make N contexts with a single fact for each depth and length (default: %(default)s).",
    )
    add(parser, "seed", "sparse-attention", "device", "dtype", "output", "picture")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()

    from tqdm import tqdm

    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.evaluation.needle import compare_retrieval, plot_retrieval
    from hf_sparse_attn.loading import load_model, parse_device, parse_dtype, read_checkpoint

    device, dtype = parse_device(arguments.device), parse_dtype(arguments.dtype)
    with argument("dataset"):
        texts = load_documents(arguments.dataset, arguments.split)
    path, _, tokenizer, fields = read_checkpoint(arguments.model, arguments.sparse_attention)
    most = max(arguments.context_lengths)
    with argument("dataset"):
        documents = long_documents(texts, tokenizer, most, arguments.num_samples)
    haystacks = dict.fromkeys(arguments.context_lengths, documents)
    contexts = make_all_contexts(arguments, "context_lengths", haystacks, tokenizer, fields, arguments.num_single)
    model = load_model(arguments.model, path, arguments.sparse_attention, device=device, num_tokens=most, dtype=dtype)
    with argument("model", arguments.model):
        result = compare_retrieval(model, contexts, progress=partial(tqdm, desc="asking", unit="prefill"))
    result |= origin(arguments, fields, device)
    report(result, arguments.output, print_result)
    if arguments.picture:
        with replaced(arguments.picture) as picture:
            plot_retrieval(result["cells"], picture)


def print_result(result: dict[str, Any]) -> None:
    print_table(
        f"{result['model']}: share of right answers, mean margin in nats; density {result['sparse']['density']:.4f}",
        ["facts", "tokens", "depth", "asked", "dense", "sparse", "dense margin", "sparse margin"],
        [
            [
                cell["task"],
                str(cell["context_length"]),
                f"{cell['depth']:g}",
                str(cell["samples"]),
                *(f"{cell[side][name]:.3f}" for name in ("accuracy", "margin") for side in ("dense", "sparse")),
            ]
            for cell in result["cells"]
        ],
    )
    difference = result["difference"]
    low, high = difference["ci95"]
    margin_low, margin_high = difference["margin_ci95"]
    dense, sparse = result["dense"], result["sparse"]
    print_table(
        f"All {result['samples']} questions: {result['only_dense']} right only with dense attention, "
        f"{result['only_sparse']} only with sparse (sign test: p = {difference['p_value']:.3g})",
        ["", "dense", "sparse", "difference", "95% interval"],
        [
            [
                "right among alternatives",
                *(f"{side['accuracy']:.4f}" for side in (dense, sparse)),
                f"{difference['accuracy']:+.4f}",
                f"{low:+.4f} .. {high:+.4f}",
            ],
            ["right when generated", *(f"{side['generation_accuracy']:.4f}" for side in (dense, sparse)), "", ""],
            [
                "margin, nats",
                *(f"{side['margin']:.3f}" for side in (dense, sparse)),
                f"{difference['margin']:+.3f}",
                f"{margin_low:+.3f} .. {margin_high:+.3f}",
            ],
            ["seconds", *(f"{side['seconds']:.1f}" for side in (dense, sparse)), "", ""],
        ],
    )
