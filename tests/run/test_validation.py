"""Rules of JSON fields, and the one message for each field that breaks its rule."""

import math

import pytest

from spin_lightning.run.validation import (
    COUNT,
    FILE_HASHES,
    INDEX,
    INDICES,
    INTEGER,
    LIST,
    NUMBER,
    NUMBERS,
    OBJECT,
    TEXT,
    TEXTS,
    WHOLE,
    check_fields,
    optional,
)


@pytest.mark.parametrize(
    ("rule", "accepted", "refused"),
    [
        (TEXT, ["", "a"], [None, 1, ["a"]]),
        (LIST, [[], [1, "a"]], [None, {}, "a"]),
        (TEXTS, [[], ["a", "b"]], [["a", 1], "ab", {"a": "b"}, None]),
        (OBJECT, [{}, {"a": 1}], [None, [], "a"]),
        (INTEGER, [-3, 0, 10**12], [True, 1.0, "1", None]),
        (COUNT, [1, 2**31 - 1], [0, -1, True, 1.0, "1", 2**31]),
        (WHOLE, [0, 5], [-1, False, 0.5, None]),
        (INDEX, [0, 999], [-1, True, "0"]),
        (INDICES, [[], [0, 2]], [[-1], [True], ["0"], 3, None]),
        (NUMBER, [0, -1.5, math.nan, math.inf, 10**30], [True, "1", None, 10**31, [1]]),
        (NUMBERS, [{}, {"a": 1, "b": math.nan}], [{"a": "1"}, {"a": None}, [1]]),
        (FILE_HASHES, [{}, {"a.bin": "0f"}], [["a.bin"], {"a.bin": 1}, {"../a.bin": "0f"}]),
        (FILE_HASHES, [{"a": "0"}], [{"/etc/a": "0"}, {"b/a": "0"}, None]),
        (optional(COUNT), [None, 1], [0, "1"]),
    ],
)
def test_rule_accepts_and_refuses(rule, accepted, refused):
    assert [value for value in accepted if not rule.accepts(value)] == []
    assert [value for value in refused if rule.accepts(value)] == []


def test_check_returns_the_record_with_the_fields_that_have_no_rule():
    record = {"rows": 3, "color": "blue"}
    assert check_fields(record, {"rows": COUNT, "missing": TEXT}) is record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "it is not a JSON object"),
        (None, "it is not a JSON object"),
        ({"rows": 1}, "its 'name' is missing"),
        ({"rows": -1, "name": "a"}, "its 'rows' is not a positive integer"),
        ({"rows": 1, "name": None}, "its 'name' is not a string"),
        ({"name": "a", "loss": "x"}, "its 'loss' is not a number or null"),
    ],
)
def test_check_names_the_field_and_its_rule(record, message):
    rules = {"rows": COUNT, "name": TEXT, "loss": optional(NUMBER)}
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_fields(record, rules, required=["name"])
