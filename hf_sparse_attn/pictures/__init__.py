"""Which keys rows see in a document that is read, where the attention mass went, and a page that shows it."""

from hf_sparse_attn.pictures.read_rows import KINDS, LayerMass, RowKeys, RowReader
from hf_sparse_attn.pictures.readable_tokens import Token, readable_tokens

__all__ = ["KINDS", "LayerMass", "RowKeys", "RowReader", "Token", "readable_tokens"]
