"""Checks of records that were read from JSON: one rule per field, one message per failure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from spin_lightning.errors import MOST_REAL, is_whole


@dataclass(frozen=True)
class Rule:
    """A rule for the value of a field.

    Attributes:
        description: Completes "its 'rows' is not …".
        accepts: Whether a value follows the rule.
    """

    description: str
    accepts: Callable[[Any], bool]


def _is_json_number(value: object) -> bool:
    """Whether a value fits a float; Python's JSON has NaN and Infinity as well."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= MOST_REAL
    return isinstance(value, float)


def _is_date(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(dt.date.fromisoformat(value))
    except ValueError:
        return False


def _is_hash_by_file(value: object) -> bool:
    # These files are opened, so no name may lead out of the folder.
    return isinstance(value, dict) and all(
        Path(name).name == name and isinstance(digest, str) for name, digest in value.items()
    )


DATE: Final = Rule("a date such as 2026-01-31", _is_date)
TEXT: Final = Rule("a string", lambda value: isinstance(value, str))
LIST: Final = Rule("a list", lambda value: isinstance(value, list))
TEXTS: Final = Rule(
    "a list of strings",
    lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value),
)
OBJECT: Final = Rule("an object", lambda value: isinstance(value, dict))
INTEGER: Final = Rule(
    "an integer", lambda value: isinstance(value, int) and not isinstance(value, bool)
)
COUNT: Final = Rule("a positive integer", lambda value: is_whole(value, 1))
WHOLE: Final = Rule("a non-negative integer", lambda value: is_whole(value, 0))
NUMBER: Final = Rule("a number", _is_json_number)
NUMBERS: Final = Rule(
    "an object of numbers",
    lambda value: isinstance(value, dict) and all(map(_is_json_number, value.values())),
)
TEXT_BY_NAME: Final = Rule(
    "an object of strings",
    lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values()),
)
INDEX: Final = Rule("the index of an iterate", lambda value: is_whole(value, 0))
INDICES: Final = Rule(
    "a list of iterates",
    lambda value: isinstance(value, list) and all(is_whole(i, 0) for i in value),
)
TOKEN_IDS: Final = Rule(
    "a list of token ids",
    lambda value: isinstance(value, list) and all(is_whole(i, 0) for i in value),
)
FILE_HASHES: Final = Rule("an object of hashes by file name", _is_hash_by_file)


def optional(rule: Rule) -> Rule:
    """The same rule for a value that may also be null."""
    return Rule(f"{rule.description} or null", lambda value: value is None or rule.accepts(value))


def check_fields(
    record: object, rules: Mapping[str, Rule], required: Collection[str] = ()
) -> dict[str, Any]:
    """Return a record after checking its fields.

    Args:
        record: A value read from JSON.
        rules: The rule of each field. Fields without a rule may have any value.
        required: Fields that must be present; the others may be missing.

    Raises:
        ValueError: It is not an object, a required field is missing, or a field breaks its rule.

    Example:
        >>> check_fields({"rows": -1}, {"rows": COUNT})
        Traceback (most recent call last):
        ...
        ValueError: its 'rows' is not a positive integer
    """
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    for name in required:
        if name not in record:
            raise ValueError(f"its {name!r} is missing")
    for name, rule in rules.items():
        if name in record and not rule.accepts(record[name]):
            raise ValueError(f"its {name!r} is not {rule.description}")
    return record
