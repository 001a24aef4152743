"""Measure what small caches cost: perplexity and needle retrieval with each eviction policy at one budget.

    hf-sparse-attn eval-cache-policies --model demo --dataset demo --context-length 8192 --budget 0.25 \
        --output policies.json
    hf-sparse-attn eval-cache-policies --model converted --dataset book.txt --context-length 8192 --budget 0.25 \
        --policies streaming_llm h2o --needle-context-lengths 4096 --depths 0 0.5 1

Documents and prompts are given in chunks of --chunk-size tokens through the cache. --budget is the share of their
tokens that every KV head keeps (on average, under adaptive budgets), lowered where the chunk and what policies store
beside keys would take the peak beyond 1.08 times that share. The first two rows keep all keys.
"""

from functools import partial
from typing import Any

from hf_sparse_attn.cli.argument_types import fraction, positive_int
from hf_sparse_attn.cli.arguments import OneLineErrors, origin, print_table, report
from hf_sparse_attn.cli.needles import make_all_contexts
from hf_sparse_attn.cli.options import add, command_parser
from hf_sparse_attn.config import text_config
from hf_sparse_attn.errors import ArgumentError, argument


def make_parser() -> OneLineErrors:
    parser = command_parser(__doc__)
    add(parser, "model", "dataset", "split", "context-length")
    add(parser, "max-documents", default=2)
    parser.add_argument(
        "--budget",
        type=fraction,
        default=0.25,
        metavar="SHARE",
        help="Keep this share of the tokens, from 0 to 1 (default: %(default)s).",
    )
    parser.add_argument(
        "--policies", nargs="+", metavar="NAME", help="Measure the policies of these names (default: all of them)."
    )
    parser.add_argument(
        "--chunk-size",
        type=positive_int,
        default=64,
        metavar="N",
        help="Give the model chunks of N tokens (default: %(default)s).",
    )
    parser.add_argument(
        "--needle-context-lengths",
        type=positive_int,
        nargs="+",
        default=[],
        metavar="N",
        help="Also hide facts in contexts of N tokens (default: no needle retrieval).",
    )
    add(parser, "depths", default=[0.0, 0.5, 1.0])
    add(parser, "num-samples", default=1)
    add(parser, "needles-per-depth", "seed", "sparse-attention", "device", "dtype", "output")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()

    import torch
    from tqdm import tqdm

    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.evaluation.cache_policies import POLICIES, check_budgets, compare_policies
    from hf_sparse_attn.loading import load_model, parse_device, parse_dtype, read_checkpoint

    names = list(dict.fromkeys(arguments.policies or POLICIES))
    for name in names:
        if name not in POLICIES:
            raise ArgumentError("policies", f"{name!r} is none of {', '.join(POLICIES)}")
    device, dtype = parse_device(arguments.device), parse_dtype(arguments.dtype)
    with argument("dataset"):
        texts = load_documents(arguments.dataset, arguments.split)
    path, config, tokenizer, fields = read_checkpoint(arguments.model, arguments.sparse_attention)
    if fields["global_token_ids"]:
        raise ArgumentError("sparse_attention", "a policy cannot go with global_token_ids")
    with argument("dataset"):
        documents = long_documents(texts, tokenizer, arguments.context_length, arguments.max_documents)
        haystacks = {
            length: long_documents(texts, tokenizer, length, arguments.num_samples)
            for length in arguments.needle_context_lengths
        }
    contexts = make_all_contexts(arguments, "needle_context_lengths", haystacks, tokenizer, fields)
    every_length = [arguments.context_length, *haystacks]
    with argument("budget"):
        keys = dtype if isinstance(dtype, torch.dtype) else text_config(config).dtype or torch.float32
        check_budgets(config, keys, names, arguments.budget, every_length, arguments.chunk_size)
    most = max(every_length)
    model = load_model(arguments.model, path, arguments.sparse_attention, device=device, num_tokens=most, dtype=dtype)
    with argument("model", arguments.model):
        progress = partial(tqdm, desc="evaluating", unit="document")
        result = compare_policies(
            model, documents, contexts, names, arguments.budget, arguments.chunk_size, progress=progress
        )
    report(result | origin(arguments, fields, device), arguments.output, print_result)


def print_result(result: dict[str, Any]) -> None:
    rows = result["rows"]
    needles = "needle" in rows[0]
    print_table(
        f"{result['model']}: {len(result['documents'])} documents of {result['context_length']} tokens, of which "
        f"policies keep {rows[-1]['tokens']}; peak: bytes over those of all keys",
        ["cache", "peak", "perplexity", "/dense", "/sparse"] + needles * ["needles"],
        [
            [
                row["name"],
                f"{row['peak_share']:.4f}",
                f"{row['perplexity']:.4f}",
                f"{row['ratio_to_dense']:.4f}",
                f"{row['ratio_to_sparse']:.4f}",
            ]
            + ([f"{row['needle']['accuracy']:.3f}"] if needles else [])
            for row in rows
        ],
    )
