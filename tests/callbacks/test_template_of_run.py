"""The chat template as a run used it: saved with the run, and dated by the run's first day."""

import datetime as dt
from pathlib import Path

import pytest

from spin_lightning import SPIN
from spin_lightning.data import datamodule
from spin_lightning.policies.saved import load_tokenizer
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import contents, play, write_examples

DATED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ strftime_now('w%d') | replace('w0', 'w') }}"
    "{% if loud %} w9{% endif %} {% endif %}{{ m.content }}"
    "{% if m.role == 'assistant' %} </s>{% endif %} {% endfor %}"
)


def on(day: int) -> type[dt.date]:
    class Today(dt.date):
        @classmethod
        def today(cls) -> dt.date:
            return dt.date(2026, 1, day)

    return Today


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    (tmp_path / "dated.jinja").write_text(DATED)
    return {
        "chat_template": str(tmp_path / "dated.jinja"),
        "chat_template_kwargs": {"loud": True},
        "max_examples": 40,
    }


def test_run_resumed_the_next_day_is_the_run_of_one_day(
    settings, tiny_model_dir, tmp_path, monkeypatch
):
    data = write_examples(tmp_path / "examples.jsonl")
    monkeypatch.setattr(datamodule.dt, "date", on(7))
    play(tmp_path / "whole", tiny_model_dir, data, epochs=2, data_settings=settings)
    play(tmp_path / "parts", tiny_model_dir, data, epochs=1, data_settings=settings)
    run = RunFolder(tmp_path / "parts")
    assert run.record(0).template_date == "2026-01-07"
    monkeypatch.setattr(datamodule.dt, "date", on(8))
    resumed = {"epochs": 2, "data_settings": settings, "ckpt_path": run.last_checkpoint}
    _, used, _ = play(run.root, tiny_model_dir, data, **resumed)
    assert used.format.date_written == "2026-01-07"
    rows = "rows/iterate_001"
    one, other = (contents(tmp_path / name) for name in ("whole", "parts"))
    assert {k: v for k, v in one.items() if k.startswith(rows)} == {
        k: v for k, v in other.items() if k.startswith(rows)
    }


def test_run_saves_the_template_with_its_variables(settings, tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "examples.jsonl")
    play(tmp_path / "run", tiny_model_dir, data, variant=SPIN, epochs=1, data_settings=settings)
    saved = load_tokenizer(tmp_path / "run").chat_template
    assert "set loud = True" in saved
    assert DATED in saved
