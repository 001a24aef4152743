"""Rows that are made while documents are read or downloaded: nothing has to be there as a whole."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from hf_sparse_attn.data.documents import stream_documents, token_ids
from hf_sparse_attn.data.local_files import batches
from hf_sparse_attn.data.mixtures import Turns
from hf_sparse_attn.data.packing import IGNORED_LABEL, best_fit_rows, packed_rows, windowed_rows
from hf_sparse_attn.data.rows import COLUMNS, check_context_length
from hf_sparse_attn.errors import RunError, one_line

logger = logging.getLogger(__name__)

# So many tokens wait to be packed by best fit, and no fewer than so many rows.
BUFFER_TOKENS = 2**21
BUFFER_ROWS = 64


class StreamedRows(IterableDataset[dict[str, np.ndarray]]):
    """Rows for Trainer without end: a dataset that comes to its end begins again, with a warning.

    Rows are the same in each iteration, so that a training which resumes goes on where it stopped: Trainer reads
    past the rows that it has seen. They come in the order of the documents, which Trainer does not shuffle. Each of
    several loader workers reads all documents, and gives every so-many-th row.

    Args:
        datasets: see `load_documents`.
        split: of those that have splits.
        kind: "packed", "best-fit" or "windowed", as the functions of `hf_sparse_attn.data`; best fit is among
            `BUFFER_TOKENS` tokens or `BUFFER_ROWS` rows at a time, whichever is more.
        shares: of each dataset; see `mixed`. Needed for more than one dataset, as nobody knows how large they are.
        eos: see `tokenize`.
        pad_token_id: see `best_fit`.

    Yields:
        Dicts of "input_ids", "position_ids" and "labels", each [context_length] int64.

    Raises:
        ValueError: several datasets have no shares.
        RunError: while iterating: what is wrong with a dataset.
    """

    def __init__(
        self,
        datasets: Sequence[str],
        tokenizer: Any,
        context_length: int,
        kind: str = "best-fit",
        split: str = "train",
        shares: Sequence[float] | None = None,
        eos: bool = False,
        pad_token_id: int = 0,
    ) -> None:
        check_context_length(context_length)
        if shares is None and len(datasets) > 1:
            raise ValueError("several datasets that are streamed need shares, as nobody knows how large they are")
        self.datasets, self.split, self.shares = list(datasets), split, shares or [1.0]
        self._tokenizer, self._eos, self._pad_token_id = tokenizer, eos, pad_token_id
        self._context_length, self._kind = context_length, kind

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for row in islice(self._mixed(warns=first == 0), first, None, step):
            yield dict(zip(COLUMNS, row, strict=True))

    def first_rows(self, dataset: str, number: int) -> list[np.ndarray]:
        """The first rows of one of the datasets, each [3, context_length].

        Raises:
            ValueError, OSError: what is wrong with the dataset; it gives no row at all.
        """
        return list(islice(self._once(dataset), number))

    def _mixed(self, warns: bool) -> Iterator[np.ndarray]:
        turns, sources = Turns(self.shares), [self._endless(dataset, warns) for dataset in self.datasets]
        while True:
            turn = turns.next()
            row = next(sources[turn])
            turns.add(turn, int(np.count_nonzero(row[2] != IGNORED_LABEL)))
            yield row

    def _endless(self, dataset: str, warns: bool) -> Iterator[np.ndarray]:
        try:
            for epoch in count(1):
                if warns and epoch > 1:
                    logger.warning("dataset %r came to its end and begins again (time %d)", dataset, epoch)
                yield from self._once(dataset)
        except (ValueError, OSError) as error:
            raise RunError(one_line(error)) from error

    def _once(self, dataset: str) -> Iterator[np.ndarray]:
        rows = self._rows(dataset)
        first = next(rows, None)
        if first is None:
            lacks = "no document" if self._kind == "windowed" else "too few tokens"
            raise ValueError(f"dataset {dataset!r} has {lacks} for a row of {self._context_length} tokens")
        yield first
        yield from rows

    def _rows(self, dataset: str) -> Iterator[np.ndarray]:
        documents = self._documents(dataset)
        if self._kind == "windowed":
            return windowed_rows(documents, self._context_length)
        if self._kind == "packed":
            return packed_rows(documents, self._context_length)
        return chain.from_iterable(
            best_fit_rows(buffer, self._context_length, self._pad_token_id)
            for buffer in _buffers(documents, self._context_length)
        )

    def _documents(self, dataset: str) -> Iterator[np.ndarray]:
        for batch in batches(stream_documents(dataset, self.split)):
            for ids in token_ids([document["text"] or "" for document in batch], self._tokenizer, self._eos):
                yield np.array(ids, dtype=np.int64)


def _buffers(documents: Iterable[np.ndarray], context_length: int) -> Iterator[list[np.ndarray]]:
    """Documents of enough tokens to be packed together; the last ones make at least one row."""
    enough = max(BUFFER_TOKENS, BUFFER_ROWS * context_length)
    buffer: list[np.ndarray] = []
    size = 0
    for ids in documents:
        buffer.append(ids)
        size += len(ids)
        if size >= enough:
            yield buffer
            buffer, size = [], 0
    if size >= context_length:
        yield buffer
