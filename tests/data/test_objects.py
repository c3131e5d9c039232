import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from spin_lightning.data.formats import read_data
from spin_lightning.data.sources import source_name
from spin_lightning.errors import DataError
from spin_lightning.types import Conversation

ROWS = [{"prompt": f"q{i}", "response": f"a{i}", "score": i} for i in range(3)]
EXPECTED = [Conversation(i, ({"role": "user", "content": f"q{i}"},), f"a{i}") for i in range(3)]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def refusal(data: object, setting: str = "data") -> str:
    with pytest.raises(DataError) as caught:
        read_data(data, setting=setting)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (ROWS, "a list of 3 rows"),
        (tuple(ROWS), "a tuple of 3 rows"),
        (pd.DataFrame(ROWS), "a DataFrame of 3 rows"),
        (pd.DataFrame(ROWS, index=[7, 7, 9]), "a DataFrame of 3 rows"),
        (pa.Table.from_pylist(ROWS), "a Table of 3 rows"),
        (datasets.Dataset.from_list(ROWS), "a Dataset of 3 rows"),
        (datasets.Dataset.from_list(ROWS).with_format("numpy"), "a Dataset of 3 rows"),
        (datasets.Dataset.from_list(ROWS[::-1]).select([2, 1, 0]), "a Dataset of 3 rows"),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": None}),
            "a DatasetDict of 2 rows",
        ),
    ],
)
def test_data_in_memory_is_read_like_a_file(data, name):
    conversations, report = read_data(data)
    assert conversations == EXPECTED
    assert report.columns_used == {"prompt": 3, "response": 3}
    assert report.columns_not_used == {"score": 3}
    assert source_name(data) == name
    assert report.source == f"data ({name})"


def test_frame_of_parquet_gives_its_chats_back(tmp_path):
    datasets.Dataset.from_list([{"messages": CHAT}] * 2).to_parquet(tmp_path / "x.parquet")
    frame = pd.read_parquet(tmp_path / "x.parquet")
    assert isinstance(frame["messages"][0], np.ndarray)
    assert read_data(frame)[0] == [Conversation(i, (CHAT[0],), "a") for i in range(2)]


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, pd.NA, pd.NaT])
def test_missing_cells_of_a_frame_are_missing(missing):
    frame = pd.DataFrame({"prompt": ["q", "q"], "response": ["a", missing], "x": [missing] * 2})
    conversations, report = read_data(frame)
    assert [c.example_id for c in conversations] == [0]
    assert report.reasons == {"a response that is not text": 1}
    assert report.columns_not_used == {"x": 0}


def test_explicit_nulls_of_a_list_stay():
    call = {"function": {"name": "f", "arguments": {"limit": None}}}
    rows = [{"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}]
    assert read_data(rows)[0][0].tool_calls == (call,)


def test_rows_are_not_changed():
    rows = [{"messages": [dict(m) for m in CHAT]}]
    read_data(rows)
    assert rows == [{"messages": CHAT}]


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ([ROWS[0], "x"], ["data is a list of 2 rows, and row 1 is", "a dictionary for each row"]),
        ([ROWS[0], CHAT], ["row 1 is a list of 2 rows"]),
        ([3], ["row 0 is an int"]),
        (3, ["data is an int, which is not a source of rows", "give a path"]),
        (None, ["data is a NoneType"]),
        (ROWS[0], ["data is a dict of 3 rows, which is not a source"]),
        (iter(ROWS), ["data is a list_iterator, which is not a source"]),
        ([], ["is empty, it has no rows"]),
        (pd.DataFrame(), ["is empty, it has no rows"]),
        (pd.DataFrame([["q", "a"]], columns=["x", "x"]), ["the column 'x' twice"]),
        (pd.Series(["a"]), ["data is a Series of 1 row, which is not a source"]),
        (
            datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}),
            ["without a split 'train'; it has test", "data=…['test']"],
        ),
        (
            datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
            ["data is an IterableDataset", "list(data.take(10_000))"],
        ),
    ],
)
def test_other_object_is_refused_with_what_is_taken(data, parts):
    said = refusal(data)
    assert [part for part in [*parts, "Fix: "] if part not in said] == []


def test_setting_is_named():
    assert refusal(3, "val_data").startswith("val_data is an int")
