"""Reading conversations from any source, whatever its columns are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, Literal

from spin_lightning.data.known_formats import FORMATS, Dialogue, Format
from spin_lightning.data.numbering import example_id
from spin_lightning.data.read_report import FileRead, ReadReport
from spin_lightning.data.sources import open_source
from spin_lightning.data.tables import SourceRow, Table
from spin_lightning.data.turns import THOUGHT_FIELDS, UnusableError
from spin_lightning.errors import DataError
from spin_lightning.types import BadRow, Conversation

Turns = Literal["last", "all"]


def read_conversations(
    source: object, columns: Mapping[str, str] | None = None, setting: str = "data"
) -> tuple[list[Conversation], list[BadRow]]:
    """The conversations of a source with their last answers, and the rows that hold none.

    `read_data` has the arguments and errors.
    """
    conversations, report = read_data(source, columns, setting)
    return conversations, list(report.bad)


def read_data(
    source: object,
    columns: Mapping[str, str] | None = None,
    setting: str = "data",
    turns: Turns = "last",
) -> tuple[list[Conversation], ReadReport]:
    """Read a source as prompts with one response each.

    Each file is read in the first of `known_formats.FORMATS` whose columns it has. A prompt is a
    text or a list of messages, a response a text or the messages that answer it.

    Files are read past any cache and without guessing types, so that an answer `72` or
    `2024-01-01` in a csv file stays the text it is.

    Args:
        source: What `sources.open_source` takes: files, folders, patterns, hub ids, or data in
            memory.
        columns: Our names, such as `messages`, or `prompt` and `response`, to the source's columns.
        setting: Which setting named the source, for messages.
        turns: Make an example of the `last` answer of a conversation, or of `all` of them, each
            with the turns before it as its prompt.

    Returns:
        The conversations in the order of the rows, and what became of every row, column and file.

    Raises:
        DataError: No such data, data that cannot be read, no rows, no usable columns, or a mapping
            that loses a column.
    """
    mapped = dict(columns or {})
    _check_names(mapped)
    opened = open_source(source, setting)
    reading = _Reading(opened.label, mapped, turns)
    for table in opened.tables:
        reading.read(table)
    if not reading.rows:
        raise DataError(
            f"{opened.label} is empty, it has no rows", fix="give data with at least one example"
        )
    reading.check_recognized()
    return reading.conversations, reading.report(opened.not_read)


# ---------------------------------------------------------------------------- rows to conversations


class _Reading:
    """Conversations of one table after the other, and what became of their rows and columns."""

    def __init__(self, label: str, mapped: Mapping[str, str], turns: Turns) -> None:
        self.conversations: list[Conversation] = []
        self.rows = 0
        self._label, self._mapped, self._turns = label, mapped, turns
        self._bad: list[BadRow] = []
        self._files: list[FileRead] = []
        self._columns: dict[str, None] = {}
        self._used: Counter[str] = Counter()
        self._not_used: Counter[str] = Counter()
        self._why: dict[str, str] = {}
        self._dropped: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def read(self, table: Table) -> None:
        """Read a table in the format that its columns tell."""
        before, bad = self.rows, len(self._bad)
        self._columns.update(dict.fromkeys(table.columns))
        found = find_format(table.columns, self._mapped)
        if found is None:
            reason = f"columns that are not recognized: {_listed(table.columns)}"
            for row in table.rows:
                self._bad.append(BadRow(self.rows, reason))
                self._count(row, ())
        else:
            self._read_rows(table, *found)
        rows, left_out = self.rows - before, len(self._bad) - bad
        name = None if found is None else found[0].name
        self._files.append(FileRead(table.name, name, rows, rows - left_out))

    def _read_rows(self, table: Table, layout: Format, names: Mapping[str, str]) -> None:
        used = [name for name in names.values() if name not in layout.leaves]
        self._used.update(dict.fromkeys(used, 0))
        self._why |= {name: why for name, why in layout.leaves.items() if name in table.columns}
        losses = _Losses(table.columns, self._mapped, used)
        for row in table.rows:
            try:
                dialogue = layout.read({ours: row.get(theirs) for ours, theirs in names.items()})
                self._add(dialogue)
                losses.check(row, dialogue)
            except UnusableError as problem:
                reason = _other_format(row, layout, names) or str(problem)
                self._bad.append(BadRow(self.rows, reason))
            self._count(row, used)
        losses.refuse(self._label)

    def _add(self, dialogue: Dialogue) -> None:
        """Make the row's examples."""
        turns = dialogue.turns
        answers = [i for i, turn in enumerate(turns) if turn.is_answer]
        learned = [i for i in answers if i >= dialogue.first_answer]
        if not learned:
            raise UnusableError(_why_no_answer(dialogue))
        learned = learned[-1:] if self._turns == "last" else learned
        made = [
            _conversation(dialogue, i, example_id(self.rows, answers_after))
            for answers_after, i in zip(reversed(range(len(learned))), learned, strict=True)
        ]
        self.conversations += made
        for turn in turns:
            self._dropped.update(turn.dropped)
            if turn.message["role"] == "assistant" and not turn.is_answer:
                self._left_out["weight 0"] += 1
        after = len(turns) - 1 - learned[-1]
        if after:
            self._left_out["after the last answer"] += after

    def _count(self, row: SourceRow, used: Sequence[str]) -> None:
        self.rows += 1
        for name, cell in row.items():
            if cell is not None and not (isinstance(cell, Sized) and not len(cell)):
                (self._used if name in used else self._not_used)[name] += 1

    def check_recognized(self) -> None:
        """Refuse a source of which no table has columns that are recognized."""
        if any(file.format is not None for file in self._files if file.rows):
            return
        present = list(self._columns)
        for ours, theirs in self._mapped.items():
            if theirs not in present:
                raise DataError(
                    f"data.columns maps {ours} to {theirs!r}, which {self._label} does not have",
                    fix=f"choose from its columns: {_listed(present)}",
                )
        raise DataError(
            f"{self._label} has no columns that are recognized; it has {_listed(present)}",
            fix=_advice(present),
        )

    def report(self, files_not_read: Mapping[str, str]) -> ReadReport:
        """What became of everything."""
        return ReadReport(
            source=self._label,
            files=tuple(self._files),
            bad=tuple(self._bad),
            conversations=len(self.conversations),
            columns_used=dict(self._used),
            columns_not_used={
                name: self._not_used[name] for name in self._columns if name not in self._used
            },
            why_not_used=self._why,
            fields_dropped=dict(self._dropped),
            turns_left_out=dict(self._left_out),
            files_not_read=files_not_read,
        )


