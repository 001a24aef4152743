"""Long documents: where they come from, their tokens, and the rows that fine-tuning reads."""

from hf_sparse_attn.data.documents import load_documents, long_documents, stream_documents, tokenize
from hf_sparse_attn.data.mixtures import Mixture, mixed, parse_mixture
from hf_sparse_attn.data.packing import IGNORED_LABEL
from hf_sparse_attn.data.rows import best_fit, packed, windowed
from hf_sparse_attn.data.streams import StreamedRows

__all__ = [
    "IGNORED_LABEL",
    "Mixture",
    "StreamedRows",
    "best_fit",
    "load_documents",
    "long_documents",
    "mixed",
    "packed",
    "parse_mixture",
    "stream_documents",
    "tokenize",
    "windowed",
]
