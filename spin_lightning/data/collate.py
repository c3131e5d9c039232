"""Collating pairs into a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spin_lightning.data.dataset import Pair
from spin_lightning.packing import pack_prompts
from spin_lightning.types import PairBatch


def collate(pairs: Sequence[Pair]) -> PairBatch:
    """Pack n pairs, either all or none of which have a generated response."""
    paired = len(pairs[0].generated_ids) > 0
    return PairBatch(
        pairs=pack_prompts(
            [pair.prompt_ids for pair in pairs],
            [(p.real_ids, p.generated_ids) if paired else (p.real_ids,) for p in pairs],
        ),
        reference_real=torch.tensor([p.reference_real for p in pairs], dtype=torch.float64),
        reference_generated=torch.tensor(
            [p.reference_generated for p in pairs], dtype=torch.float64
        )
        if paired
        else None,
        row_ids=tuple((pair.example_id, pair.sample) for pair in pairs),
    )
