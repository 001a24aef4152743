"""Sparse window + global + LSH attention for Hugging Face Transformers.

Importing this package registers `attn_implementation="sparse"`; nothing else is changed.
"""

from typing import TYPE_CHECKING
from typing import Any as _Any

from hf_sparse_attn.cache import SparseCache, SparseStaticCache
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.global_tokens import mark_global_tokens
from hf_sparse_attn.integration import check_model, configure, record_density, register
from hf_sparse_attn.moved import install as _install_moved_modules
from hf_sparse_attn.operation import SparseIndex, apply_index, build_index, sparse_attention
from hf_sparse_attn.statistics import AttentionStatistics
from hf_sparse_attn.tensor_parallel import split_heads

if TYPE_CHECKING:
    from hf_sparse_attn.cache.policies import (
        AdaptiveBudget,
        HeavyHitters,
        KeyNorm,
        Recency,
        Recent,
        Sinks,
        UniformBudget,
    )
    from hf_sparse_attn.commands import convert, evaluate_perplexity, load_model, plot_pattern
    from hf_sparse_attn.decoding_graph import DecodingGraph
    from hf_sparse_attn.module import SparseAttention
    from hf_sparse_attn.training import FinetuneArguments, finetune

__version__ = "0.1.0"
__all__ = [
    "AdaptiveBudget",
    "AttentionStatistics",
    "DecodingGraph",
    "FinetuneArguments",
    "HeavyHitters",
    "KeyNorm",
    "Recency",
    "Recent",
    "Sinks",
    "SparseAttention",
    "SparseAttentionConfig",
    "SparseCache",
    "SparseIndex",
    "SparseStaticCache",
    "UniformBudget",
    "apply_index",
    "build_index",
    "check_model",
    "configure",
    "convert",
    "evaluate_perplexity",
    "finetune",
    "load_model",
    "mark_global_tokens",
    "plot_pattern",
    "record_density",
    "sparse_attention",
    "split_heads",
]

# Loaded when they are first asked for, so that importing stays fast.
_MODULES = {
    "commands": ("convert", "evaluate_perplexity", "load_model", "plot_pattern"),
    "decoding_graph": ("DecodingGraph",),
    "module": ("SparseAttention",),
    "training": ("FinetuneArguments", "finetune"),
    "cache.policies": ("AdaptiveBudget", "HeavyHitters", "KeyNorm", "Recency", "Recent", "Sinks", "UniformBudget"),
}


def __getattr__(name: str) -> _Any:
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"hf_sparse_attn.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_install_moved_modules()
register()
