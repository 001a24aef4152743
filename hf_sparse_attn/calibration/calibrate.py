"""Dense checkpoint -> calibrated sparse checkpoint: fit the hash and what every head may read on sample documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_sparse_attn.attributes import replaced_attribute
from hf_sparse_attn.calibration.budget_allocation import (
    NUM_SAMPLED_ROWS,
    Allocation,
    Costs,
    allocate,
    first_row,
    measure_layer,
    sampled_blocks,
)
from hf_sparse_attn.calibration.kept_results import KeptResults
from hf_sparse_attn.config import SparseAttentionConfig, text_config
from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.evaluation.dense_attention import dense_side
from hf_sparse_attn.evaluation.perplexity import compare_perplexity
from hf_sparse_attn.hashing import BucketHash, encode_calibrated_hash, layer_hash
from hf_sparse_attn.hashing.product_quantizer import fit_hash
from hf_sparse_attn.integration import configured, observe_dense
from hf_sparse_attn.linear_layers import coarse_linear_layers
from hf_sparse_attn.logits import Head, hidden_states_and_head
from hf_sparse_attn.offloading import is_offloaded
from hf_sparse_attn.ops.common.threads import in_order
from hf_sparse_attn.patterns import LayerPattern, Marked, is_local
from hf_sparse_attn.tracing import input_device

Result = TypeVar("Result")

LOSS_FACTOR = 3.2  # how many times the predicted rise of the loss is measured: 1.7 to 3.2 were, with SmolLM2-135M
LEAST_LOSS = 1e-6  # nats per token: less is noise
_MAX_MEASUREMENTS = 5
_TRADE_POINTS = 10
VERSION = 2  # of what is kept of a calibration: higher when something else is measured, or in another way
GRADIENT_TOKENS = 1024  # of each document, whose loss says how much every head's errors matter


@dataclass(frozen=True)
class Calibration:
    """What was measured on the calibration documents.

    Args:
        config: with hash="calibrated" and the fitted hash, local layers as dense ones; what heads read is still to be
            chosen, among choices without smallest weights if `min_weight` is 0.
        costs: of every choice, over all documents.
        local_layers: those whose own small window is read whole.
        old_costs: in a refit, of every choice with the hash that the model has had; else None.
    """

    config: SparseAttentionConfig
    costs: Costs
    local_layers: tuple[int, ...] = ()
    old_costs: Costs | None = None

    def choose(self, density: float, key_budget: int) -> tuple[SparseAttentionConfig, Allocation]:
        """The configuration with the smallest predicted loss; see `allocation.allocate`."""
        choice = allocate(self.costs, density, key_budget, fit_min_weight=self.config.min_weight != 0)
        config = self.config.replace(
            key_budget=choice.key_budget,
            min_weight=choice.min_weight,
            dense_layers=tuple(sorted({*self.config.dense_layers, *choice.dense_layers})),
        )
        return config, choice

    def trade(self, key_budget: int) -> list[Allocation]:
        """The choices at densities from the least possible one up to a half, for tables and pictures."""
        least = self.costs.least_density
        densities = [least + (max(0.5, least) - least) * (i / _TRADE_POINTS) ** 2 for i in range(1, _TRADE_POINTS + 1)]
        return [self.choose(density, key_budget)[1] for density in densities]


def minimum_tokens(config: SparseAttentionConfig) -> int:
    """Length from which on a document has enough sparse rows to calibrate on.

    Raises:
        ArgumentError: if patterns differ by layer or head; all layers are measured at the same rows.
    """
    if config.by_layer or config.by_kv_head:
        raise ArgumentError(
            "sparse_attention", "by_layer and by_kv_head cannot be fitted to; give them to the converted model"
        )
    return first_row(config) + 2 * NUM_SAMPLED_ROWS


def num_steps(num_documents: int, refit: bool = False) -> int:
    """How often `calibrate` calls its `progress`."""
    return (4 if refit else 3) * num_documents + 1


def calibrate(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    config: SparseAttentionConfig,
    progress: Callable[[str], None] = lambda step: None,
    kept: KeptResults | None = None,
    old: SparseAttentionConfig | None = None,
) -> Calibration:
    """Fit the hash, and measure what every choice of budgets and smallest weights costs.

    The last document is kept apart from fitting the hash (if there is more than one), so that some costs are measured
    on keys that the hash has not seen.

    Args:
        model: with attn_implementation="sparse"; left as it was.
        documents: [N] int64 token ids each.
        config: everything that is not fitted here: window, static keys, dense rows and layers, seed.
        progress: called with a line of text before each step (`num_steps` in all).
        kept: of an interrupted calibration of the same model, documents and configuration, with the classes KEPT; None
            keeps nothing.
        old: in a refit, the configuration with the calibrated hash that the model has had: what every choice costs is
            measured with that hash, too.

    Raises:
        ValueError: if the documents are too short to have routed keys.
    """
    kept = kept or KeptResults()
    shortest = min(len(document) for document in documents)
    if shortest < minimum_tokens(config):
        raise ValueError(
            f"calibration documents must have at least {minimum_tokens(config)} tokens, so that some rows are sparse; "
            f"the shortest has {shortest}"
        )
    sensitivity: dict[int, Tensor] = {}
    for i, document in enumerate(documents):
        progress(f"gradients, document {i + 1} of {len(documents)}")
        part, seed = document[:GRADIENT_TOKENS], config.seed + i
        for layer, moment in kept(f"gradients-{i}", partial(_gradient_moments, model, part, seed)).items():
            sensitivity[layer] = sensitivity.get(layer, 0) + moment / len(documents)
    samples: list[dict[int, _LayerSample]] = []
    local: list[int] = []
    for i, document in enumerate(documents):
        progress(f"queries and keys, document {i + 1} of {len(documents)}")
        sample, local = kept(f"queries-and-keys-{i}", partial(_read, model, document, config))
        samples.append(sample)
    if not samples[0]:
        raise ValueError("model: all of its layers have sliding windows of their own so small that they are read whole")
    progress("fitting the hash")
    fitting = samples[:-1] or samples
    fit = partial(_by_layer, lambda layer: _fitted([sample[layer] for sample in fitting], config.seed))
    hashes = kept("hashes", partial(fit, sorted(samples[0])))
    num_layers = text_config(model.config).num_hidden_layers

    def measured(name: str, hashes: dict[int, BucketHash], told: str = "") -> Costs:
        """The costs of every choice with these hashes, over all documents."""
        of_documents = []
        for i, (document, sample) in enumerate(zip(documents, samples, strict=True)):
            progress(f"costs of every choice{told}, document {i + 1} of {len(documents)}")
            measure = partial(_document_costs, document, sample, sensitivity, hashes, config, num_layers)
            of_documents.append(kept(f"{name}-{i}", measure))
        return reduce(add, of_documents)

    costs = measured("costs", hashes)
    old_costs = None
    if old is not None:
        shapes = {layer: (len(sample.key), sample.key.shape[-1]) for layer, sample in samples[0].items()}
        old_hashes = {layer: layer_hash(old, layer, *shape) for layer, shape in shapes.items()}
        old_costs = measured("old-costs", old_hashes, " with the old hash")
    fitted = config.replace(
        hash="calibrated",
        calibrated_hash=_encode(hashes, num_layers),
        dense_layers=tuple(sorted({*config.dense_layers, *local})),
    )
    return Calibration(fitted, costs, tuple(local), old_costs)


def _by_layer(work: Callable[[int], Result], layers: Iterable[int]) -> dict[int, Result]:
    """What `work` gives for each layer; several at once, as it consists of many operations too small for threads."""
    layers = list(layers)
    return dict(zip(layers, in_order(work, layers, torch.get_num_threads()), strict=True))


@dataclass
class _LayerSample:
    """What calibration keeps of one layer on one document, on the CPU in the model's dtype."""

    key: Tensor  # [num_key_value_heads, N, head_dim]
    value: Tensor
    rows: Tensor  # [num_heads, sampled rows, head_dim]
    query_moment: Tensor  # [num_key_value_heads, head_dim, head_dim], float32
    scaling: float
    sliding_window: int | None


