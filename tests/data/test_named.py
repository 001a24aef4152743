"""Long documents by a short name, on small samples with the columns that the Hub has."""

import datasets
import pytest
from helpers.documents import texts

from hf_sparse_attn.data import load_documents, stream_documents

PG19 = {
    "short_book_title": ["A Tale"],
    "publication_date": [1859],
    "url": ["http://www.gutenberg.org/ebooks/98"],
    "text": ["It was the best of times."],
}
ARXIV = {"article": ["we study rings .", "left out"], "abstract": ["rings .", " "]}
GOVREPORT = {"report": ["Roads are long.", None], "summary": ["Roads.", "left out"]}
BOOKSUM = {
    "bid": [27681],
    "book_id": ["The Last of the Mohicans.chapters 1-2"],
    "chapter": ["Mine ear is open."],
    "summary_name": ["Chapters 1-2"],
    "summary_text": ["An ear."],
}
SAMPLES = {
    "pg19": ("emozilla/pg19", None, PG19, "It was the best of times."),
    "arxiv": ("ccdv/arxiv-summarization", "document", ARXIV, "we study rings .\n\nSummary:\nrings ."),
    "govreport": ("ccdv/govreport-summarization", None, GOVREPORT, "Roads are long.\n\nSummary:\nRoads."),
    "booksum": ("kmfoda/booksum", None, BOOKSUM, "Mine ear is open.\n\nSummary:\nAn ear."),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_named_datasets_of_the_hub(monkeypatch, name, is_streamed):
    hub_id, config, table, text = SAMPLES[name]
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        table_ = datasets.Dataset.from_dict(table)
        return table_.to_iterable_dataset() if kwargs.get("streaming") else table_

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if is_streamed:
        assert dict(stream_documents(name, "validation")) == {f"{hub_id}, row 0": text}
    else:
        assert texts(load_documents(name, "validation")) == {f"{hub_id}, row 0": text}
    assert calls == [((hub_id, config), {"split": "validation"} | ({"streaming": True} if is_streamed else {}))]


def test_parts_of_a_named_dataset(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((*args, kwargs["split"]))
        return datasets.Dataset.from_dict(ARXIV)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load_documents("arxiv:section:test:abstract")["text"]) == ["rings ."]
    load_documents("arxiv::test")
    assert calls == [("ccdv/arxiv-summarization", "section", "test"), ("ccdv/arxiv-summarization", "document", "test")]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_copies_of_named_datasets(tmp_path, name, suffix):
    *_, table, text = SAMPLES[name]
    table = datasets.Dataset.from_dict(table)
    path = tmp_path / f"sample.{suffix}"
    {"parquet": table.to_parquet, "jsonl": table.to_json, "csv": table.to_csv}[suffix](path)
    spec = f"{name}={path}"
    assert list(load_documents(spec)["text"]) == [text]
    assert [text for _, text in stream_documents(spec, "validation")] == [text]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_directories_have_splits_as_the_hub_has(tmp_path, is_streamed):
    (tmp_path / "data").mkdir()
    for split, words in (("train", "roads"), ("validation", "bridges")):
        table = datasets.Dataset.from_dict({"report": [words], "summary": ["short"]})
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    spec = f"govreport={tmp_path / 'data'}"
    for split, words in (("train", "roads"), ("validation", "bridges")):
        if is_streamed:
            found = [text for _, text in stream_documents(spec, split)]
        else:
            found = list(load_documents(spec, split)["text"])
        assert found == [f"{words}\n\nSummary:\nshort"]
    with pytest.raises(ValueError, match=f"^dataset '{spec}' cannot be loaded: .*test"):
        load_documents(spec, "test")


def test_copies_at_fault_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^dataset 'arxiv=/no/where.parquet': no such file or directory$"):
        load_documents("arxiv=/no/where.parquet")
    (tmp_path / "d.txt").write_text("a")
    with pytest.raises(ValueError, match=r"d.txt': cannot read .txt files, only .parquet, .jsonl, .json, .csv and dir"):
        load_documents(f"arxiv={tmp_path / 'd.txt'}")
    datasets.Dataset.from_dict(GOVREPORT).to_parquet(tmp_path / "d.parquet")
    for read in (load_documents, lambda dataset: list(stream_documents(dataset))):
        with pytest.raises(ValueError, match=r"d.parquet' has no column 'article'; it has report, summary$"):
            read(f"arxiv={tmp_path / 'd.parquet'}")


def test_a_directory_of_that_name_goes_first(tmp_path, monkeypatch):
    (tmp_path / "pg19").mkdir()
    (tmp_path / "pg19" / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert texts(load_documents("pg19")) == {"a.txt": "mine"}
