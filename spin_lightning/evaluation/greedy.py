"""Greedy answers for the harness, from the decoder that self-play samples with.

It drops rows that have ended. The harness's own call of `generate` goes on with all rows of a batch
until the last one has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from spin_lightning.data.tokenize import listed
from spin_lightning.generation.base import Request
from spin_lightning.generation.decoding import Decoder
from spin_lightning.generation.sampler import Sampler
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.policies.base import SinglePolicy

_GREEDY = Sampler(GenerationSettings(top_k=1))
# Settings of a generation config without influence on greedy tokens; lengths come with the request.
_HARMLESS: Final = frozenset(
    {"_from_model_config", "transformers_version", "do_sample", "temperature", "top_p", "top_k"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens"}
    | {"use_cache", "cache_implementation"}
)


@dataclass(frozen=True)
class StopTexts:
    """Ends a response as soon as its text contains one of some texts.

    Attributes:
        tokenizer: Decodes the response.
        texts: Each has one character or more.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: tuple[str, ...]

    def __call__(self, ids: Sequence[int]) -> bool:
        """Whether a response contains one of the texts, which ends in its last token."""
        # A token has at least one byte. One more, since decoding may drop a space at the start.
        longest = max((len(text.encode()) for text in self.texts), default=0)
        tail = self.tokenizer.decode(list(ids[-(longest + 1) :]))
        return any(text in tail for text in self.texts)


def is_greedy(config: GenerationConfig, options: Mapping[str, Any]) -> bool:
    """Whether a call of `generate` takes the likeliest token at each position, unchanged.

    Args:
        config: The model's generation config; it may, for example, penalize repetition.
        options: Further arguments of the call.
    """
    set_values = {**config.to_diff_dict(), **options}
    asked = {name for name, value in set_values.items() if value is not None and value is not False}
    sampled = options.get("do_sample", False) or options.get("temperature", 0.0) != 0.0
    return not sampled and asked <= _HARMLESS


def decoder_of(model: Any, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> Decoder:
    """A greedy decoder with the stop ids of a model's generation config, and with stop texts."""
    stop_ids = tuple(listed(model.generation_config.eos_token_id))
    texts = StopTexts(tokenizer, tuple(filter(None, stop)))
    return Decoder(model, _GREEDY, stop_ids, tokenizer.pad_token_id, texts)


def continue_batch(decoder: Decoder, context: Tensor, mask: Tensor, length: int) -> Tensor:
    """Prompts and responses, as `generate` returns them.

    Args:
        decoder: The decoder; its model acts as the policy.
        context: Left-padded prompts, int64, shape [n, columns].
        mask: 1 where a column holds a token, likewise.
        length: Largest number of columns of the result.

    Returns:
        The prompts and what follows, right-padded, int64, shape [n, longest].
    """
    prompts = [tuple(row[kept].tolist()) for row, kept in zip(context, mask.bool(), strict=True)]
    cap = length - context.shape[1]
    requests = [Request(prompt, opponent=0, key=0, cap=cap) for prompt in prompts]
    written = decoder.decode(requests, SinglePolicy())
    responses = [torch.tensor(r.ids, device=context.device, dtype=context.dtype) for r in written]
    return torch.cat(
        [context, pad_sequence(responses, batch_first=True, padding_value=decoder.pad_id)], dim=1
    )
