"""Where a run's files lie, and that they are written whole or not at all."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from spin_lightning.errors import RunFolderError
from spin_lightning.run.files import replace_synced, write_json
from spin_lightning.run.folder import ITERATE_FILE, RunFolder


@pytest.fixture
def run(tmp_path):
    """A run with iterates 0 to 3 and the rows that made them."""
    run = RunFolder(tmp_path / "run")
    for t in range(4):
        run.write_iterate(t, {"index": t})
        run.val_rows(t).mkdir(parents=True)
    return run


@pytest.fixture
def crash(monkeypatch):
    """A process that dies the moment a finished file would take its place."""

    def die(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)


# ------------------------------------------------------------------------------------------- paths


def test_paths_are_those_of_the_documented_layout():
    run = RunFolder(Path("r"))
    assert [
        run.iterate(0),
        run.iterate(12),
        run.rows(3),
        run.val_rows(3),
        run.tokenizer,
        run.last_checkpoint,
        run.report,
    ] == [
        Path("r/iterates/iterate_000"),
        Path("r/iterates/iterate_012"),
        Path("r/rows/iterate_003"),
        Path("r/rows/iterate_003/val"),
        Path("r/tokenizer"),
        Path("r/checkpoints/last.ckpt"),
        Path("r/report"),
    ]


# ---------------------------------------------------------------------------------------- iterates


def test_known_iterates_are_the_finished_ones_in_order_of_number(tmp_path):
    run = RunFolder(tmp_path)
    assert run.known_iterates() == []
    for t in (1000, 2, 999):
        run.write_iterate(t, {})
    run.iterate(5).mkdir()
    write_json(run.staged_iterate(7) / "iterate.json", {})
    assert run.known_iterates() == [2, 999, 1000]
    assert run.iterate_folders() == {t: run.iterate(t) for t in (2, 999, 1000)}


def test_read_iterate_gives_back_what_was_written(run):
    fields = {"index": 2, "metrics": {"val/loss": 0.6931471805599453}, "parent": None}
    run.write_iterate(2, fields)
    assert run.read_iterate(2) == fields


def test_read_iterate_that_is_not_there_says_which_are(run, tmp_path):
    with pytest.raises(RunFolderError, match=r"run has no iterate 9; it has \[0, 1, 2, 3\].*Fix: "):
        run.read_iterate(9)
    with pytest.raises(RunFolderError, match="no iterate 0; it has none"):
        RunFolder(tmp_path / "empty").read_iterate(0)


def test_staged_iterate_is_empty_again_after_a_crash(run):
    (run.staged_iterate(4) / "half").write_text("an adapter")
    assert list(run.staged_iterate(4).iterdir()) == []


@pytest.mark.parametrize("t", [0, 2, 3])
def test_discard_after_keeps_iterates_to_t_and_the_rows_that_made_them(run, t):
    run.discard_after(t)
    assert run.known_iterates() == list(range(t + 1))
    assert sorted(run.root.glob("rows/*")) == [run.rows(s) for s in range(t)]


def test_discard_after_in_a_folder_without_rows_does_nothing(tmp_path):
    RunFolder(tmp_path).discard_after(0)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------- writing


def test_write_json_makes_the_folder_and_leaves_the_file_alone(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": [1, 2], "a": "é"})
    assert json.loads(path.read_text()) == {"a": "é", "b": [1, 2]}
    assert list(path.parent.iterdir()) == [path]


def test_write_json_does_not_depend_on_the_order_of_keys(tmp_path):
    write_json(tmp_path / "one", {"a": 1, "b": 2})
    write_json(tmp_path / "other", {"b": 2, "a": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_write_json_that_crashes_leaves_the_old_file(run, crash):
    with pytest.raises(KeyboardInterrupt):
        run.write_iterate(1, {"index": "new"})
    assert run.read_iterate(1) == {"index": 1}


def test_write_json_of_what_json_cannot_hold_leaves_the_old_file(run):
    with pytest.raises(TypeError, match="not JSON serializable"):
        run.write_iterate(1, {"index": object()})
    assert run.read_iterate(1) == {"index": 1}


def test_replace_synced_puts_a_folder_in_the_place_of_an_old_one(run):
    staged = run.staged_iterate(1)
    (staged / "inner").mkdir()
    (staged / "inner" / "new").write_text("new")
    (run.iterate(1) / "stale").write_text("old")
    replace_synced(staged, run.iterate(1))
    assert [p.name for p in run.iterate(1).rglob("*")] == ["inner", "new"]
    assert not staged.exists()


def test_replace_synced_moves_between_syncing_every_file_and_the_folder(tmp_path, monkeypatch):
    events, sync, move = [], os.fsync, Path.replace

    def synced(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def moved(self, target):
        events.append("moved")
        return move(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", moved)
    files = [tmp_path / "staged" / name for name in ("a.bin", "inner/b.bin")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    on_disk = {file.stat().st_ino for file in files}
    replace_synced(tmp_path / "staged", tmp_path / "done")
    assert set(events[:2]) == on_disk
    assert events[2:] == ["moved", tmp_path.stat().st_ino]


@pytest.mark.parametrize("damage", ["edited", "missing"])
def test_check_iterate_with_a_file_that_is_not_what_was_written_names_it(damage, run):
    folder = run.iterate(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    run.write_iterate(1, {"index": 1, "files": {"adapter_model.safetensors": digest}})
    run.check_iterate(1)
    if damage == "edited":
        (folder / "adapter_model.safetensors").write_bytes(b"weightz")
    else:
        (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(RunFolderError, match=r"adapter_model.safetensors is .*Fix: restore it"):
        run.check_iterate(1)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_record_of_an_iterate_that_is_damaged_is_one_clear_error(content, run):
    run.write_iterate(1, {"index": 1})
    (run.iterate(1) / ITERATE_FILE).write_bytes(content)
    with pytest.raises(RunFolderError, match=r"iterate.json is damaged.*Fix: restore it"):
        run.read_iterate(1)
