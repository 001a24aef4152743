"""Patterns as text: a line per row, `#` a key that it reads, `.` an older key that it does not."""

import torch

from helpers.operation import SCALING, make_pattern
from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.ops import reference


def drawing(fields, num_tokens=16):
    """The specification's pattern of `fields`, without routed keys; the first and the last KV head if they differ."""
    config = SparseAttentionConfig.from_dict({"dense_below": 0, "num_global_tokens": 0, "key_budget": 0, **fields})
    pattern = make_pattern(config, 2, 2, 4)
    query, key = torch.zeros(2, num_tokens, 4).double(), torch.zeros(2, num_tokens, 4).double()
    heads = reference.attended_keys(query, key, pattern, 0, scaling=SCALING)
    heads = heads if config.by_kv_head else heads[:1]

    def line(head, row):
        return "".join("#" if head[row, key] else "." for key in range(row + 1)).ljust(num_tokens)

    return "\n".join("   ".join(line(head, row) for head in heads).rstrip() for row in range(num_tokens))
