"""The KV cache that makes decoding sparse, and the policies that keep it small."""

from hf_sparse_attn.cache.sparse_cache import EvictingLayer, SparseCache, SparseLayer, _Memory, layer_bytes

__all__ = ["EvictingLayer", "SparseCache", "SparseLayer", "_Memory", "layer_bytes"]
