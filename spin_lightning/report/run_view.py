"""What a report needs of a run, read once from its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from spin_lightning.errors import RunFolderError
from spin_lightning.evaluation.results import Result, read_results
from spin_lightning.policies.saved import load_tokenizer
from spin_lightning.report.samples import PromptSamples, samples_of_prompts
from spin_lightning.rows.store import RowTable, read_manifest, read_rows
from spin_lightning.run.files import reading
from spin_lightning.run.folder import RunFolder

# Differ between any two runs, and say nothing of them.
_NOT_SETTINGS = ("trainer.default_root_dir", "ckpt_path")


@dataclass(frozen=True)
class RunView:
    """One run.

    Attributes:
        name: What it is called here; no two runs of a report share one.
        run: Its folder.
        records: What is known of each iterate, ascending.
        tables: Held-out rows by the iterate that answered them, as far as they are there.
        results: Its scores on benchmarks.
    """

    name: str
    run: RunFolder
    records: Sequence[Mapping[str, Any]]
    tables: Mapping[int, RowTable]
    results: Sequence[Result]

    @property
    def variant(self) -> str:
        """The class that was trained."""
        fields = self.records[0].get("fingerprint_fields", {})
        return str(fields.get("variant", "")).rsplit(".", 1)[-1]

    def samples(self, count: int) -> list[PromptSamples]:
        """What the iterates answered to the same prompts."""
        if not self.tables:
            return []
        return samples_of_prompts(self.tables, load_tokenizer(self.run.root), count)

    def lengths(self, t: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Tokens of held-out real responses, and of those that iterate t wrote."""
        table = self.tables[t]
        return table.real_ids.lengths, table.generated_ids.lengths

    def rewards(self, t: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """log p_t − log p_{t−1} of real and generated responses, nats; None where it is unknown."""
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


def iterate_records(run: RunFolder) -> list[dict[str, Any]]:
    """What is known of each iterate of a run, ascending.

    Raises:
        RunFolderError: The folder holds no iterates.
    """
    known = run.known_iterates()
    if not known:
        raise RunFolderError(
            f"{run.root} holds no iterates", fix="name the folder of a run, as `fit` printed it"
        )
    return [run.read_iterate(t) for t in known]


def config_differences(views: Sequence[RunView]) -> list[list[str]]:
    """Rows of a setting and its value in each run, for the settings that differ."""
    configs = [_settings(view.run) for view in views]
    if not all(configs):
        configs = [dict(_flat(view.records[-1].get("fingerprint_fields", {}))) for view in views]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = []
    for key in keys:
        values = [config.get(key, "–") for config in configs]
        if key not in _NOT_SETTINGS and any(value != values[0] for value in values):
            rows.append([key, *map(str, values)])
    return rows


def _read(name: str, run: RunFolder) -> RunView:
    records = iterate_records(run)
    folders = {int(record["index"]): run.val_rows(int(record["index"])) for record in records}
    tables = {t: read_rows(folder) for t, folder in folders.items() if read_manifest(folder)}
    return RunView(name, run, records, tables, read_results(run))


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """The folders' names, with as many of those above as it takes to tell them apart."""
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
    fix = "restore it, or delete it: the report then takes the settings from the iterates"
    with reading(path, fix, yaml.YAMLError):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    return dict(_flat(settings))


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`a.b.c` and its value, for every value of nested dictionaries."""
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value:
            yield from _flat(value, name)
        else:
            yield name, value
