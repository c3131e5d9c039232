"""Sequences in, one padded batch out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from spin_lightning.types import SequenceBatch


def pack_padded(
    prompts: Sequence[ArrayLike], responses: Sequence[ArrayLike], pad_id: int
) -> SequenceBatch:
    """Concatenate each prompt with its response and pad on the left.

    With every response ending in the last column, the head is needed for the last
    `max(response length) + 1` columns only, which every causal language model of transformers
    can be asked for.

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

    The split depends on the lengths alone, longest first, so that the same sequences always meet
    in the same batches. A sequence longer than `max_tokens` is a batch of its own.

    Args:
        lengths: Number of tokens of each sequence.
        max_tokens: Most padded tokens (rows times longest row) of a batch.

    Yields:
        Indices into `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        size = max(1, max_tokens // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]
