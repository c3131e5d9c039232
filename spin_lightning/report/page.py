"""The report's page: the content of each section, as plain values for the template."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spin_lightning.data.data_record import length_columns
from spin_lightning.evaluation.results import ScoreLine, label_order, score_lines, told_apart
from spin_lightning.report.figures import (
    COLORS,
    curve_figure,
    histogram_figure,
    length_bins,
    reward_bins,
    svg,
)
from spin_lightning.report.measures import best_of, measures_of, points
from spin_lightning.report.run_view import RunView, config_differences
from spin_lightning.report.tells import tells_of_runs
from spin_lightning.report.verdicts import find_verdicts
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.records import PHASES, STAGES

# Of real and of generated responses.
Pair = tuple[NDArray[Any], NDArray[Any]]

_PROMPTS_SHOWN = 6
_HISTOGRAMS_PER_RUN = 6
_GIB = 1 << 30


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        html: The page, self-contained.
        figures: Its figures by file name.
    """

    html: str
    figures: Mapping[str, Figure]


def make_page(views: Sequence[RunView], version: str) -> Page:
    """Make the report of one run, or of several side by side."""
    figures: dict[str, Figure] = {}
    values: dict[str, Any] = {
        "title": " · ".join(view.name for view in views),
        "version": version,
        "runs": [{"name": view.name, "facts": _facts(view)} for view in views],
        "verdicts": _verdicts(views),
        "evaluations": _evaluations(views),
        "curves": list(_curves(views, figures)),
        "histograms": [
            part for part in (_lengths(views, figures), _rewards(views, figures)) if part["figures"]
        ],
        "samples": _samples(views),
        "tells": tells_of_runs({view.name: view for view in views}),
        "data": [{"name": v.name, "sources": v.data} for v in views if v.data],
        "length_columns": length_columns(),
        "timings": _timings(views),
        "differences": config_differences(views) if len(views) > 1 else [],
    }
    sections = [
        ("Runs", "runs", True),
        ("Verdicts", "verdicts", True),
        ("Evaluation", "evaluation", values["evaluations"]),
        ("Curves", "curves", values["curves"]),
        *((part["short"], part["id"], True) for part in values["histograms"]),
        ("Samples", "samples", values["samples"]),
        ("What tells them apart", "tells", values["tells"]),
        ("Data", "data", values["data"]),
        ("Time and memory", "time", values["timings"]),
        ("Settings", "settings", values["differences"]),
    ]
    shown = [(name, anchor) for name, anchor, there in sections if there]
    return Page(_template().render(**values, sections=shown), figures)


@cache
def _template() -> Template:
    text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(text)


def _image(figures: dict[str, Figure], name: str, figure: Figure) -> str:
    figures[name] = figure
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure)).decode()


def _facts(view: RunView) -> list[tuple[str, str]]:
    last, base = view.records[-1], view.records[0].base
    facts = [
        ("variant", view.variant),
        ("base", f"{base['name']} ({base['quantization']}, {base['compute_dtype']})"),
        ("iterates", f"p0 … p{last.index}, {last.step:,} steps"),
    ]
    if last.training is not None:
        played = {"opponent": last.training.opponent, "reference": last.training.reference}
        facts += [(name, value) for name, value in played.items() if value]
    if view.best is not None:
        best = view.best
        facts.append(("best", f"p{best.index} by {best.metric} = {best.value:.4g}"))
    facts += [("other than set", deviation) for deviation in view.deviations]
    return facts


def _verdicts(views: Sequence[RunView]) -> list[dict[str, Any]]:
    return [
        {"name": view.name, "verdicts": find_verdicts(view.records, view.best)} for view in views
    ]


def _curves(views: Sequence[RunView], figures: dict[str, Figure]) -> Iterator[dict[str, Any]]:
    histories = {view.name: view.records for view in views}
    for measure in measures_of(histories.values()):
        of_runs = {name: points(records, measure.name) for name, records in histories.items()}
        iterates = sorted({t for values in of_runs.values() for t in values})
        best = {name: best_of(measure, values) for name, values in of_runs.items()}
        name = measure.name.replace("/", "_")
        yield {
            "name": measure.name,
            "title": measure.title,
            "meaning": measure.meaning,
            "image": _image(figures, name, curve_figure(measure, histories)),
            "runs": list(of_runs),
            "rows": [
                (
                    t,
                    [
                        {"value": f"{values[t]:.4g}", "best": t == best[run]}
                        if t in values
                        else None
                        for run, values in of_runs.items()
                    ],
                )
                for t in iterates
            ],
        }


def _evaluations(views: Sequence[RunView]) -> list[dict[str, Any]]:
    """A card per metric and settings; iterates down, runs across."""
    cards: dict[tuple[str, str], dict[str, ScoreLine]] = {}
    for view in views:
        for line in score_lines(view.results):
            key = (line.metric, fingerprint(line.settings))
            cards.setdefault(key, {})[view.name] = line
    first = told_apart([next(iter(lines.values())) for lines in cards.values()])
    return [
        _evaluation(line.name, lines) for line, lines in zip(first, cards.values(), strict=True)
    ]


