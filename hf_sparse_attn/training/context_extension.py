"""A longer context than a model was trained for: its rotary position embeddings (RoPE) scaled, and a check of that.

Scaling is a matter of the config alone, as Transformers reads it (`rope_parameters`): what is trained with it loads
with stock `from_pretrained`.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_sparse_attn.attributes import evaluating
from hf_sparse_attn.config import longest_context, text_config
from hf_sparse_attn.errors import ArgumentError, argument, one_line
from hf_sparse_attn.evaluation.perplexity import row_losses

NAMES = ("linear", "dynamic", "yarn", "llama3", "theta")
TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# In nats a token. Beyond the trained length it is another part of the text, whose loss differs by some tenths anyway.
SAME_TEXT_MARGIN, OTHER_TEXT_MARGIN = 0.25, 0.5

_WITH_ORIGINAL_LENGTH = ("yarn", "longrope", "llama3")
_LLAMA_3_1 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_OF_SCALING = {
    "rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor",
}  # fmt: skip
_EXPECTED = f"expected {', '.join(NAMES)} or a JSON object of rope_parameters"


def extend_context(config: Any, scaling: str | Mapping[str, Any], context_length: int) -> Any:
    """A copy of a model's config whose rotary embeddings are scaled to `context_length`.

    Where layer types have rotary embeddings of their own, those of full attention are scaled. `max_position_embeddings`
    becomes `context_length`, except with "dynamic", which counts its factor from the trained length there.

    Args:
        config: of a checkpoint; of a vision-language model, its text model is scaled.
        scaling: a name, whose factor is `context_length` over the trained length: "linear" (position interpolation,
            Chen et al. 2023), "dynamic" (NTK-aware, by the length of each text), "yarn" (Peng et al. 2023), "llama3"
            (as Llama 3.1), or "theta" (the base `rope_theta` raised NTK-aware, by factor ** (d / (d - 2)) for d rotary
            dimensions). Or `rope_parameters` of Transformers with a "rope_type"; what is not given of factor,
            original_max_position_embeddings and rope_theta follows from the model. A model that is scaled already is
            scaled further by the name of the kind it has, its factor growing with its context; it takes another kind
            as `rope_parameters` alone.
        context_length: in tokens, longer than the model was made for.

    Raises:
        ArgumentError: for "rope_scaling"; a model without rotary embeddings is one reason.
    """
    config = copy.deepcopy(config)
    text = text_config(config)
    with argument("rope_scaling"):
        by_layer_type, own = _own_parameters(text)
        trained = longest_context(text)
        if trained is None:
            raise ValueError("the model's config does not say what length it was trained for (max_position_embeddings)")
        if context_length <= trained:
            problem = f"nothing to scale: the model was made for {trained} tokens, {{context_length}} is "
            raise ArgumentError("rope_scaling", f"{problem}{context_length}", others=("context_length",))
        if isinstance(scaling, str):
            parameters = _named(scaling, text, own, context_length / trained)
        else:
            parameters = _given(scaling, text, own, context_length)
        text.rope_parameters = by_layer_type | {"full_attention": parameters} if by_layer_type else parameters
        if parameters["rope_type"] != "dynamic":
            text.max_position_embeddings = context_length
        if hasattr(text, "original_max_position_embeddings") and parameters["rope_type"] in _WITH_ORIGINAL_LENGTH:
            # Where a family (Phi-3) has it beside rope_parameters, too, Transformers takes it from here.
            text.original_max_position_embeddings = parameters["original_max_position_embeddings"]
        _validate(text)
        _check_that_the_family_follows(config, parameters["rope_type"])
    return config


def _own_parameters(text: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config's rope_parameters by layer type, empty if all layers have the same, and those of full attention."""
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        raise ValueError(f"a model of type {text.model_type} has no rotary position embeddings that could be scaled")
    if not any(isinstance(value, dict) for value in parameters.values()):
        return {}, parameters
    if not parameters.get("full_attention"):
        raise ValueError(f"the model has no rotary position embeddings for full attention, but for {list(parameters)}")
    return parameters, parameters["full_attention"]


def _named(name: str, text: Any, own: dict[str, Any], ratio: float) -> dict[str, Any]:
    """The parameters of a scaling given by name; `ratio` is of the new length to the trained one."""
    if name == "longrope":
        raise ValueError("longrope needs its short_factor and long_factor: give a JSON object of rope_parameters")
    if name not in NAMES:
        raise ValueError(f"unknown kind {name!r}; {_EXPECTED}")
    kind = own.get("rope_type", "default")
    if kind == name:
        return own | {"factor": own["factor"] * ratio}
    if kind != "default":
        further = f"scale it further by {kind!r}" if kind in NAMES else "it cannot be scaled further by name"
        raise ValueError(f"the model is scaled by {kind!r} already: {further}, or give a JSON object, not {name!r}")
    if name == "theta":
        dims = _rotary_dimensions(text, own)
        return own | {"rope_theta": own["rope_theta"] * ratio ** (dims / (dims - 2))}
    return _completed({"rope_type": name, "factor": ratio} | (_LLAMA_3_1 if name == "llama3" else {}), text, own)


def _rotary_dimensions(text: Any, own: dict[str, Any]) -> int:
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dims = int(head_dim * (own.get("partial_rotary_factor") or 1.0))
    if dims < 4:
        raise ValueError(f"'theta' cannot scale {dims} rotary dimensions a head")
    return dims


