"""Measure how much of the dense attention the sparse rows find, by layer and head: its mass and its top keys.

    hf-sparse-attn eval-recall --model converted --dataset demo --context-length 8192 --picture recall.png
    hf-sparse-attn eval-recall --model demo --dataset book.txt --context-length 4096 --hashes random none \
        --output recall.json

The model's own hash is measured, and so are the others of --hashes with the same budgets: the calibrated one, random
hyperplanes, or none (window and static keys alone). `hf_sparse_attn/evaluation/recall.py` defines the figures.
"""

from functools import partial
from typing import Any

from hf_sparse_attn.cli.argument_types import positive_int
from hf_sparse_attn.cli.arguments import OneLineErrors, print_table, report
from hf_sparse_attn.cli.options import add, command_parser
from hf_sparse_attn.config import HASHES, text_config
from hf_sparse_attn.errors import argument
from hf_sparse_attn.output_files import replaced


def make_parser() -> OneLineErrors:
    parser = command_parser(__doc__)
    add(parser, "model", "dataset", "split")
    add(parser, "context-length", type=positive_int)
    add(parser, "max-documents", default=2)
    parser.add_argument(
        "--num-rows",
        type=positive_int,
        default=64,
        metavar="N",
        help="Sample N rows of each document (default: %(default)s).",
    )
    parser.add_argument(
        "--top-keys",
        type=positive_int,
        default=64,
        metavar="N",
        help="Look for the N heaviest keys of each row (default: %(default)s).",
    )
    parser.add_argument(
        "--hashes",
        nargs="+",
        choices=[*HASHES, "none"],
        help="Measure these hashes beside the model's own (default: all that it has).",
    )
    add(parser, "sparse-attention", "device", "output", "picture")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()

    import torch
    from tqdm import tqdm

    from hf_sparse_attn.calibration.budget_allocation import first_row
    from hf_sparse_attn.config import SparseAttentionConfig
    from hf_sparse_attn.data import load_documents, long_documents
    from hf_sparse_attn.environment import describe_environment
    from hf_sparse_attn.evaluation.recall import hash_families, measure_recall
    from hf_sparse_attn.loading import load_model, parse_device, read_checkpoint
    from hf_sparse_attn.visualization import plot_heads

    device = parse_device(arguments.device)
    with argument("dataset"):
        texts = load_documents(arguments.dataset, arguments.split)
    path, model_config, tokenizer, sparse_attention = read_checkpoint(arguments.model, arguments.sparse_attention)
    config = SparseAttentionConfig.from_dict(sparse_attention)
    with argument("sparse_attention"):
        if set(config.dense_layers) >= set(range(text_config(model_config).num_hidden_layers)):
            raise ValueError("every layer is dense: there is nothing to measure")
    with argument("hashes"):
        configs = hash_families(config, arguments.hashes)
    with argument("context_length"):
        sparse_from = first_row(config)
        if arguments.context_length < sparse_from + 64:
            raise ValueError(
                f"must be at least {sparse_from + 64}: rows at positions less than {sparse_from} read nearly everything"
            )
    with argument("dataset"):
        documents = long_documents(texts, tokenizer, arguments.context_length, arguments.max_documents)
    num_tokens = arguments.context_length
    model = load_model(arguments.model, path, arguments.sparse_attention, device=device, num_tokens=num_tokens)
    with argument("model", arguments.model):
        families = measure_recall(
            model,
            [torch.tensor(document["input_ids"]) for document in documents],
            configs,
            min(arguments.num_rows, arguments.context_length - sparse_from),
            arguments.top_keys,
            progress=partial(tqdm, desc="measuring", unit="document"),
        )
    result = {
        **families[config.hash],
        "families": families,
        "hash": config.hash,
        "top_keys": arguments.top_keys,
        "model": arguments.model,
        "documents": [document["name"] for document in documents],
        "context_length": arguments.context_length,
        "environment": describe_environment(device),
    }
    report(result, arguments.output, print_result)
    if arguments.picture:
        maps = [head_map(family["layers"], name) for name in ("ratio", "recall") for family in families.values()]
        titles = [f"{name}: {what}" for what in ("kept / best", "recall") for name in families]
        with replaced(arguments.picture) as picture:
            plot_heads(torch.tensor(maps), titles, picture, num_columns=len(families))


def head_map(layers: list[Any], name: str) -> list[list[float]]:
    """One figure by layer and head; NaN where nothing was measured."""
    num_heads = max(len(heads) for heads in layers if isinstance(heads, list))
    return [
        [head[name] for head in heads] if isinstance(heads, list) else [float("nan")] * num_heads for heads in layers
    ]


def print_result(result: dict[str, Any]) -> None:
    families = result["families"]
    shown = [(result["hash"], "best"), *((family, name) for family in families for name in ("kept", "recall"))]
    rows = []
    for layer, own in enumerate(result["layers"]):
        if isinstance(own, list):
            figures = [mean(families[family]["layers"][layer], name) for family, name in shown]
            rows.append([str(layer), *(f"{figure:.4f}" for figure in figures)])
        else:
            rows.append([str(layer), "dense" if own else "no attention"])
    rows.append(["all", *(f"{families[family][name]:.4f}" for family, name in shown)])
    keys = ", ".join(f"{name} {family['keys']:.0f}" for name, family in families.items())
    print_table(
        f"{result['model']}: attention mass kept, {result['ratio']:.4f} of the best keys' of the same number; "
        f"recall of the top {result['top_keys']} keys. Keys per row: {keys}",
        ["layer", "best possible", *(f"{family} {name}" for family, name in shown[1:])],
        rows,
    )


def mean(heads: list[dict[str, float]], name: str) -> float:
    return sum(head[name] for head in heads) / len(heads)
