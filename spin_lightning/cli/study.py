"""The command that plays a study: several variants of one config over several seeds."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from spin_lightning.cli.parsing import command_parser
from spin_lightning.errors import SettingError
from spin_lightning.run.folder import RunFolder


def study(args: list[str]) -> None:
    """Run several variants of one config over several seeds: one table, one figure.

    Runs that are complete are not played again, and one that was cut off continues. Scores that
    `spin-lightning evaluate` gave the last iterate of every run get a table of their own.
    """
    from spin_lightning.report.study_plan import STABILITY_VARIANTS, Play

    parser = command_parser("study", study)
    parser.add_argument(
        "--config", required=True, help="A config of `fit`; each variant replaces its model class."
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
    given = parser.parse_args(args)
    # By seed, so that a study that is cut off has whole seeds.
    plays = [Play.of(variant, seed) for seed in given.seeds for variant in given.variants]
    control = given.control or ("SFT" if "SFT" in given.variants else None)
    if given.control is not None and given.control not in given.variants:
        raise SettingError(
            "control", given.control, "it is not played", fix="name one of --variants"
        )

    from spin_lightning.callbacks.console import console, quiet, quiet_libraries, show_table
    from spin_lightning.cli.fit import SpinCLI, explained
    from spin_lightning.report.study import (
        benchmark_scores,
        difference_table,
        draw_study,
        study_curves,
        study_table,
    )

    quiet_libraries()
    out = Path(given.out or Path("runs") / Path(given.config).stem)
    started: dict[int, RunFolder] = {}

    def run(play: Play, number: str) -> RunFolder:
        console.print(f"[{number}] {play.stage}{play.variant}, seed {play.seed}", markup=False)
        first = started.get(play.seed)
        start = None if first is None else first.iterate(first.best()).resolve()
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            SpinCLI(play.arguments(given.config, out, start))
        return RunFolder(play.folder(out))

    with explained():
        if given.start is not None:
            for seed in given.seeds:
                play = replace(
                    Play.of(given.start, seed), epochs=given.start_epochs, stage="start-"
                )
                started[seed] = run(play, f"start {seed}")
        for number, play in enumerate(plays, start=1):
            run(play, f"{number}/{len(plays)}")
        groups = {
            variant: [RunFolder(play.folder(out)) for play in plays if play.variant == variant]
            for variant in given.variants
        }
        curves = study_curves(groups)
        show_table(study_table(curves))
        scored = {
            variant: [(run, run.known_iterates()[-1]) for run in runs]
            for variant, runs in groups.items()
        }
        if started:
            scored["start"] = [(run, run.best()) for run in started.values()]
        scores, compared = benchmark_scores(scored), "start" if started else control
        if len(given.seeds) > 1:
            if control is not None:
                show_table(difference_table(curves, control))
            if scores and compared is not None:
                show_table(difference_table(scores, compared))
        console.print(f"Picture: {draw_study(curves, out / 'study.png')}")
