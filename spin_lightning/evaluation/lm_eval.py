"""lm-evaluation-harness on iterates: one loaded base, adapters switched, all settings recorded."""

from __future__ import annotations

import importlib.util
import logging
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from spin_lightning.errors import DataError, SettingError, first_line, missing_extra
from spin_lightning.evaluation.base import EvaluatedRun
from spin_lightning.evaluation.contestants import Contestant
from spin_lightning.evaluation.offline.questions import NO_DIFFERENCES, Differences
from spin_lightning.evaluation.offline.tasks import (
    OfflineTask,
    check_offline,
    offline_names,
    offline_task,
)
from spin_lightning.evaluation.presets import INCOMPLETE, PRESETS
from spin_lightning.evaluation.results import Result, cached_result, write_result
from spin_lightning.evaluation.settings import HarnessSettings
from spin_lightning.run.fingerprint import file_hash, fingerprint

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_BENCHMARK = "lm_eval"


@dataclass(frozen=True)
class _Job:
    """One call of the harness.

    Attributes:
        task: Name of a task or group.
        num_fewshot: Examples in the prompt, or None for the task's own number.
        source: Hash of the YAML folder it comes from; None for a task of the harness.
        differs: What differs from the harness's own task.
    """

    task: str
    num_fewshot: int | None
    source: str | None
    differs: Differences = NO_DIFFERENCES


def check_installed(settings: HarnessSettings) -> None:
    """Check, before anything is loaded, that harness and questions are on this machine.

    Raises:
        SettingError: lm_eval is not installed, or an offline task has no files.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra("tasks", "lm_eval", "eval")
    check_offline(settings.tasks, _own_questions(settings))


class Harness:
    """Scores iterates on tasks of lm-evaluation-harness.

    The result of each task is stored as soon as it is measured, with everything that is needed to
    repeat it, and is not measured again.

    Args:
        settings: The tasks, and how they are run.

    Raises:
        SettingError: The harness is not installed, or has no such task, or an offline task has no
            files.
        DataError: The files of an offline task cannot be read.
    """

    def __init__(self, settings: HarnessSettings) -> None:
        """Look every task up."""
        check_installed(settings)
        self.settings = settings
        own = _own_questions(settings)
        self._offline = {name: offline_task(name, own) for name in offline_names(settings.tasks)}
        self._manager = _task_manager(settings, self._offline)
        self._jobs = [job for name in settings.tasks for job in self._jobs_of(name)]
        self._model: Any = None

    def evaluate(self, run: EvaluatedRun, contestant: Contestant) -> list[Result]:
        """Score one contestant on every task.

        Afterwards the policy and the random states are as they were before.

        Returns:
            One result per task, in the order of the settings, and the mean of each preset.

        Raises:
            DataError: The data of a task cannot be read.
        """
        results = {}
        for job in self._jobs:
            settings = self._settings_of(job)
            benchmark = f"{_BENCHMARK}/{job.task}"
            found = cached_result(run.folder, contestant, benchmark, settings)
            if found is None:
                started = time.monotonic()
                rank_zero_info(f"{contestant.label}: {job.task} …")
                answer = self._call(run, contestant, job)
                minutes = (time.monotonic() - started) / 60
                rank_zero_info(f"{contestant.label}: {job.task} took {minutes:.1f} min")
                found = self._result(contestant, benchmark, settings, answer, job.differs)
                write_result(run.folder, found)
            results[benchmark] = found
        for name in self.settings.tasks:
            if name in PRESETS:
                mean = _preset_mean(name, contestant, results)
                write_result(run.folder, mean)
                results[mean.benchmark] = mean
        return list(results.values())

    def _jobs_of(self, name: str) -> list[_Job]:
        settings = self.settings
        if name in PRESETS:
            return [self._job(p.task, p.num_fewshot) for p in PRESETS[name]]
        if name in self._offline:
            return [self._job(name, settings.num_fewshot)]
        if Path(name).is_dir():
            files = _folder_hash(Path(name))
            return [_Job(t, settings.num_fewshot, files) for t in _tasks_in(Path(name))]
        entry = self._manager.task_index.get(name)
        if entry is None:
            close = [t for t in self._manager.all_tasks if name.lower() in t][:8]
            raise SettingError(
                "tasks",
                name,
                "lm_eval has no such task or group, and there is no such folder",
                fix=f"choose from {', '.join(close)}, …" if close else "see: lm-eval ls tasks",
            )
        included = settings.include_path
        mine = included is not None and Path(included) in Path(str(entry.yaml_path)).parents
        source = _folder_hash(Path(included)) if included is not None and mine else None
        return [_Job(name, settings.num_fewshot, source)]

    def _job(self, task: str, num_fewshot: int | None) -> _Job:
        """The job of a task of the harness, or of an offline task."""
        offline = self._offline.get(task)
        if offline is None:
            return _Job(task, num_fewshot, None)
        return _Job(task, num_fewshot, offline.source, offline.differs)

    def _settings_of(self, job: _Job) -> dict[str, Any]:
        """Everything that a score depends on besides the weights."""
        settings = self.settings
        return {
            "harness": f"lm_eval {version('lm_eval')}",
            "task": job.task,
            "task_files": job.source,
            "num_fewshot": job.num_fewshot,
            "limit": settings.limit,
            "apply_chat_template": settings.apply_chat_template,
            "seeds": list(settings.seeds),
        }

    def _call(self, run: EvaluatedRun, contestant: Contestant, job: _Job) -> dict[str, Any]:
        import lm_eval

        from spin_lightning.evaluation.harness_model import PolicyLM

        settings, seeds, policy = self.settings, self.settings.seeds, run.policy()
        with isolate_rng(), _quiet(), _naming(job.task):
            if self._model is None or self._model.policy is not policy:
                self._model = PolicyLM(
                    policy, run.tokenizer, contestant.mixture, settings.batch_size
                )
            self._model.mixture = contestant.mixture
            answer: dict[str, Any] = lm_eval.simple_evaluate(
                self._model,
                tasks=[job.task],
                num_fewshot=job.num_fewshot,
                limit=settings.limit,
                log_samples=False,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=settings.apply_chat_template,
                task_manager=self._manager,
                random_seed=seeds[0],
                numpy_random_seed=seeds[1],
                torch_random_seed=seeds[2],
                fewshot_random_seed=seeds[3],
            )
        policy.evict()
        return answer

    def _result(
        self,
        contestant: Contestant,
        benchmark: str,
        settings: Mapping[str, Any],
        answer: Mapping[str, Any],
        differs: Differences,
    ) -> Result:
        """The harness's scores, under names that loggers accept."""
        scores, lower = _scores(answer, settings["task"])
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        return Result(
            contestant=contestant.name,
            identity=contestant.identity,
            benchmark=benchmark,
            settings=settings,
            scores=scores,
            lower_is_better=lower,
            details={
                "differs": differs.at(max(answer["n-shot"].values(), default=0)),
                "results": answer["results"],
                "task_versions": answer["versions"],
                "num_fewshot": answer["n-shot"],
                "samples": answer["n-samples"],
                "chat_template_sha": answer.get("chat_template_sha"),
                "batch_size": self.settings.batch_size,
                "versions": {**versions, "python": platform.python_version()},
            },
        )


