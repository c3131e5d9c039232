"""Every config that is shipped parses against the code, recipes included."""

from pathlib import Path

import pytest

from spin_lightning.cli.main import main

ROOT = Path(__file__).parents[1]
# Some configs are links to recipes of the package.
CONFIGS = sorted(
    {
        file.resolve()
        for folder in ("configs", "spin_lightning")
        for file in (ROOT / folder).rglob("*.yaml")
    }
)


def test_configs_shipped_are_all_seen():
    assert len(CONFIGS) == 22


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_shipped_parses(config, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["spin-lightning", "fit", "--config", str(config), "--print_config"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "class_path: spin_lightning." in capsys.readouterr().out
