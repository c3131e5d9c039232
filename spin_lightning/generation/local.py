"""Generation in this process: keyed inverse-CDF sampling, many iterates in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PretrainedConfig

from spin_lightning.errors import SpinError
from spin_lightning.generation.base import Generator, Request, Response
from spin_lightning.generation.decoding import Decoder
from spin_lightning.generation.sampler import Sampler
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.out_of_memory import is_out_of_memory
from spin_lightning.packing import group_by_length
from spin_lightning.policies.base import Policy
from spin_lightning.types import PolicyId

_CACHE_BYTES = 1 << 31
_MAX_BATCH_TOKENS = 1 << 17


@dataclass
class LocalGenerator(Generator):
    """Decodes in this process, one batch at a time.

    Attributes:
        stop_ids: A response ends with the first of these.
        pad_id: Any valid id; padded columns are masked.
        settings: Sampling settings and batch size.
    """

    stop_ids: tuple[int, ...]
    pad_id: int
    settings: GenerationSettings
    _halved: int | None = field(default=None, init=False)
    _has_noted_lengths: bool = field(default=False, init=False)

    def generate(self, policy: Policy, requests: Sequence[Request]) -> list[Response]:
        """Sample one response per request, with as many policies per batch as can share one.

        Raises:
            SpinError: Memory does not suffice for a single response.
        """
        decoder = Decoder(policy.model, Sampler(self.settings), self.stop_ids, self.pad_id)
        responses: dict[int, Response] = {}
        for group in policy.batch_groups({request.policy for request in requests}):
            members = [i for i, request in enumerate(requests) if request.policy in group]
            for batch in self._batches(decoder, [requests[i] for i in members]):
                indices = [members[i] for i in batch]
                decoded = self._decode(policy, decoder, group, [requests[i] for i in indices])
                responses.update(zip(indices, decoded, strict=True))
        return [responses[i] for i in range(len(requests))]

    @property
    def deviations(self) -> Mapping[str, Any]:
        """The reduced batch size, if memory did not suffice for the one in the settings."""
        return {} if self._halved is None else {"batch_tokens": self._halved}

    def _batch_tokens(self, decoder: Decoder) -> int:
        return self._halved or self.settings.batch_tokens or default_batch_tokens(decoder.model)

    def _batches(self, decoder: Decoder, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Split requests into batches of prompts of similar, or if needed of equal, length."""

        def prompt(i: int) -> int:
            return len(requests[i].prompt_ids)

        everything = range(len(requests))
        parts = [list(everything)]
        if decoder.needs_equal_lengths:
            self._note_lengths(decoder)
            parts = [list(part) for _, part in groupby(sorted(everything, key=prompt), prompt)]
        for part in parts:
            lengths = [_cached_tokens(requests[i]) for i in part]
            for batch in group_by_length(lengths, self._batch_tokens(decoder)):
                yield [part[i] for i in batch]

    def _decode(
        self,
        policy: Policy,
        decoder: Decoder,
        group: Sequence[PolicyId],
        requests: Sequence[Request],
    ) -> list[Response]:
        """Decode a batch, in halves if memory does not suffice for it."""
        try:
            with policy.at_rows(group) as routing:
                return decoder.decode(requests, routing)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(requests) == 1:
                raise SpinError(
                    f"there is not enough memory to generate one response ({error})",
                    fix="set a smaller data.max_response_tokens, or quantization: nf4",
                ) from error
        # Outside `except`, where the error and the tensors in its traceback have been freed.
        self._halve(decoder, requests)
        half = len(requests) // 2
        parts = (requests[:half], requests[half:])
        return [r for part in parts for r in self._decode(policy, decoder, group, part)]

    def _halve(self, decoder: Decoder, requests: Sequence[Request]) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tokens = len(requests) * max(_cached_tokens(request) for request in requests)
        self._halved = max(1, min(self._batch_tokens(decoder), tokens) // 2)
        rank_zero_info(
            f"NOTE: memory did not suffice to decode {tokens} tokens at once; continuing with "
            f"generation.batch_tokens {self._halved}. A run that starts with this value makes the "
            "same rows byte for byte; one that runs out of memory elsewhere may not."
        )

    def _note_lengths(self, decoder: Decoder) -> None:
        """Log once that prompts of different lengths do not share batches."""
        if not self._has_noted_lengths:
            self._has_noted_lengths = True
            rank_zero_info(
                f"Model type {decoder.config.model_type!r} caches more than keys and values: "
                "prompts are decoded one length at a time, which is slower."
            )


def default_batch_tokens(model: nn.Module) -> int:
    """Number of tokens whose keys and values fill the memory that is set aside for them.

    That is 2 GiB on a CPU. On a GPU it is three quarters of the card less the base's weights, but
    at least 2 GiB; the rest is for adapters, the optimizer and activations. What happens to be free
    does not count, since the batch is part of what decides a run's bytes.
    """
    causal: Any = model
    embeddings: Tensor = causal.get_input_embeddings().weight
    if not embeddings.is_cuda:
        return tokens_in_cache(causal.config, _CACHE_BYTES, element_size=4)
    # Without adapters: how many are loaded differs between ranks and after a resume.
    base = [p for name, p in model.named_parameters() if "lora_" not in name]
    weights = sum(p.numel() * p.element_size() for p in base)
    card = torch.cuda.get_device_properties(embeddings.device).total_memory
    memory = max(_CACHE_BYTES, card * 3 // 4 - weights)
    return tokens_in_cache(causal.config, memory, embeddings.element_size())


def tokens_in_cache(config: PretrainedConfig, memory: int, element_size: int) -> int:
    """Number of tokens, up to 2^17, whose keys and values fit into some memory.

    Args:
        config: The model's config.
        memory: Bytes.
        element_size: Bytes of a number.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    bytes_per_token = 2 * text.num_hidden_layers * heads * head_dim * element_size
    return int(min(_MAX_BATCH_TOKENS, max(1, memory // bytes_per_token)))


def _cached_tokens(request: Request) -> int:
    """Tokens that a request takes in the cache at most; twice as many if mixed with the base."""
    copies = 2 if request.policy.mixes_base else 1
    return copies * (len(request.prompt_ids) + request.cap)
