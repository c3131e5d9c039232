"""The manifest of a folder of rows, written last: the rows are complete once it exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from spin_lightning.errors import RunFolderError
from spin_lightning.run.files import read_json, reading, write_json
from spin_lightning.run.row_folder import manifest_path
from spin_lightning.run.validation import (
    COUNT,
    FILE_HASHES,
    INDEX,
    INDICES,
    NUMBER,
    NUMBERS,
    OBJECT,
    check_fields,
    optional,
)

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True)
class Manifest:
    """What the rows of a folder are.

    Attributes:
        iterate: The iterate at which they were drawn.
        opponent: Weights of the iterates that generated the responses; None without responses.
        members: Iterates whose log-probs are stored, ascending.
        rows: Number of rows.
        units: Number of work units, each with its own part file.
        unit_size: Rows of a work unit.
        cap: Most response tokens, including the stop id.
        token_alpha: Base weight of a token-level mixture; 0 without one.
        token_members: Members of the token-level mixture, ascending.
        parts: SHA-256 of each part, by file name; empty in older versions.
        deviations: Settings overridden at run time, by the number of the work unit.
        others: Further fields, such as the fingerprint of the run.
    """

    iterate: int
    opponent: Mapping[int, float] | None
    members: tuple[int, ...]
    rows: int
    units: int
    unit_size: int
    cap: int
    token_alpha: float = 0.0
    token_members: tuple[int, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    deviations: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, content: object) -> Manifest:
        """Read a manifest from JSON.

        Raises:
            ValueError: A field is missing or invalid.
        """
        known = check_fields(content, _RULES, required=_REQUIRED)
        opponent = known["opponent"]
        own = {
            **known,
            "opponent": None if opponent is None else {int(i): w for i, w in opponent.items()},
            "members": tuple(known["members"]),
            "token_alpha": known.get("token_alpha") or 0.0,
            "token_members": tuple(known.get("token_members", ())),
        }
        others = set(known) - set(_RULES) - {"schema_version"}
        return cls(
            **{name: value for name, value in own.items() if name in _RULES},
            others={name: known[name] for name in others},
        )

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain values."""
        opponent = self.opponent
        plain = {
            "schema_version": SCHEMA_VERSION,
            **self.others,
            "iterate": self.iterate,
            "opponent": None if opponent is None else {str(i): w for i, w in opponent.items()},
            "members": list(self.members),
            "token_alpha": self.token_alpha or None,
            "token_members": list(self.token_members),
            "rows": self.rows,
            "units": self.units,
            "unit_size": self.unit_size,
            "cap": self.cap,
            "parts": dict(self.parts),
        }
        return {**plain, "deviations": dict(self.deviations)} if self.deviations else plain

    def has_rows_of(self, plan: Manifest) -> bool:
        """Whether it describes the rows of another manifest, whatever their bytes."""
        return plan == replace(
            self, parts=plan.parts, deviations=plan.deviations, others=plan.others
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Mark the rows of a folder as complete."""
    write_json(manifest_path(folder), manifest.to_json())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder of rows; None until the rows are complete.

    Raises:
        RunFolderError: It is damaged, or of another schema version.
    """
    path = manifest_path(folder)
    if not path.exists():
        return None
    fix = "delete it and start the same command again: complete parts are kept"
    content = read_json(path, fix, _of_some_version)
    if content["schema_version"] != SCHEMA_VERSION:
        raise RunFolderError(
            f"the rows in {folder} are of schema version {content['schema_version']}, this "
            f"version of spin-lightning reads {SCHEMA_VERSION}",
            fix="use the version that made the run, or start a new run",
        )
    with reading(path, fix):
        return Manifest.of(content)


def _of_some_version(content: object) -> dict[str, Any]:
    return check_fields(content, {}, required=["schema_version"])


_RULES: Final = {
    "iterate": INDEX,
    "opponent": optional(NUMBERS),
    "members": INDICES,
    "rows": COUNT,
    "units": COUNT,
    "unit_size": COUNT,
    "cap": COUNT,
    "token_alpha": optional(NUMBER),
    "token_members": INDICES,
    "parts": FILE_HASHES,
    "deviations": OBJECT,
}
_REQUIRED: Final = ("iterate", "opponent", "members", "rows", "units", "unit_size", "cap")