KEPT = (_LayerSample, BucketHash, Costs)  # classes of what `calibrate` keeps


def _fitted(samples: Sequence[_LayerSample], seed: int) -> BucketHash:
    """The hash of one layer, fitted to several documents."""
    keys = torch.cat([sample.key.float() for sample in samples], 1)
    return fit_hash(keys, torch.stack([sample.query_moment for sample in samples]).mean(0), seed)


@torch.no_grad()
def _read(
    model: PreTrainedModel, document: Tensor, config: SparseAttentionConfig
) -> tuple[dict[int, _LayerSample], list[int]]:
    """The dense model's own queries and keys, but for local layers; and which layers these are."""
    sampled = torch.cat([torch.arange(*block) for block in sampled_blocks(config, len(document))])
    layers: dict[int, _LayerSample] = {}
    local: set[int] = set()

    def observer(
        pattern: LayerPattern, query: Tensor, key: Tensor, value: Tensor, scaling: float, _output: Tensor
    ) -> None:
        if is_local(config, pattern.sliding_window):
            local.add(pattern.layer_idx)
            return
        queries = query[0].float().unflatten(0, (key.shape[1], -1)).flatten(1, 2)  # [K, group * N, D]
        layers[pattern.layer_idx] = _LayerSample(
            key[0].cpu(),
            value[0].cpu(),
            query[0, :, sampled.to(query.device)].cpu(),
            (queries.transpose(1, 2) @ queries / queries.shape[1]).cpu(),
            scaling,
            pattern.sliding_window,
        )

    device = input_device(model)
    with observe_dense(model, observer), coarse_linear_layers(model, device):
        model.base_model(input_ids=document[None].to(device), use_cache=False)
    return layers, sorted(local)


