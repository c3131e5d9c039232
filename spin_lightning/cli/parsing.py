"""How the commands other than `fit` and `validate` read their arguments."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable

from jsonargparse import ArgumentParser, DefaultHelpFormatter


class _HelpFormatter(DefaultHelpFormatter):
    """Shows defaults; where the help text itself names one, no `default: null` after it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text: str = super()._get_help_string(action)
        if action.default is not None:
            return text
        return text.replace(", default: %(default)s", "").replace(" (default: %(default)s)", "")


def command_parser(name: str, command: Callable[[list[str]], None]) -> ArgumentParser:
    """A parser whose help page begins with the command's docstring."""
    return ArgumentParser(
        prog=f"spin-lightning {name}",
        description=inspect.getdoc(command),
        formatter_class=_HelpFormatter,
        exit_on_error=False,
    )


def run_first(args: list[str]) -> list[str]:
    """Accept `--run RUN`, the older spelling of the first positional argument."""
    older = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    older.add_argument("--run")
    given, rest = older.parse_known_args(args)
    return rest if given.run is None else [given.run, *rest]
