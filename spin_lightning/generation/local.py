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
from spin_lightning.generation import lanes_trial, step_graph
from spin_lightning.generation.base import Generator, Request, Response
from spin_lightning.generation.decoding import Decoder
from spin_lightning.generation.sampler import Sampler
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.out_of_memory import free_memory, is_out_of_memory
from spin_lightning.policies.base import Policy, RowRouting
from spin_lightning.policies.heads import Heads

_CACHE_BYTES = 1 << 31
_MAX_BATCH_TOKENS = 1 << 17


class _TooLarge(Exception):
    """Memory did not suffice to decode `tokens` tokens at once."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens


@dataclass(frozen=True)
class _Queue:
    """Requests that are decoded one after the other in some slots.

    Attributes:
        indices: The requests.
        slots: Number of slots.
        columns: Tokens that a slot has room for.
    """

    indices: Sequence[int]
    slots: int
    columns: int

    @property
    def tokens(self) -> int:
        """Tokens that all slots have room for."""
        return self.slots * self.columns


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
        while True:
            try:
                return self._generate(policy, requests)
            except _TooLarge as error:
                tokens = error.tokens
            # Outside `except`, where the error and the tensors in its traceback have been freed.
            self._halve(tokens)

    @property
    def deviations(self) -> Mapping[str, Any]:
        """The reduced batch size, if memory did not suffice, and kernels that do not work."""
        halved = {} if self._halved is None else {"batch_tokens": self._halved}
        return {**halved, **lanes_trial.deviations(), **step_graph.deviations()}

    def _generate(self, policy: Policy, requests: Sequence[Request]) -> list[Response]:
        decoder = Decoder(
            policy.model,
            Sampler(self.settings),
            self.stop_ids,
            self.pad_id,
            # A graph cannot hold the passes of other processes.
            cuda_graphs=self.settings.cuda_graphs and not policy.is_sharded,
        )
        responses: dict[int, Response] = {}
        for group in policy.batch_groups({request.policy for request in requests}):
            members = [i for i, request in enumerate(requests) if request.policy in group]
            for queue in self._queues(decoder, requests, members):
                with policy.at_rows(group) as routing:
                    decoded = self._decode(policy, decoder, requests, queue, routing)
                responses.update(zip(queue.indices, decoded, strict=True))
        return [responses[i] for i in range(len(requests))]

    def _decode(
        self,
        policy: Policy,
        decoder: Decoder,
        requests: Sequence[Request],
        queue: _Queue,
        routing: RowRouting,
    ) -> list[Response]:
        asked = [requests[i] for i in queue.indices]
        try:
            return decoder.decode(asked, routing, queue.slots, self.on_progress)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if queue.slots == 1 or policy.is_sharded:
                count = "one response" if queue.slots == 1 else f"{queue.slots} responses at once"
                raise SpinError(
                    f"there is not enough memory to generate {count} ({error})",
                    fix="set a smaller generation.batch_tokens or data.max_response_tokens, or "
                    "quantization: nf4",
                ) from error
            raise _TooLarge(queue.tokens) from error

    def _queues(
        self, decoder: Decoder, requests: Sequence[Request], members: Sequence[int]
    ) -> Iterator[_Queue]:
        """Split some requests into queues of similar, or if needed of equal, lengths."""
        tokens = self._halved or self.settings.batch_tokens or default_batch_tokens(decoder.model)
        parts = [list(members)]
        if decoder.needs_equal_lengths:
            self._note_lengths(decoder)
            by_prompt = sorted(members, key=lambda i: len(requests[i].prompt_ids))
            grouped = groupby(by_prompt, lambda i: len(requests[i].prompt_ids))
            parts = [list(part) for _, part in grouped]
        for part in parts:
            left = sorted(part, key=lambda i: (-requests[i].total, i))
            while left:
                queue = _first_queue(decoder, requests, left, tokens)
                yield queue
                left = left[len(queue.indices) :]

    def _halve(self, tokens: int) -> None:
        free_memory()
        self._halved = max(1, tokens // 2)
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
    # (A sharded one has the mesh of the processes that hold its parts.)
    shares = [p.device_mesh.size() if hasattr(p, "device_mesh") else 1 for p in base]
    weights = sum(p.numel() * p.element_size() // n for p, n in zip(base, shares, strict=True))
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
    layers, heads = config.get_text_config().num_hidden_layers, Heads.of(config)
    bytes_per_token = 2 * layers * heads.keys * heads.size * element_size
    return int(min(_MAX_BATCH_TOKENS, max(1, memory // bytes_per_token)))


def _first_queue(
    decoder: Decoder, requests: Sequence[Request], order: Sequence[int], tokens: int
) -> _Queue:
    """The first of some requests that are decoded together.

    Args:
        decoder: The decoder.
        requests: All requests.
        order: Indices of those that are left, longest first.
        tokens: Tokens, padding included, whose keys and values fit into memory.
    """
    columns = decoder.columns_of([requests[i] for i in order], refilled=False)
    most = max(1, tokens // columns)
    if most >= len(order) or decoder.needs_equal_lengths:
        return _Queue(order[:most], min(most, len(order)), columns)
    # Every slot has room for the longest request, so much shorter ones have slots of their own.
    similar = [i for i in order if 2 * requests[i].total > requests[order[0]].total]
    columns = decoder.columns_of([requests[i] for i in similar], refilled=True)
    most = max(1, tokens // columns)
    return _Queue(similar, min(most, len(similar)), columns)
