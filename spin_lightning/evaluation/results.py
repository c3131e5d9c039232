"""Scores of iterates on benchmarks: stored in the run folder, and compared in tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from spin_lightning.evaluation.contestants import Contestant, current_contestants, label_of
from spin_lightning.run.files import read_json, write_json
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import IterateRecord
from spin_lightning.run.validation import NUMBERS, OBJECT, TEXT, TEXTS, check_fields

_ERROR = "_error"
_DIFFERS = "differs from the official task"


@dataclass(frozen=True)
class Result:
    """The scores of one contestant on one benchmark.

    Attributes:
        contestant: Its name, such as iterate_002.
        identity: Its identity when it was measured.
        benchmark: The benchmark, such as lm_eval/arc_challenge.
        settings: Two results compare only if these are equal.
        scores: By metric; `<metric>_error` is the standard error of `<metric>`.
        lower_is_better: The metrics of which a smaller value is better.
        details: Further records: versions, sample counts, scores of parts, and under `differs` what
            differs from the official benchmark of that name.
    """

    contestant: str
    identity: str
    benchmark: str
    settings: Mapping[str, Any]
    scores: Mapping[str, float]
    lower_is_better: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, content: object) -> Result:
        """Read a result from JSON.

        Raises:
            ValueError: A field is missing, invalid, or of a later version.
        """
        known = check_fields(content, _RULES, required=set(_RULES) - {"details"})
        if later := set(known) - set(_RULES):
            raise ValueError(f"its {min(later)!r} is not a field of this version")
        return cls(**{**known, "lower_is_better": tuple(known["lower_is_better"])})

    @property
    def metrics(self) -> dict[str, float]:
        """The scores under the names that loggers get."""
        return {f"{self.benchmark}/{name}": value for name, value in self.scores.items()}


def write_result(run: RunFolder, result: Result) -> None:
    """Store a result in the run folder, in place of one with the same settings."""
    folder = run.evaluation(result.contestant)
    write_json(folder / _file_name(result.benchmark, result.settings), asdict(result))


def cached_result(
    run: RunFolder, contestant: Contestant, benchmark: str, settings: Mapping[str, Any]
) -> Result | None:
    """The stored result of the same weights under the same settings, if there is one."""
    path = run.evaluation(contestant.name) / _file_name(benchmark, settings)
    if not path.exists():
        return None
    result = read_result(path)
    return result if result.identity == contestant.identity else None


def read_result(path: Path) -> Result:
    """Read a stored result.

    Raises:
        RunFolderError: The file is damaged.
    """
    return read_json(path, "delete it: `spin-lightning evaluate` measures it again", Result.of)


def read_results(run: RunFolder, records: Sequence[IterateRecord] | None = None) -> list[Result]:
    """The results of a run, without those of iterates that were trained again since.

    Args:
        run: The run.
        records: The records of all its iterates; default: read from the run folder.

    Returns:
        Results by benchmark, then settings, then contestant.
    """
    records = run.records() if records is None else records
    known = {one.name: one for one in current_contestants(run, records)}
    found = [read_result(path) for path in run.evaluations.glob("*/*.json")]
    current = [
        r for r in found if r.contestant in known and r.identity == known[r.contestant].identity
    ]
    return sorted(current, key=lambda r: (r.benchmark, fingerprint(r.settings), r.contestant))


@dataclass(frozen=True)
class ScoreLine:
    """One metric of one benchmark under one set of settings, for all contestants.

    Attributes:
        metric: Benchmark and metric.
        settings: The settings of the scores.
        scores: (value, standard error or None) by the contestant's label.
        best: Label of the best contestant; None for a single one, and where several are equal.
        apart: Settings that tell it apart from lines of the same metric, such as `limit 20`.
        differs: What differs from the official benchmark; empty if nothing does.
    """

    metric: str
    settings: Mapping[str, Any]
    scores: Mapping[str, tuple[float, float | None]]
    best: str | None
    apart: str = ""
    differs: str = ""

    @property
    def name(self) -> str:
        """The metric, with what tells it apart."""
        return f"{self.metric} ({self.apart})" if self.apart else self.metric


def score_lines(results: Sequence[Result]) -> list[ScoreLine]:
    """Put results side by side; those of different settings get lines of their own."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        for name in result.scores:
            if not name.endswith(_ERROR):
                key = (result.benchmark, fingerprint(result.settings), name)
                groups.setdefault(key, []).append(result)
    lines = []
    for (benchmark, _, name), group in groups.items():
        scores = {
            label_of(r.contestant): (r.scores[name], r.scores.get(name + _ERROR)) for r in group
        }
        lower = name in group[0].lower_is_better
        best = _best({label: score for label, (score, _) in scores.items()}, lower=lower)
        settings, differs = group[0].settings, str(group[0].details.get("differs", ""))
        lines.append(ScoreLine(f"{benchmark}/{name}", settings, scores, best, differs=differs))
    return told_apart(lines)


def told_apart(lines: Sequence[ScoreLine]) -> list[ScoreLine]:
    """The lines, each with the settings that tell it apart from others of its metric."""
    return [replace(line, apart=_apart(line, lines)) for line in lines]


def label_order(label: str) -> tuple[bool, int, str]:
    """Sorts the labels of contestants: iterates by their index, then the others by name."""
    index = label.removeprefix("p")
    return (not index.isdigit(), int(index) if index.isdigit() else 0, label)


def _best(scores: Mapping[str, float], *, lower: bool) -> str | None:
    """The label of the best score, if one alone is the best of several."""
    wanted = min(scores.values()) if lower else max(scores.values())
    best = [label for label, score in scores.items() if score == wanted]
    return best[0] if len(best) == 1 and len(scores) > 1 else None


def _apart(line: ScoreLine, lines: Sequence[ScoreLine]) -> str:
    """The settings of a line that differ between lines of the same metric."""
    others = [one.settings for one in lines if one.metric == line.metric]
    names = [
        name
        for name in dict.fromkeys(name for settings in others for name in settings)
        if any(settings.get(name) != line.settings.get(name) for settings in others)
    ]
    return ", ".join(
        f"no {name}" if (value := line.settings.get(name)) is None else f"{name} {_short(value)}"
        for name in names
    )


def _short(value: object) -> str:
    """A setting's value; of a hash its beginning."""
    text = str(value)
    return text[:8] if re.fullmatch("[0-9a-f]{64}", text) else text


def score_table(results: Sequence[Result]) -> list[list[str]]:
    """The score lines as rows of text, `*` at the only best; the first row is the header.

    If some task is not quite the official one, the last column names the difference.
    """
    lines = score_lines(results)
    labels = sorted({label for line in lines for label in line.scores}, key=label_order)
    notes = any(line.differs for line in lines)
    table = [["score", *labels, *([_DIFFERS] if notes else [])]]
    for line in lines:
        cells = []
        for label in labels:
            value, error = line.scores.get(label, (None, None))
            text = "-" if value is None else f"{value:.4f}"
            text += "" if error is None else f" ±{error:.4f}"
            cells.append(text + ("*" if label == line.best else ""))
        table.append([line.name, *cells, *([line.differs] if notes else [])])
    return table


def _file_name(benchmark: str, settings: Mapping[str, Any]) -> str:
    slug = re.sub(r"[^\w.-]+", "_", benchmark)
    return f"{slug}-{fingerprint(settings)[:12]}.json"


_RULES: Final = {
    "contestant": TEXT,
    "identity": TEXT,
    "benchmark": TEXT,
    "settings": OBJECT,
    "scores": NUMBERS,
    "lower_is_better": TEXTS,
    "details": OBJECT,
}
