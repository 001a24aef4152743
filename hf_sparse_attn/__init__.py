"""Sparse window + global + LSH attention for Hugging Face Transformers.

Importing this package registers `attn_implementation="sparse"`; nothing else is changed.
"""

from hf_sparse_attn.cache import SparseCache
from hf_sparse_attn.config import SparseAttentionConfig
from hf_sparse_attn.integration import check_model, configure, record_density, register
from hf_sparse_attn.moved import install as _install_moved_modules
from hf_sparse_attn.ops import sparse_attention

__version__ = "0.1.0"
__all__ = ["SparseAttentionConfig", "SparseCache", "check_model", "configure", "record_density", "sparse_attention"]

_install_moved_modules()
register()
