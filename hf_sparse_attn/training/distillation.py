"""Distillation from the dense model: the same weights, every row of which reads everything, teach their sparse selves.

For each training row a forward with dense attention and without gradients comes first. On rows (tokens) sampled from
those that do not read everything anyway, the loss becomes

    (1 - weight) * cross-entropy of all rows + weight * mean KL(dense || sparse) + layer_weight * error

where the error is that of the attention layers' outputs on the sampled rows, squared and relative to the dense ones',
averaged over layers. There is no second copy of the weights: the teacher is what the model is at that step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from hf_sparse_attn.attributes import evaluating, replaced_attribute
from hf_sparse_attn.config import SparseAttentionConfig, sparse_config, text_config
from hf_sparse_attn.data import IGNORED_LABEL
from hf_sparse_attn.errors import ArgumentError, check_integer
from hf_sparse_attn.logits import Taught, causal_model_of, hidden_states_and_head, loss_is_chunked
from hf_sparse_attn.side_channels import PATTERN
from hf_sparse_attn.tracing import input_device
from hf_sparse_attn.training.processes import parts_of_rows


@dataclass(frozen=True)
class Distillation:
    """How a training learns from its dense self.

    Args:
        weight: of the divergence of the logits against the loss of the labels, from 0 to 1; 1 leaves the labels out.
        rows: most tokens of a batch on which dense and sparse are compared, at least 1.
        every: steps from one comparison to the next, at least 1; the steps between them learn from the labels alone.
        layer_weight: of the error of the attention layers' outputs, at least 0; 0 leaves it out.

    Raises:
        ArgumentError: a value is out of its range; the message names the option.
    """

    weight: float = 0.5
    rows: int = 1024
    every: int = 1
    layer_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ArgumentError("distill_weight", f"must be from 0 to 1, got {self.weight}")
        check_integer("distill_rows", self.rows, 1)
        check_integer("distill_every", self.every, 1)
        if not 0 <= self.layer_weight < float("inf"):
            raise ArgumentError("distill_layer_weight", f"must be finite and at least 0, got {self.layer_weight}")
        if self.weight == self.layer_weight == 0:
            raise ArgumentError(
                "distill_weight", "is 0, and so is {distill_layer_weight}", others=("distill_layer_weight",)
            )


def check_distillation(arguments: TrainingArguments, config: SparseAttentionConfig, context_length: int) -> None:
    """Make sure that a training can be distilled; quick, for before a model is loaded.

    Raises:
        ArgumentError: for "distill": something else than the model's own forward is to compute the loss, rows are
            divided among processes, or every row of `context_length` tokens reads everything.
    """
    if own := other_loss(arguments):
        raise ArgumentError("distill", f"needs the loss of the model's own forward, which {own} replaces")
    if parts_of_rows(arguments) > 1:
        raise ArgumentError("distill", "rows must not be divided among processes (Ulysses)")
    if context_length <= config.dense_below:
        told = f"nothing is sparse in rows of {context_length} tokens: rows under dense_below={config.dense_below} read"
        raise ArgumentError("distill", f"{told} everything")


def other_loss(arguments: TrainingArguments) -> str | None:
    """The argument by which something else than the model's own forward computes the loss; None if there is none."""
    given = {
        "label_smoothing_factor": arguments.label_smoothing_factor,
        "torch_compile": arguments.torch_compile,
        "use_liger_kernel": arguments.use_liger_kernel,
        "parallelism_config": arguments.parallelism_config and not arguments.parallelism_config.sp_enabled,
        "torch.nn.DataParallel (several GPUs in one process)": arguments.n_gpu > 1,
    }
    return next((name for name, value in given.items() if value), None)