def _own_questions(settings: HarnessSettings) -> Path | None:
    return None if settings.offline_data is None else Path(settings.offline_data)


def _task_manager(settings: HarnessSettings, offline: Mapping[str, OfflineTask]) -> TaskManager:
    from lm_eval.tasks import TaskManager

    local = [name for name in settings.tasks if offline_names([name])]
    folders = [name for name in settings.tasks if name not in PRESETS and Path(name).is_dir()]
    included = [] if settings.include_path is None else [settings.include_path]
    included += [str(task.folder) for task in offline.values()]
    # Reading the harness's own 14,000 names takes seconds, and local files do not need them.
    named = len(folders) + len(local) < len(settings.tasks)
    with _quiet():
        return TaskManager(include_path=[*included, *folders], include_defaults=named)


def _tasks_in(folder: Path) -> list[str]:
    from lm_eval.tasks import TaskManager

    with _quiet():
        tasks: list[str] = TaskManager(include_path=folder, include_defaults=False).all_subtasks
    if not tasks:
        raise SettingError(
            "tasks",
            str(folder),
            "the folder holds no task",
            fix="put a YAML file with `task: <name>` into it",
        )
    return tasks


def _scores(answer: Mapping[str, Any], task: str) -> tuple[dict[str, float], tuple[str, ...]]:
    """The scores of a task or group, or of every task of a tag."""
    found = answer["results"]
    wanted = {task: found[task]} if task in found else found
    scores, lower = {}, []
    for name, figures in wanted.items():
        prefix = "" if name == task else f"{name}/"
        for key, value in figures.items():
            metric, _, chosen_by = key.partition(",")
            if not chosen_by or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            is_error = metric.endswith("_stderr")
            plain = metric.removesuffix("_stderr")
            label = f"{prefix}{plain}" + ("" if chosen_by == "none" else f".{chosen_by}")
            scores[label + ("_error" if is_error else "")] = float(value)
            if answer["higher_is_better"].get(name, {}).get(plain) is False and not is_error:
                lower.append(label)
    return scores, tuple(lower)


def _preset_mean(name: str, contestant: Contestant, results: Mapping[str, Result]) -> Result:
    """The mean of a preset that leaderboards show, in [0, 1]."""
    tasks = PRESETS[name]
    parts = [results[f"{_BENCHMARK}/{p.task}"] for p in tasks]
    values = {p.task: part.scores[p.score] for p, part in zip(tasks, parts, strict=True)}
    return Result(
        contestant=contestant.name,
        identity=contestant.identity,
        benchmark=f"{_BENCHMARK}/{name}",
        settings={"of": [dict(part.settings) for part in parts]},
        scores={"mean": sum(values.values()) / len(values)},
        details={"scores": values, "differs": INCOMPLETE.get(name, "")},
    )


def _folder_hash(folder: Path) -> str:
    """A hash of all files below a folder of tasks, its data included."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return fingerprint({str(path.relative_to(folder)): file_hash(path) for path in files})


@contextmanager
def _naming(task: str) -> Iterator[None]:
    """Name the task whose data cannot be read, or whose answers the model has no room for."""
    try:
        yield
    except AssertionError as error:
        if "max tokens to generate" not in str(error):
            raise
        fix = "evaluate a model with a longer context, or leave the task out"
        raise SettingError("tasks", task, first_line(error), fix=fix) from error
    except OSError as error:
        raise DataError(
            f"the data of task {task} cannot be read ({first_line(error)})",
            fix="check the files that its YAML names, or the connection to the hub",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Log only errors of the harness, not a line for each model and task, nor a bar per file."""
    import datasets

    log = logging.getLogger("lm_eval")
    level, bars = log.level, datasets.are_progress_bars_disabled()
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
