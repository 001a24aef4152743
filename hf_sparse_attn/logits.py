"""Logits of many tokens, a few rows at a time: all of them at once often take more memory than the model.

The base model runs once. A chunk's logits then come from the model's own forward, whose base model is replaced for the
moment by the finished hidden states: whatever a family does to its logits after the head (scaling, soft-capping) is
done here too. Models that go around their base model, such as OPT, compute all logits at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from hf_sparse_attn.attributes import replaced_attribute
from hf_sparse_attn.linear_layers import fast_linear_layers

CHUNK_BYTES = 2**26  # of the logits of a chunk in float32; computing with them takes some three times as much
LEAST_ROWS = 4


def rows_of_chunk(vocab_size: int) -> int:
    """Rows whose logits take at most `CHUNK_BYTES` in float32, at least `LEAST_ROWS`."""
    return max(LEAST_ROWS, CHUNK_BYTES // (torch.float32.itemsize * vocab_size))


class Head:
    """A model's way from its hidden states to its logits.

    Args:
        model: the causal language model, unwrapped.
        output: of its base model; None if the hidden states are already the logits.
        vocab_size: V, how many logits there are for a token.
        forward: the model's, if not the one that wrappers such as accelerate's put into the model.

    Attributes:
        chunk_size: rows whose logits are computed at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        output: ModelOutput | None,
        vocab_size: int,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        self._base, self._output, self._forward = model.base_model, output, forward or model.forward
        self._last = model.get_output_embeddings()
        self.chunk_size = rows_of_chunk(vocab_size)

    @property
    def stands_alone(self) -> bool:
        """Whether the hidden states are already the logits."""
        return self._output is None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, D] -> logits [R, V], in the dtype that the model gives them."""
        if self._output is None:
            return hidden
        # Without router_logits, whose auxiliary loss is none of a chunk's.
        others = {name: value for name, value in self._output.items() if name != "router_logits"}
        output = type(self._output)(**others | {"last_hidden_state": hidden[None]})
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)

        def finished(*args: Any, **kwargs: Any) -> ModelOutput:
            return output

        with (
            replaced_attribute(self._base, "forward", finished),
            _without_group_hooks(self._last),
            nullcontext() if self._last is None else fast_linear_layers(self._last),
        ):
            return self._forward(input_ids=ids, use_cache=False).logits[0]


def hidden_states_and_head(model: nn.Module, **inputs: Any) -> tuple[Tensor, Head]:
    """Run a model without its logits.

    Args:
        model: a causal language model, which may be wrapped by PEFT.
        inputs: of its forward, without labels.

    Returns:
        Its last hidden states [batch, N, D], where N counts virtual tokens of soft prompts too, and the head that turns
        rows of them into logits. Gradients flow through both.
    """
    causal_model = causal_model_of(model)
    with _last_row_alone(causal_model) as outputs, fast_linear_layers(causal_model):
        logits = model(**inputs).logits
    if not outputs:
        return logits, Head(causal_model, None, logits.shape[-1])
    return outputs[-1].last_hidden_state, Head(causal_model, outputs[-1], logits.shape[-1])


def token_losses(model: nn.Module, input_ids: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """Negative log-likelihood of the token after each of the first T, in nats, from float32 logits.

    Args:
        input_ids: [1, N] int64.
        targets: [T] int64, T <= N: the tokens that follow.
        inputs: others of the model's forward.

    Returns:
        [T] float32 on the CPU.
    """
    hidden, head = hidden_states_and_head(model, input_ids=input_ids, **inputs)
    rows = hidden[0, -input_ids.shape[1] :][: len(targets)]  # a soft prompt's virtual tokens come first
    losses = [
        F.cross_entropy(head(chunk).float(), target.to(chunk.device), reduction="none").cpu()
        for chunk, target in zip(rows.split(head.chunk_size), targets.split(head.chunk_size), strict=True)
    ]
    return torch.cat(losses)


@dataclass(frozen=True)
class Taught:
    """What a teacher says of some rows of a batch, with the logits of the same head.

    Args:
        rows: [R] int64, indices into the B * N rows of the batch, R >= 1.
        hidden: [R, D], the teacher's last hidden states, without gradients.
        weight: of the mean KL(teacher || model) of these rows against the loss of the labels, from 0 to 1.
        error: called when the base model has run; gives a number that is added to the loss. None: there is none.
    """

    rows: Tensor
    hidden: Tensor
    weight: float
    error: Callable[[], Tensor] | None = None


@contextmanager
def loss_in_chunks(model: nn.Module, taught: Taught | None = None) -> Iterator[None]:
    """In this block a model's forwards with labels compute their loss a chunk of logits at a time.

    The loss and its gradients are the model's own: its forward runs as ever, adds what else it adds (the auxiliary loss
    of a router), and only finds `loss_function` replaced. The backward computes each chunk's logits again. The output's
    `logits` are those of the last token alone.

    Nothing changes for models whose forward does not call `loss_function`, or that have another one than Transformers'
    for causal models.

    Args:
        model: a causal language model, which may be wrapped by PEFT, DDP or FSDP.
        taught: becomes part of the loss, for one batch; only where the loss is computed in chunks.
    """
    causal_model = causal_model_of(model)
    original: Callable[..., Tensor] = causal_model.loss_function
    if not loss_is_chunked(causal_model):
        yield
        return

    def loss_function(logits: Tensor, labels: Any, vocab_size: int, **kwargs: Any) -> Tensor:
        if not outputs:
            if taught is not None:
                raise ValueError(f"{type(causal_model).__name__} goes around its base model and cannot be taught")
            return original(logits, labels, vocab_size, **kwargs)
        # This runs inside the model's forward: the hooks of FSDP and the autocast of accelerate must not begin again.
        output, forward = outputs.pop(), partial(type(causal_model).forward, causal_model)
        head = Head(causal_model, output, logits.shape[-1], forward)
        count = kwargs.pop("num_items_in_batch", None)
        targets, ignored = kwargs.pop("shift_labels", None), kwargs.get("ignore_index", -100)
        if targets is None:
            targets = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        targets = targets.flatten().to(logits.device)

        def summed(hidden: Tensor, target: Tensor) -> Tensor:
            return original(head(hidden), None, vocab_size, num_items_in_batch=1, shift_labels=target, **kwargs)

        hidden, own = output.last_hidden_state.flatten(0, 1), (targets != ignored).sum()
        weight = 0 if taught is None else taught.weight
        loss = _sum_of_chunks(summed, hidden, targets, head.chunk_size) if weight < 1 else hidden.new_zeros(())
        if taught is not None:  # as if each of the batch's targets had the mean divergence of the sampled rows
            given, expected = (tensor.to(hidden.device) for tensor in (taught.rows, taught.hidden))
            divergence = _sum_of_chunks(partial(_divergence, head), hidden[given], expected, head.chunk_size)
            loss = (1 - weight) * loss + weight * divergence * own / len(given)
            loss = loss if taught.error is None else loss + taught.error().to(loss.device) * own
        count = own if count is None else count
        return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)

    with (
        _last_row_alone(causal_model) as outputs,
        replaced_attribute(causal_model, "_loss_function", loss_function),
    ):
        yield


def _sum_of_chunks(function: Callable[..., Tensor], first: Tensor, second: Tensor, size: int) -> Tensor:
    """Sum of `function` over the rows of two tensors, `size` at a time; its backward computes each chunk again."""
    chunks = zip(first.split(size), second.split(size), strict=True)
    return torch.stack([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _divergence(head: Head, hidden: Tensor, expected: Tensor) -> Tensor:
    """KL(expected || found) of the logits of rows [R, D], summed over the rows, in nats."""
    with torch.no_grad():
        target = head(expected).float().log_softmax(-1)
    return F.kl_div(head(hidden).float().log_softmax(-1), target, reduction="sum", log_target=True)


@contextmanager
def _without_group_hooks(module: nn.Module | None) -> Iterator[None]:
    """Call a module more often than the others of its FSDP group, whose weights the model's own call has gathered.

    accelerate shards the last norm and the head as one group. Its hooks expect both to be called in turn: another call
    of one alone would end in gathering too late and in freeing weights that are still in use.
    """
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    if module is None or len(getattr(state, "_modules", ())) < 2:
        yield
        return
    with replaced_attribute(module, "_forward_pre_hooks", {}), replaced_attribute(module, "_forward_hooks", {}):
        yield


def causal_model_of(model: nn.Module) -> PreTrainedModel:
    """The outermost Transformers model in whatever wraps it."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def loss_is_chunked(model: PreTrainedModel) -> bool:
    """Whether `loss_in_chunks` changes anything for a model."""
    code = getattr(inspect.unwrap(model.forward), "__code__", None)
    calls_it = code is not None and "loss_function" in code.co_names
    return calls_it and model.loss_function is ForCausalLMLoss and model.base_model is not model


@contextmanager
def _last_row_alone(model: PreTrainedModel) -> Iterator[list[Any]]:
    """Collect the base model's outputs in this block, and let the model go on with each one's last row alone."""
    base, outputs = model.base_model, list[Any]()
    if base is model:  # no base model
        yield outputs
        return
    forward = base.forward

    def shortened(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        hidden = output.get("last_hidden_state") if isinstance(output, ModelOutput) else None
        if hidden is None or hidden.ndim != 3:
            return output
        outputs.append(output)
        return _with_hidden_states(output, hidden[:, -1:])

    with replaced_attribute(base, "forward", shortened):
        yield outputs


def _with_hidden_states(output: ModelOutput, hidden: Tensor) -> ModelOutput:
    """Of the family's own class, whose forward may read more of it."""
    return type(output)(**dict(output) | {"last_hidden_state": hidden})
