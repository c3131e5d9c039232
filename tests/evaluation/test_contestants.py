"""Contestants by name, and identities that change with the weights."""

from dataclasses import replace

import pytest

from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.evaluation.contestants import contestants, current_contestants, label_of
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import IterateRecord


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """The records of three iterates."""
    run = RunFolder(tmp_path / "run")
    for t in range(3):
        base, files = {"name": "tiny"}, {"adapter_model.safetensors": f"hash of {t}"}
        run.write_record(IterateRecord(t, base=base, files=files, fingerprint=f"of {t}"))
    return run


def test_contestants_are_named_by_number_and_by_what_they_are(run):
    assert [c.label for c in contestants(run, ["1"])] == ["p1"]
    assert contestants(run, ["last"]) == contestants(run, ["2"])
    assert [c.name for c in contestants(run, ["all", "1", "last"])] == [
        "iterate_000",
        "iterate_001",
        "iterate_002",
    ]
    assert contestants(run, []) == contestants(run, ["all"])
    run.write_best(0, "val/real_nll_per_token", 1.0)
    assert contestants(run, ["best"]) == contestants(run, ["0"])
    with pytest.raises(SettingError, match=r"iterate='first'.*best or last.* mixture .*also all"):
        contestants(run, ["first"])


def test_contestant_that_is_not_there_is_refused(run, tmp_path):
    with pytest.raises(RunFolderError, match=r"has no iterate 9; it has \[0, 1, 2\]"):
        contestants(run, ["9"])
    for name in ("all", "last", "mixture"):
        with pytest.raises(RunFolderError, match="has no iterate 0; it has none"):
            contestants(RunFolder(tmp_path / "empty"), [name])


def test_mixture_has_equal_weights_and_changes_with_each_of_its_iterates(run):
    (mixture,) = contestants(run, ["mixture"])
    assert (mixture.name, mixture.label) == ("mixture", "mixture")
    assert mixture.mixture.weights == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})
    before = contestants(run, ["all", "mixture"])
    run.write_record(replace(run.record(1), files={"adapter_model.safetensors": "another"}))
    after = contestants(run, ["all", "mixture"])
    changed = [a.name for a, b in zip(before, after, strict=True) if a.identity != b.identity]
    assert changed == ["iterate_001", "mixture"]


def test_current_contestants_are_all_iterates_and_their_mixture(run):
    assert current_contestants(run, run.records()) == contestants(run, ["all", "mixture"])
    assert current_contestants(run, []) == []


def test_records_are_read_once_for_all_contestants(run, monkeypatch):
    read = []
    record = RunFolder.record
    monkeypatch.setattr(RunFolder, "record", lambda self, t: read.append(t) or record(self, t))
    contestants(run, ["all", "1", "mixture", "last"])
    assert sorted(read) == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "label"), [("iterate_002", "p2"), ("iterate_1000", "p1000"), ("mixture", "mixture")]
)
def test_label_is_short(name, label):
    assert label_of(name) == label
