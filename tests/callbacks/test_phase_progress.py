"""The phases that a run tells of, in its log and in its folder."""

import json

import pytest

from spin_lightning.callbacks import phase_progress
from spin_lightning.callbacks.phase_progress import PhaseProgress
from spin_lightning.run.progress import Progress, ProgressLog
from tests.toys.runs import play, write_examples


@pytest.fixture
def phases(monkeypatch):
    """Title, total and last counts of each phase of a run, in order."""
    seen = []

    class Recording(ProgressLog):
        def advance(self, phase, done, step=None, *, found=False):
            super().advance(phase, done, step, found=found)
            entry = [phase.title, phase.total, phase.counts]
            if not any(entry[2] is other[2] for other in seen):
                seen.append(entry)

    monkeypatch.setattr(phase_progress, "ProgressLog", Recording)
    return seen


def test_every_phase_counts_all_of_its_work(phases, tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "examples.jsonl", count=120)
    settings = {"val_examples": 20, "batch_size": 32}
    play(
        tmp_path / "run",
        tiny_model_dir,
        data,
        epochs=2,
        data_settings=settings,
        trainer_settings={"num_sanity_val_steps": 0},
    )
    # 100 rows in batches of 32, and 20 held-out rows in one.
    rows, batches = {"generated": 100, "scored": 100}, {"": 4}
    held_out = {"generated": 20, "scored": 20}
    assert phases == [
        ["iterate 0 held-out rows", 20, held_out],
        ["iterate 0 rows", 100, rows],
        ["iterate 1 validation", 1, {"": 1}],
        ["iterate 1 training", 4, batches],
        ["iterate 1 validation", 1, {"": 1}],
        ["iterate 1 held-out rows", 20, held_out],
        ["iterate 1 rows", 100, rows],
        ["iterate 2 training", 4, batches],
        ["iterate 2 validation", 1, {"": 1}],
        ["iterate 2 held-out rows", 20, held_out],
    ]
    progress = Progress.of(json.loads((tmp_path / "run" / "progress.json").read_text()))
    assert progress.state == "finished"


def test_how_a_run_ended_is_in_its_folder(tiny_model_dir, tmp_path, monkeypatch):
    data = write_examples(tmp_path / "examples.jsonl", count=40)
    for error, state in ((KeyboardInterrupt(), "stopped"), (RuntimeError("x"), "failed")):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(PhaseProgress, "on_train_batch_end", fail)
        root = tmp_path / state
        with pytest.raises((SystemExit, RuntimeError, KeyboardInterrupt)):
            play(root, tiny_model_dir, data, epochs=1)
        assert json.loads((root / "progress.json").read_text())["state"] == state
