"""A user's mistakes: one message each on stderr, no traceback, exit code 2."""

from __future__ import annotations

import inspect
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Final, NoReturn

from rich.console import Console

from spin_lightning.errors import SpinError, first_line
from spin_lightning.run.files import is_of_the_disk, unwritable

FIT_HELP: Final = "see spin-lightning fit --help"
# Extras that install a package, and how Lightning's messages name one.
_EXTRAS: Final = {"wandb": "wandb", "lm_eval": "eval"}
_REQUIREMENT: Final = re.compile(r"Requirement '([\w.-]+)")
# An option that a class does not take, and the class, in jsonargparse's words.
_NOT_ACCEPTED: Final = re.compile(r"class_path '([\w.]+)'.*Option '(\w+)' is not accepted")
# Names of settings in other libraries.
_ELSEWHERE: Final = {
    "lr": "learning_rate",
    "r": "lora_r",
    "rank": "lora_r",
    "lambda": "beta",
    "model_name_or_path": "model",
    "per_device_train_batch_size": "batch_size",
    "max_length": "max_response_tokens",
    "dataset": "data",
    "gradient_checkpointing": "activation_checkpointing",
    "num_train_epochs": "epochs_per_iterate",
}
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
    text = "; ".join(problem).replace(":; ", ": ")
    fix = f"see spin-lightning {command} --help"
    if command in ("fit", "validate"):
        fix += ", and --model.help or --data.help with a class name"
    meant = _meant(text)
    return SpinError(text, fix=fix if meant is None else f"did you mean {meant}? Or {fix}")


def _meant(problem: str) -> str | None:
    """The setting that a mistyped one resembles, or that has another name elsewhere."""
    named = _NOT_ACCEPTED.search(problem)
    if named is None:
        return None
    module, _, name = named[1].rpartition(".")
    cls = getattr(import_module(module), name)
    inits = (base.__init__ for base in cls.__mro__ if "__init__" in vars(base))
    taken = {name for init in inits for name in inspect.signature(init).parameters}
    taken -= {"self", "kwargs", *getattr(cls, "without", ())}
    elsewhere = _ELSEWHERE.get(named[2])
    near = [elsewhere] if elsewhere in taken else get_close_matches(named[2], sorted(taken), n=1)
    return near[0] if near else None
