"""Attention mass that the sparse rows keep, against the best possible keys of the same number, by layer and head.

python scripts/eval_recall.py --model converted --dataset demo --context-length 8192
python scripts/eval_recall.py --model demo --dataset book.txt --context-length 4096 --output recall.json
"""

from typing import Any

from hf_sparse_attn.command_line import (
    OneLineErrors,
    argument,
    check_output_file,
    json_object,
    positive_int,
    print_table,
    run,
    write_json,
)


def parse_arguments() -> Any:
    parser = OneLineErrors(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id, directory, or demo")
    parser.add_argument("--dataset", required=True, help="Hub id[:config[:split[:column]]], file, directory, or demo")
    parser.add_argument("--split", default="validation", help="where a dataset has splits (default: %(default)s)")
    parser.add_argument("--context-length", type=positive_int, required=True, help="tokens read of each document")
    parser.add_argument("--max-documents", type=positive_int, default=2, help="default: %(default)s")
    parser.add_argument("--num-rows", type=positive_int, default=64, help="rows per document (default: %(default)s)")
    parser.add_argument("--sparse-attention", type=json_object, default={}, help="JSON object of fields to override")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--output", help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.output:
        with argument("--output"):
            check_output_file(arguments.output)

    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.environment import describe_environment
    from hf_sparse_attn.evaluation.recall import kept_mass
    from hf_sparse_attn.integration import merge_sparse_attention
    from hf_sparse_attn.loading import load_config, load_sparse_model, parse_device, resolve_model

    with argument("--device"):
        device = parse_device(arguments.device)
    with argument("--dataset"):
        texts = load_documents(arguments.dataset, arguments.split)
    with argument(f"--model {arguments.model}"):
        path = resolve_model(arguments.model)
        model_config = load_config(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    with argument("--sparse-attention"):
        config = SparseAttentionConfig.from_dict(merge_sparse_attention(model_config, arguments.sparse_attention))
    with argument("--context-length"):
        sparse_from = max(config.dense_below, config.window_size)
        if arguments.context_length < sparse_from + 64:
            raise ValueError(f"must be at least {sparse_from + 64}: rows below {sparse_from} read nearly everything")
    with argument("--dataset"):
        documents = long_documents(texts, tokenizer, arguments.context_length, arguments.max_documents)
    with argument(f"--model {arguments.model}"):
        model = load_sparse_model(path, arguments.sparse_attention).to(device).eval()
        result = kept_mass(
            model,
            [torch.tensor(document["input_ids"]) for document in documents],
            config,
            arguments.num_rows,
            progress=lambda steps: tqdm(steps, desc="measuring", unit="document"),
        )
    result |= {
        "model": arguments.model,
        "documents": [document["name"] for document in documents],
        "context_length": arguments.context_length,
        "environment": describe_environment(device),
    }
    if arguments.output:
        write_json(arguments.output, result)
    print_result(result)


def print_result(result: dict[str, Any]) -> None:
    rows = [
        [
            str(layer),
            *(f"{sum(head[name] for head in heads) / len(heads):.4f}" for name in ("kept", "best", "lost")),
            f"{sum(head['keys'] for head in heads) / len(heads):.0f}",
        ]
        for layer, heads in enumerate(result["layers"])
    ]
    rows.append(["all", *(f"{result[name]:.4f}" for name in ("kept", "best", "lost")), f"{result['keys']:.0f}"])
    print_table(
        f"{result['model']}: attention mass kept; {result['ratio']:.4f} of the best keys'",
        ["layer", "kept", "best possible", "rows under half", "keys per row"],
        rows,
    )


if __name__ == "__main__":
    run(main)
