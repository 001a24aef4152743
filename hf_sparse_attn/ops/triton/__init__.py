"""The implementation for GPUs, in Triton kernels."""

from hf_sparse_attn.ops.triton.chunks import KEEPS_HALF, document_attention, find_keys
from hf_sparse_attn.ops.triton.index import Index

__all__ = ["KEEPS_HALF", "Index", "document_attention", "find_keys"]
