"""Whether a forward leaves its choice of buckets for the backward."""

import torch


def keeps_choice(num_buckets: int, row_width: int, dtype: torch.dtype) -> bool:
    """Whether a bit for each bucket takes at most half the room of a row's queries, `row_width` numbers in `dtype`."""
    return num_buckets // 8 <= row_width * dtype.itemsize // 2
