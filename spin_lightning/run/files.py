"""Files of a run: written atomically, and refused with one error where they are damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml

from spin_lightning.errors import RunFolderError, SpinError, first_line

_ELSEWHERE = "or name another folder with --trainer.default_root_dir"
_ADVICE = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EROFS: f"mount it writable, {_ELSEWHERE}",
    errno.EACCES: f"make it writable, {_ELSEWHERE}",
    errno.EPERM: f"make it writable, {_ELSEWHERE}",
    errno.ENOTDIR: f"move the file at that path elsewhere, {_ELSEWHERE}",
    errno.EEXIST: f"move the file at that path elsewhere, {_ELSEWHERE}",
    errno.ENAMETOOLONG: f"shorten it, {_ELSEWHERE}",
}
T = TypeVar("T")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path, fix: str, parse: Callable[[Any], T]) -> T:
    """Read JSON.

    Args:
        path: The file.
        fix: How to go on without it.
        parse: Turns the content into a record; it raises a ValueError for an invalid one.

    Raises:
        RunFolderError: The file is damaged.
    """
    with reading(path, fix):
        return parse(json.loads(path.read_text(encoding="utf-8")))


def read_yaml(path: Path, name: str, fix: str) -> Any:
    """Read YAML that a user has named.

    Args:
        path: The file.
        name: The setting that names it.
        fix: What to name instead.

    Raises:
        SpinError: It cannot be read.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        problem = f"{name}={str(path)!r} cannot be read ({first_line(error)})"
        raise SpinError(problem, fix=fix) from error


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line of JSON; it is on the disk when this returns."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path, parse: Callable[[Any], T]) -> list[T]:
    """Read what `append_line` wrote, and cut off a last line that a crash left incomplete.

    Args:
        path: The file; it may be missing.
        parse: Turns a line's content into a record; it raises a ValueError for an invalid one.

    Raises:
        RunFolderError: A complete line is damaged.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    rows = []
    # (str.splitlines also splits at characters that JSON does not escape.)
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        fix = "delete this line: its content is requested again, everything else is kept"
        with reading(f"line {number} of {path}", fix):
            rows.append(parse(json.loads(line)))
    return rows


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        replace_synced(temporary, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file and the fix where the block fails to write to the disk.

    Raises:
        RunFolderError: The disk is full, read-only, protected or damaged.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


@contextmanager
def reading(path: Path | str, fix: str, *others: type[Exception]) -> Iterator[None]:
    """Refuse a damaged file of the run.

    Args:
        path: The file, or a part of one in words.
        fix: How to go on without it.
        others: Errors of a parser that are not ValueErrors.

    Raises:
        RunFolderError: The block cannot read the file, or raises a ValueError over its content.
    """
    refused: tuple[type[Exception], ...] = (OSError, ValueError, RecursionError, *others)
    try:
        yield
    except refused as error:
        raise damaged(path, first_line(error), fix) from error


def damaged(path: Path | str, reason: str, fix: str) -> RunFolderError:
    """The error for a damaged file of the run."""
    return RunFolderError(f"{path} is damaged ({reason})", fix=fix)


def is_of_the_disk(error: OSError) -> bool:
    """Whether an error comes from a full, broken, protected or read-only disk."""
    return error.errno in _ADVICE or error.errno == errno.EIO


def unwritable(path: Path | str, error: OSError) -> RunFolderError:
    """The error for a file that the disk refused."""
    return RunFolderError(
        f"{path} cannot be written ({error.strerror or error})",
        fix=f"{_ADVICE.get(error.errno or 0, 'repair the disk')}, and start the same command "
        "again: everything that was written before is complete and is used",
    )


def replace_synced(temporary: Path, path: Path) -> None:
    """Move a finished file or folder into place, after its bytes have reached the disk."""
    files = [temporary] if temporary.is_file() else [p for p in temporary.rglob("*") if p.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    old = path.with_name(f".{path.name}.old")
    if path.is_dir():
        # A folder cannot be replaced in one step, so the old one moves aside first.
        shutil.rmtree(old, ignore_errors=True)
        path.replace(old)
    temporary.replace(path)
    shutil.rmtree(old, ignore_errors=True)
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
