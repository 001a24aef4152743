"""Fit the calibrated hash: a product quantizer of each KV head's keys, in the metric of its queries."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse_attn.hashing import BucketHash, quantize_codewords

NUM_CODEBOOKS = 2
CODEBOOK_SIZE = 32
_KMEANS_STEPS = 12


def fit_hash(keys: Tensor, query_moment: Tensor, seed: int) -> BucketHash:
    """The hash of one layer.

    Args:
        keys: [num_key_value_heads, N, head_dim] float32, of all documents.
        query_moment: [num_key_value_heads, head_dim, head_dim], mean of q q^T over the queries of each KV head's group.
        seed: of the k-means starts.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = [_fit_head(k, m, generator) for k, m in zip(keys, query_moment, strict=True)]
    weights, biases = zip(*heads, strict=True)
    return BucketHash(torch.stack(weights), torch.stack(biases))


def _fit_head(keys: Tensor, moment: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codewords [D, NUM_CODEBOOKS, CODEBOOK_SIZE] and biases [NUM_CODEBOOKS, CODEBOOK_SIZE] of one KV head.

    With keys centred on their mean and multiplied by the square root of the queries' second moment, the squared
    distance of two keys is the mean squared difference of their scores. There the principal directions are dealt to
    the codebooks so that each gets the same product of variances (Ge et al. 2013, optimized product quantization).
    """
    mean = keys.mean(0)
    eigenvalues, eigenvectors = torch.linalg.eigh(moment)
    root = (eigenvectors * eigenvalues.clamp(min=1e-6 * eigenvalues.max()).sqrt()) @ eigenvectors.T
    scaled = (keys - mean) @ root
    variances, directions = torch.linalg.eigh(scaled.T @ scaled / len(scaled))
    weights, biases = [], []
    for chosen in _deal(variances.clamp(min=1e-9 * variances.max()).log().tolist()):
        basis = directions[:, chosen]
        codewords = _kmeans(scaled @ basis, generator)  # [CODEBOOK_SIZE, D / NUM_CODEBOOKS]
        weight = quantize_codewords((root @ basis @ codewords.T).unsqueeze(1)).squeeze(1)
        weights.append(weight)
        biases.append(-codewords.pow(2).sum(-1) / 2 - mean @ weight)
    return torch.stack(weights, 1), torch.stack(biases)


def _deal(log_variances: list[float]) -> list[list[int]]:
    """Deal directions, the widest first, each to the codebook with the smallest product of variances so far."""
    capacity = -(-len(log_variances) // NUM_CODEBOOKS)
    hands: list[list[int]] = [[] for _ in range(NUM_CODEBOOKS)]
    totals = [0.0] * NUM_CODEBOOKS
    for direction in sorted(range(len(log_variances)), key=lambda i: -log_variances[i]):
        hand = min((i for i in range(NUM_CODEBOOKS) if len(hands[i]) < capacity), key=lambda i: totals[i])
        hands[hand].append(direction)
        totals[hand] += log_variances[direction]
    return hands


def _kmeans(points: Tensor, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm; an empty cluster restarts at a random point. [N, d] -> [CODEBOOK_SIZE, d]."""
    centres = points[torch.randperm(len(points), generator=generator)[:CODEBOOK_SIZE]].clone()
    for _ in range(_KMEANS_STEPS):
        nearest = (points @ centres.T - centres.pow(2).sum(-1) / 2).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=CODEBOOK_SIZE)
        centres = sums / counts.clamp(min=1).unsqueeze(-1)
        empty = torch.nonzero(counts == 0).flatten()
        centres[empty] = points[torch.randint(len(points), (len(empty),), generator=generator)]
    return centres
