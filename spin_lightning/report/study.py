"""Studies: the table and picture of several variants, each with several seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spin_lightning.errors import RunFolderError
from spin_lightning.evaluation.contestants import label_of
from spin_lightning.evaluation.results import read_results, score_lines
from spin_lightning.report.figures import log_values
from spin_lightning.report.run_view import read_records
from spin_lightning.run.folder import RunFolder

# The metrics that are compared if all runs have them, with the titles of their panels.
CURVES: Final = {
    "exact/kl": "last iterate: exact KL(p_data || p_t), nats",
    "exact/mixture_kl": "mixture policy: exact KL(p_data || mean of p_0 … p_t), nats",
    "val/real_nll_per_token": "NLL of held-out real responses, nats per token",
    "answers/exact_match": "exact match of greedy answers, share of held-out examples",
}
# Those that stand in the tables alone.
_TABLE_ONLY: Final = (
    "answers/exact_match_sampled",
    "val/kl_base",
    "val/finished",
    "val/generated_tokens",
    "answers/distinct_1",
    "answers/in_format",
)
# The 0.975 quantile of Student's t for 1, 2, ... degrees of freedom; beyond, that of the normal.
_T_QUANTILES: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
_NORMAL_QUANTILE: Final = 1.96
_COLORS: Final = 10
# Whether a run has settled is judged by its second half.
_LATE: Final = 0.5

# The points of every run, by metric and variant.
Curves = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]


def study_curves(groups: Mapping[str, Sequence[RunFolder]]) -> Curves:
    """Read the metrics that all runs of a study have.

    Args:
        groups: The runs of each variant.

    Raises:
        RunFolderError: There is no such metric.
    """
    measured = {
        variant: [[record.metrics or {} for record in read_records(run)] for run in runs]
        for variant, runs in groups.items()
    }
    common = [
        metric
        for metric in (*CURVES, *_TABLE_ONLY)
        if all(metric in at for runs in measured.values() for run in runs for at in run)
    ]
    if not set(common) & set(CURVES):
        raise RunFolderError(
            "these runs have no metric in common that can be compared",
            fix="hold examples out with data.val_examples, or play on the testbed",
        )
    return {
        metric: {
            variant: [[at[metric] for at in run] for run in runs]
            for variant, runs in measured.items()
        }
        for metric in common
    }


def benchmark_scores(iterates: Mapping[str, Sequence[tuple[RunFolder, int]]]) -> Curves:
    """Read the scores of `spin-lightning evaluate` that the same benchmarks gave all runs.

    Args:
        iterates: For each variant, a run per seed and the iterate to look at.

    Returns:
        One point per run; nothing if there is no such benchmark.
    """
    measured = {variant: [_scores(run, t) for run, t in runs] for variant, runs in iterates.items()}
    of_all = [scores for runs in measured.values() for scores in runs]
    common = [name for name in of_all[0] if all(name in scores for scores in of_all)]
    return {
        name: {variant: [[scores[name]] for scores in runs] for variant, runs in measured.items()}
        for name in common
    }


def _scores(run: RunFolder, t: int) -> dict[str, float]:
    label = label_of(run.iterate(t).name)
    lines = score_lines(read_results(run))
    return {line.name: line.scores[label][0] for line in lines if label in line.scores}


def study_table(curves: Curves) -> list[list[str]]:
    """Each metric of each variant at each iterate, the median over seeds, as rows of text.

    The last column is the median over seeds of the mean over the second half of the iterates, if
    that is more than one. The first row is the header.
    """
    histories_of_all = [runs for variants in curves.values() for runs in variants.values()]
    length = max(len(points) for runs in histories_of_all for points in runs)
    first = first_late(length)
    late = [f"mean p{first}–p{length - 1}"] if first < length - 1 else []
    table = [["median over seeds", "variant", *(f"p{t}" for t in range(length)), *late]]
    for metric, runs in curves.items():
        for variant, histories in runs.items():
            cells = [f"{median(at):.3f}" for at in zip(*histories, strict=False)]
            cells += ["-"] * (length - len(cells))
            if late:
                settled = median(fmean(points[first:] or points[-1:]) for points in histories)
                cells.append(f"{settled:.3f}")
            table.append([metric, variant, *cells])
    return table


def first_late(length: int) -> int:
    """The first iterate of the second half of a run of this many."""
    return length - max(1, int(_LATE * (length - 1)))


def difference_table(curves: Curves, control: str) -> list[list[str]]:
    """The last iterate of every variant against that of a control, as rows of text.

    The first row is the header. Differences are taken seed by seed, and their mean has a 95 %
    interval by Student's t.

    Args:
        curves: The metrics, see `study_curves`, of at least two seeds.
        control: The variant to compare with.
    """
    table = [["last iterate", "variant", "mean", f"minus {control}", "95 % interval"]]
    for metric, runs in curves.items():
        theirs = [points[-1] for points in runs[control]]
        for variant, histories in runs.items():
            own = [points[-1] for points in histories]
            cells = ["-", "-"]
            if variant != control:
                low, mean, high = paired_interval(own, theirs)
                cells = [f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}"]
            table.append([metric, variant, f"{fmean(own):.3f}", *cells])
    return table


def paired_interval(own: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Lower end, mean and upper end of the mean paired difference, 95 % by Student's t.

    Args:
        own: One value per seed, at least two.
        theirs: The control's values for the same seeds.
    """
    differences = [a - b for a, b in zip(own, theirs, strict=True)]
    mean, free = fmean(differences), len(differences) - 1
    quantile = _T_QUANTILES[free - 1] if free <= len(_T_QUANTILES) else _NORMAL_QUANTILE
    half = quantile * stdev(differences) / math.sqrt(len(differences))
    return mean - half, mean, mean + half


def draw_study(curves: Curves, path: Path) -> Path:
    """Draw every metric over the iterates: a line per variant, the median over its seeds.

    A band reaches from the smallest to the largest of the seeds.

    Args:
        curves: The metrics, see `study_curves`.
        path: Where the picture goes.

    Returns:
        The picture's path.
    """
    drawn = {metric: runs for metric, runs in curves.items() if metric in CURVES}
    figure = Figure(figsize=(10, 3.6 * len(drawn)), layout="constrained")
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (metric, runs) in zip(panels, drawn.items(), strict=True):
        for number, (variant, histories) in enumerate(runs.items()):
            # Colors repeat after ten.
            _draw(axes, variant, histories, "-" if number < _COLORS else "--")
        axes.set_title(CURVES[metric], fontsize=10)
        axes.grid(alpha=0.3)
        if metric.startswith("exact/"):
            log_values(axes)
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", fontsize=8, ncols=3)
    panels[-1].set_xlabel("iterate")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _draw(axes: Axes, variant: str, histories: Sequence[Sequence[float]], style: str) -> None:
    by_iterate = list(zip(*histories, strict=False))
    middle = [median(at) for at in by_iterate]
    (line,) = axes.plot(middle, marker="o", markersize=4, linestyle=style, label=variant)
    low, high = [min(at) for at in by_iterate], [max(at) for at in by_iterate]
    axes.fill_between(range(len(low)), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
