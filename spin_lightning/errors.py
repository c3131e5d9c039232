"""Errors a user can act on: each names the field, the value and the fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class SpinError(ValueError):
    """Base of every error that spin_lightning raises on purpose.

    The command line prints its message without a traceback. The message always ends with the fix.
    """

    def __init__(self, problem: str, *, fix: str) -> None:
        super().__init__(f"{problem.rstrip('.')}. Fix: {fix.rstrip('.')}.")
        self.problem = problem
        self.fix = fix


def first_line(error: BaseException) -> str:
    """What an error says first; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class SettingError(SpinError):
    """A setting has a value that cannot work."""

    def __init__(self, field: str, value: object, problem: str, *, fix: str) -> None:
        super().__init__(f"{field}={value!r}: {problem}", fix=fix)
        self.field = field
        self.value = value


class DataError(SpinError):
    """The data set cannot be used: the file, a column or a row is not what was promised."""


class RunFolderError(SpinError):
    """A run folder is missing something, was edited, or belongs to another configuration."""


def check_names(group: str, values: Mapping[str, object], known: Sequence[str]) -> None:
    """Refuse settings that a group of them does not have.

    Raises:
        SettingError: A name in `values` is none of `known`.
    """
    for name in values:
        if name not in known:
            raise SettingError(
                f"{group}.{name}",
                values[name],
                "there is no such setting",
                fix=f"choose from {', '.join(known)}",
            )
