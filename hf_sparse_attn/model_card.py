"""The model card of a converted checkpoint: the template filled with what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_sparse_attn.allocation import Allocation
from hf_sparse_attn.config import SparseAttentionConfig


def write_model_card(
    path: Path,
    template: Path,
    *,
    source: str,
    config: SparseAttentionConfig,
    budgets: dict[str, Any],
    trade: Sequence[Allocation],
    choice: Allocation,
    calibration: list[str],
    result: dict[str, Any] | None,
    environment: dict[str, Any],
) -> None:
    """Fill `template` (Jinja, Markdown) and write it to `path`.

    Args:
        source: the dense checkpoint that was converted.
        config: the fitted configuration.
        budgets: what `conversion.describe_budgets` returns.
        trade: choices at other densities.
        choice: what the configuration was chosen as.
        calibration: names of the calibration documents.
        result: what `perplexity.compare_perplexity` returns, or None if nothing was evaluated.
        environment: where it was measured.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparse-attention", "long-context", "hf_sparse_attn"],
        base_model=None if source == "demo" or Path(source).exists() else source,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        source="SmolLM2-135M-Instruct" if source == "demo" else Path(source).name if Path(source).exists() else source,
        config=config,
        budgets=budgets,
        trade=trade,
        choice=choice,
        calibration=calibration,
        result=result,
        environment=environment,
    )
    path.write_text(str(card) + "\n", encoding="utf-8")
