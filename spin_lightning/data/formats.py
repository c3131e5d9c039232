"""Reading conversations out of files and hub data sets, whatever their columns are called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from spin_lightning.errors import DataError
from spin_lightning.types import BadRow, Conversation, Message

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_ROLES = frozenset({"system", "user", "assistant", "tool"})
_RESPONSES = ("response", "completion", "real")


class _Unusable(ValueError):
    """A row that cannot be used; the message is the reason."""


def read_conversations(
    source: str, columns: Mapping[str, str] | None = None
) -> tuple[list[Conversation], list[BadRow]]:
    """Read a data set as prompts with one response each.

    Recognised columns, in this order: `messages` (a chat; its last assistant turn is the response,
    the turns before it are the prompt), SPIN's released `real` and `generated` (chats of two
    messages; `generated` is not used, since opponents answer anew), `prompt` with `response`,
    `completion` or `real`, and `question` with `answer`.

    Args:
        source: A json, jsonl, parquet or csv file, a folder of them, or a hub id
            `owner/name[:split]`.
        columns: Our names (`messages`, or `prompt` and `response`) to the columns of the file.

    Returns:
        The conversations, and the rows that hold none with the reason.

    Raises:
        DataError: No such data, data that cannot be read, no rows, or no usable columns.
    """
    table = _load(source)
    if not len(table):
        raise DataError(f"{source} has no rows", fix="give a file with at least one example")
    read_row = _row_reader(source, table.column_names, columns)
    conversations, bad = [], []
    for example_id, row in enumerate(table):
        try:
            prompt, response = read_row(row)
            conversations.append(Conversation(example_id, prompt, response))
        except _Unusable as problem:
            bad.append(BadRow(example_id, str(problem)))
    return conversations, bad


def describe_bad_rows(bad: Sequence[BadRow], total: int) -> str:
    """Say how many rows cannot be used and why, with the first few of each kind."""
    by_reason: dict[str, list[int]] = defaultdict(list)
    for row in bad:
        by_reason[row.reason].append(row.example_id)
    kinds = (
        f"{reason}: {len(ids)} (rows {', '.join(map(str, ids[:3]))}{', …' * (len(ids) > 3)})"
        for reason, ids in by_reason.items()
    )
    return f"{len(bad)} of {total} rows ({'; '.join(kinds)})"


def _load(source: str) -> datasets.Dataset:
    path = Path(source)
    try:
        if path.exists():
            files = sorted(p for p in _files(path) if p.suffix in _LOADERS)
            if not files:
                raise DataError(
                    f"{source} holds no {', '.join(_LOADERS)} file",
                    fix="give a file of one of these kinds, or a folder of them",
                )
            if all(file.stat().st_size == 0 for file in files):
                raise DataError(f"{source} is empty", fix="give a file with at least one example")
            loader = _LOADERS[files[0].suffix]
            names = [str(file) for file in files]
            return datasets.load_dataset(loader, data_files=names, split="train")
        name, _, split = source.partition(":")
        if path.suffix in _LOADERS or name.count("/") != 1:
            raise DataError(
                f"data={source!r}: there is no such file",
                fix="check the path, or give a hub id owner/name[:split]",
            )
        return datasets.load_dataset(name, split=split or "train")
    except DataError:
        raise
    except (DatasetGenerationError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"data={source!r} cannot be read ({str(cause).strip().splitlines()[0]})",
            fix="check that the file is whole and of the kind its name says, or that the hub can "
            "be reached",
        ) from error


def _files(path: Path) -> Iterable[Path]:
    return [path] if path.is_file() else path.iterdir()


_RowReader = Callable[[Mapping[str, Any]], tuple[tuple[Message, ...], str]]


def _row_reader(
    source: str, present: Sequence[str], columns: Mapping[str, str] | None
) -> _RowReader:
    """Pick how rows are read, from the columns that are there."""
    names = dict(columns or {})
    for ours, theirs in names.items():
        if ours not in ("messages", "prompt", "response"):
            raise DataError(
                f"data.columns has a key {ours!r}", fix="use messages, or prompt and response"
            )
        if theirs not in present:
            raise DataError(
                f"data.columns maps {ours} to {theirs!r}, which {source} does not have",
                fix=f"choose from its columns: {', '.join(present)}",
            )
    if "messages" in names or (not names and "messages" in present):
        column = names.get("messages", "messages")
        return lambda row: _from_messages(row[column])
    if not names and {"real", "generated"} <= set(present):
        return lambda row: _from_messages(row["real"])
    prompt = names.get("prompt") or _first(("prompt", "question"), present)
    answers = ("answer",) if prompt == "question" else _RESPONSES
    response = names.get("response") or _first(answers, present)
    if prompt is None or response is None:
        raise DataError(
            f"{source} has no columns that are recognised; it has {', '.join(present)}",
            fix="name them, such as --data.columns '{prompt: question, response: answer}'",
        )
    return lambda row: _from_parts(row[prompt], row[response])


def _first(names: Iterable[str], present: Sequence[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _from_messages(messages: Any) -> tuple[tuple[Message, ...], str]:
    turns = _turns(messages)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise _Unusable("no assistant turn")
    if last == 0:
        raise _Unusable("no prompt before the assistant turn")
    return turns[:last], _filled(turns[last]["content"], "response")


def _from_parts(prompt: Any, response: Any) -> tuple[tuple[Message, ...], str]:
    turns = (
        (Message(role="user", content=_filled(prompt, "prompt")),)
        if isinstance(prompt, str) or prompt is None
        else _turns(prompt)
    )
    if isinstance(response, list):
        answer = _turns(response)
        response = answer[-1]["content"] if answer[-1]["role"] == "assistant" else None
    return turns, _filled(response, "response")


def _turns(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise _Unusable("no messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise _Unusable("a message without a known role")
        _filled(message.get("content"), "message")
    return tuple(Message(role=m["role"], content=m["content"]) for m in messages)


def _filled(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise _Unusable(f"a {what} that is no text")
    if not text.strip():
        raise _Unusable(f"an empty {what}")
    return text
