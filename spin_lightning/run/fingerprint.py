"""Fingerprints of configurations and files: canonical JSON and SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_READ_BYTES = 1 << 20
# Fields that earlier versions did not record, and that their runs are not compared by.
_LATER = frozenset({"precision"})


def fingerprint(fields: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON (sorted keys, no blanks) of plain values."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(run: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """One line `field: run has …, you gave …` for each field that differs, sorted by field."""
    # The run's fields were read from JSON, which turns tuples into lists.
    run, given = json.loads(json.dumps(run)), json.loads(json.dumps(given))
    given = {name: value for name, value in given.items() if name in run or name not in _LATER}
    lines = []
    for name in sorted({*run, *given}):
        had, has = run.get(name), given.get(name)
        if isinstance(had, dict) and isinstance(has, dict):
            # Nested fields, such as the files of a model, are compared one by one.
            lines += [f"{name}.{line}" for line in differences(had, has)]
        elif had != has:
            lines.append(f"{name}: run has {had!r}, you gave {has!r}")
    return lines


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def folder_hashes(folder: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of each file of `folder` whose name ends with one of `suffixes`, by name."""
    return {path.name: file_hash(path) for path in _files(folder, suffixes)}


def _files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.name.endswith(suffixes))
