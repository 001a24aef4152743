"""What is asked of tensors before anything is computed: whether their values can be read, whether gradients flow."""

from __future__ import annotations

import torch
from torch import Tensor


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether a graph is being traced or one of the tensors has a shape alone: a fake one, or one on "meta"."""
    if torch.compiler.is_compiling():
        return True
    return any(x is not None and (x.is_meta or (type(x) is not Tensor and _is_fake(x))) for x in tensors)


def carries_gradients(*tensors: Tensor | None) -> bool:
    """Whether gradients with respect to one of the tensors are recorded."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _is_fake(x: Tensor) -> bool:
    from torch._subclasses.fake_tensor import is_fake

    return is_fake(x)


def refuse_transforms() -> None:
    """Refuse what would silently give another answer, or end in an error that does not say why.

    Raises:
        ValueError: under torch.jit.trace, which would keep one input's choice of keys, and under torch.func transforms.
    """
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise ValueError(
            'attn_implementation="sparse" does not support torch.jit.trace, which keeps the keys that one input '
            "chooses; use torch.export or torch.compile"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(
            'attn_implementation="sparse" does not support torch.func transforms (grad, vjp, jvp, vmap ...); '
            "use torch.autograd"
        )


def input_device(model: torch.nn.Module) -> torch.device:
    """The device that a model's inputs belong on, wherever accelerate keeps its weights meanwhile."""
    embeddings: torch.nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    hook = getattr(embeddings, "_hf_hook", None)
    for candidate in [hook, *getattr(hook, "hooks", [])]:
        device = getattr(candidate, "execution_device", None)
        if device is not None:
            return torch.device(device)
    device = next((parameter.device for parameter in embeddings.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device
