"""Files of a run: written whole or not at all, and read with one refusal."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spin_lightning.errors import RunFolderError, first_line

_ELSEWHERE = "or name another folder with --trainer.default_root_dir"
_ADVICE = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EROFS: f"mount it writable, {_ELSEWHERE}",
    errno.EACCES: f"make it writable, {_ELSEWHERE}",
    errno.EPERM: f"make it writable, {_ELSEWHERE}",
    errno.ENOTDIR: f"move the file away that is in its place, {_ELSEWHERE}",
    errno.EEXIST: f"move the file away that is in its place, {_ELSEWHERE}",
    errno.ENAMETOOLONG: f"shorten it, {_ELSEWHERE}",
}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        replace_synced(temporary, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what could not be written, and how to go on, where the block meets a disk that refuses.

    Raises:
        RunFolderError: The disk is full, read-only, not ours to write or damaged.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


@contextmanager
def reading(path: Path, fix: str, *others: type[Exception]) -> Iterator[None]:
    """Refuse a file of the run that is not what was written there.

    Args:
        path: The file.
        fix: How to go on without it.
        others: What a parser raises that is no ValueError.

    Raises:
        RunFolderError: It cannot be read, or what the block makes of it is refused by a ValueError.
    """
    refused: tuple[type[Exception], ...] = (OSError, ValueError, RecursionError, *others)
    try:
        yield
    except refused as error:
        raise RunFolderError(f"{path} is damaged ({first_line(error)})", fix=fix) from error


def is_of_the_disk(error: OSError) -> bool:
    """Whether it is a full, broken or read-only disk that an error tells of."""
    return error.errno in _ADVICE or error.errno == errno.EIO


def unwritable(path: Path | str, error: OSError) -> RunFolderError:
    """The error for a file that the disk refused."""
    return RunFolderError(
        f"{path} cannot be written ({error.strerror or error})",
        fix=f"{_ADVICE.get(error.errno or 0, 'mend the disk')}, and start the same command again: "
        "what was written before is whole and is used",
    )


def replace_synced(temporary: Path, path: Path) -> None:
    """Put a finished file or folder in its place, after its bytes have reached the disk."""
    files = [temporary] if temporary.is_file() else [p for p in temporary.rglob("*") if p.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    old = path.with_name(f".{path.name}.old")
    if path.is_dir():
        # A folder cannot be replaced in one step; what is there moves aside first.
        shutil.rmtree(old, ignore_errors=True)
        path.replace(old)
    temporary.replace(path)
    shutil.rmtree(old, ignore_errors=True)
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
