"""Every config that is shipped parses against the code."""

from pathlib import Path

import pytest

from spin_lightning.cli.main import main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


def test_configs_shipped_are_all_seen():
    assert len(CONFIGS) == 12


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_shipped_parses(config, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["spin-lightning", "fit", "--config", str(config), "--print_config"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "class_path: spin_lightning." in capsys.readouterr().out
