"""`quickstart` and `demo`: a recipe from start to end, with its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from spin_lightning.cli.parsing import command_parser
from spin_lightning.recipes import recipe

# What the demo asks the model before and after: held-out questions of GSM8K, and another one.
_QUESTIONS: Final = (
    (
        "John takes care of 10 dogs. Each dog takes .5 hours a day to walk and take care of their "
        "business. How many hours a week does he spend taking care of dogs?"
    ),
    (
        "Grace weighs 125 pounds. Alex weighs 2 pounds less than 4 times what Grace weighs. What "
        "are their combined weights in pounds?"
    ),
    "What is the capital of France?",
)


def quickstart(args: list[str]) -> None:
    """Play SPIN and a supervised control on embedded data: minutes on a CPU.

    A second call continues what was cut off, and skips what is finished.
    """
    out = _out(quickstart, args)
    _command("report")([_fit(name, out) for name in ("quickstart", "quickstart_sft")])


def demo(args: list[str]) -> None:
    """Play SPIN from SmolLM2, a chat model, on questions of GSM8K, and show answers: CPU.

    It takes about a quarter of an hour on two cores. The model is a package of its own: where it is
    missing, the command says what to install. A second call continues what was cut off.
    """
    run = _fit("demo", _out(demo, args))
    _command("report")([run])
    options = ["--iterates", "0", "last", "--temperature", "0", "--prompt"]
    _command("chat")([run, *options, *_QUESTIONS])


def _out(command: Callable[[list[str]], None], args: list[str]) -> Path:
    parser = command_parser(command.__name__, command)
    parser.add_argument("--out", default="runs", help="Folder of the runs.")
    return Path(parser.parse_args(args).out)


def _fit(name: str, out: Path) -> str:
    """Play a recipe on one device, and return its run folder."""
    from spin_lightning.callbacks.console import console
    from spin_lightning.cli.fit import run

    chosen, folder = recipe(name), out / name
    console.print(f"[{name}] {chosen.summary}", markup=False)
    # One device: Lightning would start this command again for each of several.
    settings = {"trainer.default_root_dir": folder, "trainer.devices": 1}
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    run(["fit", "--config", str(chosen.path), *flags])
    return str(folder)


def _command(name: str) -> Callable[[list[str]], None]:
    from spin_lightning.cli.commands import COMMANDS

    return COMMANDS[name]
