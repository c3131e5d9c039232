"""Rows of files and hub data sets, unchanged: without type inference, with all columns."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spin_lightning.errors import DataError, first_line

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(/(?P<config>\w[\w.-]*))?(:(?P<split>.+))?")

SourceRow = Mapping[str, Any]


def load_rows(source: str, setting: str) -> list[SourceRow]:
    """All rows of a file, a folder of files or a hub data set, in order.

    Args:
        source: A json (a list of objects, or one object per line), jsonl, parquet or csv file, a
            folder of them, or a hub id `owner/name[/configuration][:split]`.
        setting: Setting that names the source, for messages.

    Raises:
        DataError: The data does not exist or cannot be read.
    """
    try:
        path = Path(source).expanduser()
        # (An empty path would be the current folder.)
        if source.strip() and path.exists():
            return [row for file in _files(path, setting) for row in _read_file(file, setting)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{setting}={source[:200]!r} cannot be opened ({first_line(error)})",
            fix="check the path and its permissions",
        ) from error
    hub_id = _HUB_ID.fullmatch(source)
    if hub_id is None or path.suffix.lower() in _READERS:
        raise DataError(
            f"{setting}={source!r}: there is no such file",
            fix="check the path, or give a hub id owner/name[/configuration][:split]",
        )
    return _read_hub(source, hub_id, setting)


def _files(path: Path, setting: str) -> list[Path]:
    is_folder = path.is_dir()
    files = [
        file
        for file in (sorted(path.iterdir()) if is_folder else [path])
        if file.is_file() and file.suffix.lower() in _READERS and not file.name.startswith(".")
    ]
    if not files:
        raise DataError(
            f"{setting}={str(path)!r} {'holds no' if is_folder else 'is not a'} "
            f"{', '.join(_READERS)} file",
            fix="give a file of one of these kinds, or a folder of them",
        )
    return files


def _read_file(file: Path, setting: str) -> Sequence[SourceRow]:
    try:
        return _READERS[file.suffix.lower()](file)
    # Invalid JSON, text that is not UTF-8 and most errors of Arrow are ValueErrors.
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise DataError(
            f"{setting}={str(file)!r} cannot be read ({_problem(error)})",
            fix="check that the file is complete and in the format of its extension (json: a list "
            "of objects, or one object per line)",
        ) from error


def _problem(error: Exception) -> str:
    """What is wrong with a file, and where."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8: byte 0x{error.object[error.start]:02x}, {error.reason}"
    if isinstance(error, RecursionError):
        return "its values are nested too deeply"
    return first_line(error)


def _read_json(file: Path) -> list[SourceRow]:
    """Read a list of objects or one object per line, whether the file is .json or .jsonl."""
    with file.open(encoding="utf-8-sig") as stream:
        is_list = stream.read(64).lstrip().startswith("[")
        stream.seek(0)
        if is_list:
            rows = list(enumerate(json.load(stream), 1))
        else:
            rows = [(n, _parsed(n, line)) for n, line in enumerate(stream, 1) if line.strip()]
    for n, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{'object' if is_list else 'line'} {n} has no columns")
    return [row for _, row in rows]


def _parsed(n: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {n} is not valid json: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits
        raise ValueError(f"line {n}: {_problem(error)}") from error


def _read_csv(file: Path) -> list[SourceRow]:
    with file.open(encoding="utf-8-sig", newline="") as stream, _cells_of_any_length():
        header, *records = [cells for cells in csv.reader(stream, strict=True) if cells] or [[]]
    _check_columns_differ(header)
    for n, cells in enumerate(records, 1):
        if len(cells) != len(header):
            raise ValueError(f"record {n} has {len(cells)} cells, the header has {len(header)}")
    return [dict(zip(header, cells, strict=True)) for cells in records]


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters per cell inside the block."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_parquet(file: Path) -> list[SourceRow]:
    # `read_table` would add columns for folders with names such as `split=train`.
    with pq.ParquetFile(file) as parquet:
        table = parquet.read()
    _check_columns_differ(table.column_names)
    columns = {name: _cells(table, name) for name in table.column_names}
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _cells(table: pa.Table, name: str) -> list[Any]:
    try:
        cells: list[Any] = table[name].to_pylist()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError) as error:  # a date outside Python's range
        raise ValueError(f"column {name!r}: {first_line(error)}") from error
    return cells


def _check_columns_differ(names: Sequence[str]) -> None:
    """Raise for two columns of the same name, one of which would be lost."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"it has the column {name!r} twice")
        seen.add(name)


_READERS: Mapping[str, Callable[[Path], list[SourceRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _read_hub(source: str, hub_id: re.Match[str], setting: str) -> list[SourceRow]:
    import datasets
    import huggingface_hub

    try:
        if not huggingface_hub.is_offline_mode():
            # Without a network `load_dataset` retries for half a minute before it fails.
            huggingface_hub.HfApi().dataset_info(hub_id["name"], timeout=10)
        return list(
            datasets.load_dataset(
                hub_id["name"], hub_id["config"], split=hub_id["split"] or "train"
            )
        )
    # The errors of the network clients have no common base class.
    except Exception as error:
        raise DataError(
            f"{setting}={source!r} is not a file, and reading it from the hub failed "
            f"({first_line(error.__cause__ or error)})",
            fix="check the path or the hub id owner/name[/configuration][:split]; without a "
            "network give a file, or set HF_HUB_OFFLINE=1 to use an earlier download",
        ) from error
