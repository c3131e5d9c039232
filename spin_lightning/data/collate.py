"""Collating pairs into a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spin_lightning.data.dataset import Pair
from spin_lightning.packing import pack_prompts
from spin_lightning.types import PairBatch


def collate(pairs: Sequence[Pair]) -> PairBatch:
    """Pack n pairs, which all have the same kinds of responses."""
    first = pairs[0]
    paired, has_further = len(first.generated_ids) > 0, len(first.further_real) > 0
    return PairBatch(
        pairs=pack_prompts([pair.prompt_ids for pair in pairs], [_responses(p) for p in pairs]),
        reference_real=_column([p.reference_real for p in pairs]),
        reference_generated=_column([p.reference_generated for p in pairs]) if paired else None,
        row_ids=tuple((pair.example_id, pair.sample) for pair in pairs),
        further_real=_column([p.further_real for p in pairs]) if has_further else None,
        further_generated=_column([p.further_generated for p in pairs]) if has_further else None,
    )


def _responses(pair: Pair) -> list[NDArray[np.int32]]:
    return [ids for ids in (pair.real_ids, pair.generated_ids, pair.first_ids) if len(ids)]


def _column(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
