"""Documents as files, as texts and as tokens."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq


def token_dataset(*lengths):
    """Documents of the given lengths whose tokens count on from one document to the next."""
    start, rows = 0, []
    for index, length in enumerate(lengths):
        rows.append({"name": str(index), "input_ids": list(range(start, start + length))})
        start += length
    return datasets.Dataset.from_list(rows)


def texts(documents):
    return dict(zip(documents["name"], documents["text"], strict=True))


def lines(*values, column="text"):
    return "".join(json.dumps({column: value}) + "\n" for value in values)


def write(directory, files):
    """Write files of text, bytes or tables, whose names are relative to `directory`."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(directory / name) if len(files) == 1 else str(directory)
