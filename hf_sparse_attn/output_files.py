"""Files and directories to write: checked before the work; then they are whole or not there, and no work is lost."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hf_sparse_attn.errors import RunError, add_note, reason

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
PAGE_SUFFIX = ".html"


def check_output_file(path: str | Path) -> Path:
    """Path of a file that can be written later: not itself a directory, and its directory exists or can be made."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a directory; expected the name of a file")
    if not is_device(path):
        _check_writable(_resolved(path).parent)
    return path


def check_picture_file(path: str | Path) -> Path:
    """Path of a picture that can be written later: an output file whose suffix is its format."""
    import matplotlib  # noqa: F401  whether it is there must be known before the work

    path = check_output_file(path)
    if path.suffix not in PICTURE_SUFFIXES:
        raise ValueError(f"{str(path)!r} must end in one of {', '.join(PICTURE_SUFFIXES)}")
    return path


def check_drawing_file(path: str | Path) -> Path:
    """Path of a picture or a page that can be written later: an output file whose suffix is its format."""
    path = Path(path)
    if path.suffix == PAGE_SUFFIX:
        return check_output_file(path)
    if path.suffix not in PICTURE_SUFFIXES:
        raise ValueError(f"{str(path)!r} must end in one of {', '.join((*PICTURE_SUFFIXES, PAGE_SUFFIX))}")
    return check_picture_file(path)


def check_output_directory(path: str | Path) -> Path:
    """Path, free of symbolic links, of a directory that can be filled later: absent or empty, and it can be made."""
    path = _resolved(Path(path).expanduser())
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a file; expected a directory that is new or empty")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{str(path)!r} already holds something; expected a directory that is new or empty")
    _check_writable(path)
    return path


def check_space(path: Path, num_bytes: int) -> None:
    """Make sure that a file or directory of this size can be written.

    Raises:
        OSError: the disk has less space.
    """
    usage = shutil.disk_usage(_existing(path))
    if usage.total and usage.free < num_bytes:
        needed, free = (f"{size / 1e6:.1f} MB" for size in (num_bytes, usage.free))
        raise OSError(f"{needed} are to be written, but only {free} are free there")


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end: readers see the whole file or none.

    A device or a pipe, such as /dev/stdout, is written to as it is; a symbolic link goes on leading to the file.

    Raises:
        RunError: it cannot be written.
    """
    final = temporary = Path(path)
    try:
        if not is_device(final):
            final = _resolved(final)
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary = final.with_name(f".{os.getpid()}.tmp{final.suffix}")
        yield temporary
        if temporary != final:
            temporary.replace(final)
    except OSError as error:
        raise RunError(f"cannot write {str(path)!r}: {reason(error)}") from error
    finally:
        if temporary != final:
            with suppress(OSError):
                temporary.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, the whole file or nothing; numbers that are not finite become null.

    Raises:
        RunError: it cannot be written; `value` then went to a temporary file or to standard output, as the error says.
    """
    try:
        _write(path, _json(value))
    except RunError as error:
        raise RunError(f"{error}; the results are {write_elsewhere(value)}") from error


def write_elsewhere(value: Any) -> str:
    """Write `value` as JSON to a temporary file, or else to standard output; the words for where it is."""
    text = _json(value)
    return _place(_write_temporary(text), text)


@contextmanager
def kept_on_failure(path: Path, what: str) -> Iterator[Callable[[Any], None]]:
    """Gives a function that writes a value as JSON to `path`, or where it can, for as long as the block lasts.

    Whatever ends the block early, Ctrl-C included, leaves the last value there, and its error tells where `what` is.
    """
    file: Path | None = None
    text = ""

    def keep(value: Any) -> None:
        nonlocal file, text
        older, text = file, _json(value)
        try:
            _write(path, text)
            file = path
        except RunError:
            file = _write_temporary(text)
        if older is not None and older != file:
            older.unlink(missing_ok=True)

    try:
        yield keep
    except BaseException as error:
        if text:
            add_note(error, f"{what} is {_place(file, text)}")
        raise
    if file is not None:
        file.unlink(missing_ok=True)


def unfinished_directory(output: Path) -> Path:
    """Where a directory is written before it is in its place: inside one that is there already, or beside it."""
    return (output if output.exists() else output.parent) / f".{output.name}.unfinished-{os.getpid()}"


@contextmanager
def removed_on_failure(directory: Path) -> Iterator[None]:
    """Write a directory; what cannot be finished is removed.

    Raises:
        RunError: it cannot be written.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(f"cannot write {str(directory)!r}: {reason(error)}") from error
        raise


def put_in_place(finished: Path, output: Path) -> None:
    """Rename the finished directory of a model; if the output is already there and still empty, the files move into it.

    Raises:
        RunError: it cannot be done, and the finished directory stays where it is.
    """
    try:
        if not output.exists():
            finished.rename(output)
            return
        if any(entry != finished for entry in output.iterdir()):
            raise FileExistsError("it was filled meanwhile")
        # config.json comes last: it is what makes a directory a model.
        for file in sorted(finished.iterdir(), key=lambda file: file.name == "config.json"):
            file.rename(output / file.name)
        finished.rmdir()
    except OSError as error:
        message = f"cannot write to {str(output)!r}: {reason(error)}; the finished model is in {str(finished)!r}"
        raise RunError(message) from error


def finite(value: Any) -> Any:
    """JSON-ready values with None in place of the numbers that JSON does not know, NaN and infinities."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any) -> str:
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def _write(path: str | Path, text: str) -> None:
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_temporary(text: str) -> Path | None:
    """Where it is now; None if temporary files cannot be written either."""
    try:
        handle, name = tempfile.mkstemp(prefix="hf_sparse_attn-", suffix=".json")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return None
    return Path(name)


def _place(file: Path | None, text: str) -> str:
    if file is None:
        print(text)
        return "on standard output"
    return f"in {str(file)!r}"


def _resolved(path: Path) -> Path:
    """The path without symbolic links, which may lead to what does not exist yet."""
    resolved = Path(os.path.realpath(path))
    with suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_ISLNK(resolved.lstat().st_mode):
            raise OSError(f"{str(path)!r} is a loop of symbolic links")
    return resolved


def is_device(path: Path) -> bool:
    """Whether something stands there that is neither a file nor a directory, such as a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _existing(path: Path) -> Path:
    """The path itself or the nearest one above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _check_writable(directory: Path) -> None:
    # Permission bits say little (root, read-only mounts), so a nameless file is tried.
    existing = _existing(directory)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise PermissionError(f"cannot write to {str(existing)!r}: {reason(error)}") from error
