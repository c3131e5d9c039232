"""Watching a run: what is shown, what is tolerated, and that nothing is written."""

import hashlib
import io
import json
import os
import shutil
import threading
import time

import pytest
from rich.console import Console

from spin_lightning.cli.watch_page import RunReader, page, sparkline
from spin_lightning.run.folder import RunFolder


@pytest.fixture
def run(finished, tmp_path) -> RunFolder:
    return RunFolder(shutil.copytree(finished, tmp_path / "run"))


def running(run: RunFolder, **changes) -> None:
    """Make the run look as if this process were in the middle of it."""
    content = json.loads(run.progress.read_text())
    now = {
        "state": "running",
        "title": "iterate 3 rows",
        "total": 108,
        "unit": "rows",
        "counts": {"generated": 54, "scored": 27},
        "rate": 9.0,
        "left": 12.0,
        "process": os.getpid(),
    }
    run.progress.write_text(json.dumps(content | now | changes))


def shown(run: RunFolder, width: int) -> str:
    console = Console(width=width, soft_wrap=True, record=True, file=io.StringIO())
    console.print(page(RunReader(run).read(), width))
    return console.export_text()


def state(run: RunFolder) -> dict[str, tuple[str, int]]:
    files = [file for file in run.root.rglob("*") if file.is_file()]
    return {
        str(f): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in files
    }


@pytest.mark.parametrize("width", [44, 90, 160])
def test_page_has_phase_table_curves_and_samples_and_fits_the_terminal(width, run):
    running(run)
    text = shown(run, width)
    assert max(map(len, text.splitlines())) <= width
    assert "iterate 3 rows: 54 of 108 rows generated" in " ".join(text.split())
    records = run.records()
    for record in records:
        assert f"{record.metrics['val/real_nll_per_token']:.4f}" in text
    assert "Training loss" in text
    assert "answered by iterate 2" in text
    assert text.count("generated  ") >= 3


def test_watching_changes_no_file_and_takes_no_lock(run, spin):
    before = state(run)
    spin("watch", run.root, "--once", "true")
    spin("watch", run.root)  # it has ended
    assert state(run) == before


def test_half_written_files_show_what_they_held_before(run):
    reader = RunReader(run)
    whole = reader.read()
    assert len(whole.records) == 3
    (run.iterate(2) / "iterate.json").write_text('{"index": 2, "par')
    run.progress.write_text("")
    (run.root / "metrics.csv").write_text("step,train/loss\n1,0.5\n2,0.2")
    torn = reader.read()
    assert torn.records == whole.records
    assert torn.progress == whole.progress
    assert torn.loss == [0.5]
    shutil.rmtree(run.root / "rows")
    shutil.rmtree(run.root / "tokenizer")
    assert reader.read().pairs == whole.pairs
    # Someone who comes only now sees what there is.
    late = RunReader(run).read()
    assert ([record.index for record in late.records], late.progress) == ([0, 1], None)
    assert "No progress yet" in shown(run, 80)


def test_watch_prints_phases_without_a_terminal_and_ends_with_the_run(run, spin, capsys):
    running(run)

    def finish() -> None:
        time.sleep(0.5)
        running(run, counts={"generated": 108, "scored": 30})
        time.sleep(0.5)
        running(run, state="finished")

    other = threading.Thread(target=finish)
    other.start()
    spin("watch", run.root, "--interval", "0.1")
    other.join()
    out = capsys.readouterr().out
    assert "54 of 108 rows generated, 27 scored; 9 rows/s; 12 s left" in out
    assert "108 of 108 rows generated, 30 scored" in out
    assert "The run has finished." in out


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"state": "stopped"}, "The run was stopped. Start the same command again"),
        ({"state": "failed"}, "The run has failed"),
        ({"process": 2**22 + 1}, "The process of the run is gone"),
    ],
)
def test_watch_ends_and_says_how_the_run_ended(changes, text, run, spin, capsys):
    running(run, **changes)
    spin("watch", run.root)
    assert text in capsys.readouterr().out


def test_ctrl_c_stops_watching_alone(run, spin, monkeypatch, capsys):
    running(run)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spin_lightning.cli.watch.time.sleep", interrupt)
    spin("watch", run.root)
    assert "Stopped watching; the run goes on." in capsys.readouterr().out


def test_silent_process_is_mentioned(run, monkeypatch):
    running(run)
    reader = RunReader(run)
    reader.read()
    reader._heard_at -= 200
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(page(reader.read(), 80))
    assert "No sign of life for 3.3 min" in console.export_text()


def test_what_cannot_be_watched_is_one_error(spin, tmp_path, capsys):
    for arguments, message in (
        ([tmp_path / "nothing"], "there is no folder"),
        ([tmp_path, "--interval", "0"], "interval=0.0: out of range. Fix: give 0.1 or more"),
    ):
        with pytest.raises(SystemExit):
            spin("watch", *arguments)
        assert message in capsys.readouterr().err


def test_sparkline_averages_more_values_than_columns():
    # Means of pairs: 0.5, 2.5, 4.5, 6.5, so heights 0, 1/3, 2/3 and 1 of seven.
    assert sparkline([float(i) for i in range(8)], 4) == "▁▃▆█"
