"""Generation in this process, with keyed inverse-CDF sampling and many iterates in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import PretrainedConfig

from spin_lightning.errors import SpinError
from spin_lightning.generation.base import Generator, Request, Response
from spin_lightning.generation.decoding import Decoder
from spin_lightning.generation.kv_cache import holds_keys_and_values_alone
from spin_lightning.generation.sampler import Sampler
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.packing import group_by_length
from spin_lightning.policies.base import Policy
from spin_lightning.types import PolicyId

_CACHE_BYTES = 1 << 31
_MOST_BATCH_TOKENS = 1 << 17


@dataclass
class LocalGenerator(Generator):
    """Decodes in this process, one batch after the other.

    Attributes:
        stop_ids: A response ends with the first of these.
        pad_id: Any valid id; padded columns are masked.
        settings: Sampling settings and batch size.
    """

    stop_ids: tuple[int, ...]
    pad_id: int
    settings: GenerationSettings
    config: Any = field(default=None, init=False)
    _halved: int | None = field(default=None, init=False)

    def generate(self, policy: Policy, requests: Sequence[Request]) -> list[Response]:
        """Sample one response per request, as many iterates at once as the policy can act as.

        Raises:
            SpinError: There is not enough memory for a single response.
        """
        self.config = policy.model.config
        responses: dict[int, Response] = {}
        for team in policy.teams({request.actor for request in requests}):
            asked = [i for i, request in enumerate(requests) if request.actor in team]
            for batch in self._batches([requests[i] for i in asked]):
                indices = [asked[i] for i in batch]
                answers = self._answer(policy, team, [requests[i] for i in indices])
                responses.update(zip(indices, answers, strict=True))
        return [responses[i] for i in range(len(requests))]

    @property
    def deviations(self) -> Mapping[str, Any]:
        """The batch size that memory sufficed for, where that is another."""
        return {} if self._halved is None else {"batch_tokens": self._halved}

    @property
    def _batch_tokens(self) -> int:
        return self._halved or self.settings.batch_tokens or default_batch_tokens(self.config)

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Split requests into batches of prompts of similar, or of one, length."""

        def prompt(i: int) -> int:
            return len(requests[i].prompt_ids)

        everything = range(len(requests))
        alike = [list(everything)]
        if self._alike:
            alike = [list(group) for _, group in groupby(sorted(everything, key=prompt), prompt)]
        for group in alike:
            lengths = [_cached_tokens(requests[i]) for i in group]
            for batch in group_by_length(lengths, self._batch_tokens):
                yield [group[i] for i in batch]

    def _answer(
        self, policy: Policy, team: Sequence[PolicyId], requests: Sequence[Request]
    ) -> list[Response]:
        """Decode a batch, in halves where memory does not suffice for it."""
        try:
            decoder = Decoder(
                policy.model,
                self.config,
                Sampler(self.settings),
                self.stop_ids,
                self.pad_id,
                self._alike,
            )
            with policy.at_rows(team) as seats:
                return decoder.decode(requests, seats)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(requests) == 1:
                raise SpinError(
                    f"memory does not suffice to generate one response ({error})",
                    fix="set a smaller data.max_response_tokens, or quantization: nf4",
                ) from error
        # Only here has the error, and what its traceback held, been let go.
        self._halve(requests)
        half = len(requests) // 2
        parts = (requests[:half], requests[half:])
        return [response for part in parts for response in self._answer(policy, team, part)]

    def _halve(self, requests: Sequence[Request]) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tokens = len(requests) * max(_cached_tokens(request) for request in requests)
        self._halved = max(1, min(self._batch_tokens, tokens) // 2)
        rank_zero_info(
            f"NOTE: memory did not suffice to decode {tokens} tokens at once; going on with "
            f"generation.batch_tokens {self._halved}. A run that starts with this number makes the "
            "same rows byte for byte, one in which memory runs out elsewhere may not."
        )

    @cached_property
    def _alike(self) -> bool:
        """Whether the model is decoded the slow way, prompts of one length at a time."""
        known = holds_keys_and_values_alone(self.config)
        if not known:
            rank_zero_info(
                f"Model type {self.config.model_type!r} keeps more than keys and values while it "
                "writes: prompts of one length are decoded at a time, which is slower."
            )
        return not known


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has no class for that on a CPU."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def default_batch_tokens(config: PretrainedConfig) -> int:
    """Tokens whose keys and values fill 2 GiB, from the model's size alone."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    bytes_per_token = 2 * text.num_hidden_layers * heads * head_dim * 4
    return int(min(_MOST_BATCH_TOKENS, max(1, _CACHE_BYTES // bytes_per_token)))


def _cached_tokens(request: Request) -> int:
    """Most tokens whose keys and values a request needs; a mixture with the base twice as many."""
    copies = 2 if request.actor.mixes_base else 1
    return copies * (len(request.prompt_ids) + request.cap)
