"""Reading conversations out of files and hub data sets, whatever their columns are called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spin_lightning.data.sources import SourceRow, load_rows
from spin_lightning.errors import DataError
from spin_lightning.types import BadRow, Conversation, Message

_ROLES = frozenset({"system", "user", "assistant", "tool"})
# The first pair that is there with both its columns is read.
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "real"),
    ("question", "answer"),
)
# Of many kinds of bad rows, the most frequent ones are told.
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
    is not used, since opponents answer anew). A prompt is a text or a list of messages, a response
    a text or the message that answers it.

    Files are read as they are, past any cache and without guessing types, so that an answer `72`
    or `2024-01-01` in a csv file stays the text it is.

    Args:
        source: A json (a list of objects, or one object a line), jsonl, parquet or csv file, a
            folder of them, read in the order of their names, or a hub id
            `owner/name[/configuration][:split]`.
        columns: Our names (`messages`, or `prompt` and `response`) to the columns of the file.
        setting: Which setting named the source, for messages.

    Returns:
        The conversations, and the rows that hold none with the reason.

    Raises:
        DataError: No such data, data that cannot be read, no rows, or no usable columns.
    """
    rows = load_rows(source, setting)
    if not rows:
        raise DataError(
            f"{setting}={source!r} is empty, it has no rows",
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
    """Say how many rows cannot be used and why, with the first few of each kind.

    What follows a colon in a reason is a detail of its row: it does not make another kind.

    >>> describe_bad_rows([BadRow(3, "no messages"), BadRow(5, "a prompt over 8 tokens: 9")], 10)
    '2 of 10 rows (no messages: 1 (row 3); a prompt over 8 tokens: 1 (row 5: 9))'
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for row in bad:
        kind, _, detail = row.reason.partition(": ")
        kinds[kind].append(f"{row.example_id}: {detail}" if detail else str(row.example_id))
    told = [
        f"{kind}: {len(rows)} ({'rows' if len(rows) > 1 else 'row'} {', '.join(rows[:3])}"
        f"{', …' * (len(rows) > 3)})"
        for kind, rows in sorted(kinds.items(), key=lambda item: -len(item[1]))
    ]
    if len(told) > _MOST_KINDS:
        told[_MOST_KINDS:] = [f"and {len(told) - _MOST_KINDS} other reasons"]
    return f"{len(bad)} of {total} rows ({'; '.join(told)})"


# ---------------------------------------------------------------------------- what a row means

_RowReader = Callable[[SourceRow], tuple[_Turns, str]]


def _row_reader(source: str, present: Sequence[str], columns: Mapping[str, str]) -> _RowReader:
    """Pick how rows are read, from the columns that are there."""
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
        f"{source} has no columns that are recognized; it has {', '.join(present)}",
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
    """The turns, if somebody asks before anybody answers."""
    first = next((turn["role"] for turn in turns if turn["role"] != "system"), None)
    if first != "user":
        raise _Unusable("no user turn before the first answer")
    return turns


def _answer(prompt: _Turns, turns: _Turns) -> str:
    """The response in a list of messages, which may repeat the prompt before it."""
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
    """A turn with usable contents; only a system turn may be empty, as in zephyr's data."""
    one = f"an {what}" if what[0] in "aeo" else f"a {what}"
    if not isinstance(content, str):
        raise _Unusable(f"{one} that is no text")
    if role != "system" and not content.strip():
        raise _Unusable(f"an empty {what}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise _Unusable(f"{one} that is not valid Unicode") from error
    return Message(role=role, content=content)
