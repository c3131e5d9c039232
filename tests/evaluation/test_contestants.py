"""Contestants by name: iterates and their mixture."""

import shutil

import pytest

from spin_lightning.errors import SettingError
from spin_lightning.evaluation.contestants import contestants
from spin_lightning.run.folder import RunFolder


@pytest.fixture
def run(finished_run, tmp_path) -> RunFolder:
    """A copy that can be written to."""
    shutil.copytree(finished_run.root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_contestants_are_named_by_number_and_by_what_they_are(run):
    assert [c.label for c in contestants(run, ["last"])] == [
        c.label for c in contestants(run, ["1"])
    ]
    assert len(contestants(run, ["all", "1", "last"])) == 2
    run.write_best(0, "val/real_nll_per_token", 1.0)
    assert contestants(run, ["best"]) == contestants(run, ["0"])
    with pytest.raises(SettingError, match=r"iterates='first'.*best, last, mixture or all"):
        contestants(run, ["first"])
