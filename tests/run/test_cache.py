"""The user's cache: complete folders only, made by one process at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from spin_lightning.run.cache import cache_root, make_once

# Makes a folder slowly, and counts how often that happens.
SLOW = """
import sys, time
from pathlib import Path
from spin_lightning.run.cache import make_once

def make(folder):
    with Path(sys.argv[2]).open("a") as counted:
        counted.write("made\\n")
    folder.mkdir()
    time.sleep(0.5)
    (folder / "file").write_text("whole")

print((make_once(Path(sys.argv[1]), make) / "file").read_text())
"""


def test_cache_root_follows_the_environment(monkeypatch):
    monkeypatch.setenv("SPIN_LIGHTNING_CACHE", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/somewhere")
    monkeypatch.delenv("SPIN_LIGHTNING_CACHE")
    assert cache_root() == Path("/xdg/spin-lightning")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "spin-lightning"


def test_make_once_of_three_processes_one_makes_and_the_others_wait(tmp_path):
    arguments = [sys.executable, "-c", SLOW, str(tmp_path / "cache" / "one"), str(tmp_path / "n")]
    started = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in started] == ["whole\n"] * 3
    assert (tmp_path / "n").read_text() == "made\n"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["one"]


def test_make_once_that_fails_leaves_nothing_and_may_be_tried_again(tmp_path):
    def fails(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("")
        raise ValueError

    with pytest.raises(ValueError):
        make_once(tmp_path / "one", fails)
    assert list(tmp_path.iterdir()) == []
    assert make_once(tmp_path / "one", Path.mkdir).is_dir()
    assert make_once(tmp_path / "one", fails).is_dir()
