"""The operation and its implementations, which never import each other."""

from hf_sparse_attn.ops.api import document_attention, find_candidates, find_keys, has_fixed_steps, new_index
from hf_sparse_attn.ops.backend import FixedStepIndex, Index, compute_dtype
from hf_sparse_attn.ops.common.call import AttentionCall, Chooser
from hf_sparse_attn.ops.dispatch import check_implementation, computes_dense_rows

__all__ = [
    "AttentionCall",
    "Chooser",
    "FixedStepIndex",
    "Index",
    "check_implementation",
    "compute_dtype",
    "computes_dense_rows",
    "document_attention",
    "find_candidates",
    "find_keys",
    "has_fixed_steps",
    "new_index",
]
