"""The command line: Lightning's `fit` and `validate`, and commands of our own beside them."""

from __future__ import annotations

import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning as L
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import Checkpoint, ModelSummary
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from spin_lightning.callbacks.best_iterate import BestIterate
from spin_lightning.callbacks.console import (
    ParameterCount,
    console,
    quiet,
    quiet_libraries,
    show_table,
)
from spin_lightning.callbacks.guard import RankLost
from spin_lightning.callbacks.requirements import check_folder, check_strategy, new_run
from spin_lightning.callbacks.row_making import DryRunFinished
from spin_lightning.callbacks.run_files import ConfigFile, RunCSVLogger
from spin_lightning.callbacks.self_play import SelfPlay
from spin_lightning.data.datamodule import SelfPlayDataModule
from spin_lightning.errors import RunFolderError, SettingError, SpinError, first_line
from spin_lightning.evaluation.base import Benchmark, evaluate_run
from spin_lightning.evaluation.contestants import contestants
from spin_lightning.evaluation.lm_eval import Harness
from spin_lightning.evaluation.mt_bench.benchmark import MTBench, judge_lines
from spin_lightning.evaluation.results import read_results, score_table
from spin_lightning.evaluation.settings import Answering, HarnessSettings, JudgeSettings
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.policies.saved import export_iterate
from spin_lightning.report.report import comparison_table, draw_iterates, write_report
from spin_lightning.report.run_view import read_runs
from spin_lightning.report.study import draw_study, study_curves, study_table
from spin_lightning.report.study_plan import STABILITY_VARIANTS, Play
from spin_lightning.run.files import is_of_the_disk, unwritable
from spin_lightning.run.folder import RunFolder
from spin_lightning.testbed import ensure, train_base

# What Lightning and PEFT call that torch and transformers are about to rename.
_NOT_THE_USERS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "`is_gradient_checkpointing` is deprecated",
)
_TOLD_BY_THE_PARSER = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value type",
    "Given value: NestedArg(",
    "Given value: Namespace(",
    "Given value: {",
)
# `--model.model testbed --data.data testbed` stand for the embedded language and its base model,
# `testbed:3` for those of seed 3, `testbed:seed` for those of the run's own seed.
_EMBEDDED = re.compile(r"testbed(?::(\d+|seed))?")


