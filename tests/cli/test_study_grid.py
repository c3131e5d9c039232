"""`study --grid`, played for real on the embedded testbed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from spin_lightning.cli import study_grid
from spin_lightning.cli.main import main
from spin_lightning.cli.study_grid import GridStudy
from spin_lightning.report.study_grid import Outcome, read_grid

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "testbed" / "stability.yaml"


@pytest.fixture
def grid(tmp_path: Path, testbed_seed_0: object) -> Path:
    """Two runs of two iterates, and one that starts from supervised fine-tuning."""
    config = yaml.safe_load(CONFIG.read_text())
    config["data"]["init_args"] |= {"max_examples": 640, "val_examples": 64}
    config["trainer"] |= {"max_epochs": 2, "log_every_n_steps": 1}
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(config))
    parts = {
        "beta": {"variants": ["SPIN"], "settings": {"model.beta": [0.3, 1.0]}},
        "after": {"variants": ["TPAW"], "start": "SFT(learning_rate=1e-3)"},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(
        yaml.safe_dump({"config": "cut.yaml", "seeds": [0], "parts": parts}, sort_keys=False)
    )
    return path


def study(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["spin-lightning", "study", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def measured(path: Path) -> dict[tuple[str, int], float]:
    rows = pq.read_table(path / "study.parquet").to_pylist()
    return {(row["cell"], row["iterate"]): row["exact/kl"] for row in rows}


def test_grid_is_played_once_and_a_cell_alone_gives_the_same_numbers(
    grid, tmp_path, monkeypatch, capsys
):
    assert study(monkeypatch, "--grid", grid, "--out", tmp_path / "out", "--plan") == 0
    planned = capsys.readouterr().out
    assert "play one cell (--cell) to know" in planned
    assert not (tmp_path / "out").exists()

    arguments = ("--grid", grid, "--out", tmp_path / "out")
    assert study(monkeypatch, *arguments, "--processes", 2) == 0
    output = capsys.readouterr().out
    assert "3 cells, 0 of them played before." in output
    assert "[3/3]" in output
    assert "9 rows, one per cell and iterate" in output
    assert "beta: medians over seeds" in output
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"beta.png", "after.png"}
    values = measured(tmp_path / "out")
    cells = list(dict.fromkeys(cell for cell, _ in values))
    assert cells == ["SPIN-model.beta=0.3-seed0", "SPIN-model.beta=1.0-seed0", cells[2]]
    assert cells[2].endswith("TPAW-seed0")
    runs = sorted(p.name for p in (tmp_path / "out" / "runs").iterdir() if p.is_dir())
    assert runs == ["start-SFT_learning_rate=1e-3-seed0"], "measured runs are removed"

    assert study(monkeypatch, *arguments) == 0
    assert "3 cells, 3 of them played before." in capsys.readouterr().out
    assert measured(tmp_path / "out") == values
    assert study(monkeypatch, *arguments, "--plan") == 0
    assert "play one cell" not in capsys.readouterr().out

    alone = ("--grid", grid, "--out", tmp_path / "alone", "--keep_runs", "true")
    assert study(monkeypatch, *alone, "--cell", cells[1]) == 0
    assert measured(tmp_path / "alone") == {k: v for k, v in values.items() if k[0] == cells[1]}
    assert (tmp_path / "alone" / "runs" / cells[1] / "iterates").is_dir()


def test_cell_that_ends_early_is_named_and_the_others_are_measured(
    grid, tmp_path, monkeypatch, capsys
):
    config = yaml.safe_load((tmp_path / "cut.yaml").read_text())
    config["trainer"]["max_epochs"] = 1
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(config))
    content = yaml.safe_load(grid.read_text())
    content["parts"] = {
        "rate": {"variants": ["SPIN"], "settings": {"model.learning_rate": [3e-3, 1e30]}}
    }
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    assert study(monkeypatch, "--grid", grid, "--out", tmp_path / "out") == 2
    ended = capsys.readouterr()
    assert "ENDED EARLY" in ended.out
    assert "1 of 2 cells ended early, such as SPIN-model.learning_rate=1e_30-seed0" in ended.err
    files = sorted((tmp_path / "out" / "cells").glob("*.json"))
    errors = {path.name: json.loads(path.read_text())["error"] for path in files}
    assert len(errors) == 2
    assert errors["SPIN-model.learning_rate=0.003-seed0.json"] is None


def test_processes_of_a_grid_end_with_the_command_that_is_killed(grid, tmp_path):
    command = [sys.executable, "-m", "spin_lightning", "study", "--grid", str(grid)]
    started = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out"), "--processes", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children: set[int] = set()
    try:
        wait_until(lambda: len(list((tmp_path / "out" / "runs").glob("*/rows"))) > 0)
        listed = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text()
        children = {int(pid) for pid in listed.split()}
        assert len(children) >= 2
    finally:
        started.kill()
        started.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_grid_of_another_config_is_not_mixed_with_finished_cells(
    grid, tmp_path, monkeypatch, capsys
):
    cell = next(iter(read_grid(grid).cells.values()))
    made = Outcome({**cell.content, "config": "of another file"}, 1.0, [])
    made.write(tmp_path / "out" / "cells" / f"{cell.name}.json")
    assert study(monkeypatch, "--grid", grid, "--out", tmp_path / "out") == 2
    assert "was made with another config" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [(), ("--grid", "x.yaml", "--config", "y.yaml")], ids=["neither", "both"]
)
def test_either_a_config_or_a_grid_is_played(arguments, monkeypatch, capsys):
    assert study(monkeypatch, *arguments) == 2
    assert "give --config with a config, --grid with a grid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.bta": [1.0]}, "SPIN-model.bta=1.0-seed0: "),
        ({"model.beta": [-1.0]}, "SPIN-model.beta=-1.0-seed0: beta=-1.0: out of range"),
    ],
    ids=["unknown", "out of range"],
)
def test_cell_that_cannot_be_played_is_named_before_any_is(
    settings, message, grid, tmp_path, monkeypatch, capsys
):
    content = yaml.safe_load(grid.read_text())
    content["parts"]["wrong"] = {"variants": ["SPIN"], "settings": settings}
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    assert study(monkeypatch, "--grid", grid, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", CONFIG, "--plan"), "--plan does not go with --config"),
        (("--grid", "g.yaml", "--tasks", "arc"), "--tasks does not go with --grid"),
        (("--results", "s.parquet", "--cell", "a"), "--cell does not go with --results"),
    ],
)
def test_option_of_another_kind_of_file_is_refused(arguments, message, monkeypatch, capsys):
    assert study(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_cell_that_the_grid_lacks_is_refused_in_a_plan_as_well(grid, monkeypatch, capsys):
    assert study(monkeypatch, "--grid", grid, "--plan", "--cell", "SPIN-model.beta=0.4-seed0") == 2
    assert "the grid has no such cell" in capsys.readouterr().err


def test_number_of_processes_is_checked(grid, monkeypatch, capsys):
    assert study(monkeypatch, "--grid", grid, "--processes", 0) == 2
    assert "processes=0: out of range" in capsys.readouterr().err


def test_fault_of_one_cell_does_not_end_the_others(grid, tmp_path, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(study_grid, "play_quietly", fail)
    cell = next(iter(read_grid(grid).cells.values()))
    outcome = GridStudy(read_grid(grid), tmp_path / "out", keep_runs=False).play(cell)
    assert (outcome.error, outcome.rows) == ("out of luck", [])
    assert f"{cell.name} ended early" in caplog.text
