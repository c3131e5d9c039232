"""Data formats: which columns each has, and what its rows mean.

A format is one entry of `FORMATS`. To read another one, write a function from a row to a `Dialogue`
and put it into the list, before the formats whose columns it has, too:

>>> def read_haiku(row: Cells) -> Dialogue:
...     asked = text_turn("user", row["theme"], "theme")
...     return Dialogue((asked, text_turn("assistant", row["haiku"], "haiku")))
>>> haiku = Format("haiku", {"theme": "theme", "haiku": "haiku"}, read_haiku)
>>> read_haiku({"theme": "rain", "haiku": "On the tin roof"}).turns[0].message
{'role': 'user', 'content': 'rain'}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from spin_lightning.data.turns import (
    Turn,
    UnusableError,
    chat_turns,
    decoded,
    text_turn,
    tool_schemas,
)

Cells = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What a row holds: a conversation, and which of its answers the row is about.

    Attributes:
        turns: The turns, whole.
        first_answer: Answers before this turn are context and never learned.
        tools: Schemas of the tools that are offered.
    """

    turns: tuple[Turn, ...]
    first_answer: int = 0
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Format:
    """A layout of columns.

    Our names are those that `data.columns` maps to other columns.

    Attributes:
        name: What messages call it.
        needs: Our names to the columns that have to be there.
        read: The row's cells by our names, as far as there are such columns, to its conversation;
            raises `UnusableError` with the reason.
        takes: Our names to columns that are used where they are there; None for those that are
            used only where `data.columns` maps them.
        leaves: Columns that the format has and does not use, with the reason.
    """

    name: str
    needs: Mapping[str, str]
    read: Callable[[Cells], Dialogue]
    takes: Mapping[str, str | None] = field(default_factory=dict)
    leaves: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> Mapping[str, str | None]:
        """Our names to the columns that they stand for."""
        return {**self.needs, **self.takes}

    def columns(self, present: Sequence[str], mapped: Mapping[str, str]) -> dict[str, str] | None:
        """Our names to the columns that a table has; None where the table is not of this format.

        Args:
            present: The table's columns.
            mapped: The user's mapping from our names to columns.
        """
        if not mapped.keys() <= self.names.keys():
            return None
        wanted = {ours: mapped.get(ours, theirs) for ours, theirs in self.names.items()}
        found = {
            ours: name for ours, name in wanted.items() if name is not None and name in present
        }
        return found if all(ours in found for ours in (*self.needs, *mapped)) else None


# ---------------------------------------------------------------------------- readers


def read_chat(row: Cells) -> Dialogue:
    """A chat whole, with a system prompt before it where a column holds one."""
    turns = chat_turns(row.get("messages"))
    return Dialogue((*_system_turn(row, turns), *turns), tools=_tools(row))


def read_sharegpt(row: Cells) -> Dialogue:
    """A chat; a row with pictures is about more than its text."""
    for name in ("image", "images", "video", "videos", "audio", "audios"):
        if row.get(name):
            raise UnusableError(f"a conversation about {name}")
    return read_chat(row)


def read_pair(row: Cells) -> Dialogue:
    """A prompt and its response, each a text or a list of messages."""
    asked, response = _prompt_turns(row.get("prompt")), row.get("response")
    prompt = (*_system_turn(row, asked), *asked)
    if not isinstance(response, list | tuple):
        turns = (*prompt, text_turn("assistant", response, "response"))
        return Dialogue(turns, len(prompt), _tools(row))
    answer = chat_turns(response)
    for repeated in (prompt, asked):
        if _messages(answer[: len(repeated)]) == _messages(repeated):
            answer = answer[len(repeated) :]
            break
    if not _is_one_answer([turn.message["role"] for turn in answer]):
        raise UnusableError("a response that is more than the answer to its prompt")
    return Dialogue((*prompt, *answer), len(prompt), _tools(row))


def read_preference(row: Cells) -> Dialogue:
    """The chosen side: a text or messages after a prompt, or a whole chat that ends with it."""
    chosen, prompt = row.get("chosen"), row.get("prompt")
    if isinstance(chosen, list | tuple) and chosen:
        turns = chat_turns(chosen)
        asked = [t.message["content"] for t in turns if t.message["role"] == "user"]
        if asked:
            if isinstance(prompt, str) and prompt.strip() not in ("", *map(str.strip, asked)):
                raise UnusableError("a chosen chat that does not hold its prompt")
            if isinstance(prompt, list | tuple):
                return read_pair({**row, "response": chosen})
            turns = (*_system_turn(row, turns), *turns)
            last = max((i for i, turn in enumerate(turns) if turn.is_answer), default=0)
            return Dialogue(turns, last, _tools(row))
    if prompt is None:
        raise UnusableError("a chosen response without a prompt")
    return read_pair({**row, "response": chosen})


