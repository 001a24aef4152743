"""The implementation for GPUs, in Triton kernels."""

from hf_sparse_attn.ops.backend import Backend
from hf_sparse_attn.ops.triton.chunks import document_attention, find_keys
from hf_sparse_attn.ops.triton.index import Index

BACKEND = Backend(document_attention, find_keys=find_keys, index=Index, keeps_half=True, needs_check=True)
