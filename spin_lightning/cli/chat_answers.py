"""What the iterates of a run answer in a chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from spin_lightning import keyed
from spin_lightning.data.thoughts import THOUGHTS, Thoughts
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import SettingError, SpinError, check_settings, is_number, is_whole
from spin_lightning.evaluation.contestants import Contestant, contestants
from spin_lightning.generation.base import Request, Response
from spin_lightning.generation.decoding import Decoder
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.sampler import Sampler
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.policies.base import Policy
from spin_lightning.policies.pretrained import context_length_of
from spin_lightning.policies.saved import load_policy, load_tokenizer
from spin_lightning.run.folder import RunFolder
from spin_lightning.types import Message

# For runs whose version did not record their cap.
_CAP = 256


@dataclass(frozen=True)
class ChatSettings:
    """How a chat is answered.

    Attributes:
        max_tokens: Cap of an answer; None for the run's cap.
        temperature: Divides the logits; 0 takes the most likely token.
        seed: Seed of the sampled tokens.
        system: A system turn before the chat; None for the template's own, if it writes one.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    seed: int = 0
    system: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least_one = self.max_tokens is None or is_whole(self.max_tokens, 1)
        warm = is_number(self.temperature) and self.temperature >= 0
        checks = {
            "max_tokens": (at_least_one, "a whole number > 0"),
            "temperature": (warm, "a number >= 0"),
        }
        check_settings(self, checks)

    @property
    def sampling(self) -> GenerationSettings:
        """The settings of the sampler."""
        warmth: dict[str, Any] = {"temperature": self.temperature}
        return GenerationSettings.of(warmth if self.temperature else {"top_k": 1})


@dataclass
class Dialog:
    """A chat with one contestant.

    Attributes:
        contestant: Who answers.
        turns: All turns so far.
    """

    contestant: Contestant
    turns: list[Message] = field(default_factory=list)

    def say(self, role: str, content: str) -> None:
        """Add a turn."""
        self.turns.append(Message(role=role, content=content))


@dataclass(frozen=True)
class Answer:
    """An answer in a chat.

    Attributes:
        text: Without special tokens.
        tokens: Number of its tokens.
        finished: Whether it ended by itself.
    """

    text: str
    tokens: int
    finished: bool


