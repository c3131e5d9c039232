"""A user's mistakes: one message each on stderr, no traceback, exit code 2."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from typing import Final, NoReturn

from rich.console import Console

from spin_lightning.errors import SpinError, first_line
from spin_lightning.run.files import is_of_the_disk, unwritable

FIT_HELP: Final = "see spin-lightning fit --help"
# Extras that install a package, and how Lightning's messages name one.
_EXTRAS: Final = {"wandb": "wandb", "lm_eval": "eval"}
_REQUIREMENT: Final = re.compile(r"Requirement '([\w.-]+)")
# Lines in which jsonargparse lists every type that it tried.
_PARSER_NOISE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value type",
    "Given value: NestedArg(",
    "Given value: Namespace(",
    "Given value: {",
)


def end(error: BaseException, code: int) -> NoReturn:
    """Print one message and exit."""
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    errors.print(f"Error: {error}", style="red", markup=False)
    sys.exit(code)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those behind it, latest first: jsonargparse wraps what a class raises."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def mistake_behind(error: Exception, command: str) -> SpinError | None:
    """The user's mistake behind an error; None for an error of another kind.

    Args:
        error: What the command raised.
        command: Its name, for the fix.
    """
    for cause in causes(error):
        if isinstance(cause, SpinError):
            return cause
        if isinstance(cause, OSError) and is_of_the_disk(cause):
            # A file of a logger or a library: those of the run raise a SpinError themselves.
            return unwritable(cause.filename or "a file", cause)
    if isinstance(error, ArgumentError):
        return _unread(error, command)
    missing = _missing_import(error)
    return None if missing is None else _missing(missing)


def _missing_import(error: BaseException | None) -> ModuleNotFoundError | None:
    """A failed import that was reported on purpose, as loggers do; none of our own modules."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    return None if error is None or (error.name or "").startswith("spin_lightning") else error


def _missing(error: ModuleNotFoundError) -> SpinError:
    """A package that is not installed, with the command that installs it."""
    message = first_line(error)
    # Lightning's loggers name the requirement, such as 'wandb>=0.12.10', in their message alone.
    named = _REQUIREMENT.search(message)
    package = (error.name or (named[1] if named else "")).partition(".")[0]
    wanted = f"spin-lightning[{_EXTRAS[package]}]" if package in _EXTRAS else package
    command = f"run: pip install {wanted!r}" if wanted else "install it"
    return SpinError(f"a package is missing ({message.partition(' HINT')[0]})", fix=command)


def _unread(error: ArgumentError, command: str) -> SpinError:
    """What could not be parsed, without jsonargparse's list of every type that it tried."""
    lines = (line.strip().removeprefix("- ") for line in str(error).splitlines())
    problem = [line for line in lines if line and not line.startswith(_PARSER_NOISE)]
    fix = f"see spin-lightning {command} --help"
    if command in ("fit", "validate"):
        fix += ", and --model.help or --data.help with a class name"
    return SpinError("; ".join(problem).replace(":; ", ": "), fix=fix)