def read_alpaca(row: Cells) -> Dialogue:
    """An instruction with its input below it, after earlier rounds of question and answer."""
    instruction, below = row.get("instruction"), row.get("input")
    if below is not None and not isinstance(below, str):
        raise UnusableError("an input that is not text")
    asked = text_turn("user", instruction, "instruction")
    if below and below.strip():
        asked = text_turn("user", f"{instruction}\n{below}", "instruction")
    turns = (*_system_turn(row, ()), *_rounds(row.get("history")), asked)
    answer = text_turn("assistant", row.get("output"), "output")
    return Dialogue((*turns, answer), tools=_tools(row))


def _is_one_answer(roles: Sequence[str]) -> bool:
    """Whether the assistant answers once, perhaps after calls of tools and what they return."""
    is_framed = roles[:1] == roles[-1:] == ["assistant"]
    is_alternating = ("assistant", "assistant") not in pairwise(roles)
    return is_framed and is_alternating and {*roles} <= {"assistant", "tool"}


def _prompt_turns(prompt: Any) -> tuple[Turn, ...]:
    is_chat = isinstance(prompt, list | tuple)
    return chat_turns(prompt) if is_chat else (text_turn("user", prompt, "prompt"),)


def _system_turn(row: Cells, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The system prompt of a column of its own, unless the turns begin with the same one."""
    text = row.get("system")
    if text is None or text == "":
        return ()
    turn = text_turn("system", text, "system prompt")
    first = turns[0].message if turns else None
    if first is None or first["role"] != "system":
        return (turn,)
    if first["content"] == text:
        return ()
    raise UnusableError("a system column beside another system turn")


def _rounds(history: Any) -> tuple[Turn, ...]:
    rounds = decoded(history) or ()
    if not isinstance(rounds, list | tuple) or not all(map(_is_pair, rounds)):
        raise UnusableError("a history that is not a list of pairs")
    return tuple(
        turn
        for question, answer in rounds
        for turn in (
            text_turn("user", question, "question in the history"),
            text_turn("assistant", answer, "answer in the history"),
        )
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _tools(row: Cells) -> tuple[Mapping[str, Any], ...]:
    functions = tool_schemas(row.get("functions"))
    return (*tool_schemas(row.get("tools")), *functions)


def _messages(turns: Sequence[Turn]) -> list[Any]:
    return [turn.message for turn in turns]


# ---------------------------------------------------------------------------- the formats

_TOOLS = {"tools": "tools", "functions": "functions"}
_SYSTEM = {"system": "system"}
_PICTURES = {name: name for name in ("image", "images", "video", "videos", "audio", "audios")}
_REJECTED = {"rejected": "the rejected side; opponents answer instead"}
_GENERATED = {"generated": "opponents answer again"}

# The first one whose columns a table has is how its rows are read.
FORMATS: list[Format] = [
    Format("a chat", {"messages": "messages"}, read_chat, {**_TOOLS, "system": None}),
    *(
        Format(
            f"{prompt} and {response}",
            {"prompt": prompt, "response": response},
            read_pair,
            {**_TOOLS, "system": None},
            _GENERATED,
        )
        for prompt, response in (
            ("prompt", "response"),
            ("prompt", "completion"),
            ("prompt", "real"),
            ("question", "answer"),
        )
    ),
    Format(
        "SPIN's real and generated",
        {"messages": "real", "generated": "generated"},
        lambda row: read_chat({"messages": row.get("messages")}),
        leaves=_GENERATED,
    ),
    *(
        Format(
            "preferences",
            {"chosen": "chosen", "prompt": prompt},
            read_preference,
            {**_TOOLS, **_SYSTEM},
            _REJECTED,
        )
        for prompt in ("prompt", "question", "instruction")
    ),
    Format("preferences", {"chosen": "chosen"}, read_preference, {**_TOOLS, **_SYSTEM}, _REJECTED),
    *(
        Format("ShareGPT", {"messages": column}, read_sharegpt, {**_TOOLS, **_SYSTEM, **_PICTURES})
        for column in ("conversations", "conversation")
    ),
    Format(
        "Alpaca",
        {"instruction": "instruction", "output": "output"},
        read_alpaca,
        {"input": "input", **_SYSTEM, "history": "history", **_TOOLS},
    ),
]
