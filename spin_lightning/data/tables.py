"""Rows with named columns: what every source is read into, files, hub data sets and objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from spin_lightning.errors import first_line

SourceRow = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """One file or object.

    Attributes:
        name: Its name in messages.
        columns: Names of the columns, in their order.
        rows: The rows, which can be iterated once. A row may lack columns.
    """

    name: str
    columns: tuple[str, ...]
    rows: Iterable[SourceRow]


def check_columns_differ(names: Sequence[str]) -> Sequence[str]:
    """Refuse a name that two columns have: one of them would be lost.

    Raises:
        ValueError: A name occurs twice.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"it has the column {name!r} twice")
        seen.add(name)
    return names


def arrow_rows(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[SourceRow]:
    """Rows of Arrow's batches as Python values, a batch at a time.

    Arrow gives every struct all fields that any row has. Those that a row left out are null, and
    are left out again.

    Raises:
        ValueError: A value that Python cannot hold.
    """
    decoders = [_decoder(kind) for kind in schema.types]
    for batch in batches:
        columns = [
            _cells(batch.column(i), schema.names[i], decode) for i, decode in enumerate(decoders)
        ]
        for cells in zip(*columns, strict=True):
            yield dict(zip(schema.names, cells, strict=True))


_Decoder = Callable[[Any], Any]


def _cells(column: pa.Array, name: str, decode: _Decoder | None) -> list[Any]:
    try:
        cells = column.to_pylist()
        return cells if decode is None else [decode(cell) for cell in cells]
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError) as error:  # a date that Python has no number for
        raise ValueError(f"column {name!r}: {first_line(error)}") from error


def _decoder(kind: pa.DataType) -> _Decoder | None:
    """What turns a cell of a type into plain values; None where it is plain already."""
    if isinstance(kind, pa.JsonType):
        return lambda cell: None if cell is None else json.loads(cell)
    if pa.types.is_struct(kind):
        return _struct_decoder({field.name: _decoder(field.type) for field in kind})
    if any(test(kind) for test in _LISTS) and (decode := _decoder(kind.value_type)) is not None:
        return lambda cell: None if cell is None else [decode(value) for value in cell]
    return None


_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def _struct_decoder(fields: Mapping[str, _Decoder | None]) -> _Decoder:
    def decode(cell: Any) -> Any:
        if cell is None:
            return None
        filled = ((name, value) for name, value in cell.items() if value is not None)
        return {
            name: value if (inner := fields[name]) is None else inner(value)
            for name, value in filled
        }

    return decode
