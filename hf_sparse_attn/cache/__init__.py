"""The KV cache that makes decoding sparse, and the policies that keep it small."""

from hf_sparse_attn.cache.layers import EvictingLayer, SparseLayer, layer_bytes
from hf_sparse_attn.cache.sparse_cache import SparseCache, _Memory
from hf_sparse_attn.cache.static import SparseStaticCache

__all__ = ["EvictingLayer", "SparseCache", "SparseLayer", "SparseStaticCache", "_Memory", "layer_bytes"]
