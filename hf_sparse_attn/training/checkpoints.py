"""The checkpoints that a training leaves: which there are, which are whole, and which are of the model at hand."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from hf_sparse_attn.config import text_config
from hf_sparse_attn.loading import read_config

if TYPE_CHECKING:
    from hf_sparse_attn.training.arguments import FinetuneArguments

# What makes a checkpoint one of another model.
_SHAPE = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "rope_parameters",
)
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER_PREFIX, _LORA_INPUT = "base_model.model.", ".lora_A.weight"  # of the names of an adapter's weights


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints that Trainer left in a directory, the newest first."""
    folders = [folder for folder in output.glob("checkpoint-*") if folder.is_dir()]
    numbered = {int(number): folder for folder in folders if (number := folder.name.partition("-")[2]).isdecimal()}
    return [numbered[step] for step in sorted(numbered, reverse=True)]


def damage(checkpoint: Path) -> str | None:
    """Why no training can go on from a checkpoint, such as one that was half written; None if its files are whole."""
    try:
        if not isinstance(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")), dict):
            return "its trainer_state.json is damaged"
        for index in checkpoint.glob("*.index.json"):
            for shard in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
                (checkpoint / shard).stat()
        if (checkpoint / _ADAPTER_CONFIG).exists():
            json.loads((checkpoint / _ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"]
            (checkpoint / _ADAPTER_WEIGHTS).stat()
    except FileNotFoundError as error:  # Trainer writes trainer_state.json last
        return f"it has no {Path(str(error.filename)).name}"
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return "its JSON files are damaged"
    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):  # compares the header with the length of the file
                    pass
            elif file.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(file).close()  # what torch.save writes; its table stands at the end
        except (OSError, SafetensorError, zipfile.BadZipFile):
            return f"its {file.name} is damaged"
    return None


def check_resumable(checkpoint: Path, model: PreTrainedModel, arguments: FinetuneArguments | None = None) -> None:
    """Make sure that a checkpoint without damage has the weights of such a model, or an adapter for it.

    Args:
        model: without an adapter.
        arguments: say whether LoRA is trained.

    Raises:
        ValueError: it has none, or those of a model of another shape, or is of LoRA where the arguments are not.
    """
    weights = [file for pattern in ("*.safetensors", "*.bin", "*/*") for file in checkpoint.glob(pattern)]
    if {file.name for file in weights} <= {"training_args.bin"}:
        raise ValueError(f"{str(checkpoint)!r} holds no weights")
    if (checkpoint / _ADAPTER_CONFIG).is_file():
        _check_adapter(checkpoint, model, arguments)
        return
    if arguments is not None and arguments.lora_rank is not None:
        raise ValueError(f"{str(checkpoint)!r} holds a whole model, not LoRA of rank {arguments.lora_rank}")
    if not (checkpoint / "config.json").is_file():
        return
    theirs, own = (text_config(config) for config in (read_config(str(checkpoint)), model.config))
    for name in _SHAPE:
        if getattr(theirs, name, None) != getattr(own, name, None):
            values = f"{name} is {getattr(theirs, name, None)}, not {getattr(own, name, None)}"
            raise ValueError(f"{str(checkpoint)!r} is of another model: its {values}")


def _check_adapter(checkpoint: Path, model: PreTrainedModel, arguments: FinetuneArguments | None) -> None:
    config = json.loads((checkpoint / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
    found = {"lora_rank": config["r"], "lora_alpha": config.get("lora_alpha")}
    found["lora_train_embeddings_and_norms"] = bool(config.get("modules_to_save"))
    for name, value in found.items():
        wanted = None if arguments is None else getattr(arguments, name)
        if wanted != value:
            raise ValueError(f"{str(checkpoint)!r} is of a training with {name} {value}, not {wanted}")
    layers = dict(model.named_modules())
    with safe_open(checkpoint / _ADAPTER_WEIGHTS, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118 (it is no dictionary)
            if key.endswith(_LORA_INPUT):
                name = key.removeprefix(_ADAPTER_PREFIX).removesuffix(_LORA_INPUT)
                size = weights.get_slice(key).get_shape()[1]
                if getattr(layers.get(name), "in_features", None) != size:
                    raise ValueError(f"{str(checkpoint)!r} is of another model: its {name} has {size} inputs")
