"""Turns of a chat, in the spellings that data sets use, as messages that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, cast, get_args

from spin_lightning.types import Message

# Roles by the names that data sets give them.
ROLES: Mapping[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
    # An assistant's turn whose text is its calls.
    "function_call": "assistant",
}
# Where the thought before an answer may be.
_ThoughtField = Literal["reasoning_content", "reasoning", "thinking"]
THOUGHT_FIELDS: Final[tuple[_ThoughtField, ...]] = get_args(_ThoughtField)
# What chat templates read from a message, besides its role and content.
_FIELDS = ("name", "tool_calls", "tool_call_id", "tool_responses", *THOUGHT_FIELDS)
_ROLE_KEYS = ("role", "from")
_TEXT_KEYS = ("content", "value")
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


class UnusableError(ValueError):
    """A row that cannot be used. The message is the reason; after a colon, details of the row."""


class Turn(NamedTuple):
    """One turn.

    Attributes:
        message: The turn as chat templates take it.
        is_answer: Whether the assistant may learn it: it speaks, and the turn's weight is not 0.
        dropped: Fields of the turn that are not used.
    """

    message: Message
    is_answer: bool = False
    dropped: tuple[str, ...] = ()


def text_turn(role: str, text: Any, what: str) -> Turn:
    """A turn that is a text alone.

    Raises:
        UnusableError: It is not a text, or is empty.
    """
    message = Message(role=role, content=_checked_text(text, what))
    return Turn(message, is_answer=role == "assistant")


def chat_turns(messages: Any) -> tuple[Turn, ...]:
    """The turns of a chat.

    Args:
        messages: A list of messages, or such a list as json.

    Raises:
        UnusableError: It is no such list, or one of its messages cannot be used.
    """
    messages = decoded(messages)
    if not isinstance(messages, list | tuple) or not messages:
        raise UnusableError("no messages")
    return tuple(_turn(message) for message in messages)


def decoded(value: Any) -> Any:
    """Lists and objects that a data set stores as json; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def tool_schemas(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Tools offered in a conversation, in the form that chat templates take.

    Args:
        value: A list of schemas, or such a list as json; a function's schema alone is wrapped as
            templates expect it.

    Raises:
        UnusableError: It is no such list.
    """
    tools = decoded(value)
    if tools is None or tools in ("", []):
        return ()
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise UnusableError("tools that are not a list of objects")
    _check_unicode(tools, "tools")
    return tuple(
        {"type": "function", "function": tool}
        if "name" in tool and "function" not in tool and "type" not in tool
        else tool
        for tool in tools
    )


def plain_calls(calls: Any) -> list[Mapping[str, Any]]:
    """Tool calls with arguments as objects, where the data store them as json.

    Raises:
        UnusableError: It is not a list of objects.
    """
    calls = decoded(calls)
    if not isinstance(calls, list | tuple) or not all(isinstance(c, Mapping) for c in calls):
        raise UnusableError("tool calls that are not a list of objects")
    return [
        {**call, "function": _plain_call(call["function"])}
        if isinstance(call.get("function"), Mapping)
        else _plain_call(call)
        for call in calls
    ]


# ---------------------------------------------------------------------------- one message


def _turn(given: Any) -> Turn:
    given = decoded(given)
    if not isinstance(given, Mapping):
        raise UnusableError("a message without a known role")
    fields = {name: value for name, value in given.items() if value is not None}
    said = _take(fields, _ROLE_KEYS)
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        detail = repr(said[:40]) if isinstance(said, str) else f"it has {', '.join(given)[:80]}"
        raise UnusableError(f"a message without a known role: {detail}")
    content = _take(fields, _TEXT_KEYS)
    if said == "function_call":
        fields["tool_calls"], content = _calls_in_text(content), ""
    elif role == "assistant" and isinstance(fields.get("function_call"), Mapping):
        fields["tool_calls"] = [{"type": "function", "function": fields.pop("function_call")}]
    return _with_fields(role, content, fields)


def _with_fields(role: str, content: Any, fields: dict[str, Any]) -> Turn:
    text, thought = _joined(content, f"{role} turn")
    if thought:
        fields.setdefault("thinking", thought)
    is_learned = _is_learned(fields)
    kept = {name: fields.pop(name) for name in _FIELDS if name in fields}
    if "tool_calls" in kept:
        kept["tool_calls"] = plain_calls(kept["tool_calls"])
    kept = {name: value for name, value in kept.items() if value not in ("", [])}
    _check_thoughts(kept)
    if text is None and "tool_calls" in kept:
        text = ""
    may_be_empty = role in ("system", "tool") or "tool_calls" in kept
    text = _checked_text(text, f"{role} turn", may_be_empty=may_be_empty)
    if kept:
        _check_unicode(kept, f"{role} turn")
    message = cast(Message, {"role": role, "content": text, **kept})
    return Turn(message, role == "assistant" and is_learned, tuple(fields))


def _check_thoughts(fields: dict[str, Any]) -> None:
    """Keep one thought of those that are there in several spellings."""
    thoughts = [(name, fields[name]) for name in THOUGHT_FIELDS if name in fields]
    for name, thought in thoughts:
        if not isinstance(thought, str):
            raise UnusableError(f"a thought that is not text: {name}")
        if thought != thoughts[0][1]:
            raise UnusableError(f"two different thoughts: {thoughts[0][0]} and {name}")
    for name, _ in thoughts[1:]:
        del fields[name]


def _take(fields: dict[str, Any], names: Iterable[str]) -> Any:
    """Remove the first field of these that is there, and return its value."""
    return next((fields.pop(name) for name in names if name in fields), None)


def _is_learned(fields: dict[str, Any]) -> bool:
    """Whether neither OpenAI's `weight` nor axolotl's `train` excludes the turn.

    A weight between 0 and 1 stays in `fields`: it is not used.
    """
    weight = fields.pop("weight") if fields.get("weight") in (0, 1) else 1
    trained = fields.pop("train") if isinstance(fields.get("train"), bool) else True
    return bool(weight) and trained


def _joined(content: Any, what: str) -> tuple[Any, str]:
    """Content in parts as one text, and the thought among its parts; others as they are."""
    if not isinstance(content, list | tuple) or not content:
        return content, ""
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type", next(iter(part), None)) if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "thinking":
            thoughts.append(_joined(part.get("thinking"), what)[0])
        else:
            raise UnusableError(f"{_one(what)} with a part that is not text: {str(kind)[:40]}")
    if not all(isinstance(thought, str) for thought in thoughts):
        raise UnusableError("a thought that is not text: thinking")
    return "".join(texts), "".join(thoughts)


def _calls_in_text(text: Any) -> list[Mapping[str, Any]]:
    """The calls that are the text of a turn, as in ShareGPT's `function_call`."""
    calls = decoded(text)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise UnusableError("a function call that is not json with a name")
    return [{"type": "function", "function": call} for call in calls]


def _plain_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = decoded(call.get("arguments"))
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _checked_text(text: Any, what: str, *, may_be_empty: bool = False) -> str:
    """A text as it is. Only a system turn may be empty, as in zephyr's data, and what a tool says.

    Raises:
        UnusableError: It is not a text, empty, or no valid Unicode.
    """
    if not isinstance(text, str):
        raise UnusableError(f"{_one(what)} that is not text")
    if not may_be_empty and not text.strip():
        raise UnusableError(f"an empty {what}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableError(f"{_one(what)} that is not valid Unicode") from error
    return text


def _check_unicode(value: Mapping[str, Any] | Sequence[Any], what: str) -> None:
    """Refuse half characters in nested values, and values that json cannot hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UnusableError(f"{_one(what)} that is not valid Unicode or json") from error


def _one(what: str) -> str:
    return f"an {what}" if what[0] in "aeio" else f"a {what}"
