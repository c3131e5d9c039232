"""Tasks of lm-evaluation-harness on the tiny model's words."""

from pathlib import Path

import pytest

from tests.toys.tasks import write_tasks


@pytest.fixture(scope="session")
def toy_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "toy")
