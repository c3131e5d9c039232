"""Files of a small MT-Bench, and a chat model's run to answer it."""

import shutil
from pathlib import Path

import pytest

from spin_lightning.run.folder import RunFolder
from tests.evaluation.mt_bench.bench import write_chat_model, write_small_bench
from tests.toys.runs import play, write_examples


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Path:
    return write_small_bench(tmp_path_factory.mktemp("bench") / "mt_bench")


@pytest.fixture(scope="session")
def chat_run(tiny_model_dir, tmp_path_factory) -> RunFolder:
    """Two iterates of a chat model. Not to be written to: copy it."""
    folder = tmp_path_factory.mktemp("chat")
    model = write_chat_model(tiny_model_dir, folder / "model")
    play(folder / "run", model, write_examples(folder / "examples.jsonl"), epochs=1)
    return RunFolder(folder / "run")


@pytest.fixture
def run(chat_run, tmp_path) -> RunFolder:
    shutil.copytree(chat_run.root, tmp_path / "run")
    return RunFolder(tmp_path / "run")
