"""Datasets in temporary files: as large as the disk allows, of which memory holds what is being read."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

CHUNK = 2**20  # characters or tokens handed on together


def temporary_dataset(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Dataset:
    """Batches as a dataset in a temporary file (under TMPDIR), which is gone when the dataset is."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    with tempfile.TemporaryDirectory(prefix="hf_sparse_attn_", ignore_cleanup_errors=True) as directory:
        path = os.path.join(directory, "table.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        table = pa.ipc.open_stream(pa.memory_map(path)).read_all()
    # A fingerprint of its own: `datasets` would compute one from a copy of the whole table.
    return Dataset(InMemoryTable(table), fingerprint=uuid.uuid4().hex)
