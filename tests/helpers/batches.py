"""Token ids, alone and in batches."""

import torch

from helpers.families import VOCABULARY


def tokens(length, batch_size=1, seed=0):
    return torch.randint(1, VOCABULARY, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def padded_batch(rows, side, extra):
    """Rows of unequal length in one batch, `extra` columns wider than the longest; ids, mask and position_ids.

    side: "left", "right", or "mixed": every row starts somewhere else, with padding on both sides.
    """
    width = max(len(row) for row in rows) + extra
    ids = torch.full((len(rows), width), 3)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        padding = width - len(row)
        start = {"left": padding, "right": 0, "mixed": padding * (i + 1) // (len(rows) + 1)}[side]
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def packed_documents(lengths=(21, 1, 38)):
    """Documents to be packed into one row, and the position_ids [1, tokens] that tell them apart."""
    rows = [tokens(length, seed=length)[0] for length in lengths]
    return rows, torch.cat([torch.arange(length) for length in lengths])[None]
