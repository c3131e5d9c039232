"""Every config that is shipped parses against the code, recipes included."""

from pathlib import Path

import pytest

from spin_lightning.cli.main import main
from spin_lightning.report.study_grid import read_grid

ROOT = Path(__file__).parents[1]
GRIDS = sorted((ROOT / "configs" / "study").glob("*.yaml"))
# Some configs are links to recipes of the package.
CONFIGS = sorted(
    {
        file.resolve()
        for folder in ("configs", "spin_lightning")
        for file in (ROOT / folder).rglob("*.yaml")
        if file not in GRIDS
    }
)


def test_configs_shipped_are_all_seen():
    assert len(CONFIGS) == 26
    assert len(GRIDS) == 2


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_runs_of_grids_shipped_parse(path, tmp_path, monkeypatch, capsys):
    """One of each variant and part: the others differ in numbers alone."""
    grid = read_grid(path)
    plays = {(cell.play.variant, cell.parts): cell.play for cell in grid.cells.values()}
    assert plays
    for play in plays.values():
        arguments = [*play.arguments(str(grid.config), tmp_path), "--print_config"]
        monkeypatch.setattr("sys.argv", ["spin-lightning", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0, play.name
        assert "class_path: spin_lightning." in capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_shipped_parses(config, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["spin-lightning", "fit", "--config", str(config), "--print_config"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "class_path: spin_lightning." in capsys.readouterr().out
