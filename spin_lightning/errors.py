"""Errors a user can act on: each names the field, the value and the fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spin_lightning.redaction import masked

# Anything larger is a typo: torch or parquet would overflow somewhere in a run.
MOST = 2**31 - 1
MOST_REAL = 1e30


class SpinError(ValueError):
    """Base of every error that spin_lightning raises on purpose.

    The command line prints the message without a traceback. The message always ends with the fix.
    """

    def __init__(self, problem: str, *, fix: str) -> None:
        # A path or URL in the message may contain an access token.
        super().__init__(masked(f"{problem.rstrip('.')}. Fix: {fix.rstrip('.')}."))
        self.problem = problem
        self.fix = fix


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its class name if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class SettingError(SpinError):
    """A setting has a value that cannot work."""

    def __init__(self, field: str, value: object, problem: str, *, fix: str) -> None:
        super().__init__(f"{field}={value!r}: {problem}", fix=fix)
        self.field = field
        self.value = value


class DataError(SpinError):
    """The data set cannot be used: a file, a column or a row is missing or malformed."""


class RunFolderError(SpinError):
    """A run folder is incomplete, was edited, or belongs to another configuration."""


def is_whole(value: object, least: int, most: int = MOST) -> bool:
    """Whether `value` is an integer in [least, most]. A bool does not count as one."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object) -> bool:
    """Whether `value` is a finite number. A bool does not count as one."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -MOST_REAL <= value <= MOST_REAL
    )


def check_settings(
    settings: object, checks: Mapping[str, tuple[bool, str]], prefix: str = ""
) -> None:
    """Raise for the first setting that is out of range.

    Args:
        settings: The object that holds the settings as attributes.
        checks: By attribute name, whether the value is valid, and a description of valid values
            that completes "give …".
        prefix: What precedes the attribute name in the setting's full name, such as `data.`.

    Raises:
        SettingError: A value is not valid.
    """
    for name, (valid, description) in checks.items():
        if not valid:
            raise SettingError(
                f"{prefix}{name}",
                getattr(settings, name),
                "out of range",
                fix=f"give {description}",
            )


def check_names(group: str, values: Mapping[str, object], known: Sequence[str]) -> None:
    """Raise for the first name in `values` that is not in `known`.

    Raises:
        SettingError: The group has no such setting.
    """
    for name in values:
        if name not in known:
            raise SettingError(
                f"{group}.{name}",
                values[name],
                "there is no such setting",
                fix=f"choose from {', '.join(known)}",
            )


def missing_extra(field: str, package: str, extra: str) -> SettingError:
    """The error for a setting that needs a package of an extra which is not installed.

    Args:
        field: The setting.
        package: The package that is missing.
        extra: The extra that installs it.
    """
    return SettingError(
        field,
        package,
        "this package is not installed",
        fix=f"run: pip install 'spin-lightning[{extra}]'",
    )
