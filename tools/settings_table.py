"""Every setting as one table: those of a run, of its classes, and of the commands.

The rows come from the parsers that read them, which take types and defaults from the signatures and
meanings from the docstrings, so that the table cannot differ from what the command line accepts.
"""

from __future__ import annotations

import inspect
from argparse import SUPPRESS
from collections.abc import Callable, Iterator
from types import NoneType, UnionType
from typing import Any, Final, Literal, NamedTuple, Union, get_args, get_origin
from unittest import mock

from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser

import spin_lightning
from spin_lightning.cli.commands import COMMANDS
from spin_lightning.cli.fit import SpinCLI
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.testbed import ExactMetrics

_HEAD: Final = "| setting | default | meaning | of |\n|---|---|---|---|\n"
# What a parser takes besides settings.
_NO_SETTINGS: Final = ("help", "print_config", "print_shtab")


class Setting(NamedTuple):
    """A row of the table.

    Attributes:
        path: How the command line and a config name it.
        kind: Its type.
        default: Its default; "required" if there is none.
        meaning: What it does.
        owner: The class or command that takes it.
    """

    path: str
    kind: str
    default: str
    meaning: str
    owner: str


def settings() -> list[Setting]:
    """All settings, in the order of the table."""
    return [*_of_a_run(), *_of_classes(), *_of_commands()]


def table() -> str:
    """The table in Markdown; settings that several classes share are one row."""
    owners: dict[Setting, list[str]] = {}
    for row in settings():
        owners.setdefault(row._replace(owner=""), []).append(row.owner)
    return _HEAD + "".join(_line(row, names) for row, names in owners.items())


def _line(row: Setting, owners: list[str]) -> str:
    everywhere = len(owners) == len(variants())
    of = "every variant" if everywhere else ", ".join(f"`{name}`" for name in owners)
    meaning = f"{row.meaning} `{row.kind}`" if row.kind else row.meaning
    cells = (f"`{row.path}`", f"`{row.default}`", meaning, of)
    # A bar would end the cell, and an escaped one keeps its backslash inside code.
    return "| " + " | ".join(cell.replace(" | ", " or ") for cell in cells) + " |\n"


def exported() -> Iterator[type]:
    """The exported classes that a config can name."""
    for name in spin_lightning.__all__:
        value = getattr(spin_lightning, name)
        if inspect.isclass(value) and not inspect.isabstract(value):
            yield value


def variants() -> list[type]:
    """The exported modules, SPIN first and SFT last."""
    found = [cls for cls in exported() if issubclass(cls, spin_lightning.SelfPlayModule)]
    return sorted(
        found, key=lambda cls: (cls is not spin_lightning.SPIN, cls is spin_lightning.SFT)
    )


def callbacks() -> list[type]:
    """The callbacks that a config may list under trainer.callbacks."""
    return [*(cls for cls in exported() if issubclass(cls, Callback)), ExactMetrics]


def _of_a_run() -> Iterator[Setting]:
    parser = LightningArgumentParser()
    SpinCLI.add_arguments_to_parser(None, parser)  # type: ignore[arg-type]
    yield from _rows(parser, "fit ", "fit")


def _of_classes() -> Iterator[Setting]:
    for cls in variants():
        yield from _of(cls, "model.")
    yield from _of(GenerationSettings, "model.generation.")
    yield from _of(spin_lightning.SelfPlayDataModule, "data.")
    for cls in callbacks():
        yield from _of(cls, f"{cls.__name__}.")


def _of(cls: type, prefix: str) -> Iterator[Setting]:
    parser = ArgumentParser()
    parser.add_class_arguments(cls)
    yield from _rows(parser, prefix, cls.__name__)


def _of_commands() -> Iterator[Setting]:
    for name, command in COMMANDS.items():
        yield from _rows(parser_of(command), f"{name} ", name)


class _Stopped(BaseException):
    """Raised instead of parsing, with the parser."""


def parser_of(command: Callable[[list[str]], None]) -> ArgumentParser:
    """The parser that a command builds."""

    def stop(parser: ArgumentParser, *_: object, **__: object) -> None:
        raise _Stopped(parser)

    with mock.patch.object(ArgumentParser, "parse_args", stop):
        try:
            command([])
        except _Stopped as stopped:
            parser = stopped.args[0]
            assert isinstance(parser, ArgumentParser)
            return parser
    raise AssertionError(f"{command} parses nothing")


def _rows(parser: ArgumentParser, prefix: str, owner: str) -> Iterator[Setting]:
    for action in parser._actions:
        if action.dest.endswith(_NO_SETTINGS) or SUPPRESS in (action.help, action.default):
            continue  # not a setting, or a group of them, whose members follow
        options = [option for option in action.option_strings if option.startswith("--")]
        is_setting = prefix.endswith(".")
        name = action.dest if is_setting or not options else options[0]
        required = action.required or not options
        default = "required" if required else _plain(action.default)
        yield Setting(prefix + name, _kind(action), default, _meaning(action.help), owner)


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _kind(action: Any) -> str:
    """A type as a reader writes it: `auto | float32` or `int | null`."""
    kind = getattr(action, "_typehint", None) or action.type
    if kind is None or kind is str:
        return ""
    return _name_of(kind)


def _name_of(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(_name_of(part) for part in parts))
    name = {NoneType: "null", Any: "any"}.get(kind) or getattr(
        origin or kind, "__name__", str(kind)
    )
    return f"{name}[{', '.join(map(_name_of, parts))}]" if parts else name


def _meaning(text: str | None) -> str:
    return " ".join((text or "").split()).removesuffix("(default: %(default)s)")


if __name__ == "__main__":
    print(table(), end="")
