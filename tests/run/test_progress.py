"""What a run says about its progress, by a clock of the test."""

import json
import os
import subprocess
import sys

import pytest

from spin_lightning.run.progress import Progress, ProgressLog, duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def read(path):
    return Progress.of(json.loads(path.read_text()))


def test_a_line_every_half_minute_tells_steps_rate_and_time_left(tmp_path):
    clock, lines = Clock(), []
    log = ProgressLog(lines.append, tmp_path / "progress.json", clock=clock)
    with log.phase("iterate 1 rows", 100, "rows", "generated", "scored") as phase:
        clock.now += 29
        log.advance(phase, 20, "generated")
        assert lines == []
        clock.now += 11
        log.advance(phase, 20, "scored")
        # 40 of 200 steps in 40 seconds: 160 seconds for the others. 20 rows in 40 seconds.
        (line,) = lines
        expected = "iterate 1 rows: 20 of 100 rows generated, 20 scored; 0.5 rows/s; 2.7 min left"
        assert line.split(" ", 1)[1] == expected
        clock.now += 29
        log.advance(phase, 1, "scored")
        assert len(lines) == 1


def test_rows_of_an_earlier_start_take_no_time(tmp_path):
    clock = Clock()
    log = ProgressLog(None, tmp_path / "progress.json", clock=clock)
    with log.phase("rows", 100, "rows") as phase:
        log.advance(phase, 50, found=True)
        assert phase.left(clock()) is None
        clock.now += 10
        log.advance(phase, 10)
        # 10 rows in 10 seconds, and 40 are left.
        assert phase.left(clock()) == pytest.approx(40.0)
        assert phase.rate(clock()) == pytest.approx(1.0)
        assert read(tmp_path / "progress.json").counts == {"": 60}


def test_file_is_written_once_a_second_and_tells_the_inner_phase_and_the_end(tmp_path):
    path, clock = tmp_path / "progress.json", Clock()
    log = ProgressLog(None, path, clock=clock)
    with log.phase("training", 4, "batches") as training:
        log.advance(training, 1)
        assert read(path).counts == {"": 0}
        clock.now += 1
        log.advance(training, 1)
        assert read(path).counts == {"": 2}
        with log.phase("validation", 2, "batches"):
            assert (read(path).title, read(path).state) == ("validation", "running")
        clock.now += 1
        log.tell()
        assert read(path).title == "training"
    log.end("finished")
    assert (read(path).state, read(path).process) == ("finished", os.getpid())
    assert [file.name for file in tmp_path.iterdir()] == ["progress.json"]


def test_silence_is_broken_also_while_nothing_advances(tmp_path):
    lines, path = [], tmp_path / "progress.json"
    with ProgressLog(lines.append, path, every=0.05) as log, log.phase("rows", 3, "rows"):
        first = read(path).beat
        for _ in range(200):
            if len(lines) >= 2:
                break
            log._ended.wait(0.02)
    assert len(lines) >= 2
    assert "rows: 0 of 3 rows" in lines[0]
    assert read(path).beat > first


def test_a_full_disk_does_not_end_the_run(tmp_path):
    log = ProgressLog(None, tmp_path / "nowhere" / "progress.json")
    with log.phase("rows", 3, "rows") as phase:
        log.advance(phase, 3)
    log.end("failed")
    assert not (tmp_path / "nowhere").exists()


def test_process_that_is_gone_is_known_on_its_own_machine_alone(tmp_path):
    log = ProgressLog(None, tmp_path / "progress.json")
    log.end("finished")
    content = json.loads((tmp_path / "progress.json").read_text()) | {"state": "running"}
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not Progress.of(content).is_gone
    assert Progress.of(content | {"process": ended.pid}).is_gone
    assert not Progress.of(content | {"process": ended.pid, "host": "another"}).is_gone
    assert not Progress.of(content | {"process": ended.pid, "state": "finished"}).is_gone


def test_spans_are_shown_in_the_unit_that_fits():
    assert [duration(s) for s in (59.4, 60, 7199, 7200)] == [
        "59 s",
        "1.0 min",
        "120.0 min",
        "2.0 h",
    ]
