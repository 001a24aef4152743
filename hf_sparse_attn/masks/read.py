"""The one entry: what a call says of masks, packing and cached keys, as documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse_attn.masks.both_sides import read_mask
from hf_sparse_attn.masks.documents import Document, document_starts, documents
from hf_sparse_attn.masks.mask_4d import read_custom_mask
from hf_sparse_attn.masks.mask_function import reads_both_sides
from hf_sparse_attn.side_channels import DOCUMENTS

if TYPE_CHECKING:
    from hf_sparse_attn.attention import Inputs


def read_documents(
    inputs: Inputs, num_keys: int, sliding_window: int | None, is_causal: bool = True
) -> tuple[list[Document], int | None]:
    """The documents of a batch, and the sliding window that holds: the model's own, or None where a 4D mask reads on.

    Args:
        inputs: what Transformers passed to the call.
        num_keys: slots of the cache, or keys where there is none.
        sliding_window: the model's own window for this layer, or None; a mask of non-causal attention may say another.
        is_causal: whether rows read nothing after them.

    Raises:
        ValueError: for a mask that cannot be read.
    """
    mask, (batch_size, _, num_queries, _) = inputs.attention_mask, inputs.query.shape
    if reads_both_sides(mask):
        assert mask is not None
        sliding_window = int(mask[0, 0, 1, 0]) or sliding_window
    elif not is_causal and mask is not None and mask.dtype != torch.int32:
        if mask.shape[2:] in ((1, num_keys), (num_queries, num_keys)):
            mask, sliding_window = read_mask(mask.expand(batch_size, -1, -1, -1), sliding_window)
    elif mask is not None and mask.dtype != torch.int32 and mask.shape[2:] == (num_queries, num_keys):
        mask = mask.expand(batch_size, -1, -1, -1)
        mask, sliding_window = read_custom_mask(mask, inputs.position_ids, sliding_window)
    starts = document_starts(inputs.cu_seq_lens, inputs.seq_idx, num_queries)
    return _known(mask, batch_size, num_queries, num_keys, starts), sliding_window


def _known(
    mask: Tensor | None, batch_size: int, num_queries: int, num_keys: int, starts: Tensor | None
) -> list[Document]:
    """`documents`, read once for all layers of a forward, which are given the same mask."""
    given = batch_size, num_queries, num_keys
    known = getattr(mask, DOCUMENTS, None)
    if known is not None and starts is None and known[0] == given:
        found: list[Document] = known[1]
        return found
    found = documents(mask, batch_size, num_queries, num_keys, starts)
    if mask is not None and starts is None:
        setattr(mask, DOCUMENTS, (given, found))
    return found
