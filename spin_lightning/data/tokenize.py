"""The one way from text to token ids, for generating and for training alike."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from spin_lightning.data.answers import Answers
from spin_lightning.data.lengths import cut, prompt_problem
from spin_lightning.data.special_text import SpecialText
from spin_lightning.data.templates import (
    ANSWER,
    QUESTION,
    ChatTemplate,
    LeftOut,
    Tools,
    with_file,
    with_variables,
)
from spin_lightning.data.thoughts import (
    THOUGHTS,
    Spoken,
    Thoughts,
    settle,
    without_thoughts,
)
from spin_lightning.errors import SettingError
from spin_lightning.types import BadRow, Conversation, Example, Message

# What `PromptFormat.counts` counts.
TRIMMED = "answers whose outer white space the chat template leaves out"
SPELLED = "examples that spell out special tokens, which are read as text"
DROPPED = "examples whose thoughts were dropped"


@dataclass(frozen=True)
class PromptFormat:
    """How conversations become ids: by the chat template, or as plain text without one.

    Attributes:
        tokenizer: The model's tokenizer, with the chat template as used: its variables are set in
            the template, so that whoever loads the saved tokenizer writes the same.
        stop_ids: Ids that end a response, ascending: those of the generation config, the
            tokenizer's end of sequence and the template's end of turn.
        end_of_turn: The id that a finished real response ends with.
        template: The chat template; None without one.
        thoughts: What becomes of thoughts in the data.
        counts: How many tokenized examples were used in a way that their user should see, by what
            was done with them.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    end_of_turn: int
    template: ChatTemplate | None = None
    thoughts: Thoughts = "refuse"
    counts: Counter[str] = field(default_factory=Counter, compare=False)

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        generation_eos: int | list[int] | None,
        *,
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        thoughts: Thoughts = "refuse",
        date: dt.date | None = None,
    ) -> PromptFormat:
        """Read a tokenizer's format.

        Args:
            tokenizer: The model's tokenizer.
            generation_eos: The stop ids that the model's generation config names.
            chat_template: A file whose template replaces the tokenizer's.
            chat_template_kwargs: Variables of the template, such as `enable_thinking`.
            thoughts: Whether examples with a thought (`reasoning_content`, `thinking`, or a
                `<think>` part of the text) are refused, keep it as part of the answer, or drop it.
            date: The date that the template writes as today's; default today.

        Raises:
            SettingError: The tokenizer has no end-of-sequence token, the template takes no
                question with an answer, or a setting cannot work with it.
        """
        if tokenizer.eos_token_id is None:
            raise SettingError(
                "tokenizer",
                tokenizer.name_or_path,
                "it has no end-of-sequence token, so no response could ever end",
                fix="set tokenizer.eos_token and save the tokenizer into the model folder",
            )
        if thoughts not in THOUGHTS:
            raise SettingError(
                "data.thoughts", thoughts, "there is no such choice", fix="refuse, keep, or drop"
            )
        if chat_template is not None:
            tokenizer = with_file(tokenizer, chat_template)
        if chat_template_kwargs:
            tokenizer = with_variables(tokenizer, chat_template_kwargs)
        template, end_of_turn = None, int(tokenizer.eos_token_id)
        if tokenizer.chat_template is not None:
            date = date or dt.date.today()
            template, end_of_turn = _template(tokenizer, date, chat_template)
        stops = {end_of_turn, tokenizer.eos_token_id, *listed(generation_eos)}
        return cls(tokenizer, tuple(sorted(stops)), end_of_turn, template, thoughts)

    @property
    def pad_id(self) -> int:
        """The padding id, or the end of sequence without one: padded columns are masked anyway."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @property
    def date_written(self) -> str | None:
        """The date that the template writes as today's, such as 2026-01-31; None without one."""
        writes = self.template is not None and self.template.writes_date
        return self.template.date.isoformat() if self.template and writes else None

    @cached_property
    def template_hash(self) -> str | None:
        """SHA-256 of the chat template, its variables and what becomes of thoughts.

        None without a template, where thoughts are refused. The date is excluded.
        """
        template = self.tokenizer.chat_template
        if self.thoughts != "refuse":
            used = json.dumps([template and str(template), self.thoughts])
        elif template is not None:
            used = str(template)
        else:
            return None
        return hashlib.sha256(used.encode()).hexdigest()

    def prompt_ids(self, prompt: tuple[Message, ...], tools: Tools = ()) -> tuple[int, ...]:
        """Ids that a response is sampled after.

        A template writes its own special tokens, so none are added to what it wrote; plain text
        gets the tokenizer's (a beginning of sequence, where it has one), but no end of sequence.
        A special token that a turn spells out is text.

        Raises:
            SettingError: Several turns without a chat template.
            DataError: A turn spells out a special token that cannot be read as text.
            jinja2.TemplateError: The template does not accept these turns.
        """
        turns = without_thoughts(prompt) if self.thoughts == "drop" else prompt
        return self._prompt(turns, tools)[1]

    def response_ids(self, conversation: Conversation) -> tuple[int, ...]:
        """Ids of a whole real response, up to and including its stop id.

        With a template, they are those that follow the prompt in the whole conversation; what
        comes after the end of the turn, usually a newline, is dropped. A special token that the
        response spells out is text.

        Raises:
            SettingError: Several turns without a chat template, or a template by whose own text
                real responses would differ from generated ones.
            DataError: The response cannot be used.
            jinja2.TemplateError: The template does not accept these turns.
        """
        spoken = settle(conversation, self.thoughts)
        return self._response(*self._prompt(spoken.turns, spoken.tools), spoken)

    def tokenize(
        self,
        conversation: Conversation,
        *,
        max_prompt_tokens: int | None,
        max_response_tokens: int,
        context: int,
    ) -> Example | BadRow:
        """Tokenize one conversation.

        Args:
            conversation: The text.
            max_prompt_tokens: Longest prompt; None for the context's length.
            max_response_tokens: Cap of the response, the stop id counted.
            context: Longest sequence that the model was made for.

        Returns:
            The example; a response over the cap keeps its first ids and is not finished. Or a bad
            row: a prompt that is too long, a response without a token before its stop id, one that
            the template changes, a thought that is refused, or turns that the template does not
            take.

        Raises:
            SettingError: Several turns without a chat template, or a template by whose own text
                real responses would differ from generated ones.
        """
        whole = self.whole(conversation, max_prompt_tokens=max_prompt_tokens, context=context)
        return whole if isinstance(whole, BadRow) else cut(whole, max_response_tokens, context)

    def whole(
        self, conversation: Conversation, *, max_prompt_tokens: int | None, context: int
    ) -> Example | BadRow:
        """The same example with its whole response, however long that is."""
        example_id = conversation.example_id
        try:
            spoken = settle(conversation, self.thoughts)
            before, prompt = self._prompt(spoken.turns, spoken.tools)
            problem = prompt_problem(len(prompt), max_prompt_tokens, context)
            if problem is not None:
                return BadRow(example_id, problem, len(prompt))
            response = self._response(before, prompt, spoken)
        except TemplateError as error:
            return BadRow(example_id, f"the chat template refuses it ({error})")
        except LeftOut as error:
            return BadRow(example_id, error.problem)
        if len(response) < 2:
            return BadRow(example_id, "a response without a token before its end")
        return Example(example_id, prompt, response, real_finished=True)

    # ------------------------------------------------------------------ text to ids

    def _prompt(self, turns: tuple[Message, ...], tools: Tools) -> tuple[str, tuple[int, ...]]:
        """The text of a prompt, its special tokens masked, and its ids."""
        if self.template is not None:
            text = self._rendered(turns, tools, to_be_answered=True)
            return text, self._ids(text)
        if len(turns) > 1:
            raise SettingError(
                "tokenizer.chat_template",
                None,
                f"a prompt has {len(turns)} turns, and there is no template to join them",
                fix="set a chat template and save the tokenizer into the model folder",
            )
        text = self._special.mask(turns[0]["content"])
        ids = self._ids(text, add_special_tokens=True)
        return text, ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _response(self, before: str, prompt: tuple[int, ...], spoken: Spoken) -> tuple[int, ...]:
        if self.template is None:
            text = self._plain_response(spoken)
            whole, ids = before + text, (*self._ids(text), self.end_of_turn)
        else:
            whole, ids = self._templated_response(before, prompt, spoken)
        # A sampled response would have ended there.
        if any(token in self.stop_ids for token in ids[:-1]):
            raise LeftOut("a stop token inside the response, where a generated one would end")
        if self._special.is_masked(whole):
            self.counts[SPELLED] += 1
        if spoken.dropped:
            self.counts[DROPPED] += 1
        return ids

    def _plain_response(self, spoken: Spoken) -> str:
        if spoken.tool_calls or spoken.tools:
            raise LeftOut("tools, and there is no chat template to write them")
        if spoken.thought is not None and not spoken.in_text:
            raise LeftOut("a thought of its own, and there is no chat template to write it")
        return self._special.mask(spoken.answer if spoken.thought is None else spoken.text)

    def _templated_response(
        self, before: str, prompt: tuple[int, ...], spoken: Spoken
    ) -> tuple[str, tuple[int, ...]]:
        """The text of the whole conversation, and the ids of the response in it."""
        said = self._answers.said(spoken)
        turns = (*spoken.turns, said.message)
        whole = self._rendered(turns, spoken.tools, to_be_answered=False)
        if self._answers.check(said, before, whole) == "trimmed":
            self.counts[TRIMMED] += 1
        after = whole[len(before) :]
        if not said.frame.tail.strip():
            after = after.removesuffix(said.frame.tail)
        # Together, because some tokenizers put a space before a text that stands alone: it would
        # tell real responses from generated ones.
        ids = self._ids(before + after)
        ids = ids[len(prompt) :] if ids[: len(prompt)] == prompt else self._ids(after)
        if not said.frame.tail.strip():
            return whole, (*ids, self.end_of_turn)
        if spoken.tool_calls:
            return whole, self._ended(ids)
        return whole, ids[: len(ids) - self._ids_after_end(said.frame.tail)]

    def _ended(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Ids up to the first stop token, which may be another after tool calls."""
        stop = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        if stop == len(ids) or str(self.tokenizer.decode(list(ids[stop + 1 :]))).strip():
            raise LeftOut("tool calls that the chat template does not end with a stop token")
        return ids[: stop + 1]

    @cached_property
    def _ids_after_end(self) -> Callable[[str], int]:
        """Number of ids that a template writes after the special token that ends a turn."""
        return cache(lambda tail: len(self._ids(tail.lstrip())) - 1)

    def _ids(self, text: str, *, add_special_tokens: bool = False) -> tuple[int, ...]:
        if self._special.is_masked(text):
            return self._special.ids(text, add_special_tokens=add_special_tokens)
        # Not verbose: longer than the model takes is reported by us, as a bad row.
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return tuple(ids["input_ids"])

    def _rendered(self, turns: tuple[Message, ...], tools: Tools, *, to_be_answered: bool) -> str:
        """What the template writes, with the special tokens of the data masked."""
        assert self.template is not None
        masked, masked_tools = self._special.mask(turns), self._special.mask(tools)
        text = self.template.render(masked, to_be_answered=to_be_answered, tools=masked_tools)
        if masked != turns or masked_tools != tools:
            plain = self.template.render(turns, to_be_answered=to_be_answered, tools=tools)
            if self._special.unmask(text) != plain:
                raise LeftOut("a special token in its text, which the chat template reads")
        return text

    @cached_property
    def _special(self) -> SpecialText:
        return SpecialText(self.tokenizer, self.stop_ids)

    @cached_property
    def _answers(self) -> Answers:
        assert self.template is not None
        return Answers(self.template, self.thoughts, self._special)


def listed(ids: int | list[int] | None) -> list[int]:
    """The stop ids of a generation config, which names none, one or several."""
    return [] if ids is None else [ids] if isinstance(ids, int) else ids


def _template(
    tokenizer: PreTrainedTokenizerBase, date: dt.date, file: str | Path | None
) -> tuple[ChatTemplate, int]:
    """The tokenizer's chat template, and the token with which it ends an assistant's turn."""
    try:
        template = ChatTemplate.of(tokenizer, date)
        turns = Message(role="user", content=QUESTION), Message(role="assistant", content=ANSWER)
        _, found, after = template.render(turns, to_be_answered=False).rpartition(ANSWER)
    except TemplateError as error:
        raise SettingError(
            "tokenizer.chat_template" if file is None else "data.chat_template",
            str(tokenizer.chat_template)[:60] if file is None else str(file),
            f"it does not accept a question with an answer ({error})",
            fix="correct the template and save the tokenizer into the model folder"
            if file is None
            else "correct the template in that file",
        ) from error
    end = template.end_of_turn(after) if found else None
    return template, int(tokenizer.eos_token_id) if end is None else end
