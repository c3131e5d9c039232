"""Rows and row folders with numbers to check by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spin_lightning.packing import pad_prompts
from spin_lightning.rows.manifest import Manifest, write_manifest
from spin_lightning.rows.store import write_part
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
