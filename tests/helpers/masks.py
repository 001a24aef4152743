"""Masks and documents as plain lists."""

import torch

from hf_sparse_attn.masks.documents import documents


def mask(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def split(attention_mask=None, batch_size=1, q_length=1, kv_length=1, starts=None):
    """The documents with plain lists for indices."""
    return [
        (
            document.batch,
            torch.arange(q_length)[document.queries].tolist(),
            torch.arange(kv_length)[document.keys].tolist(),
            document.query_offset,
            document.key_offset,
        )
        for document in documents(attention_mask, batch_size, q_length, kv_length, starts)
    ]


def span(start, stop):
    return list(range(start, stop))
