"""Documents that are read from local files and directories."""

import codecs
import json
import os
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from helpers.documents import lines, texts, write

from hf_sparse_attn.data import load_documents
from hf_sparse_attn.data.local_files import read_text


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
        ("bom.txt", codecs.BOM_UTF8, "is empty"),
        ("bom.jsonl", codecs.BOM_UTF8 + b"\n\n", "is empty"),
        ("null.jsonl", lines(None, None), "is empty"),
        ("nulls.parquet", pa.table({"text": pa.nulls(3)}), "is empty"),
        ("nulls.parquet", pa.table({"text": pa.array([None], pa.int32())}), "is empty"),
        ("none.parquet", pa.table({"text": pa.array([], pa.string())}), "is empty"),
    ],
)
def test_bad_local_files_are_refused(tmp_path, name, content, message):
    path = write(tmp_path, {name: content})
    with pytest.raises(ValueError, match=message) as error:
        load_documents(path)
    assert name in str(error.value)


MESSAGES = [{"role": "user", "content": "Where?"}]
HINT = "; these are chat messages: make each conversation one string first, with the tokenizer's apply_chat_template"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (5, "int64, not text"),
        (0.5, "float64, not text"),
        (False, "bool, not text"),
        ({"en": "a"}, "an object, not text"),
        (["a", "b"], "a list of strings, not text"),
        ([["a"], []], "a list of lists, not text"),
        ([{"en": "a"}], "a list of objects, not text"),
        ([1, "a", None], "a list, not text"),
        ([], "a list, not text"),
        (MESSAGES, f"a list of objects, not text{HINT}"),
        ([{"from": "human", "value": "Where?"}], f"a list of objects, not text{HINT}"),
        ("\ud83d", "half a surrogate pair, not text"),
    ],
)
def test_lines_that_hold_something_else_than_text_are_refused(tmp_path, value, found):
    """Whatever stands before them: lines that would have told the type of the column, had it been inferred."""
    for index, before in enumerate([[], ["a"], [None, "a", None]]):
        directory = tmp_path / str(index)
        path = write(directory, {"good.txt": "a", "sub/d.jsonl": lines(*before, value, "b")})
        message = f"dataset {path!r}: sub/d.jsonl, line {len(before) + 1}: column 'text' holds {found}"
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            load_documents(path)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (pa.array([None, 5], pa.int32()), "int32, not text"),
        (pa.array([b"a"]), "binary, not text"),
        (pa.array([["a"]]), "a list of strings, not text"),
        (pa.array([None, {"en": "a"}]), "an object, not text"),
        (pa.array([None, MESSAGES]), f"a list of objects, not text{HINT}"),
        (pa.array([5, 5]).dictionary_encode(), "int64, not text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_columns_that_hold_something_else_than_text_are_refused(tmp_path, monkeypatch, values, found):
    path = write(tmp_path, {"a.jsonl": lines("a"), "d.parquet": pa.table({"text": values})})
    with pytest.raises(ValueError, match=f"^dataset {path!r}: d.parquet: column 'text' holds {found}"):
        load_documents(path)
    if pa.types.is_dictionary(values.type):
        return
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset(pa.table({"text": values})))
    with pytest.raises(ValueError, match=f"^dataset 'org/name': column 'text' holds {found}"):
        load_documents("org/name")


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["a", None, "b"], pa.large_string()),
        pa.array(["a", None, "b"], pa.string_view()),
        pa.array(["a", None, "b"]).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_text_however_a_table_stores_it(tmp_path, values):
    path = write(tmp_path, {"d.parquet": pa.table({"text": values, "text.length": [1, 2, 3]})})
    assert texts(load_documents(path)) == {"d.parquet, row 0": "a", "d.parquet, row 2": "b"}


def test_files_may_differ_in_all_but_the_column(tmp_path):
    files = {
        "a.jsonl": '{"text": null, "other": 1}\n',
        "b.jsonl": '{"other": [1], "text": "b"}\n{"other": {"text": 5}}\n\n{"text": "c", "more": NaN}',
        "c.parquet": pa.table({"other": [{"x": 1}], "text": pa.nulls(1)}),
        "d.parquet": pa.table({"text": ["d"], "name": [7]}),
        "e.parquet": pa.table({"text": pa.array([None], pa.float64())}),
        "f.jsonl": "",
    }
    found = texts(load_documents(write(tmp_path, files)))
    assert found == {"b.jsonl, row 0": "b", "b.jsonl, row 2": "c", "7": "d"}


