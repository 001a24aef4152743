"""Needle retrieval: facts hidden in long real text and asked for afterwards, dense and sparse on the same prompts.

    hf-sparse-attn eval-needle --model converted --context-lengths 2048 4096 --depths 0 0.25 0.5 0.75 1 \
        --output needle.json --picture needle.png
    hf-sparse-attn eval-needle --model demo --dataset book.txt --context-lengths 4096 --depths 0.5 --num-samples 10 \
        --sparse-attention '{"key_budget": 256}'

Every sample is a document with --needles-per-depth facts at each depth, asked for one at a time after one prefill;
--num-single adds contexts with a single fact, one for each depth. Depth 0 is the first place behind the global tokens,
depth 1 the last one outside the window of the question.
"""

from functools import partial
from typing import Any

from hf_sparse_attn.cli.argument_types import (
    PICTURE_SUFFIXES,
    count,
    fraction,
    json_object,
    output_file,
    picture_file,
    positive_int,
)
from hf_sparse_attn.cli.arguments import (
    OneLineErrors,
    argument,
    choose_device,
    choose_dtype,
    load_model,
    print_table,
    read_checkpoint,
    report,
    written_fields,
)
from hf_sparse_attn.cli.output_files import replaced


def parse_arguments() -> Any:
    parser = OneLineErrors(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id, directory, or demo")
    parser.add_argument(
        "--context-lengths", type=positive_int, nargs="+", required=True, help="tokens, question and answer included"
    )
    parser.add_argument(
        "--depths", type=fraction, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="fractions (default: quarters)"
    )
    parser.add_argument(
        "--dataset",
        default="demo",
        help="text around the facts: Hub id[:config[:split[:column]]], file, directory, or demo (default: %(default)s)",
    )
    parser.add_argument("--split", default="validation", help="where a dataset has splits (default: %(default)s)")
    parser.add_argument(
        "--num-samples", type=positive_int, default=4, help="contexts per length (default: %(default)s)"
    )
    parser.add_argument(
        "--needles-per-depth",
        type=positive_int,
        default=2,
        help="facts at each depth of a context (default: %(default)s)",
    )
    parser.add_argument(
        "--num-single", type=count, default=1, help="one-fact contexts per depth and length (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which facts are hidden (default: %(default)s)")
    parser.add_argument(
        "--sparse-attention", type=json_object, default={}, help="JSON object of fields to override, or @FILE"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, ... (default: the checkpoint's own)")
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    parser.add_argument("--picture", type=picture_file, help="heat maps to write: " + ", ".join(PICTURE_SUFFIXES))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()

    from tqdm import tqdm

    from hf_sparse_attn.cli.environment import describe_environment
    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.evaluation.haystack import MAX_NEEDLES, make_contexts
    from hf_sparse_attn.evaluation.needle import compare_retrieval, plot_retrieval

    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype)
    with argument("--dataset"):
        texts = load_documents(arguments.dataset, arguments.split)
    path, _, tokenizer, sparse_attention = read_checkpoint(arguments.model, arguments.sparse_attention)
    with argument("--dataset"):
        documents = long_documents(texts, tokenizer, max(arguments.context_lengths), arguments.num_samples)
    depths = sorted(set(arguments.depths))
    with argument("--needles-per-depth"):
        if len(depths) * arguments.needles_per_depth > MAX_NEEDLES:
            raise ValueError(
                f"a context holds at most {MAX_NEEDLES} facts, fewer than {arguments.needles_per_depth} at each depth"
            )
    contexts = []
    for context_length in dict.fromkeys(arguments.context_lengths):
        with argument(f"--context-lengths {context_length}"):
            contexts += make_contexts(
                documents,
                tokenizer,
                context_length,
                depths,
                SparseAttentionConfig.from_dict(sparse_attention),
                num_samples=arguments.num_samples,
                needles_per_depth=arguments.needles_per_depth,
                num_single=arguments.num_single,
                seed=arguments.seed,
            )
    num_tokens = max(arguments.context_lengths)
    model = load_model(
        arguments.model, path, arguments.sparse_attention, device=device, num_tokens=num_tokens, dtype=dtype
    )
    with argument(f"--model {arguments.model}"):
        result = compare_retrieval(model, contexts, progress=partial(tqdm, desc="asking", unit="prefill"))
    result |= {
        "model": arguments.model,
        "dataset": arguments.dataset,
        "seed": arguments.seed,
        "sparse_attention": written_fields(sparse_attention),
        "environment": describe_environment(device),
    }
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
