"""The only conversion of text to token ids, for generation and for training alike."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from spin_lightning.errors import SettingError, first_line
from spin_lightning.types import BadRow, Conversation, Example, Message

# Content that no template writes by itself, to find what one writes after the assistant's turn.
_SENTINEL = "spin-lightning-content"


@dataclass(frozen=True)
class PromptFormat:
    """Converts conversations to ids: with the chat template, or as plain text without one.

    Attributes:
        tokenizer: The model's tokenizer.
        stop_ids: Ids that end a response, ascending: those of the generation config, the
            tokenizer's end-of-sequence id and the template's end of turn.
        end_of_turn: The last id of a finished real response.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    end_of_turn: int

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, generation_eos: int | list[int] | None
    ) -> PromptFormat:
        """Read a tokenizer's format.

        Args:
            tokenizer: The model's tokenizer.
            generation_eos: The stop ids in the model's generation config.

        Raises:
            SettingError: The tokenizer has no end-of-sequence token.
        """
        if tokenizer.eos_token_id is None:
            raise SettingError(
                "tokenizer",
                tokenizer.name_or_path,
                "it has no end-of-sequence token, so no response could ever end",
                fix="set tokenizer.eos_token and save the tokenizer into the model folder",
            )
        try:
            end_of_turn = _end_of_turn(tokenizer)
        except TemplateError as error:
            raise SettingError(
                "tokenizer.chat_template",
                str(tokenizer.chat_template)[:60],
                f"it does not accept a question with an answer ({error})",
                fix="correct the template and save the tokenizer into the model folder",
            ) from error
        named = generation_eos if isinstance(generation_eos, list) else [generation_eos]
        stops = {end_of_turn, tokenizer.eos_token_id, *(i for i in named if i is not None)}
        return cls(tokenizer, tuple(sorted(stops)), end_of_turn)

    @property
    def pad_id(self) -> int:
        """The padding id, or without one the end-of-sequence id: padded columns are masked."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @cached_property
    def template_hash(self) -> str | None:
        """SHA-256 of the chat template; None without one."""
        template = self.tokenizer.chat_template
        return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()

    def prompt_ids(self, prompt: tuple[Message, ...]) -> tuple[int, ...]:
        """Ids of the prompt, after which a response is sampled.

        A template writes its own special tokens, so none are added to its output. Plain text gets
        the tokenizer's special tokens, such as a beginning of sequence, but no end of sequence.

        Raises:
            SettingError: There are several turns and no chat template.
            jinja2.TemplateError: The template does not accept these turns.
        """
        if self.tokenizer.chat_template is not None:
            return self._ids(self._rendered(prompt, to_be_answered=True))
        if len(prompt) > 1:
            raise SettingError(
                "tokenizer.chat_template",
                None,
                f"a prompt has {len(prompt)} turns, and there is no template to join them",
                fix="set a chat template and save the tokenizer into the model folder",
            )
        ids = tuple(self.tokenizer(prompt[0]["content"], verbose=False)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def response_ids(self, conversation: Conversation) -> tuple[int, ...]:
        """Ids of a whole real response, up to and including its stop id.

        With a template, these are the ids that follow the prompt in the whole conversation, without
        what the template writes after the end of the turn, usually a newline. A stop token in the
        response's text ends it, since a sampled response would end there, too.

        Raises:
            SettingError: There are several turns and no chat template.
            jinja2.TemplateError: The template does not accept these turns.
        """
        return self._response_after(self.prompt_ids(conversation.prompt), conversation)

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
            max_response_tokens: Cap of the response, including the stop id.
            context: Longest sequence that the model supports, in tokens.

        Returns:
            The example, whose response keeps its first ids and is not finished if it exceeds the
            cap. A bad row if the prompt is too long, the response has no token before its stop id,
            or the template does not accept the turns.

        Raises:
            SettingError: There are several turns and no chat template.
        """
        example_id = conversation.example_id
        try:
            prompt = self.prompt_ids(conversation.prompt)
            problem = _prompt_problem(len(prompt), max_prompt_tokens, context)
            if problem is not None:
                return BadRow(example_id, problem)
            response = self._response_after(prompt, conversation)
        except TemplateError as error:
            return BadRow(example_id, f"the chat template refuses it ({error})")
        if len(response) < 2:
            return BadRow(example_id, "a response without a token before its end")
        cap = min(max_response_tokens, context - len(prompt))
        return Example(example_id, prompt, response[:cap], real_finished=len(response) <= cap)

    def _response_after(
        self, prompt: tuple[int, ...], conversation: Conversation
    ) -> tuple[int, ...]:
        if self.tokenizer.chat_template is None:
            ids = self._ids(conversation.response)
        else:
            ids = self._templated_response(prompt, conversation)
        stop = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return (*ids[:stop], self.end_of_turn)

    def _templated_response(
        self, prompt: tuple[int, ...], conversation: Conversation
    ) -> tuple[int, ...]:
        answer = Message(role="assistant", content=conversation.response)
        before = self._rendered(conversation.prompt, to_be_answered=True)
        whole = self._rendered((*conversation.prompt, answer), to_be_answered=False)
        # Some templates open the turn differently for generation; then use the text itself.
        after = whole.removeprefix(before) if whole.startswith(before) else conversation.response
        # Tokenize both together: some tokenizers put a space before a text on its own, which would
        # distinguish real responses from generated ones.
        ids = self._ids(before + after)
        return ids[len(prompt) :] if ids[: len(prompt)] == prompt else self._ids(after)

    def _ids(self, text: str) -> tuple[int, ...]:
        # Not verbose: sequences longer than the context are reported as bad rows.
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _rendered(self, turns: tuple[Message, ...], *, to_be_answered: bool) -> str:
        return _render(self.tokenizer, turns, to_be_answered=to_be_answered)


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: tuple[Message, ...], *, to_be_answered: bool
) -> str:
    """The template's text for some turns.

    Raises:
        jinja2.TemplateError: The template does not accept them.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": turn["role"], "content": turn["content"]} for turn in turns],
                tokenize=False,
                add_generation_prompt=to_be_answered,
            )
        )
    except TemplateError:
        raise
    # A template is a program: it may divide by zero, or add a string to a number.
    except Exception as error:
        raise TemplateError(first_line(error)) from error


def _prompt_problem(length: int, longest: int | None, context: int) -> str | None:
    """What is wrong with a prompt of this length; None if nothing is."""
    if not length:
        return "a prompt without tokens"
    if longest is not None and length > longest:
        return f"a prompt of more than max_prompt_tokens={longest}: {length} tokens"
    if length >= context:
        return f"a prompt that fills the model's context of {context} tokens: {length} tokens"
    return None


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The special token that the template writes after the assistant's content; default eos."""
    eos = int(tokenizer.eos_token_id)
    if tokenizer.chat_template is None:
        return eos
    turns = Message(role="user", content="hello"), Message(role="assistant", content=_SENTINEL)
    whole = _render(tokenizer, turns, to_be_answered=False)
    _, found, after = whole.rpartition(_SENTINEL)
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return int(ids[0]) if ids and ids[0] in special else eos
