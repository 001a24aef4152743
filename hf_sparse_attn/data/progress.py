"""Progress bars of work on documents, which for little work are noise among the messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

_FROM_DOCUMENTS = 200
_FROM_BYTES = 10 * 2**20


@contextmanager
def quiet_if_short(documents: Dataset) -> Iterator[None]:
    """Keep the progress bars of `datasets` to long work."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silence = len(documents) < _FROM_DOCUMENTS and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            enable_progress_bars()


def document_bar(documents: Dataset, phase: str) -> Any:
    """A bar of `datasets` that counts documents; it is shown for many of them and for much text."""
    from datasets.utils import tqdm

    is_short = len(documents) < _FROM_DOCUMENTS and documents.data.nbytes < _FROM_BYTES
    return tqdm(total=len(documents), desc=phase, unit=" documents", disable=is_short)
