"""The time of each iterate, summed over all starts of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spin_lightning import SPIN, SelfPlay
from spin_lightning.callbacks import iterates, run_times
from spin_lightning.callbacks.run_times import RunTimes, Spent
from spin_lightning.errors import RunFolderError
from spin_lightning.report.page import make_page
from spin_lightning.report.run_view import read_runs
from spin_lightning.rows import making
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import play, write_examples


class Clock:
    """A clock that each look moves on by as many seconds as are set."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def perf_counter(self) -> float:
        self.now += self.seconds
        return self.now


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 examples: 6 are held out, 114 give four work units of 32 and four steps of 32."""
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl")


@pytest.fixture
def slow(monkeypatch):
    """Makes every stage of a unit, and every stretch of training, last so many seconds."""

    def set_clocks(seconds: float) -> None:
        monkeypatch.setattr(making, "time", Clock(seconds))
        monkeypatch.setattr(iterates, "time", Clock(seconds))

    return set_clocks


def stop_at(monkeypatch, owner, name: str, call: int) -> None:
    """Interrupt a run at the nth call of a function, as Ctrl-C does."""
    function, calls = getattr(owner, name), []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, stops)


def stages(root: Path, t: int) -> tuple[float, float, float]:
    seconds = RunFolder(root).record(t).training.seconds
    return seconds["generating"], seconds["scoring"], seconds["training"]


def test_run_without_a_stop_counts_each_stage_once(tiny_model_dir, data, tmp_path, slow):
    slow(2.0)
    play(tmp_path, tiny_model_dir, data)
    # Four units, each with one look between two stages; one stretch from start to end.
    assert [stages(tmp_path, t) for t in (1, 2)] == [(8.0, 8.0, 2.0)] * 2
    known = json.loads((tmp_path / "times.json").read_text())
    assert known.keys() == {"1", "2"}
    assert (known["2"]["rows"], known["2"]["training"]) == (114, 2.0)


def test_run_stopped_in_row_making_sums_the_units_of_both_starts(
    tiny_model_dir, data, tmp_path, slow, monkeypatch
):
    slow(2.0)
    with monkeypatch.context() as patch:
        # The first unit is held out, the next two train: the third training unit is not scored.
        stop_at(patch, making.Synthesis, "_score", 4)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            play(tmp_path, tiny_model_dir, data)
    assert RunFolder(tmp_path).known_iterates() == [0]
    slow(5.0)
    play(tmp_path, tiny_model_dir, data)
    # Generated: three units of 2 s, then the third again and the fourth, 5 s each. Scored: two of
    # 2 s and two of 5 s.
    assert stages(tmp_path, 1) == (3 * 2.0 + 2 * 5.0, 2 * 2.0 + 2 * 5.0, 5.0)
    assert stages(tmp_path, 2) == (20.0, 20.0, 5.0)


def test_run_stopped_in_training_sums_rows_and_training_of_both_starts(
    tiny_model_dir, data, tmp_path, slow, monkeypatch
):
    slow(2.0)
    # Checkpoints after two steps and after four; Ctrl-C in the third step of iterate 2.
    saves = {"callbacks": [SelfPlay(checkpoint_steps=2)]}
    with monkeypatch.context() as patch:
        stop_at(patch, SPIN, "training_step", 7)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            play(tmp_path, tiny_model_dir, data, **saves)
    before = json.loads((tmp_path / "times.json").read_text())["2"]
    # One stretch up to the checkpoint, one up to Ctrl-C.
    assert (before["generating"], before["training"]) == (8.0, 4.0)
    slow(5.0)
    last = RunFolder(tmp_path).last_checkpoint
    play(tmp_path, tiny_model_dir, data, ckpt_path=last, callbacks=[SelfPlay()])
    assert stages(tmp_path, 2) == (8.0, 8.0, 4.0 + 5.0)
    speed = RunFolder(tmp_path).record(2).training.speed
    assert speed["speed/share_training"] == pytest.approx(9 / 25)
    page = make_page(read_runs([RunFolder(tmp_path)]), "1").html
    assert "<td>8.0 s</td><td>8.0 s</td><td>9.0 s</td>" in page


def test_peak_memory_belongs_to_the_phase_that_raised_it(tmp_path, monkeypatch):
    highest = 100
    monkeypatch.setattr(run_times, "peak_memory", lambda: highest)
    run = RunFolder(tmp_path)
    times = RunTimes.of(run, kept=True)
    progress = times.making(1)
    highest = 130
    progress.advance("generating", 8, 1.0)
    progress.advance("scoring", 8, 1.0)
    highest = 200
    times.train(1, 3.0, 8)
    assert times.spent_on(1).peaks == {"before": 100, "generating": 130, "training": 200}
    # Nothing of the next iterate rises above 200 but what came before its rows.
    highest = 250
    times.making(2).advance("generating", 8, 1.0)
    times.train(2, 3.0, 8)
    assert times.spent_on(2).peaks == {"before": 250}
    run.iterate(0).mkdir(parents=True)
    (run.iterate(0) / "iterate.json").write_text("{}")
    again = RunTimes.of(run, kept=True)
    highest = 120
    again.making(1).advance("generating", 8, 1.0)
    assert again.spent_on(1).peaks == {"before": 120, "generating": 130, "training": 200}


def test_times_of_an_abandoned_start_do_not_count_for_a_new_run(tmp_path):
    run = RunFolder(tmp_path)
    RunTimes.of(run, kept=True).train(1, 3.0, 8)
    assert RunTimes.of(run, kept=True).spent_on(1) == Spent(), "there is no iterate 0"


def test_damaged_times_name_the_file_and_the_fix(tmp_path):
    run = RunFolder(tmp_path)
    run.iterate(0).mkdir(parents=True)
    (run.iterate(0) / "iterate.json").write_text("{}")
    for text in ("[1]", "{", '{"1": {"training": "long"}}', '{"one": {"training": 1}}'):
        run.times.write_text(text)
        with pytest.raises(RunFolderError, match=r"times\.json is damaged .* Fix: delete it"):
            RunTimes.of(run, kept=True)


def test_run_of_an_older_version_counts_from_this_start_on(tmp_path):
    run = RunFolder(tmp_path)
    run.iterate(0).mkdir(parents=True)
    (run.iterate(0) / "iterate.json").write_text("{}")
    assert RunTimes.of(run, kept=True).spent_on(1).training == 0.0