def test_text_after_many_nulls(tmp_path, monkeypatch):
    """Whatever is read together first holds nulls alone."""
    path = write(tmp_path, {"d.jsonl": lines(*[None] * 200_000, "late")})
    assert texts(load_documents(path)) == {"d.jsonl, row 200000": "late"}
    table = datasets.Dataset.from_dict({"body": [None] * 3000 + ["late"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    assert texts(load_documents("org/name:::body")) == {"org/name, row 3000": "late"}


@pytest.mark.parametrize(
    "files",
    [
        {"z.jsonl": '{"tex": "a"}\n{"b": 1}\n'},
        {"z.parquet": pa.table({"tex": ["a"], "b": [1]})},
        {"a.txt": "a", "b.jsonl": lines("b"), "z.jsonl": '{"tex": "a"}\n{"b": 1}\n'},
    ],
    ids=lambda files: " ".join(files),
)
def test_a_file_without_the_column_is_refused(tmp_path, files):
    path = write(tmp_path, files)
    name = [*files][-1]
    with pytest.raises(ValueError, match=f"^dataset {path!r}: {name} has no column 'text'; it has tex, b$"):
        load_documents(path)


def test_long_lists_of_columns_are_cut(tmp_path):
    path = write(tmp_path, {"d.parquet": pa.table({f"c{index}": [1] for index in range(25)})})
    with pytest.raises(ValueError, match=r"it has c0, c1, .*, c19 and 5 more$"):
        load_documents(path)


@pytest.mark.parametrize("column", ["text", "name"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, column):
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text", "name", column])
    with pytest.raises(ValueError, match=f"d.parquet has 2 columns '{column}'; expected one"):
        load_documents(write(tmp_path, {"d.parquet": table}))


DEEP = 100_000


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ('{"text": "cut', "not JSON \\(Unterminated string.*, character 9\\); expected one JSON object a line"),
        ("[1, 2]", "a list of int64; expected one JSON object a line"),
        ('"a"', "a string; expected one JSON object a line"),
        ("null", "null; expected one JSON object a line"),
        ('{"text": "a", "text": "b"}', "the key 'text' stands twice in one object"),
        ('{"text": ' + "[" * DEEP + "]" * DEEP + "}", "lists or objects are nested too deeply"),
        (
            '{"text": "a", "other": ' + '{"a": ' * DEEP + "1" + "}" * (DEEP + 1),
            "lists or objects are nested too deeply",
        ),
        (b'{"text": "caf\xe9"}', "byte 0xe9 at position 13; expected UTF-8"),
    ],
    ids=range(8),
)
def test_broken_lines_are_refused(tmp_path, second_line, message):
    content = lines("a").encode() + (second_line if isinstance(second_line, bytes) else second_line.encode())
    with pytest.raises(ValueError, match=f"d.jsonl is not a readable .jsonl file: line 2: {message}$"):
        load_documents(write(tmp_path, {"d.jsonl": content}))


def test_broken_tables_are_refused(tmp_path):
    whole = Path(write(tmp_path, {"whole.parquet": pa.table({"text": ["some text"] * 1000, "n": range(1000)})}))
    not_utf8 = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9"))
    content = whole.read_bytes()
    for broken in (content[:-100], content[100:], b"PAR1" * 10, pa.table({"text": not_utf8})):
        with pytest.raises(ValueError, match=r"broken.parquet is not a readable .parquet file: ."):
            load_documents(write(tmp_path, {"broken.parquet": broken}))


@pytest.mark.parametrize("name", ["d.txt", "d.md", "d.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be"])
def test_other_encodings_are_named(tmp_path, name, encoding):
    mark = "\ufeff" if encoding.endswith("be") else ""  # without an order in its name, the encoding writes one
    path = write(tmp_path, {name: (mark + lines("a")).encode(encoding)})
    message = rf"{name} is not a readable \.\w+ file: .*the byte order mark of UTF-16 or UTF-32; expected UTF-8$"
    with pytest.raises(ValueError, match=message):
        load_documents(path)


def test_byte_order_marks_are_no_text(tmp_path):
    """Also where files with one were put together to a longer one."""
    mark = codecs.BOM_UTF8
    part = mark + lines("a\ufeff").encode()
    files = {"a.txt": mark + b"one\r\ntwo\rthree\n", "b.MD": mark + b"four", "c.jsonl": part + part}
    found = load_documents(write(tmp_path, files))["text"]
    assert list(found) == ["one\ntwo\nthree\n", "four", "a\ufeff", "a\ufeff"]


def test_read_text_names_the_file_and_the_byte(tmp_path):
    path = tmp_path / "notes"
    path.write_bytes(codecs.BOM_UTF8 + "é\r\n".encode())
    assert read_text(path) == read_text(str(path)) == "é\n"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(
        ValueError, match=f"^{path} is not a readable text file: byte 0xe9 at position 0; expected UTF-8$"
    ):
        read_text(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"caf\xe9", ["document.txt is not a readable .txt file", "0xe9", "3"]), (b" \n", ["document.txt is empty"])],
)
def test_chat_reads_its_document_the_same_way(run_script, assert_refused, tmp_path, content, words):
    path = write(tmp_path, {"document.txt": content})
    finished = run_script("chat.py", "--model", "nowhere", "--document", path, "--question", "Why?")
    assert_refused(finished, "--document", *words)


