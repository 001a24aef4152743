"""The implementation for CPUs, compiled by Numba."""

from hf_sparse_attn.ops.backend import Backend
from hf_sparse_attn.ops.numba.chunks import HALF, Index, document_attention, find_keys

BACKEND = Backend(document_attention, find_keys=find_keys, index=Index, cached_dtypes=frozenset(HALF))