def _gradient_moments(model: PreTrainedModel, document: Tensor, seed: int) -> dict[int, Tensor]:
    """Mean outer product of the loss's gradient in each head's output: layer -> [num_heads, D, D], float32.

    The loss is that of labels drawn from the model itself, summed over the document.
    """
    moments: dict[int, Tensor] = {}
    layers = set()

    def observer(
        pattern: LayerPattern, query: Tensor, key: Tensor, value: Tensor, scaling: float, output: Tensor
    ) -> None:
        def keep(gradient: Tensor) -> None:
            by_head = gradient[0].float().transpose(0, 1)  # [num_heads, N, D]
            with torch.autocast(gradient.device.type, enabled=False):
                moments[pattern.layer_idx] = (by_head.transpose(1, 2) @ by_head / by_head.shape[1]).cpu()

        layers.add(pattern.layer_idx)
        output.register_hook(keep)  # neither the outputs nor their gradients are all there at once

    with torch.enable_grad(), _frozen(model), _checkpointed(model), observe_dense(model, observer):
        hidden, head = hidden_states_and_head(model, input_ids=document[None].to(input_device(model)), use_cache=False)
        if not layers:
            raise ValueError("model: its attention never goes through Transformers' attention registry")
        rows = hidden[0]  # [N, D]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(len(rows), 1, generator=generator, dtype=torch.float32).to(rows.device)
        chunks = zip(rows.split(head.chunk_size), drawn.split(head.chunk_size), strict=True)
        rows.backward(torch.cat([_loss_gradient(head, *chunk) for chunk in chunks]))
    return moments


def _loss_gradient(head: Head, hidden: Tensor, drawn: Tensor) -> Tensor:
    """Gradient [R, D] of the summed loss in hidden states [R, D], with labels that uniform numbers [R, 1] choose."""
    hidden = hidden.detach().requires_grad_()
    logits = head(hidden)
    # The loss's gradient in the logits: the probabilities, less one at the label.
    gradient = logits.detach().float().softmax(-1)
    labels = torch.searchsorted(gradient.cumsum(-1), drawn).clamp_(max=logits.shape[-1] - 1)
    gradient.scatter_add_(1, labels, gradient.new_tensor([[-1.0]]).expand_as(labels))
    return torch.autograd.grad(logits, hidden, gradient.to(logits.dtype))[0]


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Gradients flow through the model, but not into its weights."""
    trainable = {name for name, parameter in _parameters(model) if parameter.requires_grad}
    model.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda *arguments: arguments[2].requires_grad_())
    try:
        yield
    finally:
        hook.remove()
        for name, parameter in _parameters(model):
            parameter.requires_grad_(name in trainable)


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Each one with all of its names."""
    return model.named_parameters(remove_duplicate=False)


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """The backward computes the activations inside the layers again: they take several times the memory of the weights.

    Only the layers are computed coarsely: the head's weights, often the largest, would be copied.

    Transformers' own switch has no effect outside of training. Where weights are offloaded, layers are computed to
    their ends: PyTorch would leave them as soon as it has what it needs, and the weights in use would stay.
    """
    early_stop, device = not is_offloaded(model), input_device(model)
    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                forward = partial(_computed_coarsely, layer, device, layer.forward)
                recomputed = partial(checkpoint, forward, use_reentrant=False, early_stop=early_stop)
                stack.enter_context(replaced_attribute(layer, "forward", recomputed))
        yield


