"""Compare models on the same held-out documents, each with dense or sparse attention, in pairs with the first of them.

    python scripts/compare_models.py "30 dense steps=tuned-dense:dense" "30 sparse steps=tuned:sparse" \
        --context-length 8192 --max-documents 8 --output benchmarks/finetuning.json

The documents are the first long ones of the validation split. Differences of the loss are in nats a token, negative
where a model is better than the first, with 95% intervals (see `paired_difference`). The models need one tokenizer.
"""

import argparse
import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from hf_sparse_attn.cli.argument_types import output_file
from hf_sparse_attn.cli.arguments import print_table
from hf_sparse_attn.data import load_documents, long_documents
from hf_sparse_attn.environment import describe_environment
from hf_sparse_attn.evaluation.dense_attention import DENSE, SPARSE
from hf_sparse_attn.evaluation.perplexity import paired_difference, token_nll
from hf_sparse_attn.integration import record
from hf_sparse_attn.loading import load_sparse_model, read_checkpoint
from hf_sparse_attn.output_files import write_json
from hf_sparse_attn.recording import DensityRecorder

ATTENTION = {"dense": DENSE, "sparse": SPARSE}


class Side(NamedTuple):
    name: str
    model: str
    attention: str


def side(text: str) -> Side:
    """Parse NAME=MODEL:ATTENTION."""
    name, equals, rest = text.partition("=")
    model, _, attention = rest.rpartition(":")
    if not (name and equals and model and attention in ATTENTION):
        raise argparse.ArgumentTypeError(f"must be NAME=MODEL:dense or NAME=MODEL:sparse, got {text!r}")
    return Side(name, model, attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="+", type=side, metavar="NAME=MODEL:ATTENTION")
    parser.add_argument("--dataset", default="demo", help="Hub id, file, directory, or demo (default: %(default)s)")
    parser.add_argument("--context-length", type=int, default=8192, help="tokens (default: %(default)s)")
    parser.add_argument("--max-documents", type=int, default=8, help="documents (default: %(default)s)")
    parser.add_argument("--output", type=output_file, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    sides: list[Side] = arguments.sides
    paths = {side.model: read_checkpoint(side.model)[0] for side in sides}  # all of them, before any long work
    tokenizer = read_checkpoint(sides[0].model)[2]
    texts = load_documents(arguments.dataset, "validation")
    documents = long_documents(texts, tokenizer, arguments.context_length, arguments.max_documents)
    report: dict[str, Any] = {
        "context_length": arguments.context_length,
        "documents": [document["name"] for document in documents],
        "environment": describe_environment(torch.device("cpu")),
        "sides": {},
    }
    first = None
    for name, given, attention in sides:
        model = load_sparse_model(paths[given], dtype=torch.float32).eval()
        model.set_attn_implementation(ATTENTION[attention])
        density = DensityRecorder()
        with record(model, density) if attention == "sparse" else nullcontext():
            losses = torch.stack([token_nll(model, torch.tensor([document["input_ids"]])) for document in documents])
        first = losses if first is None else first
        difference = paired_difference((losses - first).double())
        report["sides"][name] = {
            "attention": attention,
            "density": density.density if attention == "sparse" else 1.0,
            "perplexity": math.exp(losses.double().mean().item()),
            "ratio_to_first": math.exp(difference["mean"]),
            "delta_nll": difference,
            "nll_by_document": losses.double().mean(1).tolist(),
        }
        write_json(arguments.output, report)
    rows = []
    for name, found in report["sides"].items():
        figures = [f"{found[key]:.4f}" for key in ("density", "perplexity", "ratio_to_first")]
        low, high = found["delta_nll"]["ci95"]
        rows.append([name, found["attention"], *figures, f"{low:+.5f} .. {high:+.5f}"])
    columns = ["", "attention", "density", "perplexity", "ratio", "95% interval of the loss's difference"]
    print_table(f"{len(documents)} documents of {arguments.context_length} tokens", columns, rows)


if __name__ == "__main__":
    main()
