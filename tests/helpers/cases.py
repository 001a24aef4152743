"""Patterns, inputs and comparisons for the tests of the operation's implementations."""

import torch
import torch.nn.functional as F

from helpers.operation import KeyMask, attend, calibrated_hash_text, make_pattern
from hf_sparse_attn import SparseAttentionConfig

DIM, KV_HEADS, LENGTH = 8, 2, 150
FEATURES = {
    "defaults of this file": {},
    "window of 1": {"window_size": 1},
    "window of 70": {"window_size": 70},
    "window over everything": {"window_size": 500},
    "no globals": {"num_global_tokens": 0},
    "stride": {"stride": 13},
    "last keys of each stride": {"stride": 13, "stride_offset": 10, "stride_width": 3},
    "dilated window": {"dilated_window_size": 9, "dilation": 7},
    "slashes": {"slash_distances": (5, 11, 40, 40, 200)},
    "blocks": {"block_size": 12, "num_neighbouring_blocks": 1, "block_offset": 5},
    "blocks, some random": {"block_size": 7, "num_random_blocks": 2, "num_random_keys": 3},
    "blocks alone": {"window_size": 1, "num_global_tokens": 0, "block_size": 20, "key_budget": 0},
    "patterns by head": {
        "block_size": 20,
        "by_kv_head": ({"window_size": 4}, {"block_offset": 10, "num_global_tokens": 0, "stride": 31}),
    },
    "patterns by layer": {"by_layer": ({"stride": 11, "slash_distances": (33,)}, {"stride": 2})},
    "random keys": {"num_random_keys": 6},
    "random keys without routing": {"num_random_keys": 6, "key_budget": 0},
    "explicit globals": {"global_token_indices": (5, 77, 149, 4000)},
    "no routing": {"key_budget": 0},
    "budgets by head": {"key_budget": ((30, 7),)},
    "smallest weights by head": {"key_budget": 30, "min_weight": ((0.0, 0.02, 0.1, 0.9),)},
    "one KV head without routing": {"key_budget": ((0, 12),)},
    "budget over everything": {"key_budget": 1000},
    "page of 1": {"page_size": 1},
    "page of 3": {"page_size": 3},
    "page of 64": {"page_size": 64},
    "dense rows": {"dense_below": 71},
    "dense layer": {"dense_layers": (0,)},
    "calibrated": {"hash": "calibrated", "calibrated_hash": calibrated_hash_text()},
    "model's window inside ours": {"sliding_window": 4},
    "model's window of ours": {"sliding_window": 11},
    "model's window wider than ours": {"sliding_window": 41},
    "model's window and a dense layer": {"sliding_window": 41, "dense_layers": (0,)},
    "model's window of dense_below": {"sliding_window": 41, "dense_below": 41},
    "model's window one wider than dense_below": {"sliding_window": 41, "dense_below": 40},
    "everything at once": {
        "sliding_window": 90,
        "stride": 17,
        "stride_offset": 5,
        "stride_width": 2,
        "num_random_keys": 4,
        "dilated_window_size": 3,
        "dilation": 16,
        "slash_distances": (13, 60),
        "block_size": 9,
        "block_offset": 4,
        "num_neighbouring_blocks": 1,
        "num_random_blocks": 1,
        "global_token_indices": (20, 100),
        "dense_below": 25,
        "key_budget": ((30, 7),),
        "min_weight": ((0.0, 0.02, 0.1, 0.9),),
        "page_size": 3,
    },
}


def pattern_of(fields, num_heads=4, num_kv_heads=KV_HEADS, dtype=torch.float64, dim=DIM, device="cpu"):
    fields = {"window_size": 11, "num_global_tokens": 3, "key_budget": 14, "num_hash_bits": 3, "page_size": 8} | fields
    others = {name: fields.pop(name) for name in ("sliding_window", "is_causal") if name in fields}
    config = SparseAttentionConfig(**{"dense_below": 0} | fields)
    return make_pattern(config, num_heads, num_kv_heads, dim, dtype=dtype, device=device, **others)


def inputs(num_queries=LENGTH, num_keys=LENGTH, num_heads=4, num_kv_heads=KV_HEADS, seed=0, dim=DIM, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_heads, num_queries, dim), (num_kv_heads, num_keys, dim), (num_kv_heads, num_keys, dim))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]


def output_and_gradients(implementation, query, key, value, pattern, sinks=None, **kwargs):
    """Output and the gradients of query, key, value and sinks, under a random gradient of the output."""
    leaves = [x.clone().requires_grad_() for x in (query, key, value, sinks) if x is not None]
    output = attend(*leaves[:3], pattern, implementation, sinks=leaves[3] if len(leaves) > 3 else None, **kwargs)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype).to(output.device)
    return [output.detach(), *torch.autograd.grad((output * probe).sum(), leaves)]


def assert_like_reference(query, key, value, pattern, sinks=None, implementations=("torch", "numba"), **kwargs):
    """Output and all gradients are the specification's; the output."""
    expected = output_and_gradients("reference", query, key, value, pattern, sinks, **kwargs)
    for implementation in implementations:
        ours = output_and_gradients(implementation, query, key, value, pattern, sinks, **kwargs)
        for name, x, y in zip(("output", "query", "key", "value", "sinks"), ours, expected, strict=False):
            where = f"{implementation}, {name}"
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, msg=lambda text, where=where: f"{where}: {text}")
    return expected[0]


def sinks_of(num_heads=4, device="cpu"):
    return torch.randn(num_heads, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)


def rms(error):
    return float(error.detach().double().square().mean().sqrt())


def check_lower_precision(implementation, name, dtype, length=LENGTH, device="cpu"):
    """On the keys that were really read, forward and backward, in units of the same-dtype PyTorch path's error."""
    tensors = [x.to(dtype) for x in inputs(length, length, device=device)]
    recorder = KeyMask(4, length, length)
    probe = torch.randn(4, length, DIM, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def ours(query, key, value):
        pattern = pattern_of(FEATURES[name], dtype=torch.float32, device=device)
        return attend(query, key, value, pattern, implementation, recorder=recorder).to(dtype)

    def sdpa(query, key, value):
        mask = recorder.mask.to(device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.4, enable_gqa=True)

    def forward_and_gradients(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        output = function(*leaves)
        return [output, *torch.autograd.grad((output * probe).sum(), leaves)]

    results = [forward_and_gradients(*run) for run in ((ours, dtype), (sdpa, dtype), (sdpa, torch.float64))]
    for part, a, b, exact in zip(("output", "query", "key", "value"), *results, strict=True):
        assert a.dtype == dtype
        assert rms(a - exact) <= 2 * rms(b - exact), part
        assert rms(a - exact) < 0.02 * rms(exact), part
