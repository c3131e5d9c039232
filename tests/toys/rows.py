"""Rows and row folders with numbers to check by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spin_lightning.packing import pad_prompts
from spin_lightning.rows.store import write_manifest, write_part
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


def write_rows(folder: Path, *parts: Sequence[Row], **fields: Any) -> Path:
    """A finished folder of rows, one part per list."""
    for unit, rows in enumerate(parts):
        write_part(folder, unit, rows)
    counted = {"units": len(parts), "rows": sum(map(len, parts)), "members": parts[0][0].members}
    write_manifest(folder, {**counted, **fields})
    return folder


def first_ids(batch: PairBatch) -> list[int]:
    """The first id of every prompt of a batch."""
    sequences = pad_prompts(batch.pairs)
    starts = sequences.attention_mask.argmax(dim=-1, keepdim=True)
    return sequences.input_ids.gather(-1, starts).squeeze(-1)[::2].tolist()
