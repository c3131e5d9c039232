"""`quickstart` and `demo`: which recipes they play, and what they show of them."""

import pytest
import yaml

from spin_lightning.cli import first_runs
from spin_lightning.cli.commands import COMMANDS
from spin_lightning.recipes import Recipe, recipe
from spin_lightning.run.folder import RunFolder


@pytest.fixture
def calls(monkeypatch) -> list[list[str]]:
    """What `fit`, `report` and `chat` are called with, instead of a run of minutes."""
    made: list[list[str]] = []
    monkeypatch.setattr("spin_lightning.cli.fit.run", made.append)
    for name in ("report", "chat"):
        monkeypatch.setitem(COMMANDS, name, lambda args, name=name: made.append([name, *args]))
    return made


def fitted(name: str, folder: str) -> list[str]:
    settings = ["--trainer.default_root_dir", folder, "--trainer.devices", "1"]
    return ["fit", "--config", str(recipe(name).path), *settings]


def test_quickstart_plays_spin_and_its_control_and_compares_them(spin, calls):
    spin("quickstart")
    assert calls == [
        fitted("quickstart", "runs/quickstart"),
        fitted("quickstart_sft", "runs/quickstart_sft"),
        ["report", "runs/quickstart", "runs/quickstart_sft"],
    ]


def test_demo_plays_and_asks_the_model_before_and_after(spin, calls):
    spin("demo", "--out", "elsewhere")
    chat = calls.pop()
    assert calls == [fitted("demo", "elsewhere/demo"), ["report", "elsewhere/demo"]]
    assert chat[:5] == ["chat", "elsewhere/demo", "--iterates", "0", "last"]
    assert len(chat[chat.index("--prompt") + 1 :]) == 3


@pytest.mark.slow
def test_quickstart_cut_short_leaves_both_runs_and_a_report(spin, tmp_path, monkeypatch, capsys):
    def cut(name: str) -> Recipe:
        whole = recipe(name)
        config = yaml.safe_load(whole.text)
        config["data"]["init_args"]["max_examples"] = 1024
        config["trainer"] |= {"max_epochs": 1, "log_every_n_steps": 1}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return Recipe(path, whole.summary, whole.needs)

    monkeypatch.setattr(first_runs, "recipe", cut)
    spin("quickstart", "--out", tmp_path / "runs")
    runs = [RunFolder(tmp_path / "runs" / name) for name in ("quickstart", "quickstart_sft")]
    assert [run.known_iterates() for run in runs] == [[0, 1], [0, 1]]
    assert (runs[0].report / "report.html").is_file()
    assert "exact/kl" in capsys.readouterr().out
