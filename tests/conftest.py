"""Fixtures that many tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.run.folder import RunFolder
from spin_lightning.testbed import TestbedPaths, ensure
from tests.toys.adapters import write_adapter
from tests.toys.models import write_tiny_model
from tests.toys.runs import play, write_examples


@pytest.fixture(autouse=True)
def _same_random_state() -> Iterator[None]:
    """Start each test from one random state, whatever ran before; restore the announced seed."""
    torch.manual_seed(0)
    seed = os.environ.get("PL_GLOBAL_SEED")
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
    if seed is not None:
        os.environ["PL_GLOBAL_SEED"] = seed


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama and a word-level tokenizer that adds BOS; context 64."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_base(tiny_model_dir: Path) -> FrozenBase:
    """The tiny model as a float32 base."""
    return FrozenBase(str(tiny_model_dir), compute_dtype="float32")


@pytest.fixture(scope="session")
def tiny_adapters(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Two random adapters on the tiny model, as iterates 1 and 2."""
    root = tmp_path_factory.mktemp("adapters")
    return {t: write_adapter(tiny_model_dir, root / str(t), seed=t) for t in (1, 2)}


@pytest.fixture(scope="session")
def testbed_seed_0() -> TestbedPaths:
    """The embedded testbed, cached in the user's cache folder as for a user."""
    return ensure(seed=0)


@pytest.fixture(scope="session")
def finished_run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Iterates 0 to 4 of SPIN on the tiny model. Not to be written to: copy it."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_examples(folder / "examples.jsonl")
    play(folder / "run", tiny_model_dir, data, epochs=4)
    return RunFolder(folder / "run")
