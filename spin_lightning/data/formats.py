"""Conversations from the rows of files and hub data sets, with various column names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spin_lightning.data.sources import SourceRow, load_rows
from spin_lightning.errors import DataError
from spin_lightning.types import BadRow, Conversation, Message

_ROLES = frozenset({"system", "user", "assistant", "tool"})
# The first pair whose columns are both present is read.
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "real"),
    ("question", "answer"),
)
# Kinds of bad rows that are described, most frequent first.
_MOST_KINDS = 5

_Turns = tuple[Message, ...]


class _Unusable(ValueError):
    """A row that cannot be used; the message is the reason."""


def read_conversations(
    source: str, columns: Mapping[str, str] | None = None, setting: str = "data"
) -> tuple[list[Conversation], list[BadRow]]:
    """Read a data set as prompts with one response each.

    Recognized columns, in this order: `messages` (a chat; its last assistant turn is the response,
    the turns before it are the prompt), `prompt` with `response`, `completion` or `real`,
    `question` with `answer`, and SPIN's released `real` and `generated` (whole chats; `generated`
    is not used, since opponents generate their own responses). A prompt is a string or a list of
    messages; a response is a string or the message that answers the prompt.

    Files are read without a cache and without type inference, so an answer `72` or `2024-01-01` in
    a csv file stays a string.

    Args:
        source: A json (a list of objects, or one object per line), jsonl, parquet or csv file, a
            folder of them, read in the order of their names, or a hub id
            `owner/name[/configuration][:split]`.
        columns: Our names (`messages`, or `prompt` and `response`) to the columns of the file.
        setting: Setting that names the source, for messages.

    Returns:
        The conversations, and the rows that cannot be used with the reason.

    Raises:
        DataError: The data does not exist, cannot be read, or has no rows or no usable columns.
    """
    rows = load_rows(source, setting)
    if not rows:
        raise DataError(
            f"{setting}={source!r} is empty: it has no rows",
            fix="give data with at least one example",
        )
    present = list(dict.fromkeys(name for row in rows for name in row))
    read_row = _row_reader(f"{setting}={source!r}", present, columns or {})
    conversations, bad = [], []
    for example_id, row in enumerate(rows):
        try:
            conversations.append(Conversation(example_id, *read_row(row)))
        except _Unusable as problem:
            bad.append(BadRow(example_id, str(problem)))
    return conversations, bad


def describe_bad_rows(bad: Sequence[BadRow], total: int) -> str:
    """The number of rows that cannot be used, and the reasons with the first few rows of each.

    The part of a reason after a colon is specific to the row and does not distinguish kinds.

    >>> describe_bad_rows([BadRow(3, "no messages"), BadRow(5, "a prompt over 8 tokens: 9")], 10)
    '2 of 10 rows (no messages: 1 (row 3); a prompt over 8 tokens: 1 (row 5: 9))'
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for row in bad:
        kind, _, detail = row.reason.partition(": ")
        kinds[kind].append(f"{row.example_id}: {detail}" if detail else str(row.example_id))
    reasons = [
        f"{kind}: {len(rows)} ({'rows' if len(rows) > 1 else 'row'} {', '.join(rows[:3])}"
        f"{', …' * (len(rows) > 3)})"
        for kind, rows in sorted(kinds.items(), key=lambda item: -len(item[1]))
    ]
    if len(reasons) > _MOST_KINDS:
        others = len(reasons) - _MOST_KINDS
        reasons[_MOST_KINDS:] = [f"and {others} other reasons"]
    return f"{len(bad)} of {total} rows ({'; '.join(reasons)})"


# ---------------------------------------------------------------------------- what a row means

_RowReader = Callable[[SourceRow], tuple[_Turns, str]]


def _row_reader(source: str, present: Sequence[str], columns: Mapping[str, str]) -> _RowReader:
    """The function that reads a row, chosen by the columns that are present."""
    _check_columns(source, present, columns)
    if "messages" in columns or (not columns and "messages" in present):
        messages = columns.get("messages", "messages")
        return lambda row: _from_messages(row.get(messages))
    for pair in _PAIRS:
        prompt, response = columns.get("prompt", pair[0]), columns.get("response", pair[1])
        if prompt in present and response in present:
            return lambda row: _from_parts(row.get(prompt), row.get(response))
    if not columns and {"real", "generated"} <= set(present):
        return lambda row: _from_messages(row.get("real"))
    raise DataError(
        f"{source} has no recognized columns; it has {', '.join(present)}",
        fix="name them, such as --data.columns '{prompt: instruction, response: output}'",
    )


def _check_columns(source: str, present: Sequence[str], columns: Mapping[str, str]) -> None:
    for ours, theirs in columns.items():
        if ours not in ("messages", "prompt", "response"):
            raise DataError(
                f"data.columns has a key {ours!r}", fix="use messages, or prompt and response"
            )
        if theirs not in present:
            raise DataError(
                f"data.columns maps {ours} to {theirs!r}, which {source} does not have",
                fix=f"choose from its columns: {', '.join(present)}",
            )
    if "messages" in columns and len(columns) > 1:
        raise DataError(
            f"data.columns={dict(columns)!r} names messages and parts of them",
            fix="give messages alone, or prompt and response",
        )


def _from_messages(messages: Any) -> tuple[_Turns, str]:
    turns = _turns(messages)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise _Unusable("no assistant turn")
    return _prompt(turns[:last]), turns[last]["content"]


def _from_parts(prompt: Any, response: Any) -> tuple[_Turns, str]:
    is_chat = isinstance(prompt, list)
    turns = _turns(prompt) if is_chat else (_message("user", prompt, "prompt"),)
    if isinstance(response, list):
        return _prompt(turns), _answer(turns, _turns(response))
    return _prompt(turns), _message("assistant", response, "response")["content"]


def _prompt(turns: _Turns) -> _Turns:
    """Check that the first turn that is not a system turn is the user's."""
    first = next((turn["role"] for turn in turns if turn["role"] != "system"), None)
    if first != "user":
        raise _Unusable("no user turn before the first answer")
    return turns


def _answer(prompt: _Turns, turns: _Turns) -> str:
    """The response from a list of messages, which may repeat the prompt before it."""
    *before, last = turns
    if last["role"] != "assistant" or (before and tuple(before) != prompt):
        raise _Unusable("a response that is more than the answer to its prompt")
    return last["content"]


def _turns(messages: Any) -> _Turns:
    if not isinstance(messages, list) or not messages:
        raise _Unusable("no messages")
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise _Unusable("a message without a known role")
    return tuple(_message(m["role"], m.get("content"), f"{m['role']} turn") for m in messages)


def _message(role: str, content: Any, what: str) -> Message:
    """A turn with valid text, which only in a system turn may be empty, as in zephyr's data."""
    one = f"an {what}" if what[0] in "aeo" else f"a {what}"
    if not isinstance(content, str):
        raise _Unusable(f"{one} that is not text")
    if role != "system" and not content.strip():
        raise _Unusable(f"an empty {what}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise _Unusable(f"{one} that is not valid Unicode") from error
    return Message(role=role, content=content)