class Answers:
    """Answers of iterates, after the run's template, with the run's stop ids.

    Args:
        run: The run.
        names: Iterates, see `contestants`.
        settings: How they answer.

    Raises:
        RunFolderError: The run has no such iterate, or a file of it has changed.
        SettingError: There is no such name, the base model is not where it was, or there is a
            system turn and no chat template to write it.
    """

    def __init__(self, run: RunFolder, names: Sequence[str], settings: ChatSettings) -> None:
        """Check the iterates; the base is loaded for the first answer."""
        self.contestants = contestants(run, names)
        for t in sorted({t for one in self.contestants for t in one.mixture.members}):
            run.check_iterate(t)
        self.settings = settings
        self._run = run
        self._tokenizer = load_tokenizer(run.root)
        if settings.system is not None and not self.keeps_turns:
            raise SettingError(
                "system",
                settings.system,
                "the run's tokenizer has no chat template to write it",
                fix="leave --system out",
            )

    @property
    def keeps_turns(self) -> bool:
        """Whether earlier turns are part of a prompt: there is a chat template to join them."""
        return self._tokenizer.chat_template is not None

    def dialogs(self) -> list[Dialog]:
        """A new chat with every contestant."""
        made = [Dialog(contestant) for contestant in self.contestants]
        for dialog in made:
            if self.settings.system is not None:
                dialog.say("system", self.settings.system)
        return made

    def load(self) -> None:
        """Load the base, which the first answer does otherwise."""
        assert self._format

    def answer(self, dialogs: Sequence[Dialog], number: int) -> list[Answer]:
        """Answer the last turn of several chats, in one batch where the policies can share one.

        Args:
            dialogs: The chats; the answers are added to them.
            number: Number of the question, which the sampled tokens depend on.

        Raises:
            SpinError: A chat is too long, or the template refuses it.
        """
        requests = [self._request(dialog, number) for dialog in dialogs]
        settings = self.settings.sampling
        generator = LocalGenerator(self._format.stop_ids, self._format.pad_id, settings)
        written = generator.generate(self._policy, requests)
        return [self._add(*pair) for pair in zip(dialogs, written, strict=True)]

    def stream(self, dialog: Dialog, number: int, write: Callable[[str], None]) -> Answer:
        """Answer the last turn of one chat; `write` gets the text bit by bit.

        Raises:
            SpinError: The chat is too long, or the template refuses it.
        """
        request = self._request(dialog, number)
        writer = _Writer(self._format, write)
        parts = (Sampler(self.settings.sampling), self._format.stop_ids, self._format.pad_id)
        with self._policy.at_rows([request.policy]) as routing:
            (written,) = Decoder(self._policy.model, *parts, writer).decode([request], routing)
        return self._add(dialog, written)

    # ------------------------------------------------------------------ details

    @cached_property
    def _policy(self) -> Policy:
        return load_policy(self._run.root, "cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _format(self) -> PromptFormat:
        model: Any = self._policy.model
        stops = model.generation_config.eos_token_id
        made = [self._format_with(stops, thoughts) for thoughts in THOUGHTS]
        # The hash covers what becomes of thoughts, so it tells how the run had set it.
        used = self._recorded("chat_template")
        return next((one for one in made if one.template_hash == used), made[0])

    def _format_with(self, stops: int | list[int] | None, thoughts: Thoughts) -> PromptFormat:
        date = self._run.first_date()
        return PromptFormat.of(self._tokenizer, stops, thoughts=thoughts, date=date)

    def _recorded(self, name: str) -> Any:
        return self._run.record(min(self._run.known_iterates())).fingerprint_fields.get(name)

    def _request(self, dialog: Dialog, number: int) -> Request:
        turns = tuple(dialog.turns) if self.keeps_turns else (dialog.turns[-1],)
        try:
            prompt = self._format.prompt_ids(turns)
        except TemplateError as error:
            raise SpinError(
                f"the run's chat template refuses these turns ({error})", fix="leave --system out"
            ) from error
        model: Any = self._policy.model
        left = context_length_of(model.config) - len(prompt)
        if left < 1 or not prompt:
            raise SpinError(
                f"a prompt of {len(prompt)} tokens leaves no room for an answer",
                fix="start over with /reset, or ask something that is neither empty nor longer "
                "than the model's context",
            )
        cap = self.settings.max_tokens or self._recorded("max_response_tokens") or _CAP
        seed = self.settings.seed
        # Drawn once per chat, so that one iterate leads a whole chat with a mixture.
        member = dialog.contestant.mixture.draw(
            keyed.opponent_uniform(keyed.row_key(seed, 0, 0, 0))
        )
        return Request(prompt, member, keyed.row_key(seed, 0, number, 0), min(cap, left))

    def _add(self, dialog: Dialog, written: Response) -> Answer:
        text = _text(self._format.tokenizer, written.ids).strip()
        dialog.say("assistant", text)
        return Answer(text, len(written.ids), written.finished)


class _Writer:
    """Writes the text of an answer as its tokens come, in whole characters."""

    def __init__(self, text_format: PromptFormat, write: Callable[[str], None]) -> None:
        self._tokenizer = text_format.tokenizer
        self._write = write
        self._shown = ""

    def __call__(self, ids: Sequence[int]) -> bool:
        """See `Decoder.ends`; ends no answer."""
        text = _text(self._tokenizer, ids).lstrip()
        # A character of several tokens is not there before its last one.
        if text.startswith(self._shown) and not text.endswith("\ufffd"):
            self._write(text[len(self._shown) :])
            self._shown = text
        return False


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
