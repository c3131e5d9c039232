"""What the tests of the command line share."""

from pathlib import Path

import pytest

from spin_lightning.cli.main import main
from tests.toys.command_line import CommandLine, fit_arguments
from tests.toys.runs import write_examples


@pytest.fixture
def spin(monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Run the command line in this process, as if called with these arguments."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["spin-lightning", *map(str, arguments)])
        main()

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl")


@pytest.fixture(scope="session")
def finished(tiny_model_dir, data, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        arguments = fit_arguments(root, tiny_model_dir, data)
        patch.setattr("sys.argv", ["spin-lightning", *map(str, arguments)])
        main()
    return root
