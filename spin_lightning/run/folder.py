"""The run folder: the path of every file of a run, and the records of its iterates."""

from __future__ import annotations

import datetime as dt
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.run.files import read_json, write_json
from spin_lightning.run.fingerprint import file_hash, folder_hashes
from spin_lightning.run.records import BestRecord, IterateRecord
from spin_lightning.run.row_folder import held_out_rows

ITERATE_FILE = "iterate.json"
_ITERATE_NAME = re.compile(r"iterate_(\d{3,9})")
_RESTORE = "restore it from a copy of the run, or start a new run in another folder"
BEST_FILE = "best.json"
# Ranks iterates unless the run names another metric.
DEFAULT_METRIC = "val/real_nll_per_token"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and the records of its iterates.

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
    def data(self) -> Path:
        """What was read from the data sources, for the report; older runs have none."""
        return self.root / "data.json"

    @property
    def conversations(self) -> Path:
        """Some conversations with their ids, to check exports by; older runs have none."""
        return self.root / "conversations.json"

    @property
    def times(self) -> Path:
        """Seconds and work of each iterate, summed over all starts of the run."""
        return self.root / "times.json"

    @property
    def progress(self) -> Path:
        """What a running process does, for `spin-lightning watch`."""
        return self.root / "progress.json"

    @property
    def report(self) -> Path:
        """Pictures and tables."""
        return self.root / "report"

    @property
    def evaluations(self) -> Path:
        """Scores on benchmarks, one folder per contestant."""
        return self.root / "evaluation"

    def evaluation(self, name: str) -> Path:
        """Answers and scores of one contestant, such as iterate_002 or mixture."""
        return self.evaluations / name

    def iterate(self, t: int) -> Path:
        """Folder of iterate t."""
        return self.iterates / f"iterate_{t:03d}"

    def rows(self, t: int) -> Path:
        """Folder of the rows that are drawn at iterate t and train iterate t + 1."""
        return self.root / "rows" / f"iterate_{t:03d}"

    def val_rows(self, t: int) -> Path:
        """Folder of the held-out rows, answered by iterate t."""
        return held_out_rows(self.rows(t))

    def known_iterates(self) -> list[int]:
        """Indices of the iterates on disk, ascending."""
        files = self.iterates.glob(f"iterate_*/{ITERATE_FILE}")
        names = (_ITERATE_NAME.fullmatch(file.parent.name) for file in files)
        return sorted(int(name[1]) for name in names if name)

    def iterate_folders(self) -> dict[int, Path]:
        """Folder of each iterate on disk."""
        return {t: self.iterate(t) for t in self.known_iterates()}

    def record(self, t: int) -> IterateRecord:
        """The record of iterate t.

        Raises:
            RunFolderError: The run has no iterate t, or its record is damaged.
        """
        return read_json(self._record_file(t), _RESTORE, lambda known: IterateRecord.of(known, t))

    def first_date(self) -> dt.date | None:
        """The date that the run's chat template writes as today's; None where it writes none.

        Raises:
            RunFolderError: The record of iterate 0 is damaged.
        """
        date = self.record(0).template_date if 0 in self.known_iterates() else None
        return None if date is None else dt.date.fromisoformat(date)

    def records(self) -> list[IterateRecord]:
        """The records of all iterates on disk, ascending; each call reads them from disk."""
        return [self.record(t) for t in self.known_iterates()]

    def write_record(self, record: IterateRecord) -> None:
        """Write the record of an iterate beside its adapter."""
        write_json(self.iterate(record.index) / ITERATE_FILE, record.to_json())

    def best_record(self) -> BestRecord | None:
        """The best iterate; None where no iterate has a held-out metric.

        A run without a `BestIterate` callback is ranked here, by the callback's default metric.
        """
        file = self.iterates / BEST_FILE
        fix = "delete it: the run writes it again; or name the iterate by its number"
        if file.exists():
            return read_json(file, fix, BestRecord.of)
        values = {
            record.index: record.metrics[DEFAULT_METRIC]
            for record in self.records()
            if record.metrics is not None and DEFAULT_METRIC in record.metrics
        }
        if not values:
            return None
        best = min(values, key=lambda t: (values[t], t))
        return BestRecord(best, DEFAULT_METRIC, values[best])

    def write_best(self, t: int, metric: str, value: float) -> None:
        """Record iterate t as the best one, by its value of a metric."""
        write_json(self.iterates / BEST_FILE, asdict(BestRecord(t, metric, value)))

    def best(self) -> int:
        """Index of the best iterate.

        Raises:
            RunFolderError: No iterate has a held-out metric to rank it by.
        """
        best = self.best_record()
        if best is None:
            raise RunFolderError(
                f"the best iterate of {self.root} is not known: it has no {BEST_FILE}, and none of "
                f"its iterates {self.known_iterates()} has {DEFAULT_METRIC}, which is measured on "
                "held-out examples",
                fix="name the iterate by its number, or last",
            )
        return best.index

    def index_of(self, name: int | str) -> int:
        """Index of an iterate.

        Args:
            name: Its number, `best` or `last`.

        Raises:
            SettingError: There is no such name.
            RunFolderError: No iterate has a held-out metric to rank it by.
        """
        if name == "best":
            return self.best()
        if name == "last":
            return max(self.known_iterates(), default=0)
        if isinstance(name, bool) or not str(name).isdecimal():
            raise SettingError(
                "iterate",
                name,
                "there is no such iterate",
                fix="give the number of an iterate, best or last; load_iterate and evaluate also "
                "take mixture (of all iterates), evaluate also all",
            )
        return int(name)

    def check_iterate(self, t: int) -> IterateRecord:
        """Compare the files of iterate t with the hashes taken when it was made.

        Returns:
            Its record.

        Raises:
            RunFolderError: The run has no iterate t, or a file of it is missing or was edited.
        """
        record = self.record(t)
        _check_hashes(
            self.iterate(t),
            record.files,
            edited="has changed since it was written",
            fix="restore it from a copy of the run and start the same command again, or "
            "start a new run in another folder",
        )
        return record

    def tokenizer_hashes(self) -> dict[str, str]:
        """SHA-256 of each file of the tokenizer as used, by name."""
        return folder_hashes(self.tokenizer, (".json", ".jinja", ".model", ".txt"))

    def check_tokenizer(self) -> None:
        """Compare the tokenizer's files with the hashes taken when the run began.

        Raises:
            RunFolderError: The run has no iterates, or a file is missing or was edited.
        """
        first = self.record(min(self.known_iterates(), default=0))
        _check_hashes(
            self.tokenizer,
            first.tokenizer_files or {},
            edited="has changed since the run wrote it",
            fix="restore it from a copy of the run, or save the tokenizer of the run's "
            "base model there again with save_pretrained",
        )

    def staged_iterate(self, t: int) -> Path:
        """An empty folder to assemble iterate t in, before `replace_synced` moves it into place."""
        staged = self.iterates / f".iterate_{t:03d}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        return staged

    def discard_after(self, t: int) -> None:
        """Delete iterates after t and rows from t on: they belong to a different iterate t."""
        for known in self.known_iterates():
            if known > t:
                shutil.rmtree(self.iterate(known))
        for folder in (self.root / "rows").glob("iterate_*"):
            name = _ITERATE_NAME.fullmatch(folder.name)
            if name and int(name[1]) >= t:
                shutil.rmtree(folder)

    def _record_file(self, t: int) -> Path:
        file = self.iterate(t) / ITERATE_FILE
        if not file.exists():
            raise RunFolderError(
                f"{self.root} has no iterate {t}; it has {self.known_iterates() or 'none'}",
                fix="give one of these numbers, best or last, or correct the run folder",
            )
        return file


def _check_hashes(folder: Path, hashes: Mapping[str, str], edited: str, fix: str) -> None:
    """Refuse a folder in which a file is missing or whose hash has changed."""
    for name, digest in hashes.items():
        file = folder / name
        if not file.is_file() or file_hash(file) != digest:
            problem = edited if file.is_file() else "is missing"
            raise RunFolderError(f"{file} {problem}", fix=fix)
