"""A finished run of five iterates, for everything that reads one."""

from pathlib import Path

import pytest

from spin_lightning.run.folder import RunFolder
from tests.toys.runs import play, write_examples
from tests.toys.tasks import write_tasks


@pytest.fixture(scope="session")
def finished_run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Iterates 0 to 4 of SPIN on the tiny model. Copy it before you write to it."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_examples(folder / "examples.jsonl")
    play(folder / "run", tiny_model_dir, data, epochs=4)
    return RunFolder(folder / "run")


@pytest.fixture(scope="session")
def toy_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "toy")
