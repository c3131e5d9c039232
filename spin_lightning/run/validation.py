"""Checks of records that were read as JSON: a field, a rule, one message."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from spin_lightning.errors import is_number, is_whole


@dataclass(frozen=True)
class Rule:
    """What the value of a field has to be.

    Attributes:
        description: Completes "its 'rows' is not …".
        accepts: Whether a value follows the rule.
    """

    description: str
    accepts: Callable[[Any], bool]


TEXT: Final = Rule("a string", lambda value: isinstance(value, str))
OBJECT: Final = Rule("an object", lambda value: isinstance(value, dict))
NUMBER: Final = Rule("a number", is_number)
COUNT: Final = Rule("a positive integer", lambda value: is_whole(value, 1))
INDEX: Final = Rule("the index of an iterate", lambda value: is_whole(value, 0))
INDICES: Final = Rule(
    "a list of iterates",
    lambda value: isinstance(value, list) and all(is_whole(i, 0) for i in value),
)
# They are opened: none may lead out of its folder.
FILE_HASHES: Final = Rule(
    "an object of hashes by the names of files in this folder",
    lambda value: (
        isinstance(value, dict)
        and all(Path(name).name == name and isinstance(h, str) for name, h in value.items())
    ),
)


def optional(rule: Rule) -> Rule:
    """The rule for a value that may be null as well."""
    return Rule(f"{rule.description} or null", lambda value: value is None or rule.accepts(value))


def check_fields(
    record: object, rules: Mapping[str, Rule], required: Collection[str] = ()
) -> dict[str, Any]:
    """Return a record whose fields follow their rules.

    Args:
        record: What JSON gave.
        rules: By the name of the field; a field that is missing breaks none.
        required: Fields that may not be missing.

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
