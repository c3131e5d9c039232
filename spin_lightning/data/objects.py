"""Data that lies in memory already: lists of dictionaries, DataFrames and data sets."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from spin_lightning.data.tables import SourceRow, Table, arrow_rows, check_columns_differ
from spin_lightning.errors import DataError, first_line

_TAKEN = (
    "give a path, a hub id, a list of dictionaries, a pandas DataFrame, a datasets.Dataset or a "
    "pyarrow.Table"
)


def describe(data: object) -> str:
    """A short, stable name for data in memory: its class and number of rows.

    >>> describe([{"prompt": "a", "response": "b"}])
    'a list of 1 row'
    """
    kind = type(data).__name__
    rows = len(data) if hasattr(data, "__len__") else None
    counted = "" if rows is None else f" of {rows} row{'s' * (rows != 1)}"
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}{counted}"


def object_table(data: object, setting: str) -> Table:
    """Open data that lies in memory.

    Args:
        data: A list of dictionaries, a pandas DataFrame, a pyarrow Table, a `datasets.Dataset`, or
            a `DatasetDict` with a split `train`.
        setting: Which setting named it, for messages.

    Raises:
        DataError: It is something else, or its rows have no column names.
    """
    module = type(data).__module__.partition(".")[0]
    if module == "datasets":
        return _dataset_table(data, setting)
    if isinstance(data, pa.Table):
        return _arrow_table(data, setting)
    if module == "pandas" and hasattr(data, "columns"):
        return _frame_table(data, setting)
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        return _list_table(data, setting)
    raise DataError(f"{setting} is {describe(data)}, which is not a source of rows", fix=_TAKEN)


def dataset_table(data: Any, name: str) -> Table:
    """Open a `datasets.Dataset`; only a batch of its rows is in memory at a time."""
    batches = (
        batch
        for table in data.with_format("arrow").iter(batch_size=1000)
        for batch in table.to_batches()
    )
    return Table(name, tuple(data.column_names), arrow_rows(data.features.arrow_schema, batches))


def _dataset_table(data: Any, setting: str) -> Table:
    datasets = sys.modules["datasets"]
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            splits = ", ".join(data)
            raise DataError(
                f"{setting} is a DatasetDict without a split 'train'; it has {splits}",
                fix=f"give one of its splits, such as {setting}=…[{next(iter(data), 'train')!r}]",
            )
        return dataset_table(data["train"], f"{describe(data['train'])}, split train")
    if isinstance(data, datasets.Dataset):
        return dataset_table(data, describe(data))
    raise DataError(
        f"{setting} is {describe(data)}, whose number of rows is not known",
        fix="give a Dataset, or as many rows as you want to use: `list(data.take(10_000))`",
    )


def _arrow_table(data: pa.Table, setting: str) -> Table:
    try:
        names = check_columns_differ(data.column_names)
    except ValueError as error:
        raise _unusable(data, setting, error) from error
    return Table(describe(data), tuple(names), arrow_rows(data.schema, data.to_batches()))


def _frame_table(data: Any, setting: str) -> Table:
    names = [str(name) for name in data.columns]
    try:
        check_columns_differ(names)
    except ValueError as error:
        raise _unusable(data, setting, error) from error
    columns = [data.iloc[:, i] for i in range(len(names))]

    def rows() -> Iterator[SourceRow]:
        for cells in zip(*columns, strict=True):
            # Parquet's structs have all fields in all rows, see `arrow_rows`.
            yield {
                name: _plain(cell, keep_null=False) for name, cell in zip(names, cells, strict=True)
            }

    return Table(describe(data), tuple(names), rows())


def _list_table(data: Sequence[Any], setting: str) -> Table:
    columns: dict[str, None] = {}
    for n, row in enumerate(data):
        if not isinstance(row, Mapping):
            raise DataError(
                f"{setting} is {describe(data)}, and row {n} is {describe(row)}",
                fix="give a dictionary for each row, with the same keys",
            )
        columns.update(dict.fromkeys(row))
    rows = ({name: _plain(cell) for name, cell in row.items()} for row in data)
    return Table(describe(data), tuple(columns), rows)


def _unusable(data: object, setting: str, error: Exception) -> DataError:
    return DataError(
        f"{setting} is {describe(data)} that cannot be used: {first_line(error)}",
        fix="rename or drop a column",
    )


def _plain(value: Any, *, keep_null: bool = True) -> Any:
    """A cell as json would hold it, with None for missing values."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), keep_null=keep_null)
    if isinstance(value, list | tuple):
        return [_plain(item, keep_null=keep_null) for item in value]
    if isinstance(value, Mapping):
        return {
            name: _plain(item, keep_null=keep_null)
            for name, item in value.items()
            if keep_null or item is not None
        }
    if isinstance(value, float) and math.isnan(value):
        return None
    return None if type(value).__name__ in ("NAType", "NaTType") else value
