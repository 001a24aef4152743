"""The model card of a converted checkpoint: the template filled with what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse_attn.config import SparseAttentionConfig

if TYPE_CHECKING:
    from hf_sparse_attn.calibration.convert import Conversion

TEMPLATE = Path(__file__).with_name("template.md")
_HUB_ID = r"[\w.-]+(/[\w.-]+)?"


def write_model_card(
    path: Path,
    *,
    source: str,
    conversion: Conversion,
    calibration: list[str],
    environment: dict[str, Any],
    remote_code: bool = False,
) -> None:
    """Fill the template (Jinja, Markdown) and write it to `path`; texts, such as names of documents, stay mere text.

    Args:
        source: the dense checkpoint that was converted.
        conversion: what it gave.
        calibration: names of the calibration documents.
        environment: where it was measured.
        remote_code: whether the directory holds the file of `remote_code.write_remote_code`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    directory = Path(source).expanduser()
    is_local = directory.exists() and source != "demo"
    name = "SmolLM2-135M-Instruct" if source == "demo" else directory.resolve().name if is_local else source
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparse-attention", "long-context", "hf_sparse_attn"],
        base_model=source if not is_local and source != "demo" and re.fullmatch(_HUB_ID, source) else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        config=conversion.config,
        budgets=describe_budgets(conversion.config),
        local_layers=conversion.local_layers,
        dense_layers=[layer for layer in conversion.config.dense_layers if layer not in conversion.local_layers],
        trade=conversion.trade,
        choice=conversion.choice,
        loss_factor=conversion.loss_factor,
        refit=conversion.refit,
        remote_code=remote_code,
        **escaped(
            {
                "source": name,
                "calibration": calibration,
                "result": conversion.evaluation,
                "environment": environment,
            }
        ),
    )
    path.write_text(str(card) + "\n", encoding="utf-8", errors="backslashreplace")


def describe_budgets(config: SparseAttentionConfig) -> dict[str, Any]:
    """Mean, smallest and largest number of candidates of a row of a converted model's sparse layers, JSON-ready."""
    layers = config.key_budget if isinstance(config.key_budget, tuple) else (config.key_budget,)
    budgets = [
        budget
        for i, layer in enumerate(layers)
        if i not in config.dense_layers
        for budget in (layer if isinstance(layer, tuple) else (layer,))
    ] or [0]
    return {"mean": sum(budgets) / len(budgets), "min": min(budgets), "max": max(budgets)}


def escaped(value: Any) -> Any:
    """All texts among JSON-ready values as Markdown that shows them: in one line, without markup, links or HTML."""
    if isinstance(value, dict):
        return {name: escaped(item) for name, item in value.items()}
    if isinstance(value, list):
        return [escaped(item) for item in value]
    if not isinstance(value, str):
        return value
    line = " ".join("".join(c if c.isprintable() else " " for c in value).split())
    for special, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        line = line.replace(special, entity)
    return re.sub(r"([\\`*_{}\[\]()|~$])", r"\\\1", line)
