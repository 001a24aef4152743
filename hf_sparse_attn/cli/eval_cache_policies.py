"""What caches that stay small cost: perplexity and needle retrieval with each eviction policy at one budget.

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

from hf_sparse_attn.cli.argument_types import fraction, json_object, output_file, positive_int
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
from hf_sparse_attn.config import text_config


def parse_arguments() -> Any:
    parser = OneLineErrors(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id, directory, or demo")
    parser.add_argument("--dataset", required=True, help="Hub id[:config[:split[:column]]], file, directory, or demo")
    parser.add_argument("--split", default="validation", help="where a dataset has splits (default: %(default)s)")
    parser.add_argument("--context-length", type=positive_int, required=True, help="tokens read of each document")
    parser.add_argument("--max-documents", type=positive_int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--budget", type=fraction, default=0.25, help="share of the tokens that is kept (default: %(default)s)"
    )
    parser.add_argument("--policies", nargs="+", metavar="NAME", help="default: all that there are")
    parser.add_argument("--chunk-size", type=positive_int, default=64, help="tokens of a call (default: %(default)s)")
    parser.add_argument(
        "--needle-context-lengths", type=positive_int, nargs="+", default=[], help="tokens (default: no needles)"
    )
    parser.add_argument(
        "--depths", type=fraction, nargs="+", default=[0.0, 0.5, 1.0], help="of the facts (default: 0 0.5 1)"
    )
    parser.add_argument(
        "--num-samples", type=positive_int, default=1, help="needle contexts per length (default: %(default)s)"
    )
    parser.add_argument(
        "--needles-per-depth", type=positive_int, default=2, help="facts at each depth (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which facts are hidden (default: %(default)s)")
    parser.add_argument(
        "--sparse-attention", type=json_object, default={}, help="JSON object of fields to override, or @FILE"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, ... (default: the checkpoint's own)")
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.context_length < 2:
        raise UserError("argument --context-length: must be at least 2: the first token is not predicted")
    return arguments


def main() -> None:
    arguments = parse_arguments()

    import torch
    from tqdm import tqdm

    from hf_sparse_attn.cli.environment import describe_environment
    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.evaluation.cache_policies import POLICIES, check_budgets, compare_policies
    from hf_sparse_attn.evaluation.haystack import MAX_NEEDLES, make_contexts

    names = list(dict.fromkeys(arguments.policies or POLICIES))
    with argument("--policies"):
        for name in names:
            if name not in POLICIES:
                raise ValueError(f"{name!r} is none of {', '.join(POLICIES)}")
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype)
    with argument("--dataset"):
        texts = load_documents(arguments.dataset, arguments.split)
    path, config, tokenizer, sparse_attention = read_checkpoint(arguments.model, arguments.sparse_attention)
    with argument("--dataset"):
        documents = long_documents(texts, tokenizer, arguments.context_length, arguments.max_documents)
    depths, lengths = sorted(set(arguments.depths)), list(dict.fromkeys(arguments.needle_context_lengths))
    with argument("--needles-per-depth"):
        if len(depths) * arguments.needles_per_depth > MAX_NEEDLES:
            raise ValueError(
                f"a context holds at most {MAX_NEEDLES} facts, fewer than {arguments.needles_per_depth} at each depth"
            )
    contexts = []
    for length in lengths:
        with argument("--dataset"):
            haystacks = long_documents(texts, tokenizer, length, arguments.num_samples)
        with argument(f"--needle-context-lengths {length}"):
            contexts += make_contexts(
                haystacks,
                tokenizer,
                length,
                depths,
                SparseAttentionConfig.from_dict(sparse_attention),
                num_samples=arguments.num_samples,
                needles_per_depth=arguments.needles_per_depth,
                seed=arguments.seed,
            )
    with argument("--budget"):
        keys = text_config(config).dtype or torch.float32 if dtype == "auto" else dtype
        every_length = [arguments.context_length, *lengths]
        check_budgets(config, keys, names, arguments.budget, every_length, arguments.chunk_size)
    num_tokens = max(every_length)
    model = load_model(
        arguments.model, path, arguments.sparse_attention, device=device, num_tokens=num_tokens, dtype=dtype
    )
    with argument(f"--model {arguments.model}"):
        progress = partial(tqdm, desc="evaluating", unit="document")
        result = compare_policies(
            model, documents, contexts, names, arguments.budget, arguments.chunk_size, progress=progress
        )
    result |= {
        "model": arguments.model,
        "dataset": arguments.dataset,
        "seed": arguments.seed,
        "sparse_attention": written_fields(sparse_attention),
        "environment": describe_environment(device),
    }
    report(result, arguments.output, print_result)


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
