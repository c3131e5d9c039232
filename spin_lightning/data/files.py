"""Files of rows, read as they are: no types are guessed and no cell is lost."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from spin_lightning.data.tables import SourceRow, Table, arrow_rows, check_columns_differ
from spin_lightning.errors import DataError, first_line

_KIND_OF_TEXT = (
    "check that the file is whole and of the kind its name says (json: a list of objects, or one "
    "object a line)"
)


class _UnreadableError(ValueError):
    """A file with a known problem, and what to do about it."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.fix = fix


# Broken json, text in another encoding and most of what Arrow reports are ValueErrors; gzip reports
# a file that was cut short as EOFError.
_PROBLEMS = (
    OSError,
    EOFError,
    ValueError,
    RecursionError,
    csv.Error,
    zlib.error,
    pa.ArrowException,
)


def is_data_file(path: Path) -> bool:
    """Whether the name is that of a file that can be read."""
    return _kind(path) is not None


def read_file(path: Path, setting: str) -> Table:
    """Open a file of rows.

    Args:
        path: A file for which `is_data_file` holds.
        setting: Which setting named the source, for messages.

    Raises:
        DataError: The file cannot be read; also while its rows are iterated.
    """
    kind = _kind(path)
    assert kind is not None
    with _problems_named(path, setting):
        _check_first_bytes(path, is_text=kind in _TEXT_KINDS)
        content = _READERS[kind](path)
    return Table(str(path), tuple(content.columns), _rows_of(content.rows, path, setting))


@dataclass(frozen=True)
class _Content:
    """Columns of a file, and its rows one after the other."""

    columns: Sequence[str]
    rows: Iterator[SourceRow]


def _rows_of(rows: Iterator[SourceRow], path: Path, setting: str) -> Iterator[SourceRow]:
    with _problems_named(path, setting):
        yield from rows


