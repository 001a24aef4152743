"""A decoder of bytes with sparse attention in every layer, trained from scratch on one text by a plain loop.

python examples/sparse_transformer.py --text book.txt
"""

import argparse
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hf_sparse_attn import SparseAttention
from hf_sparse_attn.demo import demo_documents

NUM_BYTES = 256


class Block(nn.Module):
    """Attention and an MLP, each after a norm and beside a residual."""

    def __init__(self, hidden_size, num_heads, **attention):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden_size), nn.RMSNorm(hidden_size)
        self.attention = SparseAttention(hidden_size, num_heads, **attention)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class SparseTransformer(nn.Module):
    """Bytes [batch, tokens] -> logits of the next ones [batch, tokens, 256]; the head is the embedding."""

    def __init__(self, num_layers, hidden_size, num_heads, max_tokens, **attention):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(NUM_BYTES, hidden_size), nn.Embedding(max_tokens, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, layer_idx=layer, **attention) for layer in range(num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size)
        self.head = nn.Linear(hidden_size, NUM_BYTES, bias=False)
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model, rows):
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", type=Path, help="text file; by default the demo documents")
parser.add_argument("--context-length", type=int, default=512, help="bytes in a row")
parser.add_argument("--num-layers", type=int, default=4)
parser.add_argument("--hidden-size", type=int, default=128)
parser.add_argument("--num-heads", type=int, default=4, help="query heads, over half as many KV heads")
parser.add_argument("--window-size", type=int, default=64)
parser.add_argument("--key-budget", type=int, default=64, help="keys found through the hash for each row")
parser.add_argument("--max-steps", type=int, default=150)
arguments = parser.parse_args()

if arguments.text is None:
    text = "\n\n".join(document["text"] for document in demo_documents("train")).encode()
else:
    text = arguments.text.read_bytes()
width = arguments.context_length + 1
if len(text) < 10 * width:
    parser.error(f"--text must have at least 10 rows of {width} bytes, got {len(text)} bytes")
torch.manual_seed(0)
rows = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: len(text) // width * width].view(-1, width).long()
held_out, rows = rows[torch.randperm(len(rows))].split([8, len(rows) - 8])

model = SparseTransformer(
    arguments.num_layers,
    arguments.hidden_size,
    arguments.num_heads,
    arguments.context_length,
    num_key_value_heads=max(arguments.num_heads // 2, 1),
    window_size=arguments.window_size,
    key_budget=arguments.key_budget,
    num_hash_bits=6,
    dense_below=0,
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
with torch.no_grad():
    print(f"loss before: {loss_of(model, held_out):.3f} nats a byte")
batches = itertools.cycle(rows.split(4))
for step, batch in enumerate(itertools.islice(batches, arguments.max_steps), 1):
    loss = loss_of(model, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: {loss.item():.3f}")
with torch.no_grad():
    print(f"loss after: {loss_of(model, held_out):.3f} nats a byte")
    x = model.blocks[0].attention_norm(model.embedding(held_out[:1, :-1]))
    print(model.blocks[0].attention(x, need_statistics=True)[1])
