"""A finished run of a chat model that tests of exports copy and damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spin_lightning.run.folder import RunFolder
from tests.cli.conftest import spin as spin
from tests.toys.models import write_tiny_model
from tests.toys.runs import play, write_examples

# Words of the tiny model stand for roles.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}w9 {{ m.content }} {% else %}"
    "w8 {{ m.content }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w8 {% endif %}"
)


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `examples.jsonl` and `run`: iterates 0 and 1. Not to be written to."""
    root = tmp_path_factory.mktemp("chat_run")
    write_tiny_model(root / "model")
    (root / "template.jinja").write_text(TEMPLATE)
    data = write_examples(root / "examples.jsonl", count=80)
    settings = {"chat_template": str(root / "template.jinja"), "val_examples": 12}
    play(root / "run", root / "model", data, epochs=1, data_settings=settings)
    return root


@pytest.fixture
def own_run(chat_run: Path, tmp_path: Path) -> RunFolder:
    """A copy of the run on a copy of its base, to damage."""
    shutil.copytree(chat_run / "model", tmp_path / "model")
    run = RunFolder(Path(shutil.copytree(chat_run / "run", tmp_path / "run")))
    for t in run.known_iterates():
        file = run.iterate(t) / "iterate.json"
        record = json.loads(file.read_text())
        record["base"]["name"] = str(tmp_path / "model")
        file.write_text(json.dumps(record))
    return run