def sampled_rows(labels: Tensor, position_ids: Tensor | None, dense_below: int, num_rows: int) -> Tensor:
    """Choose rows that have a target and do not read everything, by the global random state.

    Args:
        labels: [B, N] int64; the target of a row is the label after it.
        position_ids: [1 or B, N]: positions in each document; None counts from the first column.
        dense_below: rows at earlier positions read everything.
        num_rows: the most to choose.

    Returns:
        [R] int64, indices into the B * N rows, in order; R may be 0.
    """
    positions = torch.arange(labels.shape[1], device=labels.device)[None] if position_ids is None else position_ids
    has_target = nn.functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1))
    eligible = (has_target & (positions >= dense_below)).flatten().nonzero()[:, 0]
    chosen = torch.randperm(len(eligible))[:num_rows].sort().values  # on the CPU: the same on every device
    return eligible[chosen.to(eligible.device)]


class Teacher:
    """A model where it reads everything, which teaches it where it does not.

    Args:
        model: the causal language model, before a training wraps it; it may be one of PEFT.
        settings: how it is asked.

    Raises:
        ValueError: the model's loss is not computed as that of Transformers' causal models.
    """

    def __init__(self, model: nn.Module, settings: Distillation) -> None:
        causal_model = causal_model_of(model)
        self._settings, self._config = settings, text_config(causal_model.config)
        tokens = torch.zeros(1, 8, dtype=torch.int64, device=input_device(causal_model))
        with torch.no_grad():  # every attention layer gets its pattern
            hidden, head = hidden_states_and_head(model, input_ids=tokens, use_cache=False)
        if head.stands_alone or not loss_is_chunked(causal_model):
            raise ValueError(f"{type(causal_model).__name__} computes its loss in its own way and cannot be distilled")
        if hidden.shape[1] != tokens.shape[1]:
            raise ValueError("a model with a soft prompt cannot be distilled: its rows are not those of the labels")
        self._layers = _sparse_layers(causal_model) if settings.layer_weight else []

    def as_dense(self) -> AbstractContextManager[None]:
        """In this block the model reads everything."""
        return replaced_attribute(self._config, "sparse_attention", {"dense_below": sys.maxsize})

    @contextmanager
    def lesson(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[Taught | None]:
        """Read a batch with dense attention; inside of this block the model then reads it with its own.

        The backward belongs inside, too: layers that are checkpointed run again there, as they ran before.

        Args:
            model: the same one, as the training wrapped it.
            inputs: of its forward, with labels.

        Yields:
            What was found; None if every row of the batch that has a target reads everything anyway.
        """
        dense_below = sparse_config(self._config).dense_below
        rows = sampled_rows(inputs["labels"], inputs.get("position_ids"), dense_below, self._settings.rows)
        if len(rows) == 0:
            yield None
            return
        others = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad(), evaluating(model), self.as_dense(), _outputs(self._layers, rows) as dense:
            hidden, _ = hidden_states_and_head(model, **others, use_cache=False)
        with _outputs(self._layers, rows) as sparse:

            def error() -> Tensor:
                if not all(output.requires_grad for output in sparse.values()):
                    raise ValueError("the layers' outputs carry no gradients; checkpoint them with use_reentrant=False")
                return self._settings.layer_weight * _relative_error(sparse, dense)

            yield Taught(rows, hidden.flatten(0, 1)[rows], self._settings.weight, error if self._layers else None)


def _relative_error(found: dict[nn.Module, Tensor], expected: dict[nn.Module, Tensor]) -> Tensor:
    """Squared error over the square of what is expected, in float32, the mean over layers."""
    pairs = [(found[layer].float(), tensor.float()) for layer, tensor in expected.items()]
    errors = [(ours - theirs).square().sum() / theirs.square().sum() for ours, theirs in pairs]
    return torch.stack([error.to(errors[-1].device) for error in errors]).mean()


def _sparse_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The attention layers that have rows which do not read everything, once the model has run."""
    patterns = ((module, module.__dict__.get(PATTERN)) for module in model.modules())
    return [module for module, cached in patterns if cached is not None and cached[2].dense_rows() is not None]


@contextmanager
def _outputs(layers: Iterable[nn.Module], rows: Tensor) -> Iterator[dict[nn.Module, Tensor]]:
    """Collect what layers give for some rows [R, D] in the forwards of this block."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs[layer] = hidden.flatten(0, 1)[rows.to(hidden.device)]

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
