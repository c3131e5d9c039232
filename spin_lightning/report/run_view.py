"""A run as the report shows it, read once from its folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from spin_lightning.data.data_record import DataRecord, read_data_records
from spin_lightning.errors import RunFolderError
from spin_lightning.evaluation.results import Result, read_results
from spin_lightning.report.cue_words import special_ids
from spin_lightning.report.samples import PromptSamples, samples_of_prompts
from spin_lightning.rows.manifest import read_manifest
from spin_lightning.rows.store import RowTable, read_rows
from spin_lightning.rows.tells import Tells, find_tells
from spin_lightning.run.files import read_json, reading
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import BestRecord, IterateRecord

# Settings that differ between any two runs.
_NOT_SETTINGS = ("trainer.default_root_dir", "ckpt_path")


@dataclass(frozen=True)
class RunView:
    """One run.

    Attributes:
        name: Its name in the report, which no other run of the report has.
        run: Its folder.
        records: The record of each iterate, ascending.
        best: The best iterate, if the run has ranked them.
        tables: Held-out rows by the iterate that answered them, as far as there are any.
        results: Its scores on benchmarks.
        data: What was read from its data sources; empty for a run of an older version.
        deviations: What was computed otherwise than the settings say, with the iterates that it
            concerns.
    """

    name: str
    run: RunFolder
    records: Sequence[IterateRecord]
    best: BestRecord | None
    tables: Mapping[int, RowTable]
    results: Sequence[Result]
    data: Sequence[DataRecord]
    deviations: Sequence[str]

    @property
    def variant(self) -> str:
        """Name of the module's class."""
        return self.records[0].variant

    def samples(self, count: int) -> list[PromptSamples]:
        """The iterates' responses to the same prompts."""
        if not self.tables:
            return []
        return samples_of_prompts(self.tables, self.tokenizer, count)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer."""
        from spin_lightning.policies.saved import load_tokenizer

        return load_tokenizer(self.run.root)

    def tells(self, t: int) -> Tells | None:
        """What tells the rows apart that iterate t made for the next; None without such rows."""
        folder = self.run.rows(t)
        if read_manifest(folder) is None:
            return None
        return find_tells(read_rows(folder), special_ids(self.tokenizer))

    def lengths(self, t: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Lengths in tokens of held-out real responses, and of those that iterate t generated."""
        table = self.tables[t]
        return table.real_ids.lengths, table.generated_ids.lengths

    def rewards(self, t: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """log p_t − log p_{t−1} of real and generated responses, nats; None without both."""
        table = self.tables[t]
        if t == 0 or not {t, t - 1} <= set(table.members) or not len(table.generated_ids.values):
            return None
        real = table.real_logps[t] - table.real_logps[t - 1]
        generated = table.generated_logps[t] - table.generated_logps[t - 1]
        return np.asarray(real), np.asarray(generated)


def read_runs(runs: Sequence[RunFolder]) -> list[RunView]:
    """Read runs to put side by side.

    Raises:
        RunFolderError: A folder holds no iterates.
    """
    names = _names(runs)
    return [_read(name, run) for name, run in zip(names, runs, strict=True)]


def read_records(run: RunFolder) -> list[IterateRecord]:
    """The record of each iterate of a run, ascending.

    Raises:
        RunFolderError: The folder holds no iterates.
    """
    records = run.records()
    if not records:
        raise RunFolderError(
            f"{run.root} holds no iterates", fix="name the folder of a run, as `fit` printed it"
        )
    return records


def config_differences(views: Sequence[RunView]) -> list[list[str]]:
    """A row per setting that differs between runs: its name, then its value in each run."""
    configs = [_settings(view.run) for view in views]
    if not all(configs):
        configs = [dict(_flat(view.records[-1].fingerprint_fields)) for view in views]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = []
    for key in keys:
        values = [config.get(key, "–") for config in configs]
        if key not in _NOT_SETTINGS and any(value != values[0] for value in values):
            rows.append([key, *map(str, values)])
    return rows


def _read(name: str, run: RunFolder) -> RunView:
    records = read_records(run)
    made = {r.index: read_manifest(run.rows(r.index)) for r in records}
    held_out = {r.index: read_manifest(run.val_rows(r.index)) for r in records}
    tables = {t: read_rows(run.val_rows(t)) for t, manifest in held_out.items() if manifest}
    fix = "delete it: the report then has no section on the data"
    data = read_json(run.data, fix, read_data_records) if run.data.exists() else []
    best, results = run.best_record(), read_results(run, records)
    manifests = chain(made.items(), held_out.items())
    of_rows = ((t, unit) for t, m in manifests if m for unit in m.deviations.values())
    of_training = ((r.index, r.training.deviations) for r in records if r.training)
    deviations = [*_deviations("rows of", of_rows), *_deviations("training of", of_training)]
    return RunView(name, run, records, best, tables, results, data, deviations)


def _deviations(what: str, found: Iterable[tuple[int, Mapping[str, Any]]]) -> list[str]:
    """Settings that were overridden, with the iterates that each concerns.

    Args:
        what: What the iterates are named with, such as `rows of`.
        found: Iterates and their settings.
    """
    where: dict[str, set[int]] = {}
    for t, settings in found:
        for name, value in settings.items():
            where.setdefault(f"{name}: {value}", set()).add(t)
    return [
        f"{setting} ({what} {', '.join(f'p{t}' for t in sorted(iterates))})"
        for setting, iterates in where.items()
    ]


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """The folders' names, made different by the folder above and a number where they are equal."""
    paths = [run.root.resolve() for run in runs]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.name}" for path in paths]
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        names[i] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


def _settings(run: RunFolder) -> dict[str, Any]:
    path = Path(run.root) / "config.yaml"
    if not path.exists():
        return {}
    fix = "restore it, or delete it: the report then reads the settings from the iterates"
    with reading(path, fix, yaml.YAMLError):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
        return dict(_flat(settings))


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`a.b.c` and its value, for each value of nested dictionaries."""
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value:
            yield from _flat(value, name)
        else:
            yield name, value
