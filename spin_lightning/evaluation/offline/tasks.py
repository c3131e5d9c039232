"""Tasks of lm-evaluation-harness on files: its own tasks, with other files and another name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from spin_lightning.evaluation.offline.files import Question
from spin_lightning.evaluation.offline.questions import (
    BENCHMARKS,
    Differences,
    Questions,
    check,
    questions_of,
)
from spin_lightning.evaluation.presets import OFFLINE_TASKS, PRESETS
from spin_lightning.run.cache import cache_root, make_once
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.packages import package_folder

_PREFIX: Final = "offline_"
# The harness's own files, below its folder of tasks.
_OFFICIAL: Final[Mapping[str, str]] = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "mmlu": "mmlu/default/mmlu_{subject}.yaml",
    "winogrande": "winogrande/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}


@dataclass(frozen=True)
class OfflineTask:
    """A task of the harness on files.

    Attributes:
        folder: The folder with its YAML and its files; `lm_eval --include_path` takes it as well.
        source: A hash of all its questions, and of which are examples.
        differs: What differs from the official task.
    """

    folder: Path
    source: str
    differs: Differences


def offline_names(names: Iterable[str]) -> list[str]:
    """The offline tasks among names of tasks and presets, each once."""
    tasks: dict[str, None] = {}
    for name in names:
        parts = [p.task for p in PRESETS[name]] if name in PRESETS else [name]
        tasks |= dict.fromkeys(part for part in parts if part in OFFLINE_TASKS)
    return list(tasks)


def check_offline(names: Iterable[str], own: Path | None) -> None:
    """Check that the files of all offline tasks among `names` can be found.

    Raises:
        SettingError: Those of a task cannot.
    """
    for task in offline_names(names):
        check(task.removeprefix(_PREFIX), own)


def offline_task(task: str, own: Path | None) -> OfflineTask:
    """Write the folder of an offline task into the user's cache, unless it is there.

    Args:
        task: Its name.
        own: Folder of the user's own files.

    Raises:
        SettingError: Its files are missing, or the cache cannot be written.
        DataError: A file cannot be read or lacks a column.
    """
    data = task.removeprefix(_PREFIX)
    questions = questions_of(data, own)
    source = fingerprint({"scored": questions.scored, "examples": questions.examples})
    official = _harness_tasks()
    # The YAML names the harness's files and the folder's own, so it belongs to both places.
    root = cache_root() / _PREFIX.rstrip("_")
    folder = root / f"{data}-{fingerprint({'q': source, 'at': [str(official), str(root)]})[:16]}"
    make_once(folder, lambda made: _write(task, questions, official, made, folder))
    return OfflineTask(folder, source, questions.differs)


def _harness_tasks() -> Path:
    folder = package_folder("lm_eval")
    assert folder is not None, "check_installed() found it"
    return folder / "tasks"


def _write(task: str, questions: Questions, official: Path, made: Path, final: Path) -> None:
    """Write the YAML files and the questions of a task into `made`, which moves to `final`."""
    made.mkdir()
    data = task.removeprefix(_PREFIX)
    benchmark = BENCHMARKS[data]
    parts = _subjects(questions) if data == "mmlu" else {"": questions}
    names = {subject: f"{task}_{subject}" if subject else task for subject in parts}
    for subject, part in parts.items():
        name = names[subject]
        files = {}
        for split, rows in ((benchmark.examples, part.examples), (benchmark.scored, part.scored)):
            file = f"{name}-{split}.parquet"
            pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), made / file)
            files[split] = str(final / file)
        content: dict[str, Any] = {
            "include": str(official / _OFFICIAL[data].format(subject=subject)),
            "task": name,
            "tag": [],
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "num_fewshot": OFFLINE_TASKS[task].num_fewshot,
        }
        if benchmark.scored == "test":
            content["validation_split"] = None
        _write_yaml(made / f"{name}.yaml", content)
    if data == "mmlu":
        group = {
            "group": task,
            "task": list(names.values()),
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
            "metadata": {"version": 2},
        }
        _write_yaml(made / f"{task}.yaml", group)


def _subjects(questions: Questions) -> dict[str, Questions]:
    """The questions of each subject of MMLU."""

    def of(subject: str, rows: list[Question]) -> list[Question]:
        return [row for row in rows if row["subject"] == subject]

    subjects = sorted({row["subject"] for row in questions.scored})
    return {
        one: Questions(of(one, questions.scored), of(one, questions.examples)) for one in subjects
    }


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
