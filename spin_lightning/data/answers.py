"""The real answer in what a template writes for the whole conversation, example by example."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from spin_lightning.data.invariant import Breach, Fit, Frame, Invariant
from spin_lightning.data.special_text import SpecialText
from spin_lightning.data.template_fixes import answer_error, thought_error
from spin_lightning.data.templates import ChatTemplate, LeftOut
from spin_lightning.data.thoughts import Spoken, Thoughts, thinking_message
from spin_lightning.types import Message


@dataclass(frozen=True)
class Said:
    """An answer in the form in which it goes to the template.

    Attributes:
        message: The assistant's turn.
        frame: What the template writes around it.
        answer: The text of the answer, without a thought that the template writes.
        thought: That thought.
    """

    message: Message
    frame: Frame
    answer: str
    thought: str | None = None


class Answers:
    """Finds answers, and refuses those that a policy could not have written.

    Args:
        template: The chat template.
        thoughts: What becomes of thoughts.
        special: Masks the special tokens of the data.
    """

    def __init__(self, template: ChatTemplate, thoughts: Thoughts, special: SpecialText) -> None:
        self._template = template
        self._thoughts = thoughts
        self._invariant = Invariant(template)
        self._special = special
        self._thinking: dict[bool, Frame | Breach] = {}

    def said(self, spoken: Spoken) -> Said:
        """Give an answer the form that the template takes.

        Raises:
            SettingError: The template itself breaks the invariant.
            LeftOut: It does so for answers without a thought, where thoughts are kept.
        """
        if spoken.thought is None:
            return Said(spoken.message, self._plain_frame(), spoken.answer)
        frame = self._thinking_frame(in_text=spoken.in_text)
        if isinstance(frame, Frame):
            message = thinking_message(spoken, in_text=frame.in_text)
            return Said(message, frame, spoken.answer, spoken.thought)
        if (
            spoken.in_text
            and "</think>" not in self._template.text
            and isinstance(self._plain, Frame)
        ):
            # The template takes thoughts for text, so they stay the text that they are.
            message = Message(role="assistant", content=spoken.text)
            return Said(message, self._plain, spoken.text)
        raise thought_error(self._template, frame)

    def check(self, said: Said, before: str, whole: str) -> Fit:
        """Hold what the template wrote for a conversation against the data set's answer.

        Args:
            said: The answer.
            before: The generation prompt, with the data's special tokens masked.
            whole: The whole conversation, likewise.

        Raises:
            LeftOut: The answer is not what follows the prompt.
        """
        answer = self._special.mask(said.answer)
        thought = None if said.thought is None else self._special.mask(said.thought)
        if whole.startswith(before):
            written = whole[len(before) :]
            if said.message.get("tool_calls"):
                fit = self._fit_calls(said, written, answer, thought)
            else:
                fit = said.frame.fit(written, answer, thought)
            if fit is not None:
                return fit
        breach = Breach.between(before, whole, answer)
        raise LeftOut(
            f"the chat template changes the answer: {self._special.unmask(breach.problem)}"
        )

    @cached_property
    def _plain(self) -> Frame | Breach:
        return self._invariant.plain()

    def _plain_frame(self) -> Frame:
        if isinstance(self._plain, Frame):
            return self._plain
        if self._thoughts == "keep":
            raise LeftOut(
                "an answer without a thought, where the chat template needs one and "
                "data.thoughts=keep"
            )
        raise answer_error(self._template, self._plain)

    def _thinking_frame(self, *, in_text: bool) -> Frame | Breach:
        if in_text not in self._thinking:
            self._thinking[in_text] = self._invariant.thinking(in_text=in_text)
        return self._thinking[in_text]

    def _fit_calls(self, said: Said, written: str, answer: str, thought: str | None) -> Fit | None:
        """Tool calls have a form of the template's own: the answer's text and their names show."""
        text = written.removeprefix(said.frame.lead)
        for piece in (thought or "", said.frame.bridge or "", answer):
            if not text.lstrip().startswith(piece.strip()):
                return None
            text = text.lstrip().removeprefix(piece.strip())
        calls = [call.get("function", call) for call in said.message["tool_calls"]]
        names = (self._special.mask(str(call.get("name"))) for call in calls)
        return "exact" if all(name in text for name in names) else None
