"""Long documents: where they come from, their tokens, and the rows that fine-tuning reads."""

from hf_sparse_attn.data.documents import load_documents, long_documents, tokenize
from hf_sparse_attn.data.rows import IGNORED_LABEL, packed, windowed

__all__ = ["IGNORED_LABEL", "load_documents", "long_documents", "packed", "tokenize", "windowed"]
