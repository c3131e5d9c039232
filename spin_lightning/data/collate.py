"""Pairs in, one batch out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spin_lightning.data.dataset import Pair
from spin_lightning.packing import pack_padded
from spin_lightning.types import PairBatch


@dataclass(frozen=True)
class Collate:
    """Packs pairs into a `PairBatch`.

    Attributes:
        pad_id: Any valid id; padded columns are masked.
    """

    pad_id: int

    def __call__(self, pairs: Sequence[Pair]) -> PairBatch:
        """Pack n pairs, of which all or none have a generated response."""
        prompts = [pair.prompt_ids for pair in pairs]
        paired = len(pairs[0].generated_ids) > 0
        return PairBatch(
            real=pack_padded(prompts, [pair.real_ids for pair in pairs], self.pad_id),
            generated=pack_padded(prompts, [pair.generated_ids for pair in pairs], self.pad_id)
            if paired
            else None,
            reference_real=torch.tensor([p.reference_real for p in pairs], dtype=torch.float64),
            reference_generated=torch.tensor(
                [p.reference_generated for p in pairs], dtype=torch.float64
            )
            if paired
            else None,
        )