def _computed_coarsely(
    layer: nn.Module, device: torch.device, forward: Callable[..., Result], *args: Any, **kwargs: Any
) -> Result:
    with coarse_linear_layers(layer, device):
        return forward(*args, **kwargs)


@torch.no_grad()
def _document_costs(
    document: Tensor,
    sample: dict[int, _LayerSample],
    sensitivity: dict[int, Tensor],
    hashes: dict[int, BucketHash],
    config: SparseAttentionConfig,
    num_layers: int,
) -> Costs:
    marked = Marked.in_document(document, config.global_token_ids)

    def measure(layer: int) -> Costs:
        kept = sample[layer]
        num_heads, num_kv_heads = len(kept.rows), len(kept.key)
        budgets, min_weights = [0] * num_kv_heads, [0.0] * num_heads
        pattern = LayerPattern(config, layer, budgets, min_weights, hashes[layer], kept.sliding_window, marked=marked)
        key, value = kept.key.float(), kept.value.float()
        return measure_layer(kept.rows.float(), key, value, sensitivity[layer], pattern, kept.scaling)

    return Costs.stack(_by_layer(measure, sample), num_layers)


def _encode(hashes: dict[int, BucketHash], num_layers: int) -> str:
    """A hybrid model has layers without attention; they get an empty place."""
    some = next(iter(hashes.values()))
    empty = BucketHash(torch.zeros_like(some.weight), torch.zeros_like(some.bias))
    layers = [hashes.get(layer, empty) for layer in range(num_layers)]
    return encode_calibrated_hash(
        torch.stack([layer.weight for layer in layers]), torch.stack([layer.bias for layer in layers])
    )


def choose_by_loss(
    model: PreTrainedModel,
    calibration: Calibration,
    document: Tensor,
    max_loss: float,
    key_budget: int,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[SparseAttentionConfig, Allocation]:
    """The smallest density at which the measured loss of `document` rises by at most `max_loss`.

    Predictions are too low by a factor. LOSS_FACTOR is what it is at most as a rule, so that one measurement mostly
    suffices; where the loss rises by more, or by less than half of that, the measured factor makes the next choice.

    Args:
        model: with attn_implementation="sparse"; left as it was.
        calibration: what `calibrate` returned.
        document: [N] int64 token ids.
        max_loss: mean difference of the negative log-likelihood, sparse minus dense, in nats per token.
        key_budget: as for `Calibration.choose`.
        progress: called with a line of text before each measurement.

    Raises:
        ValueError: if no density up to 1 keeps the loss.
    """
    factor = LOSS_FACTOR
    rows = [{"name": "calibration", "input_ids": document.tolist()}]
    dense = dense_side(model, document.tolist(), fast=True)
    best: tuple[SparseAttentionConfig, Allocation] | None = None
    for _ in range(_MAX_MEASUREMENTS):
        config, choice = _smallest_density(calibration, max_loss / factor, key_budget)
        if best is not None and choice.density >= best[1].density:
            break
        progress(f"measuring the loss at density {choice.density:.3f}")
        with configured(model, config.to_dict()):
            loss = compare_perplexity(model, rows, dense_attention=dense)["delta_nll"]["mean"]
        progress(f"the loss rises by {loss:.5f} nats per token")
        if loss <= max_loss:
            best = config, choice
        if best is not None and loss > max_loss / 2:
            break
        measured = loss / max(choice.loss, LEAST_LOSS) if loss > LEAST_LOSS else 0.0
        factor = max(1.0 if loss <= max_loss else 1.2 * factor, measured)
    if best is not None:
        return best
    raise ValueError(
        f"a rise of the loss by at most {max_loss:g} was not reached in {_MAX_MEASUREMENTS} tries, the last one "
        f"{loss:.5f} at density {choice.density:.3f}; allow more, or raise --key-budget"
    )


def _smallest_density(
    calibration: Calibration, predicted_loss: float, key_budget: int
) -> tuple[SparseAttentionConfig, Allocation]:
    """The choice of the smallest density whose predicted loss is at most this, or the choice of the smallest loss."""
    low, high = calibration.costs.least_density, 1.0
    best = calibration.choose(high, key_budget)
    for _ in range(12):
        middle = (low + high) / 2
        chosen = calibration.choose(middle, key_budget)
        if chosen[1].loss <= predicted_loss:
            high, best = middle, chosen
        else:
            low = middle
    return best
