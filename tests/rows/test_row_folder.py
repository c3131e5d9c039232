"""A folder of rows as other programs read it, and folders in the layout of earlier versions."""

import shutil
from pathlib import Path

import datasets
import pandas as pd
import pyarrow.dataset
import pytest

from spin_lightning import load_rows
from spin_lightning.report.report import write_report
from spin_lightning.report.run_view import read_runs
from spin_lightning.rows.store import SCHEMA, read_rows
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import contents, play, recorded, write_examples


def to_earlier_layout(root: Path) -> None:
    """Move what a run of this version writes to where earlier versions wrote it."""
    for manifest in sorted(root.rglob("__about__/manifest.json")):
        manifest.rename(manifest.parent.parent / "manifest.json")
        manifest.parent.rmdir()
    for rows in sorted(root.glob("rows/*/__held_out__")):
        rows.rename(rows.with_name("val"))


def in_this_layout(files: dict[str, str]) -> dict[str, str]:
    return {name.replace("/val/", "/__held_out__/"): digest for name, digest in files.items()}


def pandas_rows(folder: Path, _cache: Path) -> pd.DataFrame:
    return pd.read_parquet(folder)


def pyarrow_rows(folder: Path, _cache: Path) -> pd.DataFrame:
    return pyarrow.dataset.dataset(folder).to_table().to_pandas()


def datasets_rows(folder: Path, cache: Path) -> pd.DataFrame:
    found = datasets.load_dataset("parquet", data_dir=str(folder), cache_dir=str(cache))
    assert list(found) == ["train"]
    return found["train"].to_pandas()


@pytest.mark.parametrize("read", [pandas_rows, pyarrow_rows, datasets_rows])
@pytest.mark.parametrize("held_out", [False, True])
def test_other_programs_read_the_rows_of_a_folder_and_no_others(
    read, held_out, finished_run, tmp_path
):
    # Files of batches that were not finite, and a part that a crash left, are no rows either.
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished_run.root, run.root)
    folder = run.val_rows(1) if held_out else run.rows(1)
    (folder / "__about__/not_finite-00000.json").write_text("{}")
    (folder / ".part-00009.parquet.tmp").write_bytes(b"PAR1")
    frame, table = read(folder, tmp_path / "cache"), read_rows(folder)
    assert list(frame.columns) == SCHEMA.names
    assert frame["seed"].tolist() == table.seed.tolist()
    assert len(frame) == len(table) > 0


def test_run_in_the_layout_of_an_earlier_version_is_read_and_reported(finished_run, tmp_path):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished_run.root, run.root)
    to_earlier_layout(run.root)
    assert not list(run.root.rglob("__*__"))
    for t in range(4):
        assert load_rows(run.root, t).equals(load_rows(finished_run.root, t))
    for t in range(5):
        own = load_rows(finished_run.root, t, held_out=True)
        assert load_rows(run.root, t, held_out=True).equals(own)
    pages = [
        write_report(read_runs([RunFolder(root)]), tmp_path / name).read_text()
        for name, root in (("earlier", run.root), ("this", finished_run.root))
    ]
    assert pages[0].count("<tr") == pages[1].count("<tr") > 10


def test_run_in_the_layout_of_an_earlier_version_continues_with_the_same_bytes(
    tiny_model_dir, tmp_path
):
    data = write_examples(tmp_path / "examples.jsonl")
    whole, root = tmp_path / "whole", tmp_path / "run"
    play(whole, tiny_model_dir, data, epochs=2)
    play(root, tiny_model_dir, data, epochs=1)
    to_earlier_layout(root)
    # As if it had been stopped while it answered the held-out examples.
    (root / "rows/iterate_001/val/manifest.json").unlink()
    before = set(contents(root))
    last = RunFolder(root).last_checkpoint
    play(root, tiny_model_dir, data, epochs=2, ckpt_path=last)
    assert before <= set(contents(root))
    assert in_this_layout(contents(root)) == contents(whole)
    assert recorded(root) == recorded(whole)
    assert len(read_rows(RunFolder(root).val_rows(1))) == len(
        read_rows(RunFolder(whole).val_rows(1))
    )
    (kept,) = (root / "rows/iterate_000").glob("*manifest.json")
    assert kept.name == "manifest.json"
