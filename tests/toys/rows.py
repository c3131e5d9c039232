"""Rows and row folders with numbers to check by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spin_lightning.packing import pad_prompts
from spin_lightning.rows.manifest import Manifest, write_manifest
from spin_lightning.rows.store import Ragged, RowTable, write_part
from spin_lightning.types import PairBatch, Row

ROW = Row(
    example_id=7,
    sample=0,
    prompt_ids=(1, 4, 5),
    real_ids=(6, 7, 2),
    generated_ids=(8, 2),
    opponent=1,
    finished=True,
    real_finished=True,
    members=(0, 2),
    member_real_logps=(-1.25, -2.5),
    member_generated_logps=(-3.0, -0.5),
    token_alpha=None,
    token_members=(),
    token_real_logps=(),
    token_generated_logps=(),
    seed=-123_456_789_012_345_678,
)
# Fields of a row of a method without opponents.
REAL_ONLY = {
    "generated_ids": (),
    "opponent": None,
    "finished": False,
    "members": (),
    "member_real_logps": (),
    "member_generated_logps": (),
}


def manifest_of(*parts: Sequence[Row]) -> Manifest:
    """The manifest of rows in parts, one for each list."""
    return Manifest(
        iterate=1,
        opponent={1: 1.0},
        members=parts[0][0].members,
        rows=sum(map(len, parts)),
        units=len(parts),
        unit_size=len(parts[0]),
        cap=8,
    )


def write_rows(folder: Path, *parts: Sequence[Row], **fields: Any) -> Path:
    """A finished folder of rows, one part for each list; `fields` differ in its manifest."""
    for unit, rows in enumerate(parts):
        write_part(folder, unit, rows)
    write_manifest(folder, replace(manifest_of(*parts), **fields))
    return folder


def first_ids(batch: PairBatch) -> list[int]:
    """The first id of every prompt of a batch."""
    sequences = pad_prompts(batch.pairs)
    starts = sequences.attention_mask.argmax(dim=-1, keepdim=True)
    return sequences.input_ids.gather(-1, starts).squeeze(-1)[::2].tolist()


def table_with(
    real: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
    *,
    finished: Sequence[bool] | None = None,
    real_finished: Sequence[bool] | None = None,
    example_id: Sequence[int] | None = None,
    opponent: int = 0,
) -> RowTable:
    """A table of these responses to one prompt; by default all have ended, one row an example."""
    rows = len(real)
    zeros = {0: torch.zeros(rows, dtype=torch.float64)}
    return RowTable(
        example_id=np.arange(rows) if example_id is None else np.array(example_id),
        sample=np.zeros(rows, dtype=np.int32),
        prompt_ids=ragged([[1]] * rows),
        real_ids=ragged(real),
        generated_ids=ragged(generated),
        opponent=np.full(rows, opponent, dtype=np.int32),
        finished=np.array([True] * rows if finished is None else finished),
        real_finished=np.array([True] * rows if real_finished is None else real_finished),
        members=(0,),
        real_logps=zeros,
        generated_logps=zeros,
        token_alpha=0.0,
        token_members=(),
        token_real_logps={},
        token_generated_logps={},
        seed=np.arange(rows),
    )


def ragged(lists: Sequence[Sequence[int]]) -> Ragged:
    """A column of lists."""
    offsets = np.cumsum([0, *map(len, lists)])
    return Ragged(np.array([v for values in lists for v in values], dtype=np.int32), offsets)
