"""SIGKILL at twenty points of a run: the same command then finishes it with the same bytes."""

from pathlib import Path

import pytest

from spin_lightning.run.folder import RunFolder
from tests.faults.points import POINTS, QUICK, Point
from tests.faults.processes import fit
from tests.toys.runs import contents, logged, recorded, write_examples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl")


@pytest.fixture(scope="module")
def whole_run(tiny_model_dir, data, tmp_path_factory) -> Path:
    """A run without interruption."""
    root: Path = tmp_path_factory.mktemp("whole")
    fit(root, tiny_model_dir, data)
    return root


@pytest.fixture(scope="module")
def whole(whole_run: Path) -> dict[str, str]:
    """The bytes of a run without interruption."""
    files = contents(whole_run)
    assert sum(name.endswith(".parquet") for name in files) == 2 * 4 + 3
    assert sum(name.endswith(".safetensors") for name in files) == 2
    return files


@pytest.mark.parametrize(
    "point",
    [pytest.param(p, id=p.name, marks=[] if p in QUICK else pytest.mark.slow) for p in POINTS],
)
def test_killed_run_ends_with_the_same_bytes(
    point: Point, whole, whole_run, tiny_model_dir, data, tmp_path
):
    fit(tmp_path, tiny_model_dir, data, killed_at=point)
    before, run = contents(tmp_path), RunFolder(tmp_path)
    kept = sum(whole.get(name) == digest for name, digest in before.items())
    resumed = fit(tmp_path, tiny_model_dir, data)
    assert contents(tmp_path) == whole
    assert logged(tmp_path) == logged(whole_run)
    assert recorded(tmp_path) == recorded(whole_run)
    assert run.known_iterates() == [0, 1, 2]
    assert not list(tmp_path.rglob("*.tmp"))
    assert "Traceback" not in resumed.stderr
    print(f"{point.name}: {kept} of {len(whole)} files existed, all are the same after resume")


def test_points_are_twenty_and_all_different():
    assert len(set(POINTS)) == 20
    assert {p.stage for p in QUICK} == {"generation", "rows", "training", "checkpoint"}
