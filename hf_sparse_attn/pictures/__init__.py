"""Which keys rows see in a document that is read, where the attention mass went, and a page that shows it."""

from hf_sparse_attn.pictures.page import MOST_BYTES, PageDocument, render_page, write_page
from hf_sparse_attn.pictures.read_rows import KINDS, LayerMass, RowKeys, RowReader, spread_rows
from hf_sparse_attn.pictures.readable_tokens import Token, readable_tokens

__all__ = [
    "KINDS",
    "MOST_BYTES",
    "LayerMass",
    "PageDocument",
    "RowKeys",
    "RowReader",
    "Token",
    "readable_tokens",
    "render_page",
    "spread_rows",
    "write_page",
]
