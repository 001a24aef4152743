"""Read a long document once, then go on with it, under a full cache and under one that may not grow.

python examples/long_decode.py --model converted --document book.txt
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

import hf_sparse_attn
from hf_sparse_attn import HeavyHitters, Recent, SparseCache

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="Hub id, directory, or demo; converted or not")
parser.add_argument("--document", type=Path, required=True, help="text file")
parser.add_argument("--budget", type=int, default=2048, help="keys that the small cache keeps for each KV head")
parser.add_argument("--max-new-tokens", type=int, default=64)
arguments = parser.parse_args()

model = hf_sparse_attn.load_model(arguments.model)
tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
inputs = tokenizer(arguments.document.read_text(), return_tensors="pt")
policy = Recent(arguments.budget // 8) + HeavyHitters()

for name, cache in {
    "every key": SparseCache(model.config),
    f"{arguments.budget} keys": SparseCache(model.config, policy=policy, budget=arguments.budget),
}.items():
    settings = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False, "prefill_chunk_size": 128}
    with hf_sparse_attn.record_density(model) as density:
        output = model.generate(**inputs, past_key_values=cache, **settings)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    print(f"{name}: {cache.peak_nbytes} bytes at most, density {density.density:.3f}\n{text!r}")
