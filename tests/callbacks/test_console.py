"""What a run prints: its own lines and warnings, without the noise of other libraries."""

import logging
import subprocess
import sys

import pytest
from transformers.utils.logging import set_tqdm_hook, tqdm

from spin_lightning.callbacks.console import (
    RowProgress,
    console,
    fitting_columns,
    quiet_libraries,
    show_iterates,
    show_table,
)
from spin_lightning.run.records import IterateRecord, TrainingRecord
from tests.cli.test_fit import fit_arguments
from tests.faults.processes import environment
from tests.toys.runs import write_examples


def test_fit_prints_warnings_and_no_noise_of_other_libraries(tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "examples.jsonl", count=30)
    arguments = fit_arguments(tmp_path / "run", tiny_model_dir, data)
    # Fewer batches than an interval of logging, which Lightning warns of.
    more = ("--trainer.enable_model_summary", "true", "--trainer.log_every_n_steps", "50")
    done = subprocess.run(
        [sys.executable, "-m", "spin_lightning", *map(str, arguments), *more],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    for noise in ("Loading weights", "Tip:", "in train mode", "in eval mode", "FLOPs"):
        assert noise not in printed
    assert "smaller than the logging interval" in done.stderr
    assert "GPU available" in done.stderr
    # Rank 16 times the sum of both widths: twice 2 · 64 + 2 · 48 + 3 · 96. Frozen are twice
    # 2 · 32² + 2 · 16 · 32 + 3 · 32 · 64, embeddings and head of 24 · 32, and five norms of 32.
    assert "Parameters: 16.4 K trained, 20.1 K frozen." in done.stdout


@pytest.fixture
def libraries():
    """Undoes what a test does to other libraries."""
    logger, hook = logging.getLogger("lightning.pytorch.utilities.rank_zero"), set_tqdm_hook(None)
    filters = list(logger.filters)
    yield logger
    logger.filters = filters
    set_tqdm_hook(hook)


def test_quiet_libraries_keeps_other_bars_and_messages(libraries, capsys, caplog):
    quiet_libraries()
    quiet_libraries()
    assert list(tqdm([1, 2], desc="Loading weights")) == [1, 2]
    assert capsys.readouterr().err == ""
    assert list(tqdm([1, 2], desc="Downloading")) == [1, 2]
    assert "Downloading" in capsys.readouterr().err
    with caplog.at_level(logging.INFO):
        libraries.info("💡 Tip: try another product.")
        libraries.info("GPU available: False")
        libraries.warning("Tip: this is a warning")
    assert caplog.messages == ["GPU available: False", "Tip: this is a warning"]


def test_iterates_are_shown_with_dashes_for_what_is_not_known(capsys):
    training = TrainingRecord(opponent="p0", rows=40, loss=0.5, seconds={"training": 2.0})
    show_iterates([IterateRecord(0), IterateRecord(1, training=training, metrics={})])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["iterate", "opponent", "rows"]
    assert first.split() == ["0", *["-"] * 10]
    assert second.split() == ["1", "p0", "40", "-", "0.5000", *["-"] * 5, "2.0"]


def test_exact_kl_is_a_column_only_where_it_is_known(capsys):
    show_iterates([IterateRecord(0, metrics={"val/real_nll_per_token": 1.5})])
    assert "exact KL" not in capsys.readouterr().out
    show_iterates([IterateRecord(0), IterateRecord(1, metrics={"exact/kl": 0.25})])
    head, first, second = capsys.readouterr().out.splitlines()
    assert "exact KL" in head
    assert (first.split().count("-"), second.split().count("0.2500")) == (11, 1)


def test_table_of_iterates_fits_a_narrow_terminal(monkeypatch, capsys):
    record = IterateRecord(1, training=TrainingRecord("p0", "p0", 9, 0.5, 1.0, 1.0))
    for width, gone in ((160, ()), (80, ("gen s", "score s", "train s")), (60, ("opponent",))):
        monkeypatch.setattr(console, "width", width)
        show_iterates([record])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width
        assert not any(name in lines[0] for name in gone)
        assert "val NLL" in lines[0]
    assert "margin" in lines[0]


def test_table_leaves_out_iterates_between_the_first_and_the_newest(monkeypatch, capsys):
    # Columns of 6 + 3, 3 + 3 and 6 + 3 characters each, and one line at the end.
    rows = [["metric", "run", "p0", "p1", "p2", "p3"], ["m", "r", *["0.1234"] * 4]]
    assert fitting_columns(rows, 9 + 6 + 4 * 9 + 1) == [0, 1, 2, 3, 4, 5]
    assert fitting_columns(rows, 9 + 6 + 4 * 9) == [0, 1, 2, 4, 5]
    assert fitting_columns(rows, 9 + 6 + 3 * 9) == [0, 1, 2, 5]
    assert fitting_columns(rows, 10) == [0, 1, 2, 5]
    assert fitting_columns([["a", "b"], ["1", "2"]], 3) == [0, 1]
    monkeypatch.setattr(console, "width", 42)
    show_table(rows)
    shown = capsys.readouterr().out
    assert "Left out, since the terminal is narrow: p1, p2." in shown
    assert max(map(len, shown.splitlines()[:5])) <= 42


def test_responses_show_before_their_unit_is_complete_and_count_once():
    progress = RowProgress("rows", 10, visible=False)
    generating, scoring = progress._progress.tasks

    def shown() -> tuple[float, float]:
        return generating.completed, scoring.completed

    progress.respond(2)
    progress.respond(1)
    assert shown() == (3, 0)
    progress.advance("generating", 4, 1.0)
    progress.advance("scoring", 4, 1.0)
    assert shown() == (4, 4)
    progress.advance("generating", 6, 0.0)
    assert shown() == (10, 4)
