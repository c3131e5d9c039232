"""Rows as a table with texts."""

import pytest

from spin_lightning import load_rows
from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.rows.store import SCHEMA, read_rows


def test_rows_have_texts_and_all_stored_columns(finished_run):
    frame = load_rows(finished_run.root, 1)
    assert list(frame.columns) == ["prompt", "real", "generated", *SCHEMA.names]
    table = read_rows(finished_run.rows(1))
    assert frame["example_id"].tolist() == table.example_id.tolist()
    # Ids 4 to 23 are the words w0 to w19, 1 and 2 are <s> and </s>.
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(20))]
    for name, ids in (("prompt", table.prompt_ids), ("generated", table.generated_ids)):
        assert frame[name][5].split() == [words[i] for i in ids[5]]


def test_held_out_rows_are_those_that_the_iterate_answered(finished_run):
    frame = load_rows(finished_run.root, 4, held_out=True)
    assert len(frame) == len(read_rows(finished_run.val_rows(4)))
    assert set(frame["opponent"]) == {4}


def test_rows_have_the_names_of_iterates(finished_run):
    for name, t in (("last", 4), ("best", finished_run.best())):
        frame = load_rows(finished_run.root, name, held_out=True)
        assert frame.equals(load_rows(finished_run.root, t, held_out=True))
    with pytest.raises(SettingError, match="iterate='lsat': there is no such iterate"):
        load_rows(finished_run.root, "lsat")


def test_rows_that_were_not_made_are_one_error(finished_run):
    with pytest.raises(RunFolderError, match="not finished"):
        load_rows(finished_run.root, 4)
