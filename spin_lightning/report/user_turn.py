"""The user's turn of a prompt, read back from the prompt's ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import SettingError
from spin_lightning.types import Message

# Contents that no template writes, to find what one writes around a user's content.
_QUESTION, _ANSWER = "spin-lightning-question", "spin-lightning-answer"


@dataclass(frozen=True)
class PromptReader:
    """Reads the last user turn back from the ids of a prompt.

    Chat templates write more than the user's text: role headers, and often a default system turn.
    For display, that only hides what differs between prompts.

    Attributes:
        tokenizer: The tokenizer that made the ids.
        header: What the template writes right before a user's content; empty if it is not known.
        footer: What it writes between that content and the response.
    """

    tokenizer: PreTrainedTokenizerBase
    header: str = ""
    footer: str = ""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PromptReader:
        """Find header and footer by rendering a short chat with the tokenizer's template."""
        if tokenizer.chat_template is None:
            return cls(tokenizer)
        question = Message(role="user", content=_QUESTION)
        answer = Message(role="assistant", content=_ANSWER)
        try:
            text_format = PromptFormat.of(tokenizer, None)
            # Decoded ids, not the template's text: decoding may move spaces.
            one, several = (
                str(tokenizer.decode(list(text_format.prompt_ids(turns))))
                for turns in ((question,), (question, answer, question))
            )
        except (SettingError, TemplateError):
            return cls(tokenizer)
        before, found, footer = one.partition(_QUESTION)
        _, found_again, between = several.rpartition(_QUESTION)[0].rpartition(_ANSWER)
        if not found or not found_again:
            return cls(tokenizer)
        # A first turn and a later one follow different text; the header is what they share.
        return cls(tokenizer, _common_end(before, between), footer)

    def read(self, prompt_ids: Sequence[int]) -> str:
        """The content of the last user turn; the whole prompt where it cannot be found.

        Args:
            prompt_ids: Ids of a prompt, up to where the response starts.

        Returns:
            Text; a whole prompt is without special tokens.
        """
        text = str(self.tokenizer.decode(list(prompt_ids)))
        if self.header and text.endswith(self.footer):
            _, found, content = text.removesuffix(self.footer).rpartition(self.header)
            if found:
                return content
        return str(self.tokenizer.decode(list(prompt_ids), skip_special_tokens=True))


def _common_end(one: str, other: str) -> str:
    """The longest text that both end with."""
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
