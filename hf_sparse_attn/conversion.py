"""Dense checkpoint -> calibrated sparse checkpoint: fit the hash and the budgets of every head on sample documents."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.hashing import BucketHash, encode_calibrated_hash, quantize_codewords
from hf_sparse_attn.integration import Observer, observe_dense
from hf_sparse_attn.routing import BucketIndex, LayerPattern, static_positions

NUM_CODEBOOKS = 2
CODEBOOK_SIZE = 32
BUDGETS = (0, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_SAMPLED_ROWS = 64  # rows of each layer and head whose error decides the budgets
_KMEANS_STEPS = 12


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    config: SparseAttentionConfig,
    key_budget: int,
    progress: Callable[[str], None] = lambda step: None,
) -> SparseAttentionConfig:
    """Fit hash and budgets.

    The last document is kept apart for the budgets (if there is more than one), so that they are not fitted on keys
    that the hash has seen.

    Args:
        model: with attn_implementation="sparse"; left as it was.
        documents: [N] int64 token ids each.
        config: everything that is not fitted here: window, static keys, dense rows and layers, seed.
        key_budget: mean number of routed keys per row that the fitted budgets may spend.
        progress: called with a line of text before each step (`num_steps` in all).

    Returns:
        `config` with hash="calibrated", the fitted hash and a budget for every layer and head.

    Raises:
        ValueError: if the documents are too short to have routed keys.
    """
    shortest = min(len(document) for document in documents)
    if shortest < minimum_tokens(config):
        raise ValueError(
            f"calibration documents must have at least {minimum_tokens(config)} tokens, so that some rows are sparse; "
            f"the shortest has {shortest}"
        )
    # Calibration reads the dense model's own queries and keys.
    statistics: dict[int, _HeadStatistics] = {}
    fitting = documents[:-1] if len(documents) > 1 else documents
    for i, document in enumerate(fitting):
        progress(f"reading calibration document {i + 1} of {len(fitting)}")
        with observe_dense(model, _collect(statistics)):
            model.base_model(input_ids=document[None].to(model.device), use_cache=False)
    if not statistics:
        raise ValueError("model: its attention never goes through Transformers' attention registry")
    progress("fitting the hash")
    hashes = {layer: layer_statistics.fit(config.seed) for layer, layer_statistics in sorted(statistics.items())}
    progress("measuring every head's error by budget")
    errors: dict[int, Tensor] = {}
    with observe_dense(model, _measure(hashes, config, errors)):
        model.base_model(input_ids=documents[-1][None].to(model.device), use_cache=False)
    layers = range(max(hashes) + 1)
    # A hybrid model has layers without attention; they get an empty place in the tables.
    some_hash, some_errors = next(iter(hashes.values())), next(iter(errors.values()))
    empty = BucketHash(torch.zeros_like(some_hash.weight), torch.zeros_like(some_hash.bias))
    weight = torch.stack([hashes.get(layer, empty).weight for layer in layers])
    bias = torch.stack([hashes.get(layer, empty).bias for layer in layers])
    all_errors = torch.stack([errors.get(layer, torch.zeros_like(some_errors)) for layer in layers])
    budgets = allocate_budgets(all_errors, key_budget)
    return config.replace(
        hash="calibrated",
        calibrated_hash=encode_calibrated_hash(weight, bias),
        key_budget=tuple(tuple(layer) for layer in budgets.tolist()),
    )


def minimum_tokens(config: SparseAttentionConfig) -> int:
    """Length from which on a document has enough sparse rows to calibrate on."""
    return _first_row(config) + 2 * _SAMPLED_ROWS


def _first_row(config: SparseAttentionConfig) -> int:
    """The first row that is sparse and has older keys to choose from."""
    return max(config.dense_below, config.window_size + config.num_global_tokens)


def num_steps(num_documents: int) -> int:
    """How often `calibrate` calls its `progress`."""
    return max(num_documents - 1, 1) + 2


class _HeadStatistics:
    """What the hash of one layer is fitted to: keys, and the second moment of the queries of each KV head."""

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        self.keys: list[Tensor] = []
        self.moment = torch.zeros(num_kv_heads, head_dim, head_dim)
        self.count = 0

    def add(self, query: Tensor, key: Tensor) -> None:
        queries = query[0].float().unflatten(0, (key.shape[1], -1)).flatten(1, 2)  # [Hkv, group * N, D]
        self.keys.append(key[0].float().cpu())
        self.moment += (queries.transpose(1, 2) @ queries).cpu()
        self.count += queries.shape[1]

    def fit(self, seed: int) -> BucketHash:
        """The layer's product quantizer, in the metric in which squared distance is the mean squared score error."""
        generator = torch.Generator().manual_seed(seed)
        keys = torch.cat(self.keys, 1)  # [Hkv, N, D]
        weights, biases = zip(
            *(_fit_head(k, m, generator) for k, m in zip(keys, self.moment / self.count, strict=True)), strict=True
        )
        return BucketHash(torch.stack(weights), torch.stack(biases))


