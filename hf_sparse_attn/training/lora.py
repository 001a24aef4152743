"""LoRA with PEFT: adapters beside frozen linear layers, with embeddings and norms trained in full.

LongLoRA (arXiv:2309.12307, section 3.3) found that for longer contexts LoRA comes near full fine-tuning only where
embeddings and norms are trained, too; PEFT keeps copies of these (`modules_to_save`), tied ones tied.

What is trained is float32: a bfloat16 norm of about 1 would lose every update of less than 0.004. The forward of a
model of half precision then runs with autocast (`autocast_dtype`), and its hidden states stay in half precision.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from hf_sparse_attn.training.arguments import FinetuneArguments

_TIED_NAMES = ("embed_tokens", "lm_head")  # by which PEFT knows modules whose weights may be tied


def import_peft() -> Any:
    """The package peft.

    Raises:
        ImportError: it is not installed, or older than 0.18.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ImportError("LoRA needs peft: run `pip install peft`") from error
    if not hasattr(peft.LoraConfig, "ensure_weight_tying"):
        raise ImportError(f"LoRA needs peft 0.18 or newer, not {peft.__version__}: run `pip install -U peft`")
    return peft


def add_lora(model: PreTrainedModel, arguments: FinetuneArguments) -> Any:
    """A PeftModel around a model, which is changed: with LoRA beside all linear layers but the head.

    Args:
        arguments: `lora_rank`, `lora_alpha` and `lora_train_embeddings_and_norms` count.

    Raises:
        ImportError: see `import_peft`.
        ValueError: embeddings are tied to the head and PEFT does not know their name.
    """
    peft = import_peft()
    kept = _embeddings_and_norms(model) if arguments.lora_train_embeddings_and_norms else []
    tied = bool(kept) and _is_tied(model)
    if tied and kept[0] not in _TIED_NAMES:
        raise ValueError(f"PEFT cannot train {kept[0]}, which is tied to the head: train neither embeddings nor norms")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        target_modules="all-linear",
        modules_to_save=kept or None,
        ensure_weight_tying=tied,
    )
    dtype = model.dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about names of Transformers and about experts, which get no LoRA
        adapted = peft.get_peft_model(model, config)
    if dtype.itemsize < torch.float32.itemsize:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if kept:  # on PEFT's wrapper, with which it goes
            model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.to(dtype))
    return adapted


def merge_lora(adapted: Any) -> PreTrainedModel:
    """The model that `add_lora` was given, in its own dtype, with all that was trained in its weights."""
    dtype = autocast_dtype(adapted)
    model: PreTrainedModel = adapted.merge_and_unload()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    return model


def autocast_dtype(model: nn.Module) -> torch.dtype | None:
    """The half precision of a model's frozen weights, if what is trained of it is float32."""
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    half = frozen & {torch.bfloat16, torch.float16}
    return half.pop() if half and torch.float32 in trained else None


def _embeddings_and_norms(model: PreTrainedModel) -> list[str]:
    """The last parts of their names, the embeddings' first."""
    embeddings = model.get_input_embeddings()
    found = [name for name, module in model.named_modules() if module is embeddings]
    found += [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in found))


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
