"""The run folder: where everything lies, and how it is written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_lightning.errors import RunFolderError, is_whole
from spin_lightning.run.files import reading, write_json
from spin_lightning.run.fingerprint import file_hash, folder_hashes
from spin_lightning.run.records import BestRecord, IterateRecord

ITERATE_FILE = "iterate.json"
_ITERATE_NAME = re.compile(r"iterate_(\d{3,9})")
_RESTORE = "restore it from a copy of the run, or start a new run in another folder"
BEST_FILE = "best.json"


_RECORD = {
    "files": dict,
    "base": dict,
    "metrics": dict,
    "rows": dict,
    "fingerprint": str,
    "fingerprint_fields": dict,
    "tokenizer_files": dict,
}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and what is known of its iterates.

    Attributes:
        root: The run folder.
    """

    root: Path

    @property
    def iterates(self) -> Path:
        """One PEFT adapter folder per iterate."""
        return self.root / "iterates"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer and chat template as used."""
        return self.root / "tokenizer"

    @property
    def last_checkpoint(self) -> Path:
        """Where a resume starts."""
        return self.root / "checkpoints" / "last.ckpt"

    @property
    def report(self) -> Path:
        """Pictures and tables."""
        return self.root / "report"

    @property
    def evaluations(self) -> Path:
        """Scores on benchmarks, one folder for each who was evaluated."""
        return self.root / "evaluation"

    def evaluation(self, name: str) -> Path:
        """What is known of one that was evaluated, such as iterate_002 or mixture."""
        return self.evaluations / name

    def iterate(self, t: int) -> Path:
        """Folder of iterate t."""
        return self.iterates / f"iterate_{t:03d}"

    def rows(self, t: int) -> Path:
        """Folder of the rows that are drawn at iterate t and train iterate t + 1."""
        return self.root / "rows" / f"iterate_{t:03d}"

    def val_rows(self, t: int) -> Path:
        """Folder of the held-out rows, answered by iterate t."""
        return self.rows(t) / "val"

    def known_iterates(self) -> list[int]:
        """Indices of the iterates that are there, ascending."""
        files = self.iterates.glob(f"iterate_*/{ITERATE_FILE}")
        names = (_ITERATE_NAME.fullmatch(file.parent.name) for file in files)
        return sorted(int(name[1]) for name in names if name)

    def iterate_folders(self) -> dict[int, Path]:
        """Folder of each iterate that is there."""
        return {t: self.iterate(t) for t in self.known_iterates()}

    def record(self, t: int) -> IterateRecord:
        """What is known of iterate t.

        Raises:
            RunFolderError: The run has no iterate t, or its record is damaged.
        """
        file = self.iterate(t) / ITERATE_FILE
        if not file.exists():
            raise RunFolderError(
                f"{self.root} has no iterate {t}; it has {self.known_iterates() or 'none'}",
                fix="name one that is there, or a run folder with an iterates folder in it",
            )
        with reading(file, _RESTORE):
            return IterateRecord.of(json.loads(file.read_text(encoding="utf-8")), t)

    def records(self) -> list[IterateRecord]:
        """What is known of each iterate that is there, ascending; read anew at each call."""
        return [self.record(t) for t in self.known_iterates()]

    def write_record(self, record: IterateRecord) -> None:
        """Write what is known of an iterate beside its adapter."""
        write_json(self.iterate(record.index) / ITERATE_FILE, record.to_json())

    def best_record(self) -> BestRecord | None:
        """Index, metric and value of the best iterate; None where nothing ranked them."""
        file = self.iterates / BEST_FILE
        if not file.exists():
            return None
        fix = "delete it: the run writes it again; or name the iterate by its number"
        with reading(file, fix):
            return BestRecord.of(json.loads(file.read_text(encoding="utf-8")))

    def read_iterate(self, t: int) -> dict[str, Any]:
        """What is known of iterate t.

        Raises:
            RunFolderError: The run has no iterate t.
        """
        file = self.iterate(t) / ITERATE_FILE
        if not file.exists():
            raise RunFolderError(
                f"{self.root} has no iterate {t}; it has {self.known_iterates() or 'none'}",
                fix="name one that is there, or a run folder with an iterates folder in it",
            )
        with reading(file, _RESTORE):
            known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            _check_record(known, t)
        return known

    def field(self, t: int, name: str) -> Any:
        """What iterate t's record says under `name`.

        Raises:
            RunFolderError: The run has no iterate t, or its record does not say.
        """
        record = self.read_iterate(t)
        if name not in record:
            raise RunFolderError(
                f"{self.iterate(t) / ITERATE_FILE} does not say its {name}",
                fix=_RESTORE,
            )
        return record[name]

    def check_iterate(self, t: int) -> None:
        """Hold the files of iterate t against the hashes that were taken when it was made.

        Raises:
            RunFolderError: The run has no iterate t, or a file of it is missing or was edited.
        """
        _check_hashes(
            self.iterate(t),
            self.read_iterate(t).get("files", {}),
            edited="is not what was written",
            fix="restore it from a copy of the run and start the same command again, or "
            "start a new run in another folder",
        )

    def tokenizer_hashes(self) -> dict[str, str]:
        """SHA-256 of each file of the tokenizer as used, by name."""
        return folder_hashes(self.tokenizer, (".json", ".jinja", ".model", ".txt"))

    def check_tokenizer(self) -> None:
        """Hold the tokenizer's files against the hashes that were taken when the run began.

        Raises:
            RunFolderError: The run has no iterates, or a file is missing or was edited.
        """
        # (A run of an earlier version knows no hashes of them.)
        wanted = self.read_iterate(min(self.known_iterates(), default=0)).get("tokenizer_files", {})
        _check_hashes(
            self.tokenizer,
            wanted,
            edited="is not what the run wrote",
            fix="restore it from a copy of the run, or save the tokenizer of the run's "
            "base model there again with save_pretrained",
        )

    def write_iterate(self, t: int, fields: Mapping[str, Any]) -> None:
        """Write what is known of iterate t beside its adapter."""
        write_json(self.iterate(t) / ITERATE_FILE, fields)

    def write_best(self, t: int, metric: str, value: float) -> None:
        """Say which iterate is the best, and by what."""
        write_json(self.iterates / BEST_FILE, {"index": t, "metric": metric, "value": value})

    def best(self) -> int:
        """Index of the best iterate.

        Raises:
            RunFolderError: Nobody said which it is.
        """
        best = self.known_best()
        if best is None:
            raise RunFolderError(
                f"{self.root} has no {BEST_FILE}, since nothing was held out to rank iterates by",
                fix="name the iterate by its number",
            )
        return int(best["index"])

    def known_best(self) -> dict[str, Any] | None:
        """Index, metric and value of the best iterate; None where nobody said which it is."""
        file = self.iterates / BEST_FILE
        if not file.exists():
            return None
        fix = "delete it: the run writes it again; or name the iterate by its number"
        with reading(file, fix):
            best: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(best, dict) or not is_whole(best.get("index"), 0):
                raise ValueError("it names no iterate")
        return best

    def staged_iterate(self, t: int) -> Path:
        """An empty folder in which iterate t is put together before `replace_synced`."""
        staged = self.iterates / f".iterate_{t:03d}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        return staged

    def discard_after(self, t: int) -> None:
        """Delete iterates after t and rows from t on: they descend from another iterate t."""
        for known in self.known_iterates():
            if known > t:
                shutil.rmtree(self.iterate(known))
        for folder in (self.root / "rows").glob("iterate_*"):
            name = _ITERATE_NAME.fullmatch(folder.name)
            if name and int(name[1]) >= t:
                shutil.rmtree(folder)


def _check_hashes(folder: Path, hashes: Mapping[str, str], edited: str, fix: str) -> None:
    """Refuse a folder in which a file is missing or has another hash than it had."""
    for name, digest in hashes.items():
        file = folder / name
        if not file.is_file() or file_hash(file) != digest:
            problem = edited if file.is_file() else "is missing"
            raise RunFolderError(f"{file} {problem}", fix=fix)


def _check_record(record: Any, t: int) -> None:
    """Refuse what is no record of iterate t, as far as it says anything."""
    if not isinstance(record, dict) or record.get("index", t) != t:
        raise ValueError("it is no record of this iterate")
    for name, kind in _RECORD.items():
        if not isinstance(record.get(name, kind()), kind):
            raise ValueError(f"its {name!r} is no {kind.__name__}")
    for file in record.get("files", {}):
        # They are opened: none may lead out of the folder.
        if Path(file).name != file:
            raise ValueError(f"it names a file {file!r} elsewhere")
