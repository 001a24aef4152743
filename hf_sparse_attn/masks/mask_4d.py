"""A caller's own 4D mask, read back into the description that this plugin works with.

Transformers passes a 4D mask on as it is. One that describes causal attention inside documents, whatever the padding,
the packing or the cached keys, says which tokens are padding and where documents start, and that is all that is needed
here. Any other mask is refused, because positions in the pattern would mean nothing under it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse_attn.config import MAX_NUMBER
from hf_sparse_attn.masks.mask_function import PADDED_QUERY
from hf_sparse_attn.masks.unsupported import unsupported

_MASKED = -1e4  # an added bias under which exp() is 0 in float64 too
ROWS = 1024  # rows compared at a time


def read_custom_mask(
    mask: Tensor, position_ids: Tensor | None, sliding_window: int | None
) -> tuple[Tensor, int | None]:
    """What a 4D mask says.

    Args:
        mask: [batch, 1, Q, KV], bool (True: may attend) or float to be added to the scores (0: may attend, -10000 or
            less: may not).
        position_ids: [1 or batch, Q], or None; tells how many keys a sliding cache has dropped.
        sliding_window: the model's own window for this layer.

    Returns:
        the mask as `masking.signed_positions` writes it, and the window that holds: the model's own, or None where the
        mask lets rows read beyond it.

    Raises:
        ValueError: for a mask that is not causal attention inside documents.
    """
    admitted = admitted_pairs(mask)
    last = torch.stack([_last_admitted(row_mask) for row_mask in admitted[:, 0]])
    offset = _offset(last, mask.shape[3])
    is_token = last == torch.arange(mask.shape[2], device=mask.device) + offset
    rows = []
    for batch, row_mask in enumerate(admitted[:, 0]):
        ids = None if position_ids is None else position_ids[batch % len(position_ids)]
        rows.append(_read_row(row_mask, is_token[batch], offset, ids, sliding_window))
    for window in dict.fromkeys((sliding_window, None)):
        described = all(_describes(row_mask, *row, window) for row_mask, row in zip(admitted[:, 0], rows, strict=True))
        if described and bool(is_token.any() or not admitted.any()):  # else rows read keys, but none its own
            return torch.stack([_by_document(*row) for row in rows])[:, None, None], window
    raise unsupported("a 4D attention_mask other than causal attention inside documents")


def admitted_pairs(mask: Tensor) -> Tensor:
    """Which pairs a 4D mask admits: [batch, 1, Q, KV], bool.

    Raises:
        ValueError: for a mask that adds biases or differs by head.
    """
    if mask.dtype == torch.bool:
        admitted = mask
    elif mask.is_floating_point():
        admitted = mask == 0
        if bool((~admitted & ~(mask <= _MASKED)).any()):
            raise unsupported("a 4D attention_mask that adds biases other than 0 and -10000 or less")
    else:
        raise unsupported(f"a 4D attention_mask of dtype {mask.dtype}")
    if mask.shape[1] != 1:
        raise unsupported(f"a 4D attention_mask that differs by head (shape {tuple(mask.shape)})")
    return admitted


def _last_admitted(admitted: Tensor) -> Tensor:
    """The last slot that each row of [Q, KV] reads; -1: none."""
    last = admitted.shape[1] - 1 - admitted.flip(-1).to(torch.uint8).argmax(-1)
    return torch.where(admitted.any(-1), last, -1)


def _offset(last: Tensor, num_keys: int) -> int:
    """How far slots are ahead of rows, from the last slot [batch, Q] that each row reads.

    A token reads itself last. A row of padding reads nothing, or what came before it, or (some masks open such rows,
    so that no softmax gives NaN) every slot.
    """
    num_queries = last.shape[1]
    ahead = last - torch.arange(num_queries, device=last.device)
    opened = last == num_keys - 1
    opened[:, -1] = False
    ahead = ahead[(last >= 0) & ~opened & (ahead >= 0) & (ahead <= num_keys - num_queries)]
    return int(ahead.max()) if len(ahead) else num_keys - num_queries


def _read_row(
    admitted: Tensor, is_token: Tensor, offset: int, position_ids: Tensor | None, sliding_window: int | None
) -> tuple[Tensor, Tensor]:
    """The simplest reading of [Q, KV], yet to be checked: signed positions [KV] that count on through the batch row,
    and the position of each query in its document [Q].

    Args:
        is_token: [Q], False for padding.
    """
    num_queries, num_keys = admitted.shape
    present = admitted[is_token].any(0)
    rank = present.cumsum(0, dtype=torch.int32)
    slot = torch.arange(num_keys, device=admitted.device)
    is_query = (slot >= offset) & (slot < offset + num_queries)
    position = torch.zeros(num_queries, dtype=torch.long, device=admitted.device)
    index = torch.nonzero(is_token).flatten()
    if len(index):
        first = int(admitted[index[0]].sum()) - 1
        if first + 1 == sliding_window and position_ids is not None:  # older keys do not show
            first = max(first, min(int(position_ids[index[0]]), MAX_NUMBER))
            rank = rank + max(first + 1 - int(rank[index[0] + offset]), 0)
        step = torch.arange(len(index), device=admitted.device)
        goes_on = admitted[index[1:], index[:-1] + offset]  # a row that reads the token before it
        begun = torch.nn.functional.pad(torch.where(goes_on, 0, step[1:]), (1, 0)).cummax(-1).values
        position[index] = step - begun + torch.where(begun == 0, first, 0)
    signed = torch.where(present, torch.where(is_query, -rank, rank), torch.where(is_query, PADDED_QUERY, 0))
    return signed.int(), position


def _by_document(signed: Tensor, position: Tensor) -> Tensor:
    """`signed` with each query's position in its document."""
    signed = signed.clone()
    rows = torch.nonzero(signed < 0).flatten()
    is_token = signed[rows] != PADDED_QUERY
    signed[rows[is_token]] = -(position[is_token].int() + 1)
    return signed


def _describes(admitted: Tensor, signed: Tensor, position: Tensor, window: int | None) -> bool:
    """Whether the rows that are no padding admit just the keys that the reading gives them."""
    queries = signed[signed < 0]
    row = torch.nonzero(queries != PADDED_QUERY).flatten()
    own = -queries[row]
    rank = signed.abs()
    present = (signed != 0) & (signed != PADDED_QUERY)
    for some, own_rank in zip(row.split(ROWS), own.split(ROWS), strict=True):
        older = own_rank[:, None] - rank
        expected = present & (older >= 0) & (older <= position[some, None])
        if window is not None:
            expected &= older < window
        if not torch.equal(expected, admitted[some]):
            return False
    return True
