"""The file of a few lines by which a converted checkpoint loads with sparse attention where this package is installed.

Transformers runs it for `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` alone; `auto_map` of the
checkpoint's config.json names it, and a model that was loaded by it brings it along where it is saved.
"""

from __future__ import annotations

import json
from pathlib import Path
from string import Template

from transformers import PreTrainedModel

from hf_sparse_attn.errors import ArgumentError

MODULE = "modeling_sparse_attention"
_AUTO_CLASS = "AutoModelForCausalLM"
_CODE = Template('''\
"""$model_class with sparse attention, where the package hf_sparse_attn is installed; without it, as it always is."""

import warnings

from transformers import $model_class as DenseModel

try:
    from hf_sparse_attn import mark_global_tokens
except ImportError as error:
    mark_global_tokens, missing = None, error


class $model_class(DenseModel):
    _auto_class = "AutoModelForCausalLM"  # save_pretrained brings this file along

    def __init__(self, config, *args, **kwargs):
        asked = config.get_text_config()._attn_implementation
        if mark_global_tokens is None:
            told = f"for its sparse attention this checkpoint needs `pip install hf_sparse_attn` ({missing})"
            if asked == "sparse":
                raise ImportError(told)
            warnings.warn(f"{told}; until then it is a dense model", stacklevel=2)
        elif asked is None:
            config._attn_implementation = "sparse"
        super().__init__(config, *args, **kwargs)
        if mark_global_tokens is not None:
            mark_global_tokens(self)
''')


def name_remote_code(model: PreTrainedModel) -> None:
    """Have a model's config name the file that `write_remote_code` writes.

    Raises:
        ArgumentError: for "remote_code": the model's class is none of Transformers' own.
    """
    model_class = type(model)
    if model_class.__module__.partition(".")[0] != "transformers":
        raise ArgumentError("remote_code", f"{model_class.__name__} is no class of Transformers that a file can import")
    model.config.auto_map = {_AUTO_CLASS: f"{MODULE}.{model_class.__name__}"}


def names_remote_code(config: object) -> bool:
    """Whether a config names the file that `write_remote_code` writes."""
    return _model_class(getattr(config, "auto_map", None)) is not None


def write_remote_code(directory: Path) -> None:
    """Write the file into a checkpoint's directory, if its config.json names it."""
    file = directory / "config.json"
    named = json.loads(file.read_text(encoding="utf-8")).get("auto_map") if file.is_file() else None
    model_class = _model_class(named)
    if model_class is not None:
        code = _CODE.substitute(model_class=model_class)
        (directory / f"{MODULE}.py").write_text(code, encoding="utf-8")


def _model_class(auto_map: object) -> str | None:
    """The class that an `auto_map` takes from the file, if it does."""
    reference = auto_map.get(_AUTO_CLASS) if isinstance(auto_map, dict) else None
    module, _, name = str(reference or "").rpartition("--")[2].partition(".")  # "repo--module.class" for the Hub's
    return name if module == MODULE and name.isidentifier() else None
