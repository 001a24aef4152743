import json
from itertools import chain

import datasets
import pytest

from hf_sparse_attn.data import IGNORED_LABEL, load_documents, long_documents, packed, tokenize, windowed


def token_dataset(*lengths):
    """Documents of the given lengths whose tokens count on from one document to the next."""
    start, rows = 0, []
    for index, length in enumerate(lengths):
        rows.append({"name": str(index), "input_ids": list(range(start, start + length))})
        start += length
    return datasets.Dataset.from_list(rows)


def texts(documents):
    return dict(zip(documents["name"], documents["text"], strict=True))


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "book.md").write_text("# Title\n\ntext")
    assert texts(load_documents(str(tmp_path / "book.md"))) == {"book.md": "# Title\n\ntext"}


def test_jsonl_takes_names_from_the_file_or_makes_them(tmp_path):
    named, unnamed = tmp_path / "named.jsonl", tmp_path / "unnamed.jsonl"
    named.write_text('{"text": "a", "name": "x"}\n{"text": "b", "name": "y"}\n')
    unnamed.write_text('{"body": "a"}\n{"body": "b"}\n')
    assert texts(load_documents(str(named))) == {"x": "a", "y": "b"}
    assert texts(load_documents(f"{unnamed}:body")) == {"unnamed.jsonl, row 0": "a", "unnamed.jsonl, row 1": "b"}


def test_directory_is_read_recursively_in_order_of_path(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "ignored.csv").write_text("no")
    datasets.Dataset.from_dict({"text": ["three"], "name": ["table"]}).to_parquet(tmp_path / "sub" / "c.parquet")
    documents = load_documents(str(tmp_path))
    assert list(documents["text"]) == ["one", "two", "three"]
    assert list(documents["name"]) == ["a.txt", "b.txt", "table"]


def test_documents_without_text_are_left_out(tmp_path):
    rows = [{"text": "a"}, {"text": " \n"}, {"text": None}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(load_documents(str(tmp_path / "d.jsonl"))["text"]) == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.txt", " \n ", "is empty"),
        ("empty.jsonl", "", "is empty"),
        ("other.jsonl", '{"body": "a"}', "has no column 'text'; it has body"),
        ("number.jsonl", '{"text": 3}', "holds int64, not text"),
        ("broken.jsonl", '{"text": "a"\n{', "is not a readable .jsonl file"),
        ("broken.parquet", "PAR0", "is not a readable .parquet file"),
        ("latin.txt", b"\xff\xfe\x00", "is not a readable .txt file"),
        ("table.csv", "text\na", "cannot read .csv files"),
    ],
)
def test_bad_local_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_documents(str(path))
    assert name in str(error.value)


def test_empty_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        load_documents(str(tmp_path))


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/no/such/directory", "missing.jsonl:body"])
def test_missing_path_is_refused(name):
    with pytest.raises(FileNotFoundError, match=f"dataset '{name}': no such file or directory"):
        load_documents(name)


@pytest.mark.parametrize(
    ("spec", "arguments", "column"),
    [
        ("org/name", ("org/name", None, "validation"), "text"),
        ("org/name:en", ("org/name", "en", "validation"), "text"),
        ("org/name::test", ("org/name", None, "test"), "text"),
        ("org/name:en:test:body", ("org/name", "en", "test"), "body"),
    ],
)
def test_hub_id_with_optional_parts(monkeypatch, spec, arguments, column):
    calls = []

    def load_dataset(hub_id, config, split):
        calls.append((hub_id, config, split))
        return datasets.Dataset.from_dict({column: ["a"], "id": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts(load_documents(spec, "validation")) == {"org/name, row 0": "a"}
    assert calls == [arguments]


def test_hub_errors_name_the_dataset(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="dataset 'org/name' cannot be loaded: offline"):
        load_documents("org/name")
    with pytest.raises(ValueError, match="at most id:config:split:column"):
        load_documents("a:b:c:d:e")


def test_tokenize_keeps_names(tiny_tokenizer, text_directory):
    documents = load_documents(str(text_directory))
    tokens = tokenize(documents, tiny_tokenizer)
    assert tokens.column_names == ["name", "input_ids"]
    assert [len(ids) for ids in tokens["input_ids"]] == [len(text) for text in documents["text"]]
    assert tiny_tokenizer.decode(tokens[0]["input_ids"]) == documents[0]["text"]


def test_long_documents_are_cut_and_short_ones_left_out(tiny_tokenizer, text_directory):
    documents = load_documents(str(text_directory))
    chosen = long_documents(documents, tiny_tokenizer, 100)
    assert [document["name"] for document in chosen] == ["0.txt", "1.txt", "2.txt"]
    assert all(len(document["input_ids"]) == 100 for document in chosen)
    assert [d["name"] for d in long_documents(documents, tiny_tokenizer, 100, max_documents=2)] == ["0.txt", "1.txt"]


def test_too_short_documents_say_how_long_the_longest_is(tiny_tokenizer, text_directory):
    documents = load_documents(str(text_directory))
    longest = max(map(len, documents["text"]))
    with pytest.raises(ValueError, match=f"at least 5000 tokens: the longest of its 4 documents has {longest}"):
        long_documents(documents, tiny_tokenizer, 5000)


def test_packed_rows_restart_at_every_document():
    rows = packed(token_dataset(3, 6, 2), 5)
    assert list(rows["input_ids"]) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert list(rows["position_ids"]) == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    ignored = IGNORED_LABEL
    assert list(rows["labels"]) == [[ignored, 1, 2, ignored, 4], [ignored, 6, 7, 8, ignored]]


def test_packing_loses_only_the_last_incomplete_row():
    rows = packed(token_dataset(1, 17, 4, 30, 2), 8)
    assert list(chain.from_iterable(rows["input_ids"])) == list(range(48))


def test_windows_stay_inside_a_document():
    rows = windowed(token_dataset(3, 11, 5), 5)
    assert list(rows["input_ids"]) == [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [14, 15, 16, 17, 18]]
    assert list(rows["position_ids"]) == [[0, 1, 2, 3, 4]] * 3
    assert [labels[0] for labels in rows["labels"]] == [IGNORED_LABEL] * 3


@pytest.mark.parametrize(
    ("make_rows", "message"), [(packed, "9 tokens in all, fewer than one row of 10"), (windowed, "the longest has 5")]
)
def test_too_little_for_a_row_is_refused(make_rows, message):
    with pytest.raises(ValueError, match=message):
        make_rows(token_dataset(4, 5), 10)


@pytest.mark.parametrize("make_rows", [packed, windowed])
def test_rows_need_a_target(make_rows):
    with pytest.raises(ValueError, match="context_length must be at least 2"):
        make_rows(token_dataset(4), 1)