def _collect(statistics: dict[int, _HeadStatistics]) -> Observer:
    def observer(pattern: LayerPattern, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        layer = pattern.layer_idx
        if layer not in statistics:
            statistics[layer] = _HeadStatistics(key.shape[1], key.shape[-1])
        statistics[layer].add(query, key)

    return observer


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


def _measure(hashes: dict[int, BucketHash], config: SparseAttentionConfig, errors: dict[int, Tensor]) -> Observer:
    """An observer that fills `errors[layer]`, [num_heads, len(BUDGETS)]: mean relative error of each head's output."""

    def observer(dense: LayerPattern, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        layer, sliding_window = dense.layer_idx, dense.sliding_window
        num_heads, num_rows = query.shape[1:3]
        group = num_heads // key.shape[1]
        errors[layer] = torch.zeros(num_heads, len(BUDGETS))
        if sliding_window is not None and sliding_window <= config.window_size:
            return  # the window holds everything: no key can be routed
        pattern = LayerPattern(config, layer, [BUDGETS[-1]] * num_heads, hashes[layer], sliding_window)
        keys, values = key[0].float().cpu(), value[0].float().cpu()
        bucket = hashes[layer].assign(keys)
        static = static_positions(config, num_rows, keys.device)
        blocks = _row_blocks(config, num_rows)
        for kv_head in range(len(keys)):
            index = BucketIndex(keys[kv_head], bucket[kv_head], static, blocks[0][0], 0, pattern)
            for start, stop in blocks:
                chunk = index.rows(start, stop)
                position = torch.arange(start, stop)
                for head in range(kv_head * group, (kv_head + 1) * group):
                    rows = query[0, head, start:stop].float().cpu() * scaling
                    routed, count = chunk.select(rows, BUDGETS[-1])
                    errors[layer][head] += _error_by_budget(
                        rows, keys[kv_head], values[kv_head], position, static, routed.long(), count, pattern
                    )
        errors[layer] /= sum(stop - start for start, stop in blocks)

    return observer


def _row_blocks(config: SparseAttentionConfig, num_rows: int) -> list[tuple[int, int]]:
    """Short runs of rows, spread over the rows that are sparse; each inside one page."""
    size = min(16, config.page_size)
    first = _first_row(config)
    starts = torch.linspace(first + (num_rows - first) * 0.15, num_rows - size, _SAMPLED_ROWS // 16).long()
    return [(start, start + size) for start in (starts // size * size).tolist()]


def _error_by_budget(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    static: Tensor,
    routed: Tensor,
    count: Tensor,
    pattern: LayerPattern,
) -> Tensor:
    """Relative error of the output, summed over the rows, at each of BUDGETS: [len(BUDGETS)]."""
    column = torch.arange(len(key))
    inadmissible = column > position[:, None]
    if pattern.sliding_window is not None:
        inadmissible |= column <= position[:, None] - pattern.sliding_window
    scores = (rows @ key.T).masked_fill(inadmissible, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()  # [R, N], unnormalised
    exact = weights @ value / weights.sum(-1, keepdim=True)
    local = column > position[:, None] - pattern.config.window_size
    local[:, static] = True
    base = weights * local
    taken = weights.gather(1, routed) * (torch.arange(routed.shape[1]) < count[:, None])
    # Row b of `within` holds the weights of the keys that budget b takes.
    within = torch.arange(routed.shape[1]) < torch.tensor(BUDGETS)[:, None]
    routed_sum = (taken.unsqueeze(1) * within) @ value[routed]  # [R, len(BUDGETS), D]
    mass = base.sum(-1, keepdim=True) + taken @ within.to(taken).T  # [R, len(BUDGETS)]
    output = ((base @ value).unsqueeze(1) + routed_sum) / mass.unsqueeze(-1)
    return ((output - exact.unsqueeze(1)).norm(dim=-1) / exact.norm(dim=-1, keepdim=True)).sum(0)


def allocate_budgets(errors: Tensor, mean_budget: int) -> Tensor:
    """Spend a total number of keys where the error falls fastest per key.

    Args:
        errors: [num_layers, num_heads, len(BUDGETS)], error of each head at each of BUDGETS.
        mean_budget: routed keys per row and head to spend on average.

    Returns:
        [num_layers, num_heads] int64, each one of BUDGETS, with a mean of at most `mean_budget`.
    """
    flat = errors.flatten(0, 1).tolist()
    level = [0] * len(flat)
    left = mean_budget * len(flat)

    def best_step(head: int) -> tuple[float, int, int, int] | None:
        """The affordable step up with the steepest fall of the error per key: (-fall per key, head, from, to)."""
        here = level[head]
        steps = [
            (-(flat[head][here] - flat[head][to]) / (BUDGETS[to] - BUDGETS[here]), head, here, to)
            for to in range(here + 1, len(BUDGETS))
            if BUDGETS[to] - BUDGETS[here] <= left
        ]
        return min(steps) if steps else None

    queue = [step for step in map(best_step, range(len(flat))) if step is not None]
    heapq.heapify(queue)
    while queue:
        slope, head, here, to = heapq.heappop(queue)
        cost = BUDGETS[to] - BUDGETS[here]
        if slope >= 0:
            break
        if cost <= left:
            left -= cost
            level[head] = to
        step = best_step(head)
        if step is not None:
            heapq.heappush(queue, step)
    return torch.tensor(BUDGETS)[torch.tensor(level)].view(errors.shape[:2])


def describe_budgets(config: SparseAttentionConfig, num_layers: int, num_heads: int) -> dict[str, Any]:
    """Mean, smallest and largest routed budget of a fitted config, JSON-ready."""
    budgets = torch.tensor([config.head_budgets(layer, num_heads) for layer in range(num_layers)])
    return {"mean": budgets.double().mean().item(), "min": int(budgets.min()), "max": int(budgets.max())}
