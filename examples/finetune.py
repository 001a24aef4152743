"""Fine-tune a model with sparse attention on packed rows of long documents.

python examples/finetune.py --model converted --dataset demo --context-length 2048 --output tuned --max-steps 20
"""

import argparse

from transformers import AutoTokenizer

import hf_sparse_attn
from hf_sparse_attn.data import load_documents, packed, tokenize

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="Hub id, directory, or demo; converted or not")
parser.add_argument("--dataset", default="demo", help="Hub id, file, directory, or demo")
parser.add_argument("--context-length", type=int, default=2048, help="tokens of each row")
parser.add_argument("--output", default="tuned", help="directory to fill")
parser.add_argument("--max-steps", type=int, default=20)
arguments = parser.parse_args()

model = hf_sparse_attn.load_model(arguments.model)
tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
documents = load_documents(arguments.dataset, "train")
rows = packed(tokenize(documents, tokenizer), arguments.context_length)

training = hf_sparse_attn.FinetuneArguments(  # Transformers' TrainingArguments with other defaults
    output_dir=arguments.output, max_steps=arguments.max_steps
)
losses = hf_sparse_attn.finetune(model, tokenizer, rows, training)
print(f"loss {losses['first_loss']:.4f} at first, {losses['last_loss']:.4f} at last")
