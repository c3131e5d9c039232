"""Thoughts before answers: whether a conversation has them, and what becomes of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from spin_lightning.data.templates import LeftOut, Tools
from spin_lightning.data.turns import THOUGHT_FIELDS
from spin_lightning.types import Conversation, Message

Thoughts = Literal["refuse", "keep", "drop"]
THOUGHTS: tuple[Thoughts, ...] = get_args(Thoughts)

_OPENS, _CLOSES = THOUGHT_MARKS = "<think>", "</think>"
_THOUGHT_FIRST = re.compile(rf"\s*{_OPENS}(.*?){_CLOSES}\s*(.*)\Z", re.DOTALL)

_REFUSED = (
    "a thought, which data.thoughts=keep would make part of the answer and data.thoughts=drop "
    "would remove"
)


@dataclass(frozen=True)
class Spoken:
    """A conversation whose thoughts are settled.

    Attributes:
        turns: The turns before the answer.
        text: The answer as the data have it.
        answer: The answer without its thought.
        thought: The thought that is part of the answer; None without one.
        in_text: Whether the data have the thought as a `<think>` part of the text.
        dropped: Whether a thought was taken out, of the answer or of an earlier turn.
        tool_calls: Tool calls of the answer.
        tools: Schemas of the tools.
    """

    turns: tuple[Message, ...]
    text: str
    answer: str
    thought: str | None = None
    in_text: bool = False
    dropped: bool = False
    tool_calls: Tools = ()
    tools: Tools = ()

    @property
    def message(self) -> Message:
        """The assistant's turn, without its thought."""
        message = Message(role="assistant", content=self.answer)
        if self.tool_calls:
            message["tool_calls"] = [dict(call) for call in self.tool_calls]
        return message


def settle(conversation: Conversation, thoughts: Thoughts) -> Spoken:
    """Refuse, keep or drop the thoughts of a conversation.

    Args:
        conversation: The data set's.
        thoughts: What becomes of thoughts. `keep` leaves those of earlier turns to the template.

    Raises:
        LeftOut: It has a thought and they are refused, or one that cannot be told from the answer.
    """
    turns, text = conversation.prompt, conversation.response
    thought, answer, in_text = _thought(conversation, split=thoughts != "refuse")
    any_thought = thought is not None or any(map(_has_thought, turns))
    if any_thought and thoughts == "refuse":
        raise LeftOut(_REFUSED)
    if any_thought and thoughts == "drop":
        turns, thought, in_text = without_thoughts(turns), None, False
    return Spoken(
        turns,
        text,
        answer,
        thought,
        in_text,
        dropped=any_thought and thoughts == "drop",
        tool_calls=conversation.tool_calls,
        tools=conversation.tools,
    )


def _thought(conversation: Conversation, *, split: bool) -> tuple[str | None, str, bool]:
    """The thought of an answer, the rest of its text, and whether it was a part of the text."""
    text, reasoning = conversation.response, conversation.reasoning or None
    if _OPENS not in text and _CLOSES not in text:
        return reasoning, text, False
    if not split:
        return text, text, True
    thought, answer = _split(text)
    if reasoning is None:
        return thought.strip(), answer, True
    if reasoning.strip() != thought.strip():
        raise LeftOut("two different thoughts before the answer")
    return reasoning, answer, False


def without_thoughts(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The same turns, the assistant's without their thoughts.

    Raises:
        LeftOut: A thought cannot be told from its answer.
    """
    return tuple(_without_thought(turn) if _has_thought(turn) else turn for turn in turns)


def thinking_message(spoken: Spoken, *, in_text: bool) -> Message:
    """The assistant's turn with its thought: in the text, or under the key of its own."""
    thought, message = spoken.thought or "", spoken.message
    if in_text:
        message["content"] = f"{_OPENS}\n{thought.strip()}\n{_CLOSES}\n\n{spoken.answer}"
    else:
        # transformers copies it to the other keys that templates read.
        message["reasoning_content"] = thought
    return message


def spoken_answer(text: str) -> str:
    """What a generated text says after its thought; empty if the thought does not end.

    >>> spoken_answer("<think>2 and 2</think> 4")
    '4'
    >>> spoken_answer("<think>2 and")
    ''
    """
    thought, closed, answer = text.partition(_CLOSES)
    if closed:
        return answer.strip()
    return "" if thought.lstrip().startswith(_OPENS) else text


def _without_thought(turn: Message) -> Message:
    rest: Any = {key: value for key, value in turn.items() if key not in THOUGHT_FIELDS}
    content = turn.get("content")
    if isinstance(content, str) and (_OPENS in content or _CLOSES in content):
        rest["content"] = _split(content)[1]
    return Message(**rest)


def _has_thought(turn: Message) -> bool:
    if turn.get("role") != "assistant":
        return False
    content = turn.get("content")
    in_text = isinstance(content, str) and (_OPENS in content or _CLOSES in content)
    return in_text or any(turn.get(key) for key in THOUGHT_FIELDS)


def _split(text: str) -> tuple[str, str]:
    """The thought that a text begins with, and the answer after it."""
    found = _THOUGHT_FIRST.match(text)
    if found is None:
        raise LeftOut("a <think> part that does not begin the answer, or does not end")
    thought, answer = found.groups()
    if any(tag in part for tag in (_OPENS, _CLOSES) for part in (thought, answer)):
        raise LeftOut("more than one <think> part in an answer")
    return thought, answer