def _conversation(dialogue: Dialogue, i: int, number: int) -> Conversation:
    """The example whose response is turn i."""
    prompt = tuple(turn.message for turn in dialogue.turns[:i])
    first = next((message["role"] for message in prompt if message["role"] != "system"), None)
    if first != "user":
        raise UnusableError("no user turn before the first answer")
    answer = dialogue.turns[i].message
    thought = next((answer[name] for name in THOUGHT_FIELDS if name in answer), None)
    return Conversation(
        number,
        prompt,
        answer["content"],
        reasoning=thought,
        tool_calls=tuple(answer.get("tool_calls", ())),
        tools=dialogue.tools,
    )


def _why_no_answer(dialogue: Dialogue) -> str:
    roles = [turn.message["role"] for turn in dialogue.turns[dialogue.first_answer :]]
    return "no answer but those of weight 0" if "assistant" in roles else "no assistant turn"


# ---------------------------------------------------------------------------- which format


def find_format(
    present: Sequence[str], mapped: Mapping[str, str]
) -> tuple[Format, dict[str, str]] | None:
    """The format of a table with these columns, and our names to the columns it uses."""
    for layout in FORMATS:
        names = layout.columns(present, mapped)
        if names is not None:
            return layout, names
    return None


def _other_format(row: SourceRow, layout: Format, names: Mapping[str, str]) -> str | None:
    """The reason why a row is bad that has the columns of another format than its file."""
    filled = [name for name, cell in row.items() if cell is not None]
    if any(names[ours] in filled for ours in layout.needs):
        return None
    found = find_format(filled, {})
    return None if found is None else f"columns of another format: {_listed(found[1].values())}"


class _Losses:
    """Cells that a mapping loses, though a format that is read without it would use them."""

    def __init__(
        self, present: Sequence[str], mapped: Mapping[str, str], used: Sequence[str]
    ) -> None:
        self._mapped = mapped
        self._unmapped = find_format(present, {}) if mapped else None
        self._rows: Counter[str] = Counter()
        self._columns: list[str] = []
        if self._unmapped is not None and {*mapped.values()} <= {*self._unmapped[1].values()}:
            layout, names = self._unmapped
            self._columns = [n for n in names.values() if n not in (*used, *layout.leaves)]

    def check(self, row: SourceRow, dialogue: Dialogue) -> None:
        """Count the cells of a row that are nowhere in its conversation."""
        for name in self._columns:
            cell = row.get(name)
            texts = [turn.message["content"] for turn in dialogue.turns]
            if cell and not (isinstance(cell, str) and any(cell.strip() in t for t in texts)):
                self._rows[name] += 1

    def refuse(self, label: str) -> None:
        """Refuse the mapping if it loses anything.

        Raises:
            DataError: It does.
        """
        if not self._rows or self._unmapped is None:
            return
        layout, names = self._unmapped
        lost = ", ".join(
            f"{name} ({rows} row{'s' * (rows != 1)})" for name, rows in self._rows.items()
        )
        raise DataError(
            f"{label}: data.columns={dict(self._mapped)!r} would lose what is in {lost}",
            fix=f"leave out data.columns: the file is read as {layout.name}, with "
            f"{_listed(names.values())}",
        )


def _check_names(mapped: Mapping[str, str]) -> None:
    known = dict.fromkeys(
        ours for layout in FORMATS for ours in layout.names if ours not in layout.leaves
    )
    for ours in mapped:
        if ours not in known:
            raise DataError(f"data.columns has a key {ours!r}", fix=f"use {_listed(known)}")
    if mapped and not any(mapped.keys() <= layout.names.keys() for layout in FORMATS):
        raise DataError(
            f"data.columns={dict(mapped)!r} mixes the names of several formats",
            fix="give messages alone, prompt and response, prompt and chosen, or instruction, "
            "input and output",
        )


def _advice(present: Sequence[str]) -> str:
    lower = {name.lower(): name for name in reversed(present)}
    found = find_format(list(lower), {})
    example = {"prompt": "X", "response": "Y"}
    if found is not None:
        example = {ours: lower[theirs] for ours, theirs in found[1].items()}
    mapping = ", ".join(f"{ours}: {theirs}" for ours, theirs in example.items())
    formats = ", ".join(dict.fromkeys(layout.name for layout in FORMATS))
    return (
        f"name them, such as --data.columns '{{{mapping}}}'; columns that are not named are not "
        f"used. Without it these are read: {formats}"
    )


def _listed(names: Iterable[Any]) -> str:
    """Names, the first of very many."""
    listed = [str(name) for name in names]
    return ", ".join([*listed[:20], f"and {len(listed) - 20} more"] if len(listed) > 20 else listed)
