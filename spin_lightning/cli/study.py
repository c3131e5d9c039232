"""The command that plays a study: several variants of one config over several seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jsonargparse import Namespace

from spin_lightning.cli.parsing import command_parser
from spin_lightning.errors import SettingError, SpinError, is_whole
from spin_lightning.run.folder import RunFolder

if TYPE_CHECKING:
    from spin_lightning.evaluation.settings import HarnessSettings
    from spin_lightning.report.study_plan import Play

# The runs of a study by label, one per seed, each with the iterate that its scores are of.
Scored = dict[str, list[tuple[RunFolder, int]]]
# What each kind of file goes with; a config with all but what belongs to a grid.
_GRID_OPTIONS: Final = ("plan", "cell", "processes", "keep_runs")
_OPTIONS: Final = {"grid": ("grid", "out", *_GRID_OPTIONS), "results": ("results", "out")}


def study(args: list[str]) -> None:
    """Run several variants of one config over several seeds: one table, one figure.

    Runs that are complete are not played again, and one that was cut off continues. With --tasks
    the last iterate of every run is scored on benchmarks, and so is what --start played.

    With --grid, a file names the runs: variants, settings and seeds. Several are played at a time,
    and study.parquet has one row per run and iterate. --results shows such a file again.
    """
    from spin_lightning.evaluation.settings import HarnessSettings
    from spin_lightning.report.study_plan import STABILITY_VARIANTS, Play

    parser = command_parser("study", study)
    parser.add_argument(
        "--config", help="A config of `fit`; each variant replaces its model class."
    )
    parser.add_argument(
        "--grid",
        type=Path | None,
        help="A file that names the runs, such as configs/study/smoke.yaml, in place of --config. "
        "It goes with --plan, --cell, --processes, --keep_runs and --out.",
    )
    parser.add_argument(
        "--plan",
        nargs="?",
        type=bool,
        const=True,
        default=False,
        help="With --grid: print the number of runs and the hours, and play nothing.",
    )
    parser.add_argument("--cell", help="With --grid: play this run alone, by its name.")
    parser.add_argument(
        "--processes", type=int, default=1, help="With --grid: runs at a time, a core for each."
    )
    parser.add_argument(
        "--keep_runs",
        type=bool,
        default=False,
        help="With --grid: keep the run folders once they are measured.",
    )
    parser.add_argument(
        "--results",
        type=Path | None,
        help="A study.parquet that --grid wrote: print a table of each part and draw its picture, "
        "in --out or beside the file, and play nothing.",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(STABILITY_VARIANTS),
        help="Variants, with their own settings as in 'AlphaSPIN(alpha=0.3)'.",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        help="Seeds; each variant is run once per seed.",
    )
    parser.add_argument(
        "--start",
        help="A variant, usually SFT, to play first for each seed; all others start from its "
        "iterate with the lowest held-out NLL. Default: they start from the model.",
    )
    parser.add_argument(
        "--start_epochs", type=int, default=1, help="With --start: how many epochs it is played."
    )
    parser.add_argument(
        "--control", help="A variant to compare with, seed by seed; default: SFT, if it is played."
    )
    parser.add_argument("--out", help="Folder of the runs; default: runs/<name of the config>.")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        help="Benchmarks, as in `spin-lightning evaluate`; default: none.",
    )
    parser.add_class_arguments(HarnessSettings, "benchmark", skip={"tasks"})
    given = parser.parse_args(args)
    _check_options(given, parser.get_defaults())
    if given.results is not None:
        from spin_lightning.cli.study_grid import show_results

        show_results(given.results, Path(given.out or given.results.parent))
        return
    if given.grid is not None:
        from spin_lightning.cli.study_grid import play_grid

        play_grid(
            given.grid,
            None if given.out is None else Path(given.out),
            given.processes,
            given.cell,
            plan_only=given.plan,
            keep_runs=given.keep_runs,
        )
        return
    if not is_whole(given.start_epochs, 1):
        raise SettingError("start_epochs", given.start_epochs, "out of range", fix="give 1 or more")
    # By seed, so that a study that is cut off has whole seeds.
    plays = [Play.of(variant, seed) for seed in given.seeds for variant in given.variants]
    control = given.control or ("SFT" if "SFT" in given.variants else None)
    if given.control is not None and given.control not in given.variants:
        raise SettingError(
            "control", given.control, "it is not played", fix="name one of --variants"
        )

    from spin_lightning.callbacks.console import console, quiet_libraries, show_table
    from spin_lightning.cli.fit import explained
    from spin_lightning.report.study import (
        benchmark_scores,
        difference_table,
        draw_study,
        study_curves,
        study_table,
    )

    quiet_libraries()
    out = Path(given.out or Path("runs") / Path(given.config).stem)
    with explained():
        started: dict[int, RunFolder] = {}
        if given.start is not None:
            for seed in given.seeds:
                first = Play.of(given.start, seed)
                first = replace(first, epochs=given.start_epochs, stage="start-")
                started[seed] = _run(first, f"start {seed}", given.config, out)
        for number, play in enumerate(plays, start=1):
            _run(play, f"{number}/{len(plays)}", given.config, out, started.get(play.seed))
        groups = {
            variant: [RunFolder(play.folder(out)) for play in plays if play.variant == variant]
            for variant in given.variants
        }
        scored: Scored = {
            variant: [(run, run.known_iterates()[-1]) for run in runs]
            for variant, runs in groups.items()
        }
        if started:
            scored["start"] = [(run, run.best()) for run in started.values()]
        if given.tasks:
            _evaluate(scored, HarnessSettings(tuple(given.tasks), **given.benchmark))
        curves, scores = study_curves(groups), benchmark_scores(scored)
        show_table(study_table(curves))
        if len(given.seeds) > 1 and control is not None:
            show_table(difference_table(curves, control))
        compared = "start" if started else control
        if len(given.seeds) > 1 and scores and compared is not None:
            show_table(difference_table(scores, compared))
        console.print(f"Picture: {draw_study(curves, out / 'study.png')}")


def _check_options(given: Namespace, defaults: Namespace) -> None:
    """Refuse options that the given file has no use for.

    Raises:
        SpinError: There are some, or there is not one file.
    """
    files = [name for name in ("config", "grid", "results") if given[name] is not None]
    if len(files) != 1:
        raise SpinError(
            "a study is played from one file",
            fix="give --config with a config, --grid with a grid, or --results with its results",
        )
    (file,) = files
    changed = [name for name in vars(given) if given[name] != defaults.get(name)]
    if file == "config":
        unused = [name for name in changed if name in _GRID_OPTIONS]
    else:
        unused = [name for name in changed if name not in _OPTIONS[file]]
    if unused:
        raise SpinError(f"--{unused[0]} does not go with --{file}", fix="leave one of them out")


def _run(
    play: Play, number: str, config: str, out: Path, started: RunFolder | None = None
) -> RunFolder:
    """Play one run, from the best iterate of another one if there is one; return its folder."""
    from spin_lightning.callbacks.console import console
    from spin_lightning.cli.study_grid import play_quietly

    console.print(f"[{number}] {play.stage}{play.variant}, seed {play.seed}", markup=False)
    return play_quietly(play, config, out, started)


def _evaluate(scored: Scored, settings: HarnessSettings) -> None:
    """Score iterates on benchmarks, as far as their results are not in their run folders."""
    from spin_lightning.callbacks.console import console
    from spin_lightning.evaluation.base import evaluate_run
    from spin_lightning.evaluation.lm_eval import Harness

    for label, members in scored.items():
        for run, t in members:
            console.print(f"[benchmarks] {label}: p{t} of {run.root.name}", markup=False)
            for _ in evaluate_run(run, [str(t)], [Harness(settings)]):
                pass
