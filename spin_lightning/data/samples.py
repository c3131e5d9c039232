"""Some conversations of a run as messages, kept so that an exported tokenizer can be checked."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from spin_lightning.data.templates import ChatTemplate, LeftOut, Tools
from spin_lightning.data.thoughts import settle
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.redaction import masked
from spin_lightning.run.validation import LIST, TOKEN_IDS, WHOLE, check_fields
from spin_lightning.types import Conversation, Example, Message

MOST_SAMPLES: Final = 8
# Of how many examples they are taken: some cannot be used.
_TRIED: Final = 64


@dataclass(frozen=True)
class SampleConversation:
    """The prompt of an example as messages, with its ids in the run.

    Attributes:
        example_id: The example.
        turns: The turns that the chat template is given.
        tools: Schemas of the tools.
        prompt_ids: Ids of the prompt in every row of the run.
    """

    example_id: int
    turns: tuple[Message, ...]
    tools: Tools
    prompt_ids: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The conversation as plain values."""
        return {
            "example_id": self.example_id,
            "turns": [dict(turn) for turn in self.turns],
            "tools": [dict(tool) for tool in self.tools],
            "prompt_ids": list(self.prompt_ids),
        }

    @classmethod
    def of(cls, content: object) -> SampleConversation:
        """Read a conversation from JSON.

        Raises:
            ValueError: A field is missing or has an invalid value.
        """
        known = check_fields(content, _RULES, required=_RULES)
        turns, tools = tuple(known["turns"]), tuple(known["tools"])
        if not turns or not all(isinstance(each, dict) for each in (*turns, *tools)):
            raise ValueError("its turns or tools are not objects")
        return cls(known["example_id"], turns, tools, tuple(known["prompt_ids"]))


def samples_to_json(samples: Sequence[SampleConversation]) -> dict[str, Any]:
    """The content of a run's `conversations.json`."""
    return {"conversations": [sample.to_json() for sample in samples]}


def read_samples(content: object) -> list[SampleConversation]:
    """The conversations in the content of a run's `conversations.json`.

    Raises:
        ValueError: A conversation is missing or invalid.
    """
    known = check_fields(content, {"conversations": LIST}, required=("conversations",))
    return [SampleConversation.of(each) for each in known["conversations"]]


def sample_conversations(
    examples: Sequence[Example],
    conversations: Mapping[int, Conversation],
    text_format: PromptFormat,
) -> list[SampleConversation]:
    """Up to `MOST_SAMPLES` conversations, spread over the examples.

    Those that spell out a special token, which a run reads as text and transformers as the token,
    and those with a secret in them are passed over.

    Args:
        examples: Examples of the run.
        conversations: Their texts, by example id, as far as they are known.
        text_format: How the run turns text into ids.
    """
    known = [example for example in examples if example.example_id in conversations]
    step = max(1, len(known) // MOST_SAMPLES)
    tried = [known[i] for start in range(step) for i in range(start, len(known), step)][:_TRIED]
    made = (_sample(e, conversations[e.example_id], text_format) for e in tried)
    return list(islice((sample for sample in made if sample is not None), MOST_SAMPLES))


def _sample(
    example: Example, conversation: Conversation, text_format: PromptFormat
) -> SampleConversation | None:
    date = text_format.template.date if text_format.template else None
    try:
        spoken = settle(conversation, text_format.thoughts)
        ids = plain_prompt_ids(text_format.tokenizer, spoken.turns, spoken.tools, date)
    except (LeftOut, TemplateError):
        return None
    texts = str((spoken.turns, spoken.tools))
    if ids != example.prompt_ids or masked(texts) != texts:
        return None
    return SampleConversation(example.example_id, spoken.turns, spoken.tools, ids)


def plain_prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Message],
    tools: Tools = (),
    date: dt.date | None = None,
) -> tuple[int, ...]:
    """Ids of a prompt as transformers alone computes them, by the tokenizer's chat template.

    Without a template, a prompt is the text of its one turn.

    Args:
        tokenizer: The tokenizer.
        turns: The turns.
        tools: Schemas of the tools.
        date: The date that the template writes as today's; default today.

    Raises:
        jinja2.TemplateError: The template does not accept the turns.
    """
    if tokenizer.chat_template is None:
        alone = tuple(tokenizer(turns[-1]["content"])["input_ids"])
        return alone[:-1] if alone and alone[-1] == tokenizer.eos_token_id else alone
    template = ChatTemplate.of(tokenizer, date or dt.date.today())
    text = template.render(turns, to_be_answered=True, tools=tools)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


_RULES: Final = {"example_id": WHOLE, "turns": LIST, "tools": LIST, "prompt_ids": TOKEN_IDS}