def _evaluation(name: str, lines: Mapping[str, ScoreLine]) -> dict[str, Any]:
    labels = {label for line in lines.values() for label in line.scores}
    rows = []
    for label in sorted(labels, key=label_order):
        cells: list[dict[str, Any] | None] = []
        for line in lines.values():
            value, error = line.scores.get(label, (None, None))
            cells.append(
                None
                if value is None
                else {
                    "value": f"{value:.4f}",
                    "error": None if error is None else f"{error:.4f}",
                    "best": label == line.best,
                }
            )
        rows.append((label, cells))
    first = next(iter(lines.values()))
    return {
        "metric": name,
        "runs": list(lines),
        "rows": rows,
        "differs": first.differs,
        "settings": _in_a_line(first.settings),
    }


def _in_a_line(settings: Mapping[str, Any]) -> str:
    """The settings of a score in one line, hashes shortened."""
    shown = []
    for key, value in settings.items():
        if value is None or key in ("task", "of"):
            continue
        text = value[:8] if isinstance(value, str) and len(value) == 64 else str(value)
        shown.append(text if key == "harness" else f"{key} {text}")
    return ", ".join(shown)


def _chosen(iterates: Sequence[int]) -> list[int]:
    """At most `_HISTOGRAMS_PER_RUN` iterates, evenly spread, including the first and the last."""
    if len(iterates) <= _HISTOGRAMS_PER_RUN:
        return list(iterates)
    step = (len(iterates) - 1) / (_HISTOGRAMS_PER_RUN - 1)
    return [iterates[round(i * step)] for i in range(_HISTOGRAMS_PER_RUN)]


def _lengths(views: Sequence[RunView], figures: dict[str, Figure]) -> dict[str, Any]:
    pairs = {
        (i, t): view.lengths(t)
        for i, view in enumerate(views)
        for t in _chosen(sorted(view.tables))
    }
    return {
        "id": "lengths",
        "short": "Lengths",
        "title": "Lengths of responses",
        "meaning": "Tokens of held-out responses, including the stop token: real, and of p_t.",
        "figures": _histograms("lengths", views, pairs, length_bins, "tokens", figures),
    }


def _rewards(views: Sequence[RunView], figures: dict[str, Figure]) -> dict[str, Any]:
    pairs = {}
    for i, view in enumerate(views):
        for t in _chosen([t for t in sorted(view.tables) if t > 0]):
            rewards = view.rewards(t)
            if rewards is not None:
                pairs[i, t] = rewards
    axis = "log p_t − log p_{t−1}, nats"
    return {
        "id": "rewards",
        "short": "Rewards",
        "title": "Rewards of responses",
        "meaning": "log p_t(y|x) − log p_{t−1}(y|x) of held-out responses, real and of p_t, nats "
        "before β: the last iterate made responses on the right likelier. The outermost hundredth "
        "is left out.",
        "figures": _histograms("rewards", views, pairs, reward_bins, axis, figures),
    }


def _histograms(
    kind: str,
    views: Sequence[RunView],
    pairs: Mapping[tuple[int, int], Pair],
    bins_of: Callable[[Sequence[Pair]], NDArray[Any]],
    axis: str,
    figures: dict[str, Figure],
) -> list[dict[str, str]]:
    """A histogram of real and generated responses per run and iterate, all with the same bins."""
    if not pairs:
        return []
    bins = bins_of(list(pairs.values()))
    shown = []
    for (i, t), (real, generated) in pairs.items():
        figure = histogram_figure(real, generated, axis, COLORS[i % len(COLORS)], bins)
        image = _image(figures, f"{kind}_run{i}_p{t}", figure)
        shown.append({"title": f"{views[i].name}, p{t}", "image": image})
    return shown


def _samples(views: Sequence[RunView]) -> list[dict[str, Any]]:
    """The first prompts of the first run, with the responses of every run that has them."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for i, view in enumerate(views):
        # Enough samples of another run to find the first run's prompts among them.
        for sample in view.samples(_PROMPTS_SHOWN if i == 0 else 1000):
            key = (sample.prompt, sample.real)
            if i and key not in found:
                continue
            start = f"{view.name} " if len(views) > 1 else ""
            answers = [(f"{start}p{t}", text) for t, text in sample.generated.items()]
            found.setdefault(key, []).extend(answers)
    return [
        {"prompt": prompt, "real": real, "answers": answers}
        for (prompt, real), answers in found.items()
    ]


def _timings(views: Sequence[RunView]) -> list[dict[str, Any]]:
    """Time and memory of every iterate, phase by phase, one table per run."""
    timings = []
    for view in views:
        rows = []
        for record in view.records:
            training = record.training
            if training is not None and training.seconds:
                peaks = training.phase_peaks
                rows.append(
                    [
                        f"p{record.index}",
                        *(f"{training.seconds[stage]:.1f} s" for stage in STAGES),
                        *(_gib(peaks.get(phase)) for phase in PHASES),
                        _gib(training.peak_memory),
                    ]
                )
        if rows:
            timings.append({"name": view.name, "rows": rows})
    return timings


def _gib(size: int | None) -> str:
    return "–" if size is None else f"{size / _GIB:.2f}"
