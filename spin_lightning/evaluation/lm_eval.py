"""lm-evaluation-harness on iterates: one loaded base, adapters switched, every setting recorded."""

from __future__ import annotations

import importlib.util
import logging
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedTokenizerBase

from spin_lightning.errors import DataError, SettingError
from spin_lightning.evaluation.contestants import Contestant
from spin_lightning.evaluation.results import Result, cached_result, write_result
from spin_lightning.evaluation.settings import HarnessSettings
from spin_lightning.policies.base import Policy
from spin_lightning.policies.pretrained import first_line
from spin_lightning.run.fingerprint import file_hash, fingerprint
from spin_lightning.run.folder import RunFolder

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_BENCHMARK = "lm_eval"


@dataclass(frozen=True)
class PresetTask:
    """A task of a preset.

    Attributes:
        task: The harness's name.
        num_fewshot: Examples in the prompt.
        score: The score that enters the preset's mean.
    """

    task: str
    num_fewshot: int
    score: str


PRESETS: Final[Mapping[str, tuple[PresetTask, ...]]] = {
    # The six tasks and settings of the first Open LLM Leaderboard, which the SPIN papers use.
    "open_llm_leaderboard": (
        PresetTask("arc_challenge", 25, "acc_norm"),
        PresetTask("hellaswag", 10, "acc_norm"),
        PresetTask("mmlu", 5, "acc"),
        PresetTask("truthfulqa_mc2", 0, "acc"),
        PresetTask("winogrande", 5, "acc"),
        PresetTask("gsm8k", 5, "exact_match.strict-match"),
    )
}


@dataclass(frozen=True)
class _Job:
    """One call of the harness.

    Attributes:
        task: A name that the task manager knows.
        num_fewshot: Examples in the prompt, or None for the task's own number.
        source: Hash of the YAML folder it comes from; None for a task of the harness.
    """

    task: str
    num_fewshot: int | None
    source: str | None


def check_installed() -> None:
    """Refuse, before anything is loaded, to evaluate without the harness.

    Raises:
        SettingError: lm_eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise SettingError(
            "tasks",
            "lm_eval",
            "lm-evaluation-harness is not installed",
            fix="run: pip install 'spin-lightning[eval]'",
        )


class Harness:
    """Scores iterates on tasks of lm-evaluation-harness.

    What is known already is not measured again: each task of each iterate is kept as soon as it is
    done, with all that is needed to repeat it.

    Args:
        settings: What is asked.

    Raises:
        SettingError: The harness is not installed, or knows no such task.
    """

    def __init__(self, settings: HarnessSettings) -> None:
        """Look every task up."""
        check_installed()
        self.settings = settings
        self._manager = _task_manager(settings)
        self._jobs = [job for name in settings.tasks for job in self._jobs_of(name)]
        self._model: Any = None

    def evaluate(
        self,
        run: RunFolder,
        policy: Callable[[], Policy],
        tokenizer: PreTrainedTokenizerBase,
        contestant: Contestant,
    ) -> list[Result]:
        """Score one contestant on every task.

        The policy and the random states are as before when this returns.

        Args:
            run: The run folder.
            policy: Gives who can act as the contestant's iterates; not asked where all is known.
            tokenizer: The run's.
            contestant: Who answers.

        Returns:
            One result per task, in the order asked for, and the mean of each preset.

        Raises:
            DataError: The data of a task cannot be read.
        """
        results = {}
        for job in self._jobs:
            asked = self._asked(job)
            benchmark = f"{_BENCHMARK}/{job.task}"
            found = cached_result(run, contestant, benchmark, asked)
            if found is None:
                answer = self._call(policy(), tokenizer, contestant, job)
                found = self._result(contestant, benchmark, asked, answer)
                write_result(run, found)
            results[benchmark] = found
        for name in self.settings.tasks:
            if name in PRESETS:
                mean = _preset_mean(name, contestant, results)
                write_result(run, mean)
                results[mean.benchmark] = mean
        return list(results.values())

    def _jobs_of(self, name: str) -> list[_Job]:
        settings = self.settings
        if name in PRESETS:
            return [_Job(p.task, p.num_fewshot, None) for p in PRESETS[name]]
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

    def _asked(self, job: _Job) -> dict[str, Any]:
        """All that decides a score besides the weights."""
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

    def _call(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        contestant: Contestant,
        job: _Job,
    ) -> dict[str, Any]:
        import lm_eval

        from spin_lightning.evaluation.harness_model import PolicyLM

        settings, seeds = self.settings, self.settings.seeds
        with isolate_rng(), _quiet(), _naming(job.task):
            if self._model is None or self._model.policy is not policy:
                self._model = PolicyLM(policy, tokenizer, contestant.mixture, settings.batch_size)
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
        asked: Mapping[str, Any],
        answer: Mapping[str, Any],
    ) -> Result:
        """What the harness found, under names that a logger takes."""
        scores, lower = _scores(answer, asked["task"])
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        return Result(
            contestant=contestant.name,
            identity=contestant.identity,
            benchmark=benchmark,
            settings=asked,
            scores=scores,
            lower_is_better=lower,
            details={
                "results": answer["results"],
                "task_versions": answer["versions"],
                "num_fewshot": answer["n-shot"],
                "samples": answer["n-samples"],
                "chat_template_sha": answer.get("chat_template_sha"),
                "batch_size": self.settings.batch_size,
                "versions": {**versions, "python": platform.python_version()},
            },
        )


def _task_manager(settings: HarnessSettings) -> TaskManager:
    from lm_eval.tasks import TaskManager

    folders = [name for name in settings.tasks if name not in PRESETS and Path(name).is_dir()]
    included = [] if settings.include_path is None else [settings.include_path]
    # Reading the harness's own 14,000 names takes seconds; local folders alone need none of them.
    named = len(folders) < len(settings.tasks)
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
    """Scores of what was asked for: of the task, the group, or every task of a tag."""
    found = answer["results"]
    asked = {task: found[task]} if task in found else found
    scores, lower = {}, []
    for name, figures in asked.items():
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
    """The mean that leaderboards show, between 0 and 1."""
    tasks = PRESETS[name]
    parts = [results[f"{_BENCHMARK}/{p.task}"] for p in tasks]
    values = {p.task: part.scores[p.score] for p, part in zip(tasks, parts, strict=True)}
    return Result(
        contestant=contestant.name,
        identity=contestant.identity,
        benchmark=f"{_BENCHMARK}/{name}",
        settings={"of": [dict(part.settings) for part in parts]},
        scores={"mean": sum(values.values()) / len(values)},
        details={"scores": values},
    )


def _folder_hash(folder: Path) -> str:
    """Changes with every file below a folder of tasks, data among them."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return fingerprint({str(path.relative_to(folder)): file_hash(path) for path in files})


@contextmanager
def _naming(task: str) -> Iterator[None]:
    """Say which task it was that could not be read."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the data of task {task} cannot be read ({first_line(error)})",
            fix="check the files that its YAML names, or the connection to the hub",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's log, less what it says of every model and every task."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
