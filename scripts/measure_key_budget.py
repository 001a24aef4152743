"""Recall and speed of one layer whose rows read 128 keys, at short and long lengths, beside SDPA in the same run.

    python scripts/measure_key_budget.py --output benchmarks/key_budget.json

The setting in which token-level sparse attention is often shown: a few keys of every row, documents from 256 tokens on.
"hash" finds all of them through a random hash; "window" reads the row's last 64 keys, 4 leading ones and finds the
rest. Inputs are random, or what a layer of the model gets when it reads the demo text. Recall is the share of the 128
keys with the largest weights that a row reads, of 256 rows, and mass the share of the dense softmax on what it reads.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn import SparseAttentionConfig, build_index
from hf_sparse_attn.benchmarking.speed import compare_speed, layer_inputs, make_inputs
from hf_sparse_attn.cli.argument_types import output_file, positive_int
from hf_sparse_attn.cli.arguments import print_table
from hf_sparse_attn.data import load_documents, long_documents
from hf_sparse_attn.environment import describe_environment
from hf_sparse_attn.loading import load_sparse_model, read_checkpoint
from hf_sparse_attn.output_files import write_json

SHAPE = (9, 3, 64)  # of the demo model
NUM_ROWS = 256


def configs(num_keys: int) -> dict[str, SparseAttentionConfig]:
    """What is compared; rows under `num_keys` read everything anyway."""
    others: dict[str, Any] = {"dense_below": 0, "min_weight": 0.0}
    window, leading = num_keys // 2, 4
    return {
        "hash": SparseAttentionConfig(window_size=1, num_global_tokens=0, key_budget=num_keys - 1, **others),
        "window": SparseAttentionConfig(
            window_size=window, num_global_tokens=leading, key_budget=num_keys - window - leading, **others
        ),
    }


@torch.no_grad()
def recall(inputs: tuple[Tensor, ...], config: SparseAttentionConfig, layer_idx: int, num_keys: int) -> dict[str, Any]:
    """Means over rows and heads."""
    query, key = inputs[:2]
    num_heads, num_tokens, group = query.shape[1], query.shape[2], query.shape[1] // key.shape[1]
    rows = torch.linspace(0, num_tokens - 1, NUM_ROWS, dtype=torch.float64).long().unique()
    position = torch.arange(num_tokens)
    older = rows[:, None] - position
    (found,) = build_index(query, key, config=config, layer_idx=layer_idx).candidates
    kept, shares = [], []
    for head in range(num_heads):
        read = (older < config.window_size) | (position < config.num_global_tokens)
        candidates = found[head // group, rows].long()
        read[(candidates >= 0).nonzero()[:, 0], candidates[candidates >= 0]] = True
        scores = query[0, head, rows] @ key[0, head // group].T * query.shape[-1] ** -0.5
        weights = scores.masked_fill(older < 0, -torch.inf).softmax(-1)
        read &= older >= 0
        kept.append((weights * read).sum(-1))
        best = weights.topk(min(num_keys, num_tokens), -1).indices
        is_real = weights.gather(1, best) > 0
        shares.append((read.gather(1, best) & is_real).sum(-1) / is_real.sum(-1))
    return {"recall": torch.stack(shares).mean().item(), "mass": torch.stack(kept).mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="Hub id, directory, or demo (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=10, help="whose inputs are taken (default: %(default)s)")
    parser.add_argument("--num-keys", type=positive_int, default=128, help="of a row (default: %(default)s)")
    parser.add_argument("--seq-lens", type=positive_int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed runs (default: %(default)s)")
    parser.add_argument("--output", type=output_file, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    path, _, tokenizer, _ = read_checkpoint(arguments.model)
    (document,) = long_documents(load_documents("demo", "validation"), tokenizer, max(arguments.seq_lens), 1)
    model = load_sparse_model(path, dtype=torch.float32).eval()
    ids = torch.tensor([document["input_ids"]])
    with torch.no_grad():
        real = layer_inputs(model, ids, arguments.layer)
    result: dict[str, Any] = {"environment": describe_environment(torch.device("cpu")), "rows": []}
    result |= {name: getattr(arguments, name) for name in ("model", "layer", "num_keys", "repeats")}
    for num_tokens in arguments.seq_lens:
        given: dict[str, tuple[Tensor, Tensor, Tensor]] = {
            "random": make_inputs(num_tokens, *SHAPE, torch.float32, torch.device("cpu")),
            "model": (real[0][:, :, :num_tokens], real[1][:, :, :num_tokens], real[2][:, :, :num_tokens]),
        }
        for kind, inputs in given.items():
            for name, config in configs(arguments.num_keys).items():
                speed = compare_speed(inputs, config=config, layer_idx=arguments.layer, repeats=arguments.repeats)
                found = recall(inputs, config, arguments.layer, arguments.num_keys)
                times = {key: speed[key] for key in ("dense_ms", "sparse_ms")}
                ratio = speed["dense_ms"] / speed["sparse_ms"]
                row = {"inputs": kind, "keys": name, "tokens": num_tokens} | found | times | {"speed": ratio}
                result["rows"].append(row)
                write_json(arguments.output, result)
    print_table(
        f"{arguments.num_keys} keys of a row; speed over SDPA's",
        ["inputs", "keys", "tokens", "recall", "mass", "dense ms", "sparse ms", "speed"],
        [
            [row["inputs"], row["keys"], str(row["tokens"])]
            + [f"{row[name]:.{digits}f}" for name, digits in zip(list(row)[3:], (3, 3, 1, 1, 2), strict=True)]
            for row in result["rows"]
        ],
    )


if __name__ == "__main__":
    main()
