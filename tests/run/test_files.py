"""Files of a run: written atomically, and refused with one error where they are damaged."""

import json
import os
from pathlib import Path

import pytest

from spin_lightning.errors import RunFolderError
from spin_lightning.run.files import (
    append_line,
    read_json,
    read_lines,
    replace_synced,
    write_json,
)
from spin_lightning.run.validation import TEXT, check_fields


def test_write_json_makes_the_folder_and_leaves_the_file_alone(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": [1, 2], "a": "é"})
    assert json.loads(path.read_text()) == {"a": "é", "b": [1, 2]}
    assert list(path.parent.iterdir()) == [path]


def test_write_json_does_not_depend_on_the_order_of_keys(tmp_path):
    write_json(tmp_path / "one", {"a": 1, "b": 2})
    write_json(tmp_path / "other", {"b": 2, "a": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_write_json_that_crashes_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"a": 1})

    def die(self, target):
        """The process dies the moment a finished file would take its place."""
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {"a": "new"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_write_json_of_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_replace_synced_puts_a_folder_in_the_place_of_an_old_one(tmp_path):
    staged, folder = tmp_path / ".staged", tmp_path / "folder"
    (staged / "inner").mkdir(parents=True)
    (staged / "inner" / "new").write_text("new")
    folder.mkdir()
    (folder / "stale").write_text("old")
    replace_synced(staged, folder)
    assert [p.name for p in folder.rglob("*")] == ["inner", "new"]
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


# ----------------------------------------------------------------------------------------- reading


def named(content: object) -> str:
    """The name in a record."""
    return str(check_fields(content, {"name": TEXT}, required=["name"])["name"])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": 3}', b"\xff", b"[" * 10**5])
def test_read_json_of_a_damaged_file_is_one_error_with_the_fix(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"a.json is damaged \(.+\). Fix: delete it"):
        read_json(path, "delete it", named)
    path.write_text('{"name": "x"}')
    assert read_json(path, "delete it", named) == "x"


def test_lines_that_are_appended_are_read_back(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    assert read_lines(path, named) == []
    names = ["a", "two\nlines", "separated\u2028here", "\u00e9"]
    for name in names:
        append_line(path, {"name": name})
    assert read_lines(path, named) == names


def test_last_line_that_a_crash_left_incomplete_is_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"name": "a"})
    before = path.read_bytes()
    path.write_bytes(before + b'{"name": "b')
    assert read_lines(path, named) == ["a"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["", "{", "[]", '{"name": 3}', "[" * 10**5])
def test_line_that_is_damaged_is_one_error_with_its_number(line, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"name": "a"}}\n{line}\n{{"name": "c"}}\n')
    with pytest.raises(
        RunFolderError, match=r"line 2 of .*lines.jsonl is damaged.*delete this line"
    ):
        read_lines(path, named)
