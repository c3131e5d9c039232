"""Building batches from sequences: prompts shared without padding, or every sequence padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from spin_lightning.types import PromptBatch, SequenceBatch


def pack_prompts(
    prompts: Sequence[ArrayLike], responses: Sequence[Sequence[ArrayLike]]
) -> PromptBatch:
    """Concatenate prompts, each followed by its responses, without padding.

    Args:
        prompts: Token ids of n prompts, each at least one token: tuples, lists or arrays.
        responses: Token ids of the responses to each prompt, each at least one token, likewise.

    Returns:
        The batch, on the CPU.
    """
    groups = list(zip(prompts, responses, strict=True))
    pieces = [np.asarray(ids) for prompt, group in groups for ids in (prompt, *group)]
    return PromptBatch(
        input_ids=torch.from_numpy(np.concatenate(pieces).astype(np.int64)),
        prompt_lengths=tuple(np.size(prompt) for prompt, _ in groups),
        response_lengths=tuple(tuple(np.size(ids) for ids in group) for _, group in groups),
    )


# Tokens of a forward pass, so that activations stay small whatever the batch. On a CPU, from about
# 8000 on, even those of a small model exceed what glibc's allocator keeps (32 MiB): the system maps
# their memory again each time, page by page, which took a third of a step. On other devices a pass
# has to be long enough for efficient products.
_TOKENS_OF_A_PASS = {"cpu": 1024}
_TOKENS_ELSEWHERE = 8192


def pass_tokens(device: torch.device) -> int:
    """Tokens of a forward pass that suits a device."""
    return _TOKENS_OF_A_PASS.get(device.type, _TOKENS_ELSEWHERE)


def split_for(
    device: torch.device, batch: PromptBatch, most: int | None = None
) -> list[PromptBatch]:
    """Split a batch between prompts into forward passes that suit a device.

    A batch that is such a pass already stays whole.

    Args:
        device: Where the passes are computed.
        batch: n prompts and their responses.
        most: Tokens of a pass, as in `split_prompts`; by default, what suits the device.
    """
    if batch.is_one_pass:
        return [batch]
    return split_prompts(batch, most or pass_tokens(device))


def split_prompts(batch: PromptBatch, most: int) -> list[PromptBatch]:
    """Split a batch between prompts into passes of about equal numbers of tokens.

    Args:
        batch: n prompts and their responses.
        most: Tokens of a pass; one can be longer by up to one prompt with its responses.

    Returns:
        The passes in order; a single one if the batch has at most `most` tokens.
    """
    groups = list(zip(batch.prompt_lengths, batch.response_lengths, strict=True))
    lengths = [prompt + sum(responses) for prompt, responses in groups]
    total = sum(lengths)
    count = -(-total // most)
    # A prompt belongs to the piece that contains its middle.
    middles = [end - length / 2 for end, length in zip(accumulate(lengths), lengths, strict=True)]
    pieces: dict[int, list[int]] = {}
    for i, middle in enumerate(middles):
        pieces.setdefault(int(middle * count / total), []).append(i)
    sizes = [sum(lengths[i] for i in piece) for piece in pieces.values()]
    return [
        PromptBatch(
            input_ids=ids,
            prompt_lengths=tuple(batch.prompt_lengths[i] for i in piece),
            response_lengths=tuple(batch.response_lengths[i] for i in piece),
            is_one_pass=True,
        )
        for ids, piece in zip(torch.split(batch.input_ids, sizes), pieces.values(), strict=True)
    ]


def halve_prompts(batch: PromptBatch) -> list[PromptBatch]:
    """Split a batch between prompts into two passes of about equal tokens; [] for one prompt."""
    if len(batch.prompt_lengths) == 1:
        return []
    # The middle of the first prompt is in the first half, that of the last one in the second.
    return split_prompts(batch, -(-len(batch.input_ids) // 2))


def halve_responses(batch: PromptBatch) -> list[PromptBatch]:
    """Split a batch into two passes, a single prompt between its responses; [] for one response.

    The responses keep their order.
    """
    if len(batch.prompt_lengths) > 1:
        return halve_prompts(batch)
    (prompt,), (lengths,) = batch.prompt_lengths, batch.response_lengths
    middle = len(lengths) // 2
    if not middle:
        return []
    first = sum(lengths[:middle])
    sizes = [prompt, first, sum(lengths[middle:])]
    shared, early, late = torch.split(batch.input_ids, sizes)
    return [
        PromptBatch(torch.cat([shared, ids]), (prompt,), (part,), is_one_pass=True)
        for ids, part in ((early, lengths[:middle]), (late, lengths[middle:]))
    ]


def positions(batch: PromptBatch) -> Tensor:
    """Position of each token within its own [prompt, response], int64, shape [tokens]."""
    pieces = [
        piece
        for prompt, lengths in zip(batch.prompt_lengths, batch.response_lengths, strict=True)
        for piece in (np.arange(prompt), *(np.arange(prompt, prompt + n) for n in lengths))
    ]
    return torch.from_numpy(np.concatenate(pieces))


def predictors(batch: PromptBatch) -> tuple[Tensor, Tensor]:
    """Indices of the tokens that predict response tokens, and of the response tokens themselves.

    The last token of a prompt predicts the first token of each of its responses.

    Returns:
        Two int64 tensors of shape [response tokens], response by response: indices into the row.
    """
    predicting: list[ArrayLike] = []
    predicted: list[ArrayLike] = []
    start = 0
    for prompt, lengths in zip(batch.prompt_lengths, batch.response_lengths, strict=True):
        last = start + prompt - 1
        start += prompt
        for length in lengths:
            tokens = np.arange(start, start + length)
            predicting += [[last], tokens[:-1]]
            predicted.append(tokens)
            start += length
    return torch.from_numpy(np.concatenate(predicting)), torch.from_numpy(np.concatenate(predicted))


def pad_prompts(batch: PromptBatch) -> SequenceBatch:
    """Turn each response into a separate padded sequence, with its prompt in front.

    Returns:
        The sequences in the order of the responses, on the device of the batch.
    """
    ids = batch.input_ids.cpu().numpy()
    prompts, responses, start = [], [], 0
    for prompt, lengths in zip(batch.prompt_lengths, batch.response_lengths, strict=True):
        here, start = ids[start : start + prompt], start + prompt
        for length in lengths:
            prompts.append(here)
            responses.append(ids[start : start + length])
            start += length
    # Padded columns are masked, and 0 is a valid id in every vocabulary.
    return pack_padded(prompts, responses, pad_id=0).to(batch.input_ids.device)


def pack_padded(
    prompts: Sequence[ArrayLike], responses: Sequence[ArrayLike], pad_id: int
) -> SequenceBatch:
    """Concatenate each prompt with its response and pad on the left.

    Since every response ends in the last column, logits are needed for the last
    `max(response length) + 1` columns only; causal language models of transformers can compute
    just those.

    Args:
        prompts: Token ids of n prompts, each at least one token: tuples, lists or arrays.
        responses: Token ids of n responses, likewise.
        pad_id: Any valid id; padded columns are masked.

    Returns:
        The batch, on the CPU.
    """
    pairs = [(np.asarray(p), np.asarray(r)) for p, r in zip(prompts, responses, strict=True)]
    input_ids, attention_mask = pad_left([np.concatenate(pair) for pair in pairs], pad_id)
    lengths = torch.tensor([len(response) for _, response in pairs])
    return SequenceBatch(input_ids, attention_mask, response_lengths=lengths)


def pad_left(sequences: Sequence[ArrayLike], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of n sequences, int64, each of shape [n, longest]."""
    rows = [np.asarray(sequence) for sequence in sequences]
    longest = max(len(row) for row in rows)
    input_ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, longest - len(row) :] = row
        attention_mask[i, longest - len(row) :] = 1
    return torch.from_numpy(input_ids), torch.from_numpy(attention_mask)


def group_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Split indices into batches of similar length and at most `max_tokens` padded tokens.

    The split depends on the lengths alone, longest first, so that the same sequences always share
    the same batches. A sequence longer than `max_tokens` gets its own batch.

    Args:
        lengths: Number of tokens of each sequence.
        max_tokens: Maximum number of padded tokens (rows times longest row) of a batch.

    Yields:
        Indices into `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        size = max(1, max_tokens // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]
