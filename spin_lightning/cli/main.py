"""The entry point: the help page, the dispatch to a command, and how a mistake ends."""

from __future__ import annotations

import gc
import inspect
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Final

from spin_lightning.cli.commands import COMMANDS
from spin_lightning.cli.fit_help import FIT_HELP_PAGE
from spin_lightning.cli.mistakes import end, mistake_behind
from spin_lightning.errors import SettingError
from spin_lightning.run.packages import ignore_renamed

# Lightning's own subcommands; the others are functions in `commands.py`.
_LIGHTNING: Final = {
    "fit": "Train a model by self-play, or resume a run.",
    "validate": "Compute the held-out metrics of a run's current iterate.",
}
# What users of other libraries type.
_ELSEWHERE: Final = {"train": "fit", "eval": "evaluate", "merge": "export", "generate": "chat"}
# 128 + SIGINT, as shells report it.
_INTERRUPTED: Final = 130
_HELP: Final = """\
usage: spin-lightning COMMAND [ARGUMENTS]

Fine-tune a language model by self-play (SPIN): at each iterate the model answers the prompts of a
data set, and is trained to prefer the data's responses over its own.

commands:
{commands}

Where to go next:
  spin-lightning COMMAND --help             arguments of a command, with their defaults
  spin-lightning fit --model.help SPIN      settings of a variant: SPIN, MixtureSPIN,
                                            FictitiousSPIN, AlphaSPIN, SPACE, SFT
  spin-lightning fit --data.help SelfPlayDataModule
                                            settings of the data
  spin-lightning quickstart                 a first run, minutes on a CPU
  spin-lightning recipes ls                 configs to start from
  README.md and docs/                       what the variants compute, metrics, evaluation
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with one message and exit code 2.

    Where another process of a distributed run has failed, this one ends with one line and exit
    code 1. Ctrl-C ends with exit code 130.

    Args:
        args: The arguments; default: those of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    command = arguments[0] if arguments else "--help"
    ignore_renamed()
    # So that --model my_variants.MySPIN finds my_variants.py, as `python -m` would.
    sys.path.insert(0, "")
    try:
        if command in ("-h", "--help"):
            print(help_page(), end="")
        elif command in COMMANDS:
            COMMANDS[command](arguments[1:])
        elif command in _LIGHTNING and arguments[1:] in (["-h"], ["--help"]):
            print(FIT_HELP_PAGE.format(command=command, summary=_LIGHTNING[command]), end="")
        elif command in _LIGHTNING and arguments[1:] == ["--help", "all"]:
            _run_lightning([command, "--help"])
        elif command in _LIGHTNING or command.startswith("-"):
            _run_lightning(args)
        else:
            raise _unknown(command)
    except (OSError, ValueError, ImportError, ArgumentError) as error:
        mistake = mistake_behind(error, command if command in COMMANDS else "fit")
        if mistake is None:
            raise
        end(mistake, 2)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except SystemExit as error:
        # Lightning turns Ctrl-C into exit code 1; `SelfPlay` has said how to continue.
        if isinstance(error.__context__, KeyboardInterrupt):
            sys.exit(_INTERRUPTED)
        raise


def help_page() -> str:
    """One line per command, and where to read on."""
    own = {name: inspect.getdoc(command) or "" for name, command in COMMANDS.items()}
    lines = {**_LIGHTNING, **own}
    listed = (f"  {name:<10} {text.splitlines()[0]}" for name, text in lines.items())
    return _HELP.format(commands="\n".join(listed))


def _run_lightning(args: Sequence[str] | None) -> None:
    with _collector_paused():
        from spin_lightning.cli.fit import run
    run(args)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Import without garbage collection.

    What torch, Lightning and transformers import stays for good. The collector would walk it again
    and again, which takes a third of the time, and once more when the process ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _unknown(command: str) -> SettingError:
    names = [*_LIGHTNING, *COMMANDS]
    elsewhere = _ELSEWHERE.get(command)
    near = [elsewhere] if elsewhere else get_close_matches(command, names, n=1)
    return SettingError(
        "command",
        command,
        "there is no such command",
        fix=f"run spin-lightning {near[0]}" if near else f"choose from {', '.join(names)}",
    )
