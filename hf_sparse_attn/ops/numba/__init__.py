"""The implementation for CPUs, compiled by Numba."""

from hf_sparse_attn.ops.backend import Backend
from hf_sparse_attn.ops.numba.attention import document_attention
from hf_sparse_attn.ops.numba.chunks import find_keys
from hf_sparse_attn.ops.numba.index import Index

BACKEND = Backend(document_attention, find_keys=find_keys, index=Index, keeps_half=True, dense_rows=True)