class SpinCLI(LightningCLI):
    """LightningCLI for self-play: a run folder, the loggers in it, and `resume: auto`."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        """Parse `args` (the command line's when None) and run the subcommand they name."""
        super().__init__(
            SelfPlayModule,
            SelfPlayDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # Lightning's own refuses an existing config.yaml, which a resume always meets.
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # The modules keep plain hyper-parameters by themselves.
            load_from_checkpoint_support=False,
            # The row loaders split their batches over the ranks themselves.
            trainer_defaults={"use_distributed_sampler": False},
            parser_kwargs={
                "prog": "spin-lightning",
                "description": "Fine-tune a language model by self-play.",
                "epilog": _other_commands(),
                "exit_on_error": False,
                **{name: {"exit_on_error": False} for name in self.subcommands()},
            },
            args=None if args is None else list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` and `validate`, less what the command line fills in itself."""
        filled = {"model", "datamodule", "weights_only"}
        return {
            "fit": filled | {"train_dataloaders", "val_dataloaders"},
            "validate": filled | {"dataloaders"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings that belong to a run as a whole."""
        parser.add_argument(
            "--resume",
            type=Literal["auto", "never"],
            default="auto",
            help="auto: go on with the run that is in the run folder; never: refuse to.",
        )
        parser.add_argument(
            "--dry_run",
            type=bool,
            default=False,
            help="Make one work unit, print rows, tokens and estimated time, and stop.",
        )
        parser.add_argument(
            "--checkpoint_minutes",
            type=float | None,
            default=10.0,
            help="Write checkpoints/last.ckpt when this long has gone by in an epoch; null: only "
            "after each epoch.",
        )
        parser.add_argument(
            "--checkpoint_steps",
            type=int | None,
            default=None,
            help="Write it after this many optimizer steps, too.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the arguments; refuse a seed that numpy cannot take."""
        try:
            super().parse_arguments(parser, args)
        except (UnicodeDecodeError, RecursionError) as error:
            raise SpinError(
                f"a config file cannot be read ({first_line(error)})",
                fix="give YAML in UTF-8, such as the config.yaml of a run",
            ) from error
        given = self.config[self.config.subcommand]
        if not isinstance(given.trainer, Namespace):
            raise SettingError(
                "trainer", given.trainer, "it is no group of settings", fix="give trainer.<name>"
            )
        seed = given.seed_everything
        if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 2**32:
            raise SettingError(
                "seed_everything", seed, "out of range", fix="give a whole number, 0 to 2^32 - 1"
            )

    def _parse_ckpt_path(self) -> None:
        """The config given always counts; Lightning would put the checkpoint's values back."""

    def before_instantiate_classes(self) -> None:
        """Resolve the embedded testbed, the run folder, and the checkpoint to resume from."""
        config = self.config[self.config.subcommand]
        _resolve_testbed(config)
        if config.trainer.default_root_dir is None:
            variant = config.model.class_path.rsplit(".", 1)[-1]
            config.trainer.default_root_dir = str(new_run(variant))
        parser = self._parser(self.config.subcommand)
        self._config_text = parser.dump(config, skip_unset=False)
        run = RunFolder(Path(config.trainer.default_root_dir))
        if self.config.subcommand == "fit":
            check_folder(run)
        config.ckpt_path = _checkpoint(run, config.ckpt_path, config.resume)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer with the run folder's loggers and checkpoint and the self-play loop."""
        settings = self._get(self.config_init, "trainer")
        check_strategy(settings.strategy)
        root = Path(settings.default_root_dir)
        callbacks = list(settings.callbacks or [])
        callbacks.append(ConfigFile(root, self._config_text))
        if not any(isinstance(callback, SelfPlay) for callback in callbacks):
            intervals = ("checkpoint_minutes", "checkpoint_steps")
            callbacks.append(SelfPlay(**{n: self._get(self.config_init, n) for n in intervals}))
        if not any(isinstance(callback, BestIterate) for callback in callbacks):
            callbacks.append(BestIterate())
        summarized = any(isinstance(callback, ModelSummary) for callback in callbacks)
        if settings.enable_model_summary is not False and not summarized:
            callbacks.append(ParameterCount())
            kwargs["enable_model_summary"] = False
        for callback in callbacks:
            if isinstance(callback, SelfPlay):
                callback.dry_run = self._get(self.config_init, "dry_run")
        if not any(isinstance(callback, Checkpoint) for callback in callbacks):
            # SelfPlay writes checkpoints/last.ckpt; Lightning would add one of its own beside it.
            kwargs["enable_checkpointing"] = False
        logger = settings.logger
        if logger is None or logger is True:
            logger = [
                RunCSVLogger(root),
                TensorBoardLogger(root / "tensorboard", name="", version=""),
            ]
        try:
            return super().instantiate_trainer(callbacks=callbacks, logger=logger, **kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise SpinError(
                f"trainer: {first_line(error)}", fix="see spin-lightning fit --help"
            ) from error


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with one message and exit code 2.

    A process whose run another one has ended says so in one line, with exit code 1.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    for message in _NOT_THE_USERS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    quiet_libraries()
    # So that --model my_variants.MySPIN finds my_variants.py, as `python -m` would.
    sys.path.insert(0, "")
    try:
        if arguments and arguments[0] in _COMMANDS:
            _COMMANDS[arguments[0]](arguments[1:])
        else:
            SpinCLI(args)
    except DryRunFinished:
        console.print("Dry run: nothing was trained. What was made is kept and used by `fit`.")
    except (OSError, ValueError, MisconfigurationException, ArgumentError) as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        _end(mistake, 2)
    except RuntimeError as error:
        if not RankLost.is_cause_of(error):
            raise
        _end(RankLost(), 1)


def _end(error: Exception, code: int) -> NoReturn:
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    errors.print(f"Error: {error}", style="red", markup=False)
    sys.exit(code)


def _mistake(error: BaseException | None) -> SpinError | None:
    """The user's mistake behind an error: jsonargparse wraps what a class raises in its own."""
    cause = error
    while cause is not None:
        if isinstance(cause, SpinError):
            return cause
        if isinstance(cause, MisconfigurationException):
            return SpinError(first_line(cause), fix="see spin-lightning fit --help")
        if isinstance(cause, OSError) and is_of_the_disk(cause):
            # A logger's or a library's own file: those of the run say so by themselves.
            return unwritable(cause.filename or "a file", cause)
        cause = cause.__cause__ or cause.__context__
    return _unread(error) if isinstance(error, ArgumentError) else None


def _unread(error: ArgumentError) -> SpinError:
    """What could not be read, without jsonargparse's account of every type that it tried."""
    lines = (line.strip().removeprefix("- ") for line in str(error).splitlines())
    told = [line for line in lines if line and not line.startswith(_TOLD_BY_THE_PARSER)]
    return SpinError(
        "; ".join(told).replace(":; ", ": "),
        fix="see spin-lightning fit --help, and --model.help or --data.help with a class name",
    )


def _export(args: list[str]) -> None:
    """Write an iterate as a PEFT folder, or merged into a full model."""
    parser = _parser("export", _export)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument(
        "--iterate",
        type=int | Literal["best"] | None,
        help="which iterate, by number or best; the last one if nothing is said",
    )
    parser.add_argument(
        "--merge", type=bool, default=False, help="write a full model, the adapter merged into it"
    )
    given = parser.parse_args(args)
    run = RunFolder(Path(given.run))
    if given.iterate is None:
        t = max(run.known_iterates(), default=0)
    else:
        t = run.best() if given.iterate == "best" else given.iterate
    console.print(f"Iterate {t}: {export_iterate(given.run, t, given.out, given.merge)}")


def _evaluate(args: list[str]) -> None:
    """Score iterates of a run on lm-evaluation-harness tasks and MT-Bench."""
    parser = _parser("evaluate", _evaluate)
    parser.add_argument("--run", required=True, help="the run folder")
    parser.add_argument(
        "--iterates", nargs="+", default=[], help="numbers, best, last, mixture or all (default)"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], help="tasks, groups, presets, folders of YAML tasks"
    )
    parser.add_class_arguments(HarnessSettings, skip={"tasks"})
    parser.add_argument("--mt-bench", "--mt_bench", help="folder or hub id of MT-Bench's files")
    parser.add_class_arguments(JudgeSettings, "judge")
    parser.add_class_arguments(Answering, "answers")
    parser.add_argument("--versus", help="with --mt-bench: match every iterate with this one")
    given = parser.parse_args(args)
    run = RunFolder(Path(given.run))
    benchmarks: list[Benchmark] = []
    if given.tasks:
        names = {field.name for field in fields(HarnessSettings)} - {"tasks"}
        chosen = {name: given[name] for name in names}
        benchmarks.append(Harness(HarnessSettings(tuple(given.tasks), **chosen)))
    if given.mt_bench:
        (versus,) = contestants(run, [given.versus]) if given.versus else (None,)
        judge, answering = JudgeSettings(**given.judge), Answering(**given.answers)
        benchmarks.append(MTBench(given.mt_bench, judge, answering, versus))
    if not benchmarks:
        raise SpinError("nothing to evaluate", fix="give --tasks or --mt-bench")
    for contestant, results in evaluate_run(run, [str(n) for n in given.iterates], benchmarks):
        where = run.evaluation(contestant.name)
        console.print(f"{contestant.label}: {len(results)} results in {where}")
        for line in (line for result in results for line in judge_lines(result)):
            console.print(f"  {line}")
    show_table(score_table(read_results(run)))


def _report(args: list[str]) -> None:
    """Compare runs: a table of every metric over the iterates, and a page of pictures."""
    parser = _parser("report", _report)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", help="folder of the page; the first run's report if not said")
    given = parser.parse_args(args)
    runs = [RunFolder(Path(folder)) for folder in given.runs]
    views = read_runs(runs)
    show_table(comparison_table(views))
    folder = Path(given.out) if given.out else runs[0].report
    name = "iterates.png" if len(runs) == 1 else "comparison.png"
    histories = {view.name: view.records for view in views}
    console.print(f"Picture: {draw_iterates(histories, folder / name)}")
    console.print(f"Report: {write_report(views, folder)}")


def _testbed(args: list[str]) -> None:
    """Make the embedded testbed, or a small model of your own data, and print where they lie."""
    parser = _parser("testbed", _testbed)
    parser.add_argument("--seed", type=int, default=0, help="which testbed language")
    parser.add_argument("--data", help="train a tokenizer and a small Llama on this data instead")
    parser.add_argument("--out", help="with --data: the model folder to write")
    parser.add_argument("--minutes", type=float, default=3.0, help="with --data: how long to train")
    given = parser.parse_args(args)
    if given.data is None:
        paths = ensure(given.seed)
        console.print(f"model: {paths.model}\ndata:  {paths.data}")
        return
    if given.out is None:
        parser.error("--data needs --out, the model folder to write")
    console.print(f"model: {train_base(given.data, Path(given.out), minutes=given.minutes)}")


def _study(args: list[str]) -> None:
    """Play several variants of one config over several seeds: their table and their picture."""
    parser = _parser("study", _study)
    parser.add_argument("--config", required=True, help="a config of `fit`, variant replaced")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(STABILITY_VARIANTS),
        help="variants, with settings of their own as in 'AlphaSPIN(alpha=0.3)'",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run for each")
    parser.add_argument("--out", help="folder of the runs; runs/<name of the config> if not said")
    given = parser.parse_args(args)
    out = Path(given.out or Path("runs") / Path(given.config).stem)
    plays = [Play.of(variant, seed) for variant in given.variants for seed in given.seeds]
    for number, play in enumerate(plays, start=1):
        console.print(f"[{number}/{len(plays)}] {play.variant}, seed {play.seed}", markup=False)
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            SpinCLI(play.arguments(given.config, out))
    groups = {
        variant: [RunFolder(play.folder(out)) for play in plays if play.variant == variant]
        for variant in given.variants
    }
    curves = study_curves(groups)
    show_table(study_table(curves))
    console.print(f"Picture: {draw_study(curves, out / 'study.png')}")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "evaluate": _evaluate,
    "export": _export,
    "report": _report,
    "study": _study,
    "testbed": _testbed,
}


def _parser(name: str, command: Callable[..., None]) -> ArgumentParser:
    return ArgumentParser(prog=f"spin-lightning {name}", description=command.__doc__)


def _other_commands() -> str:
    lines = (f"{name}: {command.__doc__}" for name, command in _COMMANDS.items())
    return "Other commands, each with its own --help. " + " ".join(lines)


def _resolve_testbed(config: Namespace) -> None:
    """Put the folders of the embedded testbed in place of its name."""
    for namespace, key in ((config.model.init_args, "model"), (config.data.init_args, "data")):
        if named := _EMBEDDED.fullmatch(namespace[key]):
            seed = config.seed_everything if named[1] == "seed" else named[1]
            namespace[key] = str(getattr(ensure(int(seed or 0)), key))


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a name that is too long
        return False


def _checkpoint(run: RunFolder, given: str | None, resume: str) -> str | None:
    """The checkpoint to start from.

    Raises:
        RunFolderError: One was asked for that is not there, or a run is there that may not be
            resumed.
    """
    last = run.last_checkpoint
    if resume == "never" and run.known_iterates():
        raise RunFolderError(
            f"{run.root} already holds a run, and resume is never",
            fix="set resume: auto, or name a new folder with --trainer.default_root_dir",
        )
    if given not in (None, "last"):
        if not _is_file(given):
            raise RunFolderError(
                f"ckpt_path={given!r}: there is no such file",
                fix="name a checkpoint of the run, or leave it out: resume: auto finds the last",
            )
        return given
    if last.exists():
        return str(last)
    if given == "last":
        raise RunFolderError(
            f"ckpt_path is last, and there is no {last}",
            fix="leave ckpt_path out to start from scratch, or name the checkpoint's file",
        )
    return None
