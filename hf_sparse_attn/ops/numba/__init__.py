"""The implementation for CPUs, compiled by Numba."""

from hf_sparse_attn.ops.numba.chunks import HALF, Index, document_attention, find_keys

__all__ = ["HALF", "Index", "document_attention", "find_keys"]
