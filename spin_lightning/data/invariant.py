"""What a chat template writes around an answer, and whether a policy could write the same.

A policy is asked with the generation prompt and writes until the end of turn. Real answers have to
be what it could have written: the generation prompt and the response are what the template writes
for the whole conversation, and nothing of the template stands between the prompt and the answer.
Otherwise real and generated responses differ by the template's own text, which is then what
self-play learns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from spin_lightning.data.templates import ANSWER, QUESTION, THOUGHT, ChatTemplate
from spin_lightning.data.thoughts import Spoken, Thoughts, thinking_message
from spin_lightning.errors import SettingError
from spin_lightning.types import Message

# Variables by which templates switch thoughts off or on, in the order in which they are tried.
_SWITCHES: tuple[Mapping[str, Any], ...] = (
    {"enable_thinking": False},
    {"thinking": False},
    {"enable_thinking": True},
    {"thinking": True},
)
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
        thoughts: What becomes of thoughts.
    """

    template: ChatTemplate
    thoughts: Thoughts

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

    def error(self, breach: Breach, *, thought: bool) -> SettingError:
        """The breach with the fix that works, found by trying."""
        if thought:
            difference = "it does not write a thought as part of the answer"
        elif breach.header is None and ANSWER not in breach.written:
            difference = "it does not write the answer"
        else:
            difference = "real answers would differ from generated ones by the template's own text"
        return SettingError(
            "tokenizer.chat_template",
            self.template.text[:_SHOWN],
            f"{difference}: {breach.problem}",
            fix=self.fix(breach, thought=thought),
        )

    def fix(self, breach: Breach, *, thought: bool) -> str:
        """What to set so that the template holds the invariant."""
        ways = [self._switch(thought=thought) or self._other_file(breach, thought=thought)]
        if not thought and isinstance(self.thinking(in_text=False), Frame):
            ways.append("set data.thoughts: keep where the answers of the data have thoughts")
        if thought:
            ways.append("set data.thoughts: drop")
        found = [way for way in ways if way]
        if not found or (thought and len(found) == 1):
            found.insert(
                0,
                "set data.chat_template to a file that writes nothing but the answer and a special "
                "token such as eos_token after its generation prompt",
            )
        return ", or ".join(found)

    def _holds(self, template: ChatTemplate, *, thought: bool) -> bool:
        other = Invariant(template, self.thoughts)
        return isinstance(other.thinking(in_text=False) if thought else other.plain(), Frame)

    def _switch(self, *, thought: bool) -> str | None:
        """A variable of the template that mends it."""
        for switch in self._switches():
            if self._holds(self.template.having(switch), thought=thought):
                return f"set data.chat_template_kwargs: {_yaml(switch)}"
        return None

    def _switches(self) -> list[Mapping[str, Any]]:
        text = self.template.text
        return [s for s in _SWITCHES if all(re.search(rf"\b{name}\b", text) for name in s)]

    def _other_file(self, breach: Breach, *, thought: bool) -> str | None:
        """A change of the template's text that mends it."""
        if thought:
            return None
        # The model's own way to leave out a thought comes before one of ours.
        for switch in (*self._switches(), {}):
            template = self.template.having(switch) if switch else self.template
            found = Invariant(template, self.thoughts).plain()
            header = found.header if isinstance(found, Breach) else None
            if header is None or (switch and header.strip()):
                continue
            line = f"{{% if add_generation_prompt %}}{{{{ {header!r} }}}}{{% endif %}}"
            if self._holds(
                template.reading(template.text.removesuffix("\n") + line), thought=False
            ):
                also = f"data.chat_template_kwargs: {_yaml(switch)} and " if switch else ""
                return (
                    f"set {also}data.chat_template to a copy of the template with {line} at its end"
                )
        return self._without_extra(breach)

    def _without_extra(self, breach: Breach) -> str | None:
        text = self.template.text
        for extra in (breach.extra, breach.extra.replace("\n", "\\n")):
            head, found, rest = text.rpartition(extra) if extra else ("", "", "")
            if found and self._holds(self.template.reading(head + rest), thought=False):
                return (
                    f"set data.chat_template to a copy of the template without the {breach.extra!r}"
                    " of its generation prompt"
                )
        return None

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


def _yaml(switch: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{k}: {str(v).lower()}" for k, v in switch.items()) + "}"