def test_names_that_are_no_names(tmp_path):
    names = [None, 5, ["x"], {"x": 1}, " ", "half \ud83d", "x"]
    rows = [{"text": str(index), "name": name} for index, name in enumerate(names)] + [{"text": "7"}]
    path = write(tmp_path, {"d.jsonl": "\n".join(map(json.dumps, rows))})
    expected = [f"d.jsonl, row {index}" for index in range(8)]
    expected[1], expected[5], expected[6] = "5", "half ?", "x"
    assert list(load_documents(path)["name"]) == expected


@pytest.mark.parametrize("values", [[None, "x"], [{"x": 1}, None], [None, None]], ids=str)
def test_names_of_tables_that_are_no_names(tmp_path, monkeypatch, values):
    table = pa.table({"text": ["a", "b"], "name": values})
    expected = ["x" if value == "x" else f"d.parquet, row {index}" for index, value in enumerate(values)]
    assert list(load_documents(write(tmp_path, {"d.parquet": table}))["name"]) == expected
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset(table))
    expected = [name.replace("d.parquet", "org/name") for name in expected]
    assert list(load_documents("org/name")["name"]) == expected


@pytest.mark.parametrize("name", ["a [1]*?.jsonl", "a::b.jsonl", "zip:x.jsonl", "a\nb.jsonl", "ü.JSONL", "%20.jsonl"])
def test_odd_file_names(tmp_path, name):
    path = write(tmp_path, {name: lines("a")})
    for dataset in (path, f"{path}:text", f"{path}:", str(tmp_path)):
        assert texts(load_documents(dataset)) == {f"{name}, row 0": "a"}


def test_file_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    assert texts(load_documents(write(tmp_path, {name: "a"}))) == {"caf?.txt": "a"}
    assert texts(load_documents(str(tmp_path))) == {"caf?.txt": "a"}


def test_what_is_no_file_is_passed_over_in_a_directory_and_refused_alone(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "device.jsonl").symlink_to("/dev/zero")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    (tmp_path / "link.txt").symlink_to(write(tmp_path, {"directory.txt/file": "linked"}))
    assert texts(load_documents(str(tmp_path))) == {"link.txt": "linked"}
    for name in ("pipe.txt", "device.jsonl"):
        with pytest.raises(ValueError, match=f"{name}' is neither a file nor a directory"):
            load_documents(str(tmp_path / name))
    for name in ("gone.txt", "gone", "circle.txt"):
        with pytest.raises(FileNotFoundError, match=f"{name}': no such file or directory"):
            load_documents(str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="dataset 'gone': no such file or directory"):
        load_documents("gone")


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.parquet", "b"])
def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, name):
    write(tmp_path, {"a.txt": "a", f"{name}/c.txt" if name == "b" else name: "locked"})
    locked = tmp_path / name

    def deny(function):
        def denied(path, *args, **kwargs):
            if str(path) == str(locked):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return denied

    # Not with chmod: the superuser reads everything.
    for owner, function in ((os, "scandir"), (Path, "open"), (Path, "read_bytes")):
        monkeypatch.setattr(owner, function, deny(getattr(owner, function)))
    with pytest.raises(PermissionError, match=f"Permission denied: '{locked}'"):
        load_documents(str(tmp_path))


def test_empty_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        load_documents(str(tmp_path))
