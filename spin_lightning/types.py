"""The values that travel between the parts of the library. All frozen, all plain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor


class Message(TypedDict):
    """One turn of a chat, in the form that chat templates take."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example as text.

    Attributes:
        example_id: Position of the example in its source, counted from 0.
        prompt: The turns before the response; a plain prompt is a single user turn.
        response: The response of the data set ("real").
    """

    example_id: int
    prompt: tuple[Message, ...]
    response: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """An example that was left out, and why."""

    example_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised example.

    Attributes:
        example_id: Position of the example in its source, counted from 0.
        prompt_ids: Ids of the prompt, exactly as the opponents will see them.
        real_ids: Ids of the real response, up to and including its stop id, or its first
            ids up to the cap.
        real_finished: Whether `real_ids` ends with a stop id.
    """

    example_id: int
    prompt_ids: tuple[int, ...]
    real_ids: tuple[int, ...]
    real_finished: bool
