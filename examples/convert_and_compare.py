"""Convert a model, then compare its perplexity dense and sparse.

python examples/convert_and_compare.py --model demo --dataset demo --output converted
"""

import argparse
import json

import hf_sparse_attn

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="demo", help="Hub id, directory, or demo")
parser.add_argument("--dataset", default="demo", help="Hub id, file, directory, or demo")
parser.add_argument("--output", default="converted", help="directory to write, new or empty")
parser.add_argument("--context-length", type=int, default=8192, help="tokens of each document")
parser.add_argument("--target-density", type=float, default=0.19, help="share of the pairs that may be read")
parser.add_argument("--sparse-attention", type=json.loads, default={}, help="JSON object of fields to set")
arguments = parser.parse_args()

converted = hf_sparse_attn.convert(
    arguments.model,
    arguments.output,
    calibration_dataset=arguments.dataset,
    context_length=arguments.context_length,
    target_density=arguments.target_density,
    sparse_attention=arguments.sparse_attention,
    num_evaluation_documents=0,
)
print(f"{converted['output']}: expected density {converted['density']:.3f}")

result = hf_sparse_attn.evaluate_perplexity(
    arguments.output, arguments.dataset, arguments.context_length, max_documents=2
)
print(f"dense {result['dense']['perplexity']:.4f}, sparse {result['sparse']['perplexity']:.4f}")
print(f"ratio {result['perplexity_ratio']:.4f} at density {result['sparse']['density']:.3f}")
