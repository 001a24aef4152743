"""Mixtures: how much of a training each of several datasets gets."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hf_sparse_attn.data.rows import targets

if TYPE_CHECKING:
    from datasets import Dataset

MOST_EPOCHS = 1000  # of the smallest dataset in one of the largest, or a share is taken for a mistake


class Mixture(NamedTuple):
    """Rows of several datasets.

    Args:
        rows: in the order in which they are to be read.
        tokens: of each dataset, how many of its tokens have a loss there.
        epochs: how many times all rows of each dataset are there.
    """

    rows: Dataset
    tokens: list[int]
    epochs: list[float]


def parse_mixture(specs: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Split `DATASET:SHARE` into datasets and their shares, None if none has one or there is one dataset.

    A share is a last part that reads as a number, unless a file or directory has the whole for a name. (A
    configuration of the Hub that is a number is told by a colon behind it: `id:2020:`.)

    Raises:
        ValueError: a share is not a finite number greater than 0, only some datasets have one, or one is given twice.
    """
    datasets, shares = zip(*map(_split_share, specs), strict=True)
    given = [share for share in shares if share is not None]
    for dataset in datasets:
        if datasets.count(dataset) > 1:
            raise ValueError(f"{dataset!r} is given more than once")
    if not given or len(datasets) == 1:
        return list(datasets), None
    if len(given) < len(specs):
        without = datasets[shares.index(None)]
        raise ValueError(f"either every dataset has a share (DATASET:SHARE) or none has; {without!r} has none")
    return list(datasets), given


def _split_share(spec: str) -> tuple[str, float | None]:
    dataset, _, last = spec.rpartition(":")
    try:
        share = float(last)
    except ValueError:
        return spec, None
    paths = (spec, spec.partition("=")[2])
    if not dataset or any(os.path.exists(os.path.expanduser(path)) for path in paths):
        return spec, None
    if not 0 < share < math.inf:
        raise ValueError(f"the share of {dataset!r} must be a finite number greater than 0, got {last!r}")
    return dataset, share


def mixed(
    rows: Sequence[Dataset], shares: Sequence[float] | None = None, num_rows: int | None = None, seed: int = 0
) -> Mixture:
    """Rows of several datasets in one.

    Without shares these are all rows of all datasets, one after the other. With shares, each next row is of the
    dataset that is furthest behind its share of the tokens so far, so that every beginning of the result has these
    shares as nearly as whole rows allow. Rows of a dataset come in random order, in another one each time they begin
    again. More `num_rows` lengthen the result and change nothing before.

    Args:
        rows: what `packed`, `best_fit` or `windowed` returned for each dataset.
        shares: of each dataset, positive; they need not add up to 1.
        num_rows: of the result; by default so many that each row is there at least once.
        seed: of the order.

    Raises:
        ValueError: to read every row once, a dataset would be there more than `MOST_EPOCHS` times.
    """
    from datasets import concatenate_datasets

    counts = [targets(part) for part in rows]
    tokens = [int(count.sum()) for count in counts]
    if shares is None:
        return Mixture(concatenate_datasets(list(rows)), tokens, [1.0] * len(rows))
    if num_rows is None:
        per_share = [count / share for count, share in zip(tokens, shares, strict=True)]
        if max(per_share) > MOST_EPOCHS * min(per_share):
            raise ValueError(
                f"with these shares, the smallest dataset would be repeated more than {MOST_EPOCHS} times until the "
                "largest is read once"
            )
    turns, orders = Turns(shares), [_orders(len(part), seed + index) for index, part in enumerate(rows)]
    taken, missing = np.zeros((2, len(rows)), dtype=np.int64), len(rows)
    starts = np.cumsum([0, *map(len, rows)])
    chosen: list[int] = []
    while missing if num_rows is None else len(chosen) < num_rows:
        source = turns.next()
        row = next(orders[source])
        turns.add(source, int(counts[source][row]))
        taken[0, source] += 1
        missing -= int(taken[0, source] == len(rows[source]))
        taken[1, source] += counts[source][row]
        chosen.append(int(starts[source]) + row)
    epochs = [int(number) / len(part) for number, part in zip(taken[0], rows, strict=True)]
    return Mixture(concatenate_datasets(list(rows)).select(chosen), taken[1].tolist(), epochs)


class Turns:
    """Whose turn it is: that of the source which is furthest behind its share of the tokens so far."""

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares, self._tokens = list(shares), [0] * len(shares)

    def next(self) -> int:
        """The source to take from; the first of those that are equally far behind."""
        return min(range(len(self._shares)), key=lambda source: self._tokens[source] / self._shares[source])

    def add(self, source: int, tokens: int) -> None:
        """Say how many tokens were taken from a source."""
        self._tokens[source] += tokens


def _orders(length: int, seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.permutation(length).tolist()
