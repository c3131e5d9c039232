"""Scores of iterates on benchmarks: kept in the run folder, read back, put side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spin_lightning.errors import RunFolderError, first_line
from spin_lightning.evaluation.contestants import Contestant, contestants, label_of
from spin_lightning.run.files import write_json
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.folder import RunFolder

_ERROR = "_error"


@dataclass(frozen=True)
class Result:
    """What one contestant scored on one benchmark.

    Attributes:
        contestant: Its name, such as iterate_002.
        identity: Its identity when it was measured.
        benchmark: What it was measured on, such as lm_eval/arc_challenge.
        settings: All that has to be the same for two results to compare.
        scores: By metric; `<metric>_error` is the standard error of `<metric>`.
        lower_is_better: The metrics of which a small value is good.
        details: What was recorded besides: versions, sample counts, scores of parts.
    """

    contestant: str
    identity: str
    benchmark: str
    settings: Mapping[str, Any]
    scores: Mapping[str, float]
    lower_is_better: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The scores under the names that loggers get."""
        return {f"{self.benchmark}/{name}": value for name, value in self.scores.items()}


def write_result(run: RunFolder, result: Result) -> None:
    """Keep a result in the run folder; one of the same settings is replaced."""
    folder = run.evaluation(result.contestant)
    write_json(folder / _file_name(result.benchmark, result.settings), asdict(result))


def cached_result(
    run: RunFolder, contestant: Contestant, benchmark: str, settings: Mapping[str, Any]
) -> Result | None:
    """The result of the same weights under the same settings, where it is known."""
    path = run.evaluation(contestant.name) / _file_name(benchmark, settings)
    if not path.exists():
        return None
    result = _read(path)
    return result if result.identity == contestant.identity else None


def read_results(run: RunFolder) -> list[Result]:
    """All results of a run that still speak of its iterates, by benchmark, then contestant."""
    known = {one.name: one for one in contestants(run, ["all", "mixture"])}
    found = [_read(path) for path in run.evaluations.glob("*/*.json")]
    current = [
        r for r in found if r.contestant in known and r.identity == known[r.contestant].identity
    ]
    return sorted(current, key=lambda r: (r.benchmark, fingerprint(r.settings), r.contestant))


@dataclass(frozen=True)
class ScoreLine:
    """One metric of one benchmark under one set of settings, for all who were measured.

    Attributes:
        metric: Benchmark and metric.
        settings: What the scores were taken under.
        scores: (value, standard error or None) by the contestant's label.
        best: Label of the best one; None where there is nothing to compare.
    """

    metric: str
    settings: Mapping[str, Any]
    scores: Mapping[str, tuple[float, float | None]]
    best: str | None


def score_lines(results: Sequence[Result]) -> list[ScoreLine]:
    """Put results side by side; only those of the same settings meet in a line."""
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
        sign = -1 if name in group[0].lower_is_better else 1
        best = max(scores, key=lambda label: sign * scores[label][0]) if len(scores) > 1 else None
        lines.append(ScoreLine(f"{benchmark}/{name}", group[0].settings, scores, best))
    return lines


def score_table(results: Sequence[Result]) -> list[list[str]]:
    """The same as rows of text, `*` at the best; the first row is a head."""
    lines = score_lines(results)
    labels = list(dict.fromkeys(label for line in lines for label in line.scores))
    table = [["score", *labels]]
    for line in lines:
        cells = []
        for label in labels:
            value, error = line.scores.get(label, (None, None))
            text = "-" if value is None else f"{value:.4f}"
            text += "" if error is None else f" ±{error:.4f}"
            cells.append(text + ("*" if label == line.best else ""))
        table.append([line.metric, *cells])
    return table


def _file_name(benchmark: str, settings: Mapping[str, Any]) -> str:
    slug = re.sub(r"[^\w.-]+", "_", benchmark)
    return f"{slug}-{fingerprint(settings)[:12]}.json"


def _read(path: Path) -> Result:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        result = Result(**{**fields, "lower_is_better": tuple(fields["lower_is_better"])})
        for name, kind in (("contestant", str), ("benchmark", str), ("settings", dict)):
            if not isinstance(getattr(result, name), kind):
                raise ValueError(f"its {name!r} is no {kind.__name__}")
        if not isinstance(result.scores, dict) or not all(map(_is_score, result.scores.values())):
            raise ValueError("its scores are no numbers")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunFolderError(
            f"{path} is no result of an evaluation ({first_line(error)})",
            fix="delete it: `spin-lightning evaluate` measures it again",
        ) from error
    return result


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
