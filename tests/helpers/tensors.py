"""Batches for the public operation, a small config, and output with gradients."""

import torch

from helpers.cases import inputs
from hf_sparse_attn import SparseAttentionConfig

FIELDS = {"window_size": 11, "num_global_tokens": 3, "key_budget": 14, "num_hash_bits": 3, "page_size": 8}
FIELDS |= {"dense_below": 0, "implementation": "torch"}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def config(**changes):
    return SparseAttentionConfig(**{**FIELDS, **changes})


def batch(num_queries=70, num_keys=70, batch_size=2, seed=0, **others):
    rows = [inputs(num_queries, num_keys, seed=seed + row, **others) for row in range(batch_size)]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def with_gradients(attend, *tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    output = attend(*leaves)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return [output.detach(), *torch.autograd.grad((output * probe).sum(), leaves)]


def assert_all_close(found, expected):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **EXACT)
