"""The rows of an iterate on disk: a parquet part per work unit, each written when it is made."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from spin_lightning.errors import RunFolderError
from spin_lightning.rows.agreement import SamplerGap
from spin_lightning.rows.manifest import Manifest, read_manifest
from spin_lightning.run.files import damaged, reading, replace_synced, writing
from spin_lightning.run.fingerprint import file_hash
from spin_lightning.run.row_folder import MANIFEST, manifest_path
from spin_lightning.types import Row

_LOG = logging.getLogger(__name__)
_RESTORE = (
    "start the same command again: it regenerates a part of the newest rows alone; copy an older "
    "part from a backup of the run"
)
_DEVIATIONS = b"spin_lightning.deviations"
_GAP = b"spin_lightning.sampler_gap"
_IDS = pa.list_(pa.int32())
_LOGPS = pa.list_(pa.float64())
SCHEMA = pa.schema(
    [
        ("example_id", pa.int64()),
        ("sample", pa.int32()),
        ("prompt_ids", _IDS),
        ("real_ids", _IDS),
        ("generated_ids", _IDS),
        ("opponent", pa.int32()),
        ("finished", pa.bool_()),
        ("real_finished", pa.bool_()),
        ("members", _IDS),
        ("member_real_logps", _LOGPS),
        ("member_generated_logps", _LOGPS),
        ("token_alpha", pa.float64()),
        ("token_members", _IDS),
        ("token_real_logps", _LOGPS),
        ("token_generated_logps", _LOGPS),
        ("seed", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Ragged:
    """A column of lists, stored flat."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    def __getitem__(self, index: int) -> NDArray[Any]:
        """The list of row `index`."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Length of each row's list, shape [rows]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class RowTable:
    """The rows of one folder, by column, in the order they were made.

    Attributes:
        opponent: The iterate that generated each response, -1 without a response.
        members: Iterates whose log-probs are stored, the same for every row.
        real_logps: log p_i(y|x) by member, float64, each of shape [rows].
        generated_logps: log p_i(y'|x) by member, likewise.
        token_alpha: Base weight of a token-level mixture; 0 without one.
        token_members: Members of the token-level mixture.
        token_real_logps: log g_i(y|x) by member, likewise.
        token_generated_logps: log g_i(y'|x) by member, likewise.
        seed: Key of each row.
    """

    example_id: NDArray[np.int64]
    sample: NDArray[np.int32]
    prompt_ids: Ragged
    real_ids: Ragged
    generated_ids: Ragged
    opponent: NDArray[np.int32]
    finished: NDArray[np.bool_]
    real_finished: NDArray[np.bool_]
    members: tuple[int, ...]
    real_logps: Mapping[int, Tensor]
    generated_logps: Mapping[int, Tensor]
    token_alpha: float
    token_members: tuple[int, ...]
    token_real_logps: Mapping[int, Tensor]
    token_generated_logps: Mapping[int, Tensor]
    seed: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.example_id)

    @property
    def row_ids(self) -> list[tuple[int, int]]:
        """Example and sample of each row."""
        return list(zip(self.example_id.tolist(), self.sample.tolist(), strict=True))


def part_path(folder: Path, unit: int) -> Path:
    """The file of a work unit's rows."""
    return folder / f"part-{unit:05d}.parquet"


def write_part(
    folder: Path,
    unit: int,
    rows: Sequence[Row],
    deviations: Mapping[str, Any] | None = None,
    gap: SamplerGap | None = None,
) -> None:
    """Write the rows of one work unit atomically.

    Args:
        folder: The folder of the rows.
        unit: Number of the unit.
        rows: Its rows.
        deviations: Settings overridden at run time; stored with the part.
        gap: How far the sampler's log-probs are from the scorer's; likewise.
    """
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    table = pa.Table.from_pydict(columns, schema=SCHEMA)
    about = {_DEVIATIONS: json.dumps(dict(deviations))} if deviations else {}
    if gap is not None:
        about[_GAP] = json.dumps(asdict(gap))
    if about:
        table = table.replace_schema_metadata(about)
    path = part_path(folder, unit)
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        # (A name that readers of the folder skip, should it be left by a crash.)
        temporary = path.with_name(f".{path.name}.tmp")
        # Page checksums reveal a flipped bit while there is no manifest yet.
        pq.write_table(table, temporary, write_page_checksum=True)
        replace_synced(temporary, path)


def part_matches(folder: Path, unit: int, expected: Mapping[str, Sequence[Any]]) -> bool:
    """Whether a unit has a complete part with these values in some of its columns."""
    path = part_path(folder, unit)
    if not path.exists():
        return False
    try:
        # All of it, since a part may be damaged anywhere.
        table = _read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        warn_damaged(path, error)
        return False
    return all(table[name].to_pylist() == list(values) for name, values in expected.items())


def read_deviations(folder: Path, units: int) -> dict[str, dict[str, Any]]:
    """Settings overridden at run time, by the number of the work unit."""
    found = {}
    for unit in range(units):
        metadata = pq.read_schema(part_path(folder, unit)).metadata or {}
        if _DEVIATIONS in metadata:
            found[str(unit)] = json.loads(metadata[_DEVIATIONS])
    return found


def read_gap(folder: Path, units: int) -> SamplerGap | None:
    """The gap between sampler and scorer over all units that have one; None if none has."""
    found = [pq.read_schema(part_path(folder, u)).metadata or {} for u in range(units)]
    gaps = [SamplerGap(**json.loads(about[_GAP])) for about in found if _GAP in about]
    return SamplerGap.sum(gaps) if gaps else None


def warn_damaged(path: Path, reason: object) -> None:
    """Log that a part is regenerated."""
    _LOG.warning("%s is damaged (%s): only this part will be regenerated.", path, reason)


def part_hashes(folder: Path, units: int) -> dict[str, str]:
    """SHA-256 of each part, by file name."""
    return {path.name: file_hash(path) for path in (part_path(folder, u) for u in range(units))}


def damaged_parts(folder: Path, manifest: Manifest) -> list[Path]:
    """Parts that are missing, or differ from those that the manifest was written for."""
    paths = {folder / name: digest for name, digest in manifest.parts.items()}
    return [
        path for path, digest in paths.items() if not path.is_file() or file_hash(path) != digest
    ]


def read_rows(folder: Path) -> RowTable:
    """Read all rows of a finished folder.

    Raises:
        RunFolderError: The folder has no manifest, so its rows are incomplete, or its rows are
            damaged or of another schema.
    """
    table, manifest = _read_finished(folder)
    # Values may be missing, or lists have other lengths than there are members.
    with reading(folder, _RESTORE):
        return _row_table(table, manifest)


def read_parts(folder: Path) -> pa.Table:
    """Read all rows of a finished folder, in the columns of `SCHEMA`.

    Raises:
        RunFolderError: As for `read_rows`.
    """
    return _read_finished(folder)[0]


def _read_finished(folder: Path) -> tuple[pa.Table, Manifest]:
    manifest = read_manifest(folder)
    if manifest is None:
        raise RunFolderError(
            f"the rows in {folder} are not finished: there is no {MANIFEST}",
            fix="start the run again in the same folder; it makes the missing rows",
        )
    for path in damaged_parts(folder, manifest):
        raise damaged(path, "it is missing, or its contents have changed", _RESTORE)
    parts = [_read_part(part_path(folder, unit)) for unit in range(manifest.units)]
    table = pa.concat_tables(parts).combine_chunks()
    if len(table) != manifest.rows:
        raise RunFolderError(
            f"{folder} has {len(table)} rows, but its manifest lists {manifest.rows}",
            fix=f"delete {manifest_path(folder)} and start the run again",
        )
    return table, manifest


def _row_table(table: pa.Table, manifest: Manifest) -> RowTable:
    members, token_members = manifest.members, manifest.token_members
    return RowTable(
        example_id=_flat(table, "example_id"),
        sample=_flat(table, "sample"),
        prompt_ids=_ragged(table, "prompt_ids"),
        real_ids=_ragged(table, "real_ids"),
        generated_ids=_ragged(table, "generated_ids"),
        opponent=table["opponent"].fill_null(-1).to_numpy(),
        finished=_flat(table, "finished"),
        real_finished=_flat(table, "real_finished"),
        members=members,
        real_logps=_by_member(table, "member_real_logps", members),
        generated_logps=_by_member(table, "member_generated_logps", members),
        token_alpha=manifest.token_alpha,
        token_members=token_members,
        token_real_logps=_by_member(table, "token_real_logps", token_members),
        token_generated_logps=_by_member(table, "token_generated_logps", token_members),
        seed=_flat(table, "seed"),
    )


def _read_part(path: Path) -> pa.Table:
    with reading(path, _RESTORE, pa.ArrowException):
        return _read_table(path)


def _read_table(path: Path) -> pa.Table:
    """All of a part, every page compared with its checksum."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if not file.schema_arrow.equals(SCHEMA):
            raise ValueError("it has other columns")
        return file.read()


def _flat(table: pa.Table, name: str) -> NDArray[Any]:
    if table[name].null_count:
        raise ValueError(f"values of {name} are missing")
    values: NDArray[Any] = table[name].to_numpy()
    return values


def _ragged(table: pa.Table, name: str) -> Ragged:
    column = table[name].combine_chunks()
    if column.null_count or column.values.null_count:
        raise ValueError(f"values of {name} are missing")
    return Ragged(column.values.to_numpy(), column.offsets.to_numpy().astype(np.int64))


def _by_member(table: pa.Table, name: str, members: tuple[int, ...]) -> dict[int, Tensor]:
    values = _ragged(table, name).values.reshape(len(table), len(members))
    return {member: torch.from_numpy(np.array(values[:, i])) for i, member in enumerate(members)}
