"""The one way from text to token ids, for generating and for training alike."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from spin_lightning.errors import SettingError
from spin_lightning.types import BadRow, Conversation, Example, Message

# Content that no template writes by itself, to see what one writes after the assistant's turn.
_SENTINEL = "spin-lightning-content"


@dataclass(frozen=True)
class PromptFormat:
    """How conversations become ids: by the chat template, or as plain text without one.

    Attributes:
        tokenizer: The model's tokenizer.
        stop_ids: Ids that end a response, ascending: those of the generation config, the
            tokenizer's end of sequence and the template's end of turn.
        end_of_turn: The id that a finished real response ends with.
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
            generation_eos: The stop ids that the model's generation config names.

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
        end_of_turn = _end_of_turn(tokenizer)
        named = generation_eos if isinstance(generation_eos, list) else [generation_eos]
        stops = {end_of_turn, tokenizer.eos_token_id, *(i for i in named if i is not None)}
        return cls(tokenizer, tuple(sorted(stops)), end_of_turn)

    @property
    def pad_id(self) -> int:
        """The padding id, or the end of sequence without one: padded columns are masked anyway."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @cached_property
    def template_hash(self) -> str | None:
        """SHA-256 of the chat template; None without one."""
        template = self.tokenizer.chat_template
        return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()

    def prompt_ids(self, prompt: tuple[Message, ...]) -> tuple[int, ...]:
        """Ids that a response is sampled after.

        A template writes its own special tokens, so none are added to what it wrote; plain text
        gets the tokenizer's (a beginning of sequence, where it has one), but no end of sequence.

        Raises:
            SettingError: Several turns without a chat template.
            jinja2.TemplateError: The template does not take these turns.
        """
        if self.tokenizer.chat_template is not None:
            return self._ids(self._rendered_prompt(prompt))
        if len(prompt) > 1:
            raise SettingError(
                "tokenizer.chat_template",
                None,
                f"a prompt has {len(prompt)} turns, and there is no template to join them",
                fix="set a chat template and save the tokenizer into the model folder",
            )
        ids = tuple(self.tokenizer(prompt[0]["content"])["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def response_ids(self, conversation: Conversation) -> tuple[int, ...]:
        """Ids of a whole real response, up to and including its stop id.

        With a template, they are those of the text that it writes after the prompt; what follows
        the end of the turn, usually a newline, is dropped.
        """
        ids = self._ids(self._response_text(conversation))
        stop = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return (*ids[:stop], self.end_of_turn)

    def tokenise(
        self,
        conversation: Conversation,
        *,
        max_prompt_tokens: int | None,
        max_response_tokens: int,
        context: int,
    ) -> Example | BadRow:
        """Tokenise one conversation.

        Args:
            conversation: The text.
            max_prompt_tokens: Longest prompt; None for the context's length.
            max_response_tokens: Cap of the response, the stop id counted.
            context: Longest sequence that the model was made for.

        Returns:
            The example; a response over the cap keeps its first ids and is not finished. Or a bad
            row: a prompt that is too long, or turns that the template does not take.
        """
        try:
            prompt = self.prompt_ids(conversation.prompt)
            response = self.response_ids(conversation)
        except TemplateError as error:
            return BadRow(conversation.example_id, f"the chat template refuses it: {error}")
        longest = context - 1 if max_prompt_tokens is None else min(max_prompt_tokens, context - 1)
        if not prompt or len(prompt) > longest:
            reason = f"the prompt has more than {longest} tokens" if prompt else "an empty prompt"
            return BadRow(conversation.example_id, reason)
        cap = min(max_response_tokens, context - len(prompt))
        finished = len(response) <= cap
        return Example(conversation.example_id, prompt, response[:cap], finished)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _rendered_prompt(self, prompt: tuple[Message, ...]) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                _chat(prompt), tokenize=False, add_generation_prompt=True
            )
        )

    def _response_text(self, conversation: Conversation) -> str:
        """What the template writes after the prompt, or the response itself."""
        if self.tokenizer.chat_template is None:
            return conversation.response
        answer = Message(role="assistant", content=conversation.response)
        turns = _chat((*conversation.prompt, answer))
        prompt = self._rendered_prompt(conversation.prompt)
        whole = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        # Some templates open the turn differently where they are to answer; then the text itself.
        return whole.removeprefix(prompt) if whole.startswith(prompt) else conversation.response


def _chat(turns: tuple[Message, ...]) -> list[dict[str, str]]:
    """The turns as transformers types them."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The special token that the template writes after the assistant's content, else eos."""
    eos = int(tokenizer.eos_token_id)
    if tokenizer.chat_template is None:
        return eos
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": _SENTINEL},
    ]
    after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(_SENTINEL)[2]
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return int(ids[0]) if ids and ids[0] in special else eos
