"""Measure the loss within and beyond the trained length with each kind of RoPE scaling, before any training.

    python scripts/measure_rope_scaling.py --model demo --dataset demo --context-length 16384 \
        --output benchmarks/rope_scaling.json

Of the first documents of the validation split, in nats per token, with sparse attention as the model has it.
"""

import argparse
import copy
import math

import torch

from hf_sparse_attn.cli.argument_types import output_file
from hf_sparse_attn.config import longest_context, text_config
from hf_sparse_attn.data import load_documents, long_documents
from hf_sparse_attn.environment import describe_environment
from hf_sparse_attn.evaluation.perplexity import token_nll
from hf_sparse_attn.loading import load_sparse_model, read_checkpoint
from hf_sparse_attn.output_files import write_json
from hf_sparse_attn.training import extend_context

KINDS = {
    "not scaled": None,
    "theta": "theta",
    "llama3": "llama3",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "linear": "linear",
    "linear, factor 8": {"rope_type": "linear", "factor": 8.0},
    "yarn, factor 8": {"rope_type": "yarn", "factor": 8.0},
    "yarn, factor 1.2": {"rope_type": "yarn", "factor": 1.2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="Hub id, directory, or demo (default: %(default)s)")
    parser.add_argument("--dataset", default="demo", help="Hub id, file, directory, or demo (default: %(default)s)")
    parser.add_argument("--context-length", type=int, default=16384, help="tokens (default: %(default)s)")
    parser.add_argument("--max-documents", type=int, default=2, help="documents (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which ones (default: all)")
    parser.add_argument("--output", type=output_file, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    path, config, tokenizer, _ = read_checkpoint(arguments.model)
    trained = longest_context(text_config(config))
    texts = load_documents(arguments.dataset, "validation")
    documents = long_documents(texts, tokenizer, arguments.context_length, arguments.max_documents)
    results = {
        "model": arguments.model,
        "trained_length": trained,
        "context_length": arguments.context_length,
        "documents": [document["name"] for document in documents],
        "environment": describe_environment(torch.device("cpu")),
        "kinds": {},
    }
    for kind in arguments.kinds:
        scaling = KINDS[kind]
        scaled = copy.deepcopy(config) if scaling is None else extend_context(config, scaling, arguments.context_length)
        model = load_sparse_model(path, config=scaled, dtype=torch.float32).eval()
        losses = torch.stack([token_nll(model, torch.tensor([document["input_ids"]])) for document in documents])
        found = {"within": losses[:, : trained - 1], "beyond": losses[:, trained - 1 :]}
        results["kinds"][kind] = {
            name: {"by_document": part.mean(1).tolist(), "perplexity": math.exp(part.mean().item())}
            for name, part in found.items()
        }
        write_json(arguments.output, results)
        print(f"{kind}: {found['within'].mean():.3f} within {trained} tokens, {found['beyond'].mean():.3f} beyond")


if __name__ == "__main__":
    main()
