"""The form of every hash: which bucket a key falls into.

All families are one thing: per KV head a few codebooks, each of which gives the key the code of its best-scoring
codeword, `argmax_c key . weight[:, c] + bias[c]`. The bucket number spells the codes as digits. Random hyperplanes
(SimHash, Charikar 2002) are codebooks of the two codewords -h and +h. The calibrated hash is a product quantizer
(Jegou, Douze and Schmid 2011) fitted in the metric of the head's queries: nearest-codeword search is linear in the
key once the squared norm of the codeword is part of the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BucketHash:
    """The hash of one layer.

    Args:
        weight: [num_key_value_heads, head_dim, num_codebooks, codebook_size] codewords.
        bias: [num_key_value_heads, num_codebooks, codebook_size].
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def empty(cls, num_kv_heads: int, head_dim: int) -> BucketHash:
        """One bucket for all keys, in float32 on the CPU: the place of a layer that hashes nothing."""
        return cls(torch.zeros(num_kv_heads, head_dim, 1, 1), torch.zeros(num_kv_heads, 1, 1))

    @property
    def num_buckets(self) -> int:
        return int(self.bias.shape[-1] ** self.bias.shape[-2])

    def assign(self, key: Tensor) -> Tensor:
        """Bucket of every key: [num_key_value_heads, N, head_dim] -> [num_key_value_heads, N], int64."""
        num_codebooks, codebook_size = self.bias.shape[-2:]
        weight, bias = self.weight.to(key), self.bias.to(key)
        scores = torch.baddbmm(bias.flatten(1).unsqueeze(1), key, weight.flatten(2))
        scores = scores.unflatten(-1, (num_codebooks, codebook_size))
        # Of two, a comparison finds the larger one several times faster.
        codes = scores[..., 1] > scores[..., 0] if codebook_size == 2 else scores.argmax(-1)  # [Hkv, N, codebooks]
        digit = codebook_size ** torch.arange(num_codebooks - 1, -1, -1, device=key.device)
        return (codes.to(key.dtype) @ digit.to(key.dtype)).long()  # small whole numbers, exact in either precision
