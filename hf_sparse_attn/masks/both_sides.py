"""4D masks of attention that is not causal, read back as `mask_4d` reads causal ones."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse_attn.masks.mask_4d import ROWS, admitted_pairs
from hf_sparse_attn.masks.mask_function import PADDED_QUERY
from hf_sparse_attn.masks.unsupported import unsupported


def read_mask(mask: Tensor, sliding_window: int | None) -> tuple[Tensor, int | None]:
    """What a 4D mask of non-causal attention says: which tokens are padding, and where documents start.

    Args:
        mask: [batch, 1, 1 or tokens, tokens], bool (True: may attend) or float to be added to the scores (0: may
            attend, -10000 or less: may not).
        sliding_window: the model's own window for this layer.

    Returns:
        the mask as `masking.signed_positions` writes it, and the window that holds: the model's own, or None where the
        mask lets rows read beyond it.

    Raises:
        ValueError: for a mask that is not attention to all tokens of a document, or to those inside of the window.
    """
    admitted = admitted_pairs(mask)[:, 0]
    if admitted.shape[1] == 1:
        positions = admitted[:, 0].cumsum(-1, dtype=torch.int32)
        return _signed(admitted[:, 0], positions)[:, None, None], sliding_window
    is_token = admitted.diagonal(dim1=1, dim2=2)
    rows = [_read_row(*row) for row in zip(admitted, is_token, strict=True)]
    for window in dict.fromkeys((sliding_window, None)):
        if all(_describes(*row, window) for row in zip(admitted, is_token, rows, strict=True)):
            positions = torch.stack([position for _, position in rows])
            return _signed(is_token, positions)[:, None, None], window
    raise unsupported("a 4D attention_mask other than attention to whole documents, or inside of the model's window")


def _signed(is_token: Tensor, position: Tensor) -> Tensor:
    return torch.where(is_token, -position, PADDED_QUERY).int()


def _read_row(admitted: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
    """The simplest reading of [tokens, tokens], yet to be checked: each token's document and its position there, from 1
    on."""
    index = torch.nonzero(is_token).flatten()
    goes_on = admitted[index[1:], index[:-1]]  # a token that reads the one before it
    starts = torch.zeros_like(is_token, dtype=torch.int32)
    starts[index[1:]] = (~goes_on).int()
    rank = is_token.cumsum(0, dtype=torch.int32)
    return starts.cumsum(0), rank - torch.where(starts > 0, rank - 1, 0).cummax(0).values


def _describes(admitted: Tensor, is_token: Tensor, read: tuple[Tensor, Tensor], window: int | None) -> bool:
    """Whether the rows that are no padding admit just the keys that the reading gives them."""
    document, position = read
    for some in torch.nonzero(is_token).flatten().split(ROWS):
        expected = is_token & (document[some, None] == document)
        if window is not None:
            expected &= (position[some, None] - position).abs() < window
        if not torch.equal(expected, admitted[some]):
            return False
    return True
