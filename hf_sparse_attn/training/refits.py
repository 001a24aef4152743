"""The hash follows the weights: what training moved, and refits while it goes on.

A calibrated hash was fitted to queries and keys that training moves. `hash_recall` tells how well it still finds; a
refit (`calibration.refit`) fits hash and choice anew at the density of the old choice. It happens between two steps,
before the checkpoint of the same step, and what was fitted goes along in the trainer's state: a training that is
resumed reads the same keys as one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_sparse_attn.attributes import evaluating
from hf_sparse_attn.calibration.budget_allocation import first_row
from hf_sparse_attn.calibration.calibrate import minimum_tokens
from hf_sparse_attn.calibration.refit import refit
from hf_sparse_attn.config import SparseAttentionConfig, sparse_config, text_config
from hf_sparse_attn.errors import ArgumentError
from hf_sparse_attn.evaluation.recall import measure_recall
from hf_sparse_attn.logits import causal_model_of
from hf_sparse_attn.training.lora import autocast_dtype

NUM_DOCUMENTS = 2
_LEAST_ROWS, _MOST_TOKENS = 16, 8192  # that recall is measured on: the model reads them with dense attention
_STATE = "hf_sparse_attn"  # in the trainer's state


def check_refits(config: SparseAttentionConfig, context_length: int) -> None:
    """Make sure that a model can be refitted on rows of `context_length` tokens.

    Raises:
        ArgumentError: for "refit_every": it has no hash that was fitted, or such rows are too short.
    """
    if config.hash != "calibrated":
        raise ArgumentError("refit_every", "the model was not converted, so that there is nothing to refit")
    if context_length < (least := minimum_tokens(config)):
        raise ArgumentError("refit_every", f"needs rows of at least {least} tokens, got {context_length}")


def some_documents(rows: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The tokens of the first rows of a dataset, which are taken for documents."""
    return [torch.as_tensor(row["input_ids"]) for row in islice(rows, NUM_DOCUMENTS)]


def hash_recall(model: nn.Module, documents: Sequence[Tensor], *others: SparseAttentionConfig) -> list[float] | None:
    """Share of each row's 64 keys of largest dense weight that it reads, with the model's configuration and others.

    Args:
        model: which may be one of PEFT.
        documents: [N] int64 token ids each; the first 8192 tokens of the first one are read.
        others: configurations to compare.

    Returns:
        One number for each configuration; None where no row there is sparse.
    """
    causal_model = causal_model_of(model)
    configs = {str(i): config for i, config in enumerate((sparse_config(causal_model.config), *others))}
    read = [document[:_MOST_TOKENS] for document in documents[:1]]
    if not read or len(read[0]) < max(map(first_row, configs.values())) + _LEAST_ROWS:
        return None
    try:
        with _calm(model):
            reports = measure_recall(causal_model, read, configs)
    except ValueError:  # every layer is dense
        return None
    return [report["recall"] for report in reports.values()]


class Refits(TrainerCallback):
    """Refits the model's hash after every so many steps, and gives a resumed training what was fitted before.

    Each refit is an entry of the log: "refit_recall" with "before" and "after", as `hash_recall` gives them,
    "refit_predicted_loss" in nats per token, before and after, and "refit_is_taken": one that predicts no smaller loss
    is not.

    Args:
        documents: [N] int64 token ids each, to fit to.
        every: steps from one refit to the next; None: never.
    """

    def __init__(self, documents: Sequence[Tensor], every: int | None) -> None:
        self._documents, self._every = documents, every

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        kept = state.stateful_callbacks.get(_STATE)
        if kept is not None and model is not None:
            text_config(causal_model_of(model).config).sparse_attention = kept["sparse_attention"]

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if self._every is None or state.global_step % self._every or model is None:
            return
        causal_model = causal_model_of(model)
        old = sparse_config(causal_model.config)
        with _calm(model):
            new, moved = refit(causal_model, self._documents, old)
        before, after = hash_recall(model, self._documents, new) or (None, None)
        is_better = moved.new.loss < moved.old.loss  # the new one is fitted in steps: it may miss by a little
        fields = _of_first_process((new if is_better else old).to_dict())
        text_config(causal_model.config).sparse_attention = fields
        state.stateful_callbacks[_STATE] = {"sparse_attention": fields}
        entry: dict[str, Any] = {"refit_recall": {"before": before, "after": after}, "refit_is_taken": is_better}
        entry |= {"refit_predicted_loss": {"before": moved.old.loss, "after": moved.new.loss}}
        state.log_history.append(entry | {"step": state.global_step})


def _calm(model: nn.Module) -> ExitStack:
    """In this block the model computes as in training, but without dropout."""
    stack = ExitStack()
    stack.enter_context(evaluating(model))
    if (dtype := autocast_dtype(model)) is not None:
        stack.enter_context(torch.autocast(next(model.parameters()).device.type, dtype))
    return stack


def _of_first_process(fields: dict[str, Any]) -> dict[str, Any]:
    """The same in every process, to the last bit."""
    from accelerate.utils import broadcast_object_list

    shared = [fields]
    broadcast_object_list(shared)
    return shared[0]
