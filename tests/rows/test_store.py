"""Rows in parquet parts: the same to the byte, and refused where they are damaged."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from spin_lightning.errors import RunFolderError
from spin_lightning.rows.store import (
    SCHEMA,
    part_matches,
    part_path,
    read_rows,
    write_part,
)
from spin_lightning.types import Row
from tests.toys.rows import REAL_ONLY, ROW, write_rows

# The documented schema of rows.
TYPES = {
    "example_id": "int64",
    "sample": "int32",
    "prompt_ids": "list<element: int32>",
    "real_ids": "list<element: int32>",
    "generated_ids": "list<element: int32>",
    "opponent": "int32",
    "finished": "bool",
    "real_finished": "bool",
    "members": "list<element: int32>",
    "member_real_logps": "list<element: double>",
    "member_generated_logps": "list<element: double>",
    "token_alpha": "double",
    "token_members": "list<element: int32>",
    "token_real_logps": "list<element: double>",
    "token_generated_logps": "list<element: double>",
    "seed": "int64",
}

TOKEN_MIXTURE = {
    "token_alpha": 0.3,
    "token_members": (0, 1),
    "token_real_logps": (-1.1, -1.2),
    "token_generated_logps": (-2.1, -2.2),
}


def changed(**values: Any) -> Row:
    return replace(ROW, **values)


def keyed(*keys: int) -> list[Row]:
    return [changed(seed=key) for key in keys]


def torn(path: Path, share: float) -> None:
    """Truncate a file, as a full disk or an interrupted copy does."""
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


# ------------------------------------------------------------------------ parts


def test_part_has_the_columns_and_types_of_the_architecture(tmp_path):
    write_part(tmp_path, 0, [ROW])
    schema = pq.read_schema(part_path(tmp_path, 0))
    assert {column.name: str(column.type) for column in schema} == TYPES
    assert schema.equals(SCHEMA)


def test_part_has_a_column_for_every_field_of_a_row():
    assert [field.name for field in fields(Row)] == SCHEMA.names


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(ROW, id="pair"),
        pytest.param(changed(**REAL_ONLY), id="no opponent"),
        pytest.param(changed(generated_ids=(), finished=False), id="empty response"),
        pytest.param(changed(**TOKEN_MIXTURE), id="token mixture"),
        pytest.param(changed(seed=-(2**63)), id="lowest key"),
        pytest.param(changed(seed=2**63 - 1), id="highest key"),
        pytest.param(changed(member_real_logps=(-1500.1 - 1e-12, -1 / 3)), id="float64"),
    ],
)
def test_row_written_and_read_is_the_same(row, tmp_path):
    write_part(tmp_path, 0, [row, ROW])
    first, second = pq.read_table(part_path(tmp_path, 0)).to_pylist()
    tuples = {name: tuple(v) if isinstance(v, list) else v for name, v in first.items()}
    assert Row(**tuples) == row
    assert second["seed"] == ROW.seed


def test_part_written_twice_is_the_same_to_the_byte(tmp_path):
    for folder in ("a", "b"):
        write_part(tmp_path / folder, 3, keyed(1, 2))
    first, second = (part_path(tmp_path / folder, 3).read_bytes() for folder in ("a", "b"))
    assert first == second


def test_part_whose_writing_fails_leaves_what_was_there(tmp_path):
    write_part(tmp_path, 0, keyed(1))
    before = part_path(tmp_path, 0).read_bytes()
    with pytest.raises(OverflowError):
        write_part(tmp_path, 0, keyed(2**63))
    assert part_path(tmp_path, 0).read_bytes() == before


def test_part_alone_is_left_where_it_was_written(tmp_path):
    write_part(tmp_path / "deep" / "folder", 12, [ROW])
    assert [path.name for path in (tmp_path / "deep/folder").iterdir()] == ["part-00012.parquet"]


# ------------------------------------------------------------------------ part_matches


@pytest.mark.parametrize(
    ("keys", "matches"),
    [
        ([5, -6], True),
        ([-6, 5], False),
        ([5], False),
        ([5, -6, 7], False),
        ([5, 6], False),
        ([], False),
    ],
)
def test_part_matches_just_its_own_keys_in_their_order(keys, matches, tmp_path):
    write_part(tmp_path, 0, keyed(5, -6))
    assert part_matches(tmp_path, 0, {"seed": keys}) is matches


def test_part_that_is_not_there_matches_nothing(tmp_path):
    write_part(tmp_path, 0, keyed(5))
    assert not part_matches(tmp_path, 1, {"seed": [5]})


@pytest.mark.parametrize("share", [0.0, 0.002, 0.5, 0.99])
def test_part_torn_counts_as_absent(share, tmp_path):
    write_part(tmp_path, 0, keyed(5, -6))
    torn(part_path(tmp_path, 0), share)
    assert not part_matches(tmp_path, 0, {"seed": [5, -6]})


def test_part_with_one_bit_flipped_is_named_and_counts_as_absent(tmp_path, caplog):
    write_part(tmp_path, 0, keyed(5, -6))
    path = part_path(tmp_path, 0)
    content = bytearray(path.read_bytes())
    # The response ids 8, 2 of the first data page, as parquet's dictionary holds them.
    place = content.index((8).to_bytes(4, "little") + (2).to_bytes(4, "little"))
    content[place] ^= 1
    path.write_bytes(content)
    assert not part_matches(tmp_path, 0, {"seed": [5, -6]})
    assert "part-00000.parquet is damaged" in caplog.text


def test_part_with_other_columns_counts_as_absent(tmp_path):
    write_part(tmp_path, 0, keyed(5))
    table = pq.read_table(part_path(tmp_path, 0)).drop_columns("sample")
    pq.write_table(table, part_path(tmp_path, 0))
    assert not part_matches(tmp_path, 0, {"seed": [5]})


# ------------------------------------------------------------------------ read_rows


def test_read_rows_without_manifest_says_that_rows_are_missing(tmp_path):
    write_part(tmp_path, 0, [ROW])
    with pytest.raises(RunFolderError, match=r"not finished.*Fix: start the run again"):
        read_rows(tmp_path)


def test_read_rows_of_another_number_than_the_manifest_says_is_refused(tmp_path):
    write_rows(tmp_path, [ROW], rows=2)
    with pytest.raises(RunFolderError, match=r"has 1 rows, but its manifest lists 2. Fix: delete"):
        read_rows(tmp_path)


def test_read_rows_with_a_part_missing_is_refused(tmp_path):
    write_rows(tmp_path, [ROW], [ROW])
    part_path(tmp_path, 1).unlink()
    with pytest.raises(RunFolderError, match=r"part-00001.*Fix: "):
        read_rows(tmp_path)


def test_read_rows_with_a_part_torn_is_refused(tmp_path):
    write_rows(tmp_path, [ROW], [ROW])
    torn(part_path(tmp_path, 1), 0.5)
    with pytest.raises(RunFolderError, match=r"part-00001.*Fix: "):
        read_rows(tmp_path)


def test_read_rows_of_a_later_schema_is_refused(tmp_path):
    path = write_rows(tmp_path, [ROW]) / "__about__/manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(RunFolderError, match=r"2.*Fix: "):
        read_rows(tmp_path)


def test_read_rows_gives_columns_in_the_order_of_the_parts(tmp_path):
    other = changed(
        example_id=9,
        prompt_ids=(1,),
        real_ids=(2,),
        generated_ids=(9, 9, 9, 9),
        opponent=0,
        finished=False,
        real_finished=False,
        member_real_logps=(-7.0, -8.0),
        member_generated_logps=(-9.0, -10.0),
    )
    table = read_rows(write_rows(tmp_path, [ROW], [other, ROW]))
    assert len(table) == 3
    assert table.members == (0, 2)
    columns = {
        "example_id": [7, 9, 7],
        "opponent": [1, 0, 1],
        "finished": [True, False, True],
        "real_finished": [True, False, True],
    }
    for name, values in columns.items():
        assert getattr(table, name).tolist() == values, name
    lists = {
        "prompt_ids": [[1, 4, 5], [1], [1, 4, 5]],
        "real_ids": [[6, 7, 2], [2], [6, 7, 2]],
        "generated_ids": [[8, 2], [9, 9, 9, 9], [8, 2]],
    }
    for name, values in lists.items():
        column = getattr(table, name)
        assert [column[i].tolist() for i in range(len(column))] == values, name
        assert column.lengths.tolist() == [len(ids) for ids in values], name
        assert column[0].dtype == np.int32, name
    assert {m: v.tolist() for m, v in table.real_logps.items()} == {
        0: [-1.25, -7.0, -1.25],
        2: [-2.5, -8.0, -2.5],
    }
    assert {m: v.tolist() for m, v in table.generated_logps.items()} == {
        0: [-3.0, -9.0, -3.0],
        2: [-0.5, -10.0, -0.5],
    }
    assert table.real_logps[0].dtype == torch.float64


def test_read_rows_without_opponents_has_minus_one_and_no_logps(tmp_path):
    table = read_rows(write_rows(tmp_path, [changed(**REAL_ONLY)] * 2))
    assert table.opponent.tolist() == [-1, -1]
    assert table.generated_ids.lengths.tolist() == [0, 0]
    assert table.members == ()
    assert not table.real_logps
    assert not table.generated_logps
