"""The entry point: the help page, the dispatch, and how a mistake ends."""

import importlib.util
import subprocess
import sys

import pytest

from spin_lightning.cli.commands import COMMANDS
from spin_lightning.cli.main import main
from tests.toys.command_line import fit_arguments

ALL = ("fit", "validate", *COMMANDS)
HEAVY = {"bitsandbytes", "datasets", "lightning", "matplotlib", "peft", "torch", "transformers"}
LIGHT_CALL = f"""
import sys
from spin_lightning.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
loaded = {HEAVY} & sys.modules.keys()
assert not loaded, loaded
"""


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints that runs this code."""
    call = [sys.executable, "-c", code, *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True, timeout=200).stdout


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)], ids=repr)
def test_help_lists_every_command(arguments, spin, capsys):
    spin(*arguments)
    page = capsys.readouterr().out
    assert [line.split()[0] for line in page.splitlines() if line.startswith("  ")][: len(ALL)] == [
        *ALL
    ]
    for hint in ("fit --model.help SPIN", "fit --data.help SelfPlayDataModule", "docs/"):
        assert hint in page
    assert max(map(len, page.splitlines())) <= 100


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_needs_no_heavy_import(command):
    arguments = ["--help"] if command is None else [command, "--help"]
    page = python(LIGHT_CALL, *arguments)
    assert page.startswith(f"usage: spin-lightning {command or 'COMMAND'} ")


def test_signatures_of_fit_are_read_without_what_only_a_run_needs():
    code = "import sys, spin_lightning.cli.fit; print({'peft', 'bitsandbytes'} & set(sys.modules))"
    assert python(code).strip() == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_every_option_and_shows_its_default(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    page = capsys.readouterr().out
    assert COMMANDS[command].__doc__.splitlines()[0][:40] in page
    unwrapped = " ".join(page.split())
    assert "null)" not in unwrapped.replace("| null)", "").replace("'best'], null)", "")
    assert "default" in page


@pytest.mark.parametrize(
    ("command", "fix"),
    [
        ("evalute", "run spin-lightning evaluate"),
        ("fti", "run spin-lightning fit"),
        ("exprot", "run spin-lightning export"),
        ("xyz", f"choose from {', '.join(ALL)}"),
    ],
)
def test_mistyped_command_ends_with_one_message_and_the_nearest(command, fix, spin, capsys):
    with pytest.raises(SystemExit) as end:
        spin(command, "--whatever")
    assert end.value.code == 2
    message = f"Error: command={command!r}: there is no such command. Fix: {fix}.\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_option_of_a_command_ends_with_one_message(command, spin, capsys):
    with pytest.raises(SystemExit) as end:
        spin(command, "--bogus", "1")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ")
    assert line.endswith(f"Fix: see spin-lightning {command} --help.")


def test_missing_package_ends_with_one_message_that_says_how_to_install_it(
    spin, monkeypatch, capsys
):
    def fail(args):
        raise ModuleNotFoundError("Requirement 'wandb>=0.12.10' not met. Try `pip install wandb`.")

    monkeypatch.setattr("spin_lightning.cli.fit.SpinCLI", fail)
    with pytest.raises(SystemExit) as end:
        spin("fit")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Requirement 'wandb>=0.12.10' not met" in line
    assert "pip install 'spin-lightning[wandb]'" in line


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="mlflow is installed")
def test_logger_without_its_package_ends_with_one_message(
    spin, tiny_model_dir, data, tmp_path, capsys
):
    arguments = fit_arguments(tmp_path, tiny_model_dir, data)
    with pytest.raises(SystemExit) as end:
        spin(*arguments, "--trainer.logger", "MLFlowLogger")
    assert end.value.code == 2
    assert "a package is missing (Requirement 'mlflow" in capsys.readouterr().err


def test_missing_module_of_the_package_itself_keeps_its_traceback(spin, monkeypatch):
    def fail(args):
        raise ModuleNotFoundError("No module named 'spin_lightning.x'", name="spin_lightning.x")

    monkeypatch.setattr("spin_lightning.cli.fit.SpinCLI", fail)
    with pytest.raises(ModuleNotFoundError):
        spin("fit")


def test_python_m_is_the_same_command_line():
    call = [sys.executable, "-m", "spin_lightning"]
    page = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert page.startswith("usage: spin-lightning COMMAND")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            # As Lightning's WandbLogger and MLFlowLogger raise it.
            ModuleNotFoundError("Requirement 'wandb>=0.12.10' not met. HINT: Try running pip"),
            "'wandb>=0.12.10' not met.). Fix: run: pip install 'spin-lightning[wandb]'",
        ),
        (
            ModuleNotFoundError("Requirement 'mlflow>=1.0.0' not met."),
            "Fix: run: pip install 'mlflow'",
        ),
        (
            ModuleNotFoundError("No module named 'lm_eval.tasks'", name="lm_eval.tasks"),
            "Fix: run: pip install 'spin-lightning[eval]'",
        ),
    ],
)
def test_missing_extra_ends_with_the_command_that_installs_it(
    error, said, spin, monkeypatch, capsys
):
    def export(args: list[str]) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "export", export)
    with pytest.raises(SystemExit) as end:
        spin("export")
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_ctrl_c_ends_with_130(spin, monkeypatch, capsys):
    def interrupted(args: list[str]) -> None:
        raise KeyboardInterrupt

    def interrupted_in_lightning(args: list[str]) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    for command in (interrupted, interrupted_in_lightning):
        monkeypatch.setitem(COMMANDS, "export", command)
        with pytest.raises(SystemExit) as end:
            spin("export")
        assert end.value.code == 130
    assert capsys.readouterr().err.strip() == "Stopped."


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_help_of_fit_is_short_and_names_where_the_rest_is(command, spin, capsys):
    spin(command, "--help")
    page = capsys.readouterr().out
    assert page.startswith(f"usage: spin-lightning {command} ")
    assert len(page.splitlines()) < 40
    assert "--model.help SPIN" in page
    assert "--help all" in page


def test_help_of_fit_needs_no_heavy_import():
    assert "--model.beta" in python(LIGHT_CALL, "fit", "--help")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("model.betta", "beta"), ("model.lr", "learning_rate"), ("data.batchsize", "batch_size")],
)
def test_mistyped_setting_is_answered_with_the_one_that_is_meant(given, meant, spin, capsys):
    with pytest.raises(SystemExit) as end:
        spin("fit", "--config", "configs/quickstart.yaml", f"--{given}", "1")
    assert end.value.code == 2
    assert f"Fix: did you mean {meant}?" in " ".join(capsys.readouterr().err.split())


def test_setting_that_resembles_none_gets_no_suggestion(spin, capsys):
    with pytest.raises(SystemExit):
        spin("fit", "--config", "configs/quickstart.yaml", "--model.zzz", "1")
    assert "did you mean" not in capsys.readouterr().err


def test_command_of_another_library_is_answered_with_ours(spin, capsys):
    with pytest.raises(SystemExit):
        spin("train")
    assert "run spin-lightning fit" in " ".join(capsys.readouterr().err.split())
