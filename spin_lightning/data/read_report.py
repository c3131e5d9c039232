"""What became of every row, column and file of a source, for people to check."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from spin_lightning.data.numbering import place
from spin_lightning.errors import DataError
from spin_lightning.types import BadRow, Conversation

# Of many kinds of anything, the most frequent ones are named.
_MOST_KINDS = 5
# A source of which more is lost is not what the user takes it for.
MOST_LOST = 0.5


@dataclass(frozen=True)
class FileRead:
    """One file or object that was read.

    Attributes:
        name: Its path, or a short description.
        format: The data format of its rows; None where its columns are not recognized.
        rows: Number of rows.
        used: Number of rows that gave an example.
    """

    name: str
    format: str | None
    rows: int
    used: int


@dataclass(frozen=True)
class ReadReport:
    """What was read from a source.

    Every row is either used or in `bad`: `rows == used_rows + len(bad)`. Every column is in
    `columns_used` or in `columns_not_used`, and every file in `files` or in `files_not_read`.

    Attributes:
        source: The setting and its value.
        files: What was read, in order.
        bad: The rows that give no example, with the reason.
        conversations: Number of examples; with `turns: all` a row may give several.
        columns_used: Rows with a value, for each column that was used.
        columns_not_used: Rows with a value, for each other column.
        why_not_used: Why columns are not used, where there is a reason.
        fields_dropped: Messages that have the field, for each field of a message that is not used.
        turns_left_out: Assistant turns that are not learned, by reason, and turns after the last
            answer.
        files_not_read: Files that were not read, with the reason.
    """

    source: str
    files: tuple[FileRead, ...]
    bad: tuple[BadRow, ...]
    conversations: int
    columns_used: Mapping[str, int] = field(default_factory=dict)
    columns_not_used: Mapping[str, int] = field(default_factory=dict)
    why_not_used: Mapping[str, str] = field(default_factory=dict)
    fields_dropped: Mapping[str, int] = field(default_factory=dict)
    turns_left_out: Mapping[str, int] = field(default_factory=dict)
    files_not_read: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_rows(
        cls, source: str, conversations: Sequence[Conversation], bad: Sequence[BadRow]
    ) -> ReadReport:
        """The report of a reader that tells rows apart, and nothing else."""
        rows = len(conversations) + len(bad)
        file = FileRead(source, None, rows, len(conversations))
        return cls(source, (file,), tuple(bad), len(conversations))

    @property
    def rows(self) -> int:
        """Number of rows read: the lines of a jsonl file, blank ones left out."""
        return sum(file.rows for file in self.files)

    @property
    def used_rows(self) -> int:
        """Number of rows that gave at least one example."""
        return self.rows - len(self.bad)

    @property
    def reasons(self) -> Mapping[str, int]:
        """How many rows are bad for each reason, the most frequent first."""
        return dict(Counter(row.reason.partition(": ")[0] for row in self.bad).most_common())

    def notes(self) -> list[str]:
        """One line for each kind of thing that was not used; rows aside, see `bad`."""
        columns = [
            _counted(name, rows, "row", self.why_not_used.get(name))
            for name, rows in self.columns_not_used.items()
        ]
        by_reason: dict[str, list[str]] = defaultdict(list)
        for name, why in self.files_not_read.items():
            by_reason[why].append(name)
        files = [f"{_first(names)} ({why})" for why, names in by_reason.items()]
        kinds = {
            "columns not used": columns,
            "message fields not used": _counts(self.fields_dropped, "message"),
            "turns not learned": _counts(self.turns_left_out, "turn"),
            "files not read": files,
        }
        return [f"{kind}: {_first(names)}" for kind, names in kinds.items() if names]


BadRows = Literal["skip", "skip_any", "refuse"]


def checked_bad_rows(
    report: ReadReport, unfit: Sequence[BadRow], tried: int, bad_rows: BadRows
) -> str | None:
    """Describe the rows that are left out, or refuse the data because of them.

    Args:
        report: What was read.
        unfit: Examples that were read and do not fit: the prompt is too long, or the chat template
            refuses it.
        tried: Number of examples that were tried.
        bad_rows: `skip` takes a loss of up to half of the rows, `skip_any` any loss but that of
            all rows, `refuse` none.

    Returns:
        The description; None if nothing is left out.

    Raises:
        DataError: More is left out than `bad_rows` takes.
    """
    bad = [*report.bad, *unfit]
    if not bad:
        return None
    text = describe_bad_rows(bad, report.rows)
    left = report.used_rows / report.rows * (1 - len(unfit) / max(1, tried))
    if not left:
        fix = "correct the rows"
        if any(row.prompt_tokens is not None for row in unfit):
            fix = "raise data.max_prompt_tokens, or use a model with a longer context"
    elif bad_rows == "refuse":
        fix = "correct these rows, or skip them with data.bad_rows: skip"
    elif bad_rows == "skip" and left < 1 - MOST_LOST:
        fix = (
            "correct these rows, which are more than half; give each format a file of its own; or "
            "skip them, however many, with data.bad_rows: skip_any"
        )
    else:
        return text
    raise DataError(f"{report.source}: {text}", fix=fix)


def describe_bad_rows(bad: Sequence[BadRow], total: int) -> str:
    """Count the rows that cannot be used by reason, with the first few of each kind.

    What follows a colon in a reason is a detail of its row: it does not make another kind.

    >>> describe_bad_rows([BadRow(3, "no messages"), BadRow(5, "a prompt over 8 tokens: 9")], 10)
    '2 of 10 rows (no messages: 1 (row 3); a prompt over 8 tokens: 1 (row 5: 9))'
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for row in bad:
        kind, _, detail = row.reason.partition(": ")
        example = place(row.example_id)
        kinds[kind].append(f"{example}: {detail}" if detail else example)
    named = [
        f"{kind}: {len(rows)} ({'rows' if len(rows) > 1 else 'row'} {', '.join(rows[:3])}"
        f"{', …' * (len(rows) > 3)})"
        for kind, rows in sorted(kinds.items(), key=lambda item: -len(item[1]))
    ]
    if len(named) > _MOST_KINDS:
        named[_MOST_KINDS:] = [f"and {len(named) - _MOST_KINDS} other reasons"]
    return f"{len(bad)} of {total} rows ({'; '.join(named)})"


def _counts(counts: Mapping[str, int], unit: str) -> list[str]:
    return [_counted(name, count, unit) for name, count in counts.items()]


def _counted(name: str, count: int, unit: str, why: str | None = None) -> str:
    return f"{name} ({count} {unit}{'s' * (count != 1)}{f': {why}' if why else ''})"


def _first(names: Iterable[str]) -> str:
    """The first names of many."""
    names = list(names)
    if len(names) > 2 * _MOST_KINDS:
        names[2 * _MOST_KINDS :] = [f"and {len(names) - 2 * _MOST_KINDS} more"]
    return ", ".join(names)