def _given(scaling: Mapping[str, Any], text: Any, own: dict[str, Any], context_length: int) -> dict[str, Any]:
    """The parameters of a scaling given as rope_parameters."""
    kind = scaling.get("rope_type")
    if kind not in TYPES:
        raise ValueError(f"rope_type must be one of {', '.join(TYPES)}, got {kind!r}")
    # Some versions of Transformers take floats alone.
    floats = {
        name: float(value) if type(value) is int and name != "original_max_position_embeddings" else value
        for name, value in scaling.items()
    }
    parameters = _completed(floats, text, own)
    if kind != "default":
        original = parameters.get("original_max_position_embeddings", text.max_position_embeddings)
        if not isinstance(original, int) or isinstance(original, bool) or not 0 < original < context_length:
            raise ValueError(
                f"original_max_position_embeddings must be an integer under {context_length}, got {original!r}"
            )
        parameters.setdefault("factor", context_length / original)
        _check_greater_than_1("factor", parameters["factor"])
    _check_greater_than_1("rope_theta", parameters["rope_theta"])
    return parameters


def _check_greater_than_1(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 < value < math.inf:
        raise ValueError(f"{name} must be a number greater than 1, got {value!r}")


def _completed(parameters: dict[str, Any], text: Any, own: dict[str, Any]) -> dict[str, Any]:
    """With what is none of the scaling's own, such as rope_theta and partial_rotary_factor, as the model has it."""
    if parameters["rope_type"] in _WITH_ORIGINAL_LENGTH:
        original = own.get("original_max_position_embeddings", text.max_position_embeddings)
        parameters = {"original_max_position_embeddings": original} | parameters
    return {name: value for name, value in own.items() if name not in _OF_SCALING} | parameters


def _validate(text: Any) -> None:
    """Let Transformers check rope_parameters; most of what it finds it only logs."""
    with _warnings_of("transformers.modeling_rope_utils") as warnings:
        try:
            text.validate_rope()
        except (KeyError, TypeError) as error:
            found = warnings[0] if warnings else one_line(error).strip("\"'")
            raise ValueError(f"Transformers {transformers.__version__} refuses rope_parameters: {found}") from error
    # A factor that is not the ratio of the lengths is somebody's choice; some versions do not know the rope_theta that
    # they put there themselves.
    harmless = re.compile(r"The explicitly set RoPE scaling factor|Unrecognized keys .*: \{'rope_theta'\}$")
    if refused := [warning for warning in warnings if not harmless.match(warning)]:
        raise ValueError(refused[0])


@contextmanager
def _warnings_of(name: str) -> Iterator[list[str]]:
    """Collect what a logger warns of in this block, instead of having it told."""
    logger, messages = logging.getLogger(name), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _check_that_the_family_follows(config: Any, rope_type: str) -> None:
    """Some families of models compute their rotary embeddings without a look at rope_type."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kinds = [module.rope_type for _, _, module in _rotary_modules(model)]
    if rope_type not in [kind.get("full_attention") if isinstance(kind, dict) else kind for kind in kinds]:
        raise ValueError(f"{type(model).__name__} of this version of Transformers does not scale rotary embeddings")


def _rotary_modules(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The text model's modules of rotary embeddings, each with the module that holds it and its name there."""
    of_text = type(text_config(model.config))
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "rope_type") and isinstance(getattr(child, "config", None), of_text)
    ]


class FirstLoss(NamedTuple):
    """The loss of a row before training, in nats a token.

    Args:
        trained: within the trained length, with the rotary embeddings that the model was trained with.
        scaled: of the same tokens with the scaled ones.
        beyond: of the tokens past the trained length with the scaled ones; None if there are none.
        trained_length: in tokens.
    """

    trained: float
    scaled: float
    beyond: float | None
    trained_length: int

    def problem(self) -> str | None:
        """The line to tell of a loss that training should not start from; None if there is nothing to tell."""
        without = f"{self.trained:.2f} without scaling"
        if not self.scaled <= self.trained + SAME_TEXT_MARGIN:
            return (
                f"before training the loss within {self.trained_length} tokens is {self.scaled:.2f} with the scaled "
                f"rotary embeddings, {without}: the scaling changes short distances, as linear does, or its factor is "
                "too large; theta, llama3 and yarn change less"
            )
        if self.beyond is not None and not self.beyond <= self.trained + OTHER_TEXT_MARGIN:
            return (
                f"before training the loss beyond {self.trained_length} tokens is {self.beyond:.2f}, within them "
                f"{without}: the scaling does not reach that far, its factor or rope_theta is too small"
            )
        return None


@torch.no_grad()
def check_first_loss(model: PreTrainedModel, row: Mapping[str, Sequence[int]], unscaled: Any) -> FirstLoss:
    """Compare a row's loss with the one that the same weights have with the rotary embeddings of before scaling.

    Two forwards of a row, one of them no longer than the trained length.

    Args:
        model: loaded with a config from `extend_context`; it is left as it was.
        row: of `hf_sparse_attn.data.packed` or `windowed`.
        unscaled: the config that was given to `extend_context`.
    """
    trained_length = longest_context(text_config(unscaled))
    assert trained_length is not None
    with evaluating(model):
        losses, positions = row_losses(model, row)
        with _rotary_of(model, text_config(unscaled)):
            before, short = row_losses(model, {name: values[:trained_length] for name, values in row.items()})
    inside = losses[: len(before)]
    beyond = losses[positions >= trained_length]
    return FirstLoss(
        before[short >= 0].mean().item(),
        inside[short >= 0].mean().item(),
        beyond.mean().item() if len(beyond) else None,
        trained_length,
    )


@contextmanager
def _rotary_of(model: PreTrainedModel, text: Any) -> Iterator[None]:
    """In this block the rotary embeddings are those of another config."""
    found = _rotary_modules(model)
    try:
        for parent, name, module in found:
            device = next(module.buffers()).device
            setattr(parent, name, type(module)(config=text).to(device))
        yield
    finally:
        for parent, name, module in found:
            setattr(parent, name, module)
