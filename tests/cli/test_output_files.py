import json
import os
import tempfile
from pathlib import Path

import pytest

from hf_sparse_attn import output_files
from hf_sparse_attn.errors import RunError


def test_output_directory_must_be_new_or_empty(tmp_path):
    assert output_files.check_output_directory(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    output_files.check_output_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="already holds something"):
        output_files.check_output_directory(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        output_files.check_output_directory(tmp_path / "file")
    assert not (tmp_path / "a").exists()


def test_output_directory_is_told_without_symbolic_links(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    for link, target in (("link", "there"), ("dangling", "absent"), ("loop", "loop")):
        (tmp_path / link).symlink_to(tmp_path / target)
    assert output_files.check_output_directory(tmp_path / "link") == tmp_path / "there"
    assert output_files.check_output_directory(tmp_path / "dangling") == tmp_path / "absent"
    with pytest.raises(OSError, match="loop of symbolic links"):
        output_files.check_output_directory(tmp_path / "loop")
    monkeypatch.chdir(tmp_path / "there")
    assert output_files.check_output_directory(".") == tmp_path / "there"
    for taken in ("..", "/"):
        with pytest.raises(FileExistsError, match="already holds something"):
            output_files.check_output_directory(taken)


def test_output_file_must_not_be_a_directory(tmp_path):
    with pytest.raises(FileExistsError, match="is a directory"):
        output_files.check_output_file(tmp_path)


def test_output_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="cannot write"):
        output_files.check_output_file(tmp_path / "file" / "result.json")


@pytest.mark.parametrize("check", [output_files.check_output_file, output_files.check_output_directory])
def test_output_with_a_name_too_long(tmp_path, check):
    with pytest.raises(OSError, match="File name too long"):
        check(tmp_path / ("x" * 300))


def test_space_is_checked_where_the_output_will_be(tmp_path):
    output_files.check_space(tmp_path / "new" / "directory", 1)
    with pytest.raises(OSError, match=r"are to be written, but only .* are free there"):
        output_files.check_space(tmp_path / "new" / "directory", 10**18)


def test_write_json_replaces_the_whole_file(tmp_path):
    path = tmp_path / "new" / "result.json"
    output_files.write_json(path, {"a": 1})
    output_files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert list(path.parent.iterdir()) == [path]


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "result.json"
    output_files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        output_files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "result.json"
    output_files.write_json(path, {"a": float("nan"), "b": [float("inf"), (1.5, -float("inf"))]})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, [1.5, None]]}


def test_write_json_writes_through_symbolic_links_and_to_devices(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    output_files.write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "target.json").read_text()) == {"a": 1}
    output_files.write_json(output_files.check_output_file("/dev/null"), {"a": 1})
    assert not Path("/dev/null").is_file()


@pytest.fixture
def full_disk(tmp_path):
    """A file on a disk that is full by the time it is written, although it could be when it was checked."""
    path = tmp_path / "later" / "result.json"
    output_files.check_output_file(path)
    (tmp_path / "later").write_text("in the way")
    return path


def test_results_that_cannot_be_written_are_kept_elsewhere(full_disk):
    with pytest.raises(RunError, match=r"cannot write '.*result\.json': .*; the results are in '") as failure:
        output_files.write_json(full_disk, {"loss": 1.5})
    kept = Path(str(failure.value).split("'")[-2])
    assert json.loads(kept.read_text()) == {"loss": 1.5}
    kept.unlink()


def test_results_go_to_standard_output_where_no_file_can_be_written(full_disk, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(OSError("no temporary files")))
    with pytest.raises(RunError, match="the results are on standard output"):
        output_files.write_json(full_disk, {"loss": 1.5})
    assert json.loads(capsys.readouterr().out) == {"loss": 1.5}


def keep_and_fail(path, error):
    with output_files.kept_on_failure(path, "what was found") as keep:
        keep({"a": 1})
        keep({"a": 2})
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("wrong")], ids=["interrupted", "failed"])
def test_what_is_kept_stays_on_failure_alone(tmp_path, error):
    path = tmp_path / "kept.json"
    with output_files.kept_on_failure(path, "what was found") as keep:
        keep({"a": 1})
        assert json.loads(path.read_text()) == {"a": 1}
    assert not path.exists()

    with pytest.raises(type(error)) as failure:
        keep_and_fail(path, error)
    assert failure.value.__notes__ == [f"what was found is in {str(path)!r}"]
    assert json.loads(path.read_text()) == {"a": 2}


def test_what_cannot_be_kept_at_its_place_is_kept_elsewhere(full_disk):
    with pytest.raises(ValueError, match="wrong") as failure:
        keep_and_fail(full_disk, ValueError("wrong"))
    kept = Path(failure.value.__notes__[0].split("'")[1])
    assert json.loads(kept.read_text()) == {"a": 2}
    kept.unlink()


def test_replaced_leaves_the_old_file_when_drawing_fails(tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_text("old")

    def draw():
        with output_files.replaced(picture) as temporary:
            assert temporary.suffix == ".png"
            temporary.write_text("half")
            raise OSError(28, os.strerror(28))

    with pytest.raises(RunError, match="cannot write"):
        draw()
    assert picture.read_text() == "old"
    assert list(tmp_path.iterdir()) == [picture]
