"""What a chat template writes around an answer, and whether a policy could write the same.

A policy is asked with the generation prompt and writes until the end of turn. Real answers have to
be what it could have written: the generation prompt and the response are what the template writes
for the whole conversation, and nothing of the template stands between the prompt and the answer.
Otherwise real and generated responses differ by the template's own text, which is then what
self-play learns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError

from spin_lightning.data.templates import ANSWER, QUESTION, THOUGHT, ChatTemplate
from spin_lightning.data.thoughts import Spoken, thinking_message
from spin_lightning.types import Message

_SHOWN = 60

Fit = Literal["exact", "trimmed"]


@dataclass(frozen=True)
class Frame:
    """What a template writes around an answer, after the generation prompt.

    Attributes:
        lead: Before the thought, or before the answer without one: at most spaces then, which
            tokenizers join with the word that follows.
        bridge: Between the thought and the answer; None without a thought.
        tail: After the answer.
        in_text: Whether the template reads the thought from the text.
    """

    lead: str
    bridge: str | None
    tail: str
    in_text: bool = False

    def fit(self, written: str, answer: str, thought: str | None) -> Fit | None:
        """How the text after a generation prompt holds the answer of the data.

        Returns:
            exact, or trimmed where only white space around the thought and the answer is missing;
            None where anything else differs.
        """
        bridge = self.bridge or ""
        if written == self.lead + (thought or "") + bridge + answer + self.tail:
            return "exact"
        if not (written.startswith(self.lead) and written.endswith(self.tail)):
            return None
        rest = written.removeprefix(self.lead).removesuffix(self.tail).strip()
        for piece in ((thought or "").strip(), bridge.strip()):
            if not rest.startswith(piece):
                return None
            rest = rest.removeprefix(piece).lstrip()
        return "trimmed" if rest == answer.strip() else None


@dataclass(frozen=True)
class Breach:
    """A template that breaks the invariant.

    Attributes:
        asked: What the generation prompt ends with.
        written: What the template writes for the answer, from the same place.
        answer: The answer.
        header: What it writes before the answer, after the generation prompt; None where it does
            not write the generation prompt.
        extra: What the generation prompt has that the whole conversation does not.
    """

    asked: str
    written: str
    answer: str
    header: str | None = None
    extra: str = ""

    @classmethod
    def between(cls, before: str, whole: str, answer: str) -> Breach:
        """The difference of a generation prompt and the whole conversation."""
        common = next(
            (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b),
            min(len(before), len(whole)),
        )
        start = max(0, common - _SHOWN // 2)
        continues = whole.startswith(before)
        head, found, _ = whole[len(before) :].partition(answer)
        return cls(
            asked=("…" if start else "") + before[start:][-_SHOWN:],
            written=_shortened(whole[len(before) :] if continues else "…" + whole[start:]),
            answer=_shortened(answer),
            header=head if continues and found else None,
            extra=before[common:],
        )

    @property
    def problem(self) -> str:
        """The three texts."""
        return (
            f"the generation prompt ends with {self.asked!r}, and for the answer {self.answer!r} "
            f"the template writes {self.written!r}"
        )


@dataclass(frozen=True)
class Invariant:
    """Holds a template against the invariant, on a conversation without any content of its own.

    Attributes:
        template: The template.
    """

    template: ChatTemplate

    def plain(self) -> Frame | Breach:
        """What stands around an answer without a thought."""
        return self._probe(Message(role="assistant", content=ANSWER), None)

    def thinking(self, *, in_text: bool) -> Frame | Breach:
        """What stands around an answer with its thought, in a form that the template knows.

        Args:
            in_text: Whether the data have the thought in the text.
        """
        spoken = Spoken((), ANSWER, ANSWER, THOUGHT)
        first = self._probe(thinking_message(spoken, in_text=False), THOUGHT)
        if isinstance(first, Frame) or "</think>" not in self.template.text:
            return first
        second = self._probe(thinking_message(spoken, in_text=True), THOUGHT)
        if isinstance(second, Breach):
            return second if in_text else first
        return Frame(second.lead, second.bridge, second.tail, in_text=True)

    def _probe(self, answer: Message, thought: str | None) -> Frame | Breach:
        question = Message(role="user", content=QUESTION)
        before = self.template.render((question,), to_be_answered=True)
        try:
            whole = self.template.render((question, answer), to_be_answered=False)
        except TemplateError as error:
            if thought is None:
                raise
            return Breach(before[-_SHOWN:], f"({error})", ANSWER)
        return self._frame(before, whole, thought) or Breach.between(before, whole, ANSWER)

    def _frame(self, before: str, whole: str, thought: str | None) -> Frame | None:
        written = whole.removeprefix(before)
        if not whole.startswith(before) or written.count(ANSWER) != 1:
            return None
        head, _, tail = written.partition(ANSWER)
        if tail.strip() and self.template.end_of_turn(tail) is None:
            return None
        if thought is None:
            return None if head.strip(" ") else Frame(head, None, tail)
        lead, found, bridge = head.partition(thought)
        return Frame(lead, bridge, tail) if found and thought not in bridge else None


def _shortened(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}…{text[-_SHOWN:]}"
