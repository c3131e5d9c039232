"""Whether all processes see one run folder."""

import errno
import fcntl
import threading

import pytest

from spin_lightning.callbacks.requirements import new_run
from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.run.lock import FolderLock
from spin_lightning.run.shared import View, check_shared, place_mark, sees, wait_for_file


def test_mark_is_seen_in_its_folder_and_in_no_other(tmp_path):
    mark = place_mark(tmp_path / "run")
    assert sees(mark, patience=0)
    assert not sees(tmp_path / mark.name, patience=0)


def test_folder_is_refused_with_the_ranks_that_do_not_see_the_mark(tmp_path):
    views = [View(0, "node0", True), View(1, "node0", True), View(2, "node1", False)]
    check_shared(tmp_path, views[:2])
    with pytest.raises(RunFolderError, match=r"rank 0 on node0 wrote .* that rank 2 on node1 ca"):
        check_shared(tmp_path, views)


def test_file_of_another_machine_is_waited_for(tmp_path):
    file = tmp_path / "iterate.json"
    timer = threading.Timer(0.3, file.touch)
    timer.start()
    wait_for_file(file, patience=10)
    timer.join()
    with pytest.raises(RunFolderError, match=r"not visible on .* after 0 s"):
        wait_for_file(tmp_path / "manifest.json", patience=0)


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "SLURM_NTASKS"])
def test_processes_started_together_have_to_name_their_folder(variable, monkeypatch):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(SettingError, match=r"trainer.default_root_dir=None: .* its own"):
        new_run("SPIN")


def test_file_system_without_locks_is_named_as_the_problem(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(RunFolderError, match=r"has no locks .No locks available"):
        FolderLock(tmp_path).acquire(patience=0)
