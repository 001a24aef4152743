"""Rows that are made while documents are read."""

from itertools import islice

import datasets
import numpy as np
import pytest
from helpers.documents import lines, texts, write
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_sparse_attn.data import (
    StreamedRows,
    best_fit,
    load_documents,
    packed,
    stream_documents,
    streams,
    tokenize,
    windowed,
)
from hf_sparse_attn.errors import RunError

MAKERS = {"packed": packed, "best-fit": best_fit, "windowed": windowed}
TEXTS = ["a" * 30, "b" * 7, "c" * 12, "d" * 25, "e" * 3]


@pytest.fixture
def path(tmp_path):
    return write(tmp_path, {"d.jsonl": lines(*TEXTS, None, " ")})


def first(rows, number):
    return [{name: values.tolist() for name, values in row.items()} for row in islice(rows, number)]


def test_documents_are_those_that_are_loaded(path, tmp_path):
    assert dict(stream_documents(path)) == texts(load_documents(path))
    assert dict(stream_documents("demo", "validation")) == texts(load_documents("demo", "validation"))
    with pytest.raises(ValueError, match="is empty: it holds no document with any text"):
        list(stream_documents(write(tmp_path, {"e.jsonl": lines(None, " ")})))


def test_documents_are_read_only_as_far_as_they_are_asked_for(tmp_path, monkeypatch):
    path = write(tmp_path, {"d.jsonl": lines("a", "b") + "broken"})
    assert list(islice(stream_documents(path), 2)) == [("d.jsonl, row 0", "a"), ("d.jsonl, row 1", "b")]
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "name": ["x", None]}).to_iterable_dataset()
    read = []
    table = table.map(lambda row: read.append(row["text"]) or row)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    assert next(iter(stream_documents("org/name"))) == ("x", "a")
    assert read == ["a"]
    assert list(stream_documents("org/name")) == [("x", "a"), ("org/name, row 1", "b")]


def test_hub_rows_are_checked(monkeypatch):
    table = datasets.Dataset.from_dict({"body": ["a"], "label": [0]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    with pytest.raises(ValueError, match=r"^dataset 'org/name' has no column 'text'; it has body, label$"):
        list(stream_documents("org/name"))
    with pytest.raises(ValueError, match=r"^dataset 'org/name:::label', row 0: column 'label' holds int64, not text$"):
        list(stream_documents("org/name:::label"))


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_are_those_of_the_loaded_documents_again_and_again(path, tiny_tokenizer, kind):
    expected = list(MAKERS[kind](tokenize(load_documents(path), tiny_tokenizer), 10))
    stream = StreamedRows([path], tiny_tokenizer, 10, kind)
    assert first(stream, 2 * len(expected) + 1) == [*expected, *expected, expected[0]]
    assert first(stream, 3) == expected[:3]
    row = next(iter(stream))
    assert row["labels"].dtype == np.int64


def test_best_fit_among_the_documents_of_a_buffer(path, tiny_tokenizer, monkeypatch):
    """30 | 7, 12, 25 | 3: each buffer of three rows or more is packed on its own, and the last one is too short."""
    monkeypatch.setattr(streams, "BUFFER_ROWS", 3)
    monkeypatch.setattr(streams, "BUFFER_TOKENS", 0)
    rows = islice(StreamedRows([path], tiny_tokenizer, 10, pad_token_id=tiny_tokenizer("_")["input_ids"][0]), 9)
    letters = [tiny_tokenizer.decode(row["input_ids"]) for row in rows]
    assert letters[:3] == letters[8:] * 3 == ["a" * 10] * 3
    assert letters[3:8] == ["b" * 7 + "cc_", "c" * 10, "d" * 10, "d" * 10, "d" * 5 + "_" * 5]


def test_streamed_mixture_has_its_shares(tmp_path, tiny_tokenizer, caplog):
    one = write(tmp_path, {"one.txt": "a" * 400})
    two = write(tmp_path, {"two.txt": "b" * 100})
    stream = StreamedRows([one, two], tiny_tokenizer, 10, "packed", shares=[3, 1])
    [a, b] = tiny_tokenizer("ab")["input_ids"]
    found = [row["input_ids"][0] for row in islice(stream, 45)]
    for number in range(1, 46):
        assert abs(found[:number].count(a) - 0.75 * number) <= 1
    assert set(found) == {a, b}
    assert [record.getMessage() for record in caplog.records] == [
        f"dataset {two!r} came to its end and begins again (time 2)"
    ]
    with pytest.raises(ValueError, match="several datasets that are streamed need shares"):
        StreamedRows([one, two], tiny_tokenizer, 10)


def test_loader_workers_share_the_rows(path, tiny_tokenizer):
    stream = StreamedRows([path], tiny_tokenizer, 10, "packed")
    loader = DataLoader(stream, batch_size=1, num_workers=2, collate_fn=default_data_collator)
    found = [batch["input_ids"][0].tolist() for batch in islice(loader, 9)]
    assert found == [row["input_ids"] for row in first(stream, 9)]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("a" * 9, "best-fit", "has too few tokens for a row of 10 tokens"),
        ("a" * 9, "packed", "has too few tokens for a row of 10 tokens"),
        ("a" * 9, "windowed", "has no document for a row of 10 tokens"),
        (" ", "packed", "is empty"),
    ],
)
def test_datasets_without_a_row_are_refused(tmp_path, tiny_tokenizer, content, kind, message):
    path = write(tmp_path, {"d.txt": content})
    stream = StreamedRows([path], tiny_tokenizer, 10, kind)
    with pytest.raises(ValueError, match=f"^dataset '{path}' {message}"):
        stream.first_rows(path, 1)
    with pytest.raises(RunError, match=message):
        next(iter(stream))
