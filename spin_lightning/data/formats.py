"""Reading conversations out of files and hub data sets, whatever their columns are called."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spin_lightning.errors import DataError, first_line
from spin_lightning.types import BadRow, Conversation, Message

_ROLES = frozenset({"system", "user", "assistant", "tool"})
# The first pair that is there with both its columns is read.
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "real"),
    ("question", "answer"),
)
_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(/(?P<config>\w[\w.-]*))?(:(?P<split>.+))?")
# Of many kinds of bad rows, the most frequent ones are told.
_MOST_KINDS = 5

_Row = Mapping[str, Any]
_Turns = tuple[Message, ...]


class _Unusable(ValueError):
    """A row that cannot be used; the message is the reason."""


def read_conversations(
    source: str, columns: Mapping[str, str] | None = None, setting: str = "data"
) -> tuple[list[Conversation], list[BadRow]]:
    """Read a data set as prompts with one response each.

    Recognised columns, in this order: `messages` (a chat; its last assistant turn is the response,
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
    rows = _load(source, setting)
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


# ---------------------------------------------------------------------------- where rows come from


def _load(source: str, setting: str) -> list[_Row]:
    path = Path(source).expanduser()
    if path.exists():
        return [row for file in _files(path, setting) for row in _read_file(file, setting)]
    hub_id = _HUB_ID.fullmatch(source)
    if hub_id is None or path.suffix.lower() in _READERS:
        raise DataError(
            f"{setting}={source!r}: there is no such file",
            fix="check the path, or give a hub id owner/name[/configuration][:split]",
        )
    return _read_hub(source, hub_id, setting)


def _files(path: Path, setting: str) -> list[Path]:
    candidates = [path] if path.is_file() else sorted(path.iterdir())
    files = [
        file
        for file in candidates
        if file.is_file() and file.suffix.lower() in _READERS and not file.name.startswith(".")
    ]
    if not files:
        what = "is" if path.is_file() else "holds"
        raise DataError(
            f"{setting}={str(path)!r} {what} no {', '.join(_READERS)} file",
            fix="give a file of one of these kinds, or a folder of them",
        )
    return files


def _read_file(file: Path, setting: str) -> Sequence[_Row]:
    try:
        return _READERS[file.suffix.lower()](file)
    # A broken json, text that is not UTF-8 and most of what Arrow complains about: ValueError.
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise DataError(
            f"{setting}={str(file)!r} cannot be read ({first_line(error)})",
            fix="check that the file is whole and of the kind its name says (json: a list of "
            "objects, or one object a line)",
        ) from error


def _read_json(file: Path) -> list[_Row]:
    """A list of objects, or one object a line, whichever of the two names the file has."""
    with file.open(encoding="utf-8-sig") as stream:
        is_list = stream.read(64).lstrip().startswith("[")
        stream.seek(0)
        if is_list:
            rows = list(enumerate(json.load(stream), 1))
        else:
            rows = [(n, _parsed(n, line)) for n, line in enumerate(stream, 1) if line.strip()]
    for n, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{'object' if is_list else 'line'} {n} has no columns")
    return [row for _, row in rows]


def _parsed(n: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {n} is not valid json: {error.msg}") from error


def _read_csv(file: Path) -> list[_Row]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        header, *records = [cells for cells in csv.reader(stream, strict=True) if cells] or [[]]
    for n, cells in enumerate(records, 1):
        if len(cells) != len(header):
            raise ValueError(f"record {n} has {len(cells)} cells, the header has {len(header)}")
    return [dict(zip(header, cells, strict=True)) for cells in records]


def _read_parquet(file: Path) -> list[_Row]:
    # `read_table` would add columns for folders that are named like `split=train`.
    with pq.ParquetFile(file) as parquet:
        rows: list[_Row] = parquet.read().to_pylist()
    return rows


_READERS: Mapping[str, Callable[[Path], list[_Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _read_hub(source: str, hub_id: re.Match[str], setting: str) -> list[_Row]:
    import datasets
    import huggingface_hub

    try:
        if not huggingface_hub.is_offline_mode():
            # Without a network `load_dataset` tries for half a minute before it says so.
            huggingface_hub.HfApi().dataset_info(hub_id["name"], timeout=10)
        return list(
            datasets.load_dataset(
                hub_id["name"], hub_id["config"], split=hub_id["split"] or "train"
            )
        )
    # Whatever a client of the network raises: its errors have no base class in common.
    except Exception as error:
        raise DataError(
            f"{setting}={source!r} is no file, and reading it from the hub failed "
            f"({first_line(error.__cause__ or error)})",
            fix="check the path or the hub id owner/name[/configuration][:split]; without a "
            "network give a file, or set HF_HUB_OFFLINE=1 to use what was downloaded before",
        ) from error


# ---------------------------------------------------------------------------- what a row means

_RowReader = Callable[[_Row], tuple[_Turns, str]]


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
        f"{source} has no columns that are recognised; it has {', '.join(present)}",
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
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise _Unusable("a message without a known role")
    return tuple(_message(m["role"], m.get("content"), f"{m['role']} turn") for m in messages)


def _message(role: str, content: Any, what: str) -> Message:
    """A turn with usable contents; only a system turn may be empty, as in zephyr's data."""
    if not isinstance(content, str):
        raise _Unusable(f"a {what} that is no text")
    if role != "system" and not content.strip():
        raise _Unusable(f"an empty {what}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise _Unusable(f"a {what} that is not valid Unicode") from error
    return Message(role=role, content=content)
