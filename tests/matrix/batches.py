"""Paths of several documents in one forward: padding and packing."""

import torch
from helpers.batches import packed_documents
from helpers.checks import check_packed, check_padding, check_position_ids
from helpers.families import tiny_model
from helpers.specification import assert_each_specified, assert_specified, logits
from transformers import DataCollatorWithFlattening


def left_padding(family):
    """Rows of several lengths, padded on the left to several widths, with position_ids that count padding or not."""
    check_widths(family, "left")


def right_padding(family):
    """The same with padding on the right."""
    check_widths(family, "right")


def mixed_padding(family):
    """The same with padding on both sides, of another width in each row."""
    check_widths(family, "mixed")


def check_widths(family, side):
    for extra in (0, 3, 17):
        check_padding(family, side, extra)


def packed_by_collator(family):
    """Batches of `DataCollatorWithFlattening`, with and without its `cu_seq_lens_q` and its `seq_idx`."""
    rows, _ = packed_documents()
    features = [{"input_ids": row.tolist()} for row in rows]
    for extras in ({}, {"return_flash_attn_kwargs": True}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}):
        batch = DataCollatorWithFlattening(**extras)(features)
        del batch["labels"]
        assert_each_specified(logits(tiny_model(family), batch.pop("input_ids"), **batch), family, rows)


def packed_by_lengths(family):
    """Documents told apart by `cu_seq_lens_q` alone; position_ids count on through the row."""
    check_packed_without_position_ids(family, cu_seq_lens_q=torch.tensor([0, 21, 22, 60], dtype=torch.int32))


def packed_by_seq_idx(family):
    """Documents told apart by `seq_idx` alone; position_ids count on through the row."""
    check_packed_without_position_ids(family, seq_idx=torch.tensor([[0] * 21 + [1] + [2] * 38], dtype=torch.int32))


def check_packed_without_position_ids(family, **inputs):
    rows, _ = packed_documents()
    ids = torch.cat(rows)[None]
    together = logits(tiny_model(family), ids, **inputs)[0]
    columns = torch.arange(ids.shape[1])
    lengths = [len(row) for row in rows]
    for part, row, position_ids in zip(together.split(lengths), rows, columns.split(lengths), strict=True):
        assert_specified(part, family, row, position_ids)


PATHS = {
    "left padding": left_padding,
    "right padding": right_padding,
    "mixed padding": mixed_padding,
    "packed by position_ids": check_packed,
    "position_ids that restart under a mask or cache": check_position_ids,
    "packed by a collator": packed_by_collator,
    "packed by cu_seq_lens": packed_by_lengths,
    "packed by seq_idx": packed_by_seq_idx,
}
