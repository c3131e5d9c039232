"""A chat template as a run uses it: its text, its variables, its date and its form of content."""

from __future__ import annotations

import copy
import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from spin_lightning.errors import DataError, SettingError, first_line
from spin_lightning.types import Message

# Texts that no template writes by itself, to see what one writes around them.
QUESTION = "a question by spin-lightning"
ANSWER = "an answer by spin-lightning"
THOUGHT = "a thought by spin-lightning"

# Variables that the library or transformers gives to every template.
_GIVEN = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])((?:(?!\1)[^\\])*)\1\s*\)""")

Tools = Sequence[Mapping[str, Any]]


class LeftOut(DataError):
    """An example that cannot be used; `problem` is the reason that is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, fix="correct the row, or skip it with data.bad_rows: skip")


@dataclass(frozen=True)
class ChatTemplate:
    """What turns messages into text.

    Attributes:
        tokenizer: Holds the template, with the run's variables in it.
        date: The date that the template writes as today's, where it writes one.
        parts: Whether the template reads contents as lists of parts, as those of vision models do,
            and loses a plain text.
    """

    tokenizer: PreTrainedTokenizerBase
    date: dt.date
    parts: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, date: dt.date) -> ChatTemplate:
        """Read the tokenizer's template, and find the form of content that it takes.

        Raises:
            SettingError: It computes the format of a date, which could not be held fixed.
            jinja2.TemplateError: It takes no question with an answer.
        """
        text = cls(tokenizer, date)
        if any("strftime_now(" in _dated(source, date) for source in text._sources):
            raise SettingError(
                "tokenizer.chat_template",
                text.text[:60],
                "it writes today's date in a format that it computes, so the date of a run could "
                "not be held fixed",
                fix="write the format as a text, such as strftime_now('%Y-%m-%d')",
            )
        try:
            if text._keeps_contents():
                return text
        except TemplateError:
            in_parts = replace(text, parts=True)
            if in_parts._takes_parts():
                return in_parts
            raise
        in_parts = replace(text, parts=True)
        return in_parts if in_parts._takes_parts() else text

    @property
    def text(self) -> str:
        """The template's source, without a date of its own."""
        return str(self.tokenizer.get_chat_template())

    @property
    def writes_date(self) -> bool:
        """Whether today's date can be in what it writes."""
        return any(_dated(source, self.date) != source for source in self._sources)

    def having(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """The same template with these variables set in it."""
        return ChatTemplate.of(with_variables(self.tokenizer, variables), self.date)

    def reading(self, text: str) -> ChatTemplate:
        """The same tokenizer with another template."""
        return ChatTemplate.of(with_text(self.tokenizer, text), self.date)

    def render(self, turns: Sequence[Message], *, to_be_answered: bool, tools: Tools = ()) -> str:
        """Turns as the template writes them.

        Args:
            turns: The turns, passed on with every key that they have.
            to_be_answered: Whether to write the beginning of an assistant's turn after them.
            tools: Schemas of the tools that the conversation may call.

        Raises:
            jinja2.TemplateError: The template does not accept them.
        """
        offered: list[Any] | None = [dict(tool) for tool in tools] or None
        try:
            source = self.tokenizer.get_chat_template(tools=offered)
            return str(
                self.tokenizer.apply_chat_template(
                    [self._message(turn) for turn in turns],
                    chat_template=_dated(source, self.date),
                    tools=offered,
                    tokenize=False,
                    add_generation_prompt=to_be_answered,
                )
            )
        except TemplateError:
            raise
        # A template is a program: it may divide by zero, or add a text to a number.
        except Exception as error:
            raise TemplateError(first_line(error)) from error

    def end_of_turn(self, written: str) -> int | None:
        """The special token that a text begins with, white space aside; None without one."""
        ids = self.tokenizer(written.lstrip(), add_special_tokens=False)["input_ids"]
        added = self.tokenizer.get_added_vocab().values()
        return int(ids[0]) if ids and ids[0] in {*self.tokenizer.all_special_ids, *added} else None

    @property
    def _sources(self) -> tuple[str, ...]:
        """Every template of the tokenizer: some have one for tools alone."""
        whole = self.tokenizer.chat_template
        return tuple(whole.values()) if isinstance(whole, Mapping) else (str(whole),)

    def _message(self, turn: Message) -> dict[str, Any]:
        content = turn.get("content")
        if self.parts and isinstance(content, str):
            return {**turn, "content": [{"type": "text", "text": content}]}
        return dict(turn)

    def _keeps_contents(self) -> bool:
        return all(text in self._probe() for text in (QUESTION, ANSWER))

    def _takes_parts(self) -> bool:
        try:
            # Some templates write a list as Python shows it.
            return self._keeps_contents() and "'type'" not in self._probe()
        except TemplateError:
            return False

    def _probe(self) -> str:
        answer = Message(role="assistant", content=ANSWER)
        turns = (Message(role="user", content=QUESTION), answer)
        return self.render(turns, to_be_answered=False)


@lru_cache(maxsize=32)
def _dated(source: str, date: dt.date) -> str:
    """A template's source with this date for today's."""
    return _DATE_CALL.sub(lambda call: repr(date.strftime(call[2])), source)


def with_text(tokenizer: PreTrainedTokenizerBase, text: str) -> PreTrainedTokenizerBase:
    """A tokenizer of the same ids with another chat template."""
    changed = copy.copy(tokenizer)
    changed.chat_template = text
    return changed


def with_file(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer with the template of a file.

    Raises:
        SettingError: The file cannot be read.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            "data.chat_template",
            str(path),
            f"the file cannot be read ({first_line(error)})",
            fix="give the path of a Jinja chat template, a text file in UTF-8",
        ) from error
    return with_text(tokenizer, text)


def with_variables(
    tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    """A tokenizer whose template has these variables set, so that it needs no one to pass them.

    Raises:
        SettingError: There is no template, or it does not use one of them, or a value is none that
            can be written into it.
    """
    if tokenizer.chat_template is None:
        raise SettingError(
            "data.chat_template_kwargs",
            dict(variables),
            "the tokenizer has no chat template to pass them to",
            fix="set data.chat_template, or leave data.chat_template_kwargs out",
        )
    whole = tokenizer.chat_template
    texts = list(whole.values()) if isinstance(whole, Mapping) else [whole]
    for name, value in variables.items():
        _check_variable(name, value, texts)
    changed = copy.copy(tokenizer)
    changed.chat_template = (
        {key: _setting(variables, text) for key, text in whole.items()}
        if isinstance(whole, Mapping)
        else _setting(variables, whole)
    )
    return changed


def _setting(variables: Mapping[str, Any], text: str) -> str:
    """A template's source with variables set before all else, instead of such lines in it."""
    old = re.compile(rf"\{{% set (?:{'|'.join(variables)}) = .* %\}}\n")
    while (line := old.match(text)) is not None:
        text = text[line.end() :]
    # With trim_blocks, as transformers sets it, a newline after a tag is not written.
    return "".join(f"{{% set {k} = {v!r} %}}\n" for k, v in variables.items()) + text


def _check_variable(name: str, value: object, texts: Sequence[str]) -> None:
    field = f"data.chat_template_kwargs.{name}"
    if not str(name).isidentifier() or name in _GIVEN:
        raise SettingError(
            field,
            value,
            "every template gets it from the library"
            if name in _GIVEN
            else "it is not a name that a template could use",
            fix="leave it out",
        )
    if not _is_plain(value):
        raise SettingError(
            field,
            value,
            "a template cannot hold it",
            fix="give text, a number, true, false, null, or lists and mappings of them",
        )
    if not any(re.search(rf"\b{name}\b", text) for text in texts):
        used = sorted({variable for text in texts for variable in _variables(text)})
        raise SettingError(
            field,
            value,
            "the chat template does not use it",
            fix=f"choose from what it uses: {', '.join(used)}" if used else "leave it out",
        )


def _variables(text: str) -> set[str]:
    """Names that a template expects from outside, as far as that can be read."""
    try:
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        names = meta.find_undeclared_variables(environment.parse(text))
    except TemplateError:
        return set()
    return {name for name in names - _GIVEN if not name.endswith("_token")} - {"namespace", "dict"}


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(v) for key, v in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, float):
        return abs(value) < float("inf")
    return value is None or isinstance(value, str | int)