@contextmanager
def _problems_named(path: Path, setting: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except _PROBLEMS as error:
        problem, fix = _diagnosis(error)
        raise DataError(f"{setting}={str(path)!r} cannot be read ({problem})", fix=fix) from error


def _diagnosis(error: Exception) -> tuple[str, str]:
    """What is wrong with a file, in words that say where, and what to do about it."""
    if isinstance(error, _UnreadableError):
        return str(error), error.fix
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return (
            f"it is not {error.encoding.upper()}: byte 0x{byte:02x}, {error.reason}",
            "save it as UTF-8 (in a spreadsheet: 'CSV UTF-8'; else `iconv -f CP1252 -t UTF-8`), or "
            + _KIND_OF_TEXT,
        )
    if isinstance(error, RecursionError):
        return "its values are nested too deeply", _KIND_OF_TEXT
    return first_line(error), _KIND_OF_TEXT


# ---------------------------------------------------------------------------- kinds and bytes


def _open_gz(path: Path) -> IO[bytes]:
    return io.BufferedReader(gzip.GzipFile(path))


def _open_zst(path: Path) -> IO[bytes]:
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


_COMPRESSED: Mapping[str, Callable[[Path], IO[bytes]]] = {
    ".gz": _open_gz,
    ".zst": _open_zst,
}
# First bytes of files that are no text, with what they belong to.
_MAGIC = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
    b"PAR1": ("parquet", ".parquet"),
    b"ARROW1": ("arrow", ".arrow"),
    b"PK\x03\x04": ("zip", ".zip, unpacked first"),
}
_LFS_POINTER = b"version https://git-lfs.github.com"
# The longer marks first: that of UTF-16 starts that of UTF-32.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _kind(path: Path) -> str | None:
    """The suffix that says how to read a file, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[1] in _COMPRESSED:
        return suffixes[0] if suffixes[0] in _TEXT_KINDS else None
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def _open_bytes(path: Path) -> IO[bytes]:
    return _COMPRESSED.get(path.suffix.lower(), lambda p: p.open("rb"))(path)


@contextmanager
def _open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """The text of a file; a byte order mark decides the encoding, else it is UTF-8."""
    with _open_bytes(path) as stream:
        start = stream.read(4)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if start.startswith(mark)), None)
    with (
        _open_bytes(path) as stream,
        io.TextIOWrapper(stream, encoding or "utf-8-sig", newline=newline) as text,
    ):
        yield text


def _check_first_bytes(path: Path, *, is_text: bool) -> None:
    """Name what a file really is, where its first bytes tell."""
    with path.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(_LFS_POINTER):
        raise _UnreadableError(
            "it is a pointer of Git LFS, not the data", "run `git lfs pull` in the clone"
        )
    if not is_text or path.suffix.lower() in _COMPRESSED:
        return
    for magic, (name, suffix) in _MAGIC.items():
        if start.startswith(magic):
            raise _UnreadableError(
                f"it is a {name} file", f"give it a name that ends with {suffix}"
            )


# ---------------------------------------------------------------------------- json


def _read_json(path: Path) -> _Content:
    """A list of objects, or one object a line, whichever of the two names the file has."""
    with _open_text(path) as stream:
        is_list = stream.read(64).lstrip().startswith("[")
    with _open_text(path) as stream:
        if is_list:
            rows = list(enumerate(json.load(stream), 1))
        else:
            rows = [(n, _parsed(n, line)) for n, line in enumerate(stream, 1) if line.strip()]
    for n, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{'object' if is_list else 'line'} {n} has no columns")
    columns = dict.fromkeys(name for _, row in rows for name in row)
    return _Content(list(columns), (row for _, row in rows))


def _parsed(n: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {n} is not valid json: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits
        raise ValueError(f"line {n}: {_diagnosis(error)[0]}") from error


# ---------------------------------------------------------------------------- csv

# The separator that the file's name stands for, and those that spreadsheets write instead.
_SEPARATORS = {".csv": ",;\t", ".tsv": "\t;,"}
# Spreadsheets may name the separator in a first line of its own.
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*')


def _read_csv(path: Path) -> _Content:
    """Records below a header.

    The separator that the file's name stands for is tried first. Another one counts only where it
    divides the header and all records have as many cells.
    """
    with _open_text(path, newline="") as stream:
        named = _SEPARATOR_LINE.fullmatch(stream.readline(64))
    if named is not None:
        return _read_separated(path, named[1], skip_lines=1)
    problem: Exception | None = None
    one_column: _Content | None = None
    for separator in _SEPARATORS[str(_kind(path))]:
        try:
            content = _read_separated(path, separator)
        except UnicodeDecodeError:
            raise
        except (ValueError, csv.Error) as error:
            problem = problem or error
            continue
        if len(content.columns) > 1:
            return content
        one_column = one_column or content
    if problem is not None:
        raise problem
    assert one_column is not None
    return one_column


def _read_separated(path: Path, separator: str, skip_lines: int = 0) -> _Content:
    with _open_text(path, newline="") as stream, _cells_of_any_length():
        for _ in range(skip_lines):
            stream.readline()
        reader = csv.reader(stream, strict=True, delimiter=separator)
        header = next((cells for cells in reader if cells), [])
        # Not divided by this separator: the records are not, either, but for chance.
        is_divided = len(header) > 1 or separator == _SEPARATORS[str(_kind(path))][0]
        records = [cells for cells in reader if cells] if is_divided else []
    check_columns_differ(header)
    for n, cells in enumerate(records, 1):
        if len(cells) != len(header):
            raise _UnreadableError(
                f"record {n} has {len(cells)} cells, the header has {len(header)}, with "
                f"{separator!r} between cells",
                f"put double quotes around cells with {separator!r} in them, or save it as jsonl",
            )
    return _Content(header, (dict(zip(header, cells, strict=True)) for cells in records))


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Read cells of more than the 131,072 characters that the csv module takes by itself."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


# ---------------------------------------------------------------------------- parquet and arrow


def _read_parquet(path: Path) -> _Content:
    # `read_table` would add columns for folders that are named like `split=train`.
    with pq.ParquetFile(path) as parquet:
        schema = parquet.schema_arrow

    def batches() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path) as parquet:
            yield from parquet.iter_batches(batch_size=1024)

    return _Content(check_columns_differ(schema.names), arrow_rows(schema, batches()))


def _read_arrow(path: Path) -> _Content:
    """Arrow's file format, or its stream format, which `datasets` writes."""
    with _open_arrow(path) as reader:
        schema = reader.schema

    def batches() -> Iterator[pa.RecordBatch]:
        with _open_arrow(path) as reader:
            if isinstance(reader, pa.ipc.RecordBatchFileReader):
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                yield from reader

    return _Content(check_columns_differ(schema.names), arrow_rows(schema, batches()))


@contextmanager
def _open_arrow(path: Path) -> Iterator[Any]:
    with pa.memory_map(str(path)) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        with pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream) as reader:
            yield reader


_READERS: Mapping[str, Callable[[Path], _Content]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
_TEXT_KINDS = frozenset({".json", ".jsonl", ".ndjson", ".csv", ".tsv"})
# For messages.
KINDS = f"{', '.join(_READERS)} file (text also as {', '.join(_COMPRESSED)})"
