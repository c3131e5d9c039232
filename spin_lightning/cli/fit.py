"""`fit` and `validate`: LightningCLI with a run folder."""

from __future__ import annotations

import re
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import spin_lightning
from spin_lightning.callbacks.best_iterate import BestIterate
from spin_lightning.callbacks.console import ParameterCount, console, quiet_libraries
from spin_lightning.callbacks.guard import RankLost
from spin_lightning.callbacks.requirements import check_folder, check_strategy, new_run
from spin_lightning.callbacks.row_making import DryRunFinished
from spin_lightning.callbacks.run_files import ConfigFile, RunCSVLogger
from spin_lightning.callbacks.self_play import SelfPlay
from spin_lightning.cli.mistakes import FIT_HELP, causes, end
from spin_lightning.data.datamodule import SelfPlayDataModule
from spin_lightning.errors import RunFolderError, SettingError, SpinError, first_line
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.run.folder import RunFolder
from spin_lightning.testbed import ensure, ensure_noisy

# `--model.model testbed --data.data testbed` stand for the embedded language and its base model,
# `testbed:3` for those of seed 3, `testbed:seed` for those of the run's own seed. The data of
# `testbed-noisy` have wrong responses among them.
_EMBEDDED = re.compile(r"testbed(-noisy)?(?::(\d+|seed))?")


def _import_exports() -> None:
    """A bare class name, as in `--model SPIN`, is looked up among the classes that are imported."""
    for name in spin_lightning.__all__:
        if name[0].isupper():
            getattr(spin_lightning, name)


def _int_before_float() -> None:
    """Read a whole number for the trainer as an int: `limit_val_batches: 1` is one batch, 1.0 all.

    typing caches Union[int, float] and Union[float, int] as one, so that the order in Lightning's
    signature depends on what was imported before it.
    """
    hints = L.Trainer.__init__.__annotations__
    for name, hint in hints.items():
        if hint == int | float | None:
            hints[name] = int | float | None


_import_exports()
_int_before_float()


class SpinCLI(LightningCLI):
    """LightningCLI for self-play: a run folder with its loggers, and `resume: auto`."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        """Run the subcommand that `args` name; default: the arguments of the process."""
        super().__init__(
            SelfPlayModule,
            SelfPlayDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # Lightning's own refuses an existing config.yaml, and on a resume there is one.
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
                "exit_on_error": False,
                **{name: {"exit_on_error": False} for name in self.subcommands()},
            },
            args=None if args is None else list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` and `validate`, each with the arguments that are not settings."""
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
            help="auto: resume the run in the run folder, if there is one; never: refuse to.",
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
            help="Minutes between writes of checkpoints/last.ckpt within an epoch; null: write it "
            "after each epoch only.",
        )
        parser.add_argument(
            "--checkpoint_steps",
            type=int | None,
            default=None,
            help="Also write it every so many optimizer steps.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the arguments; refuse a seed that numpy cannot take."""
        try:
            with warnings.catch_warnings():
                # Other commands give the arguments of `fit` themselves.
                warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
                super().parse_arguments(parser, args)
        except (UnicodeDecodeError, RecursionError) as error:
            raise SpinError(
                f"a config file cannot be read ({first_line(error)})",
                fix="give YAML in UTF-8, such as the config.yaml of a run",
            ) from error
        given = self.config[self.config.subcommand]
        if not isinstance(given.trainer, Namespace):
            raise SettingError(
                "trainer", given.trainer, "it is not a group of settings", fix="give trainer.<name>"
            )
        seed = given.seed_everything
        if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 2**32:
            raise SettingError(
                "seed_everything", seed, "out of range", fix="give a whole number, 0 to 2^32 - 1"
            )

    def _parse_ckpt_path(self) -> None:
        """Keep the given config; Lightning would restore the values in the checkpoint."""

    def before_instantiate_classes(self) -> None:
        """Fill in the paths of the testbed, the run folder, and the checkpoint to resume from."""
        config = self.config[self.config.subcommand]
        resolve_testbed(config)
        if config.trainer.default_root_dir is None:
            variant = config.model.class_path.rsplit(".", 1)[-1]
            config.trainer.default_root_dir = str(new_run(variant))
        parser = self._parser(self.config.subcommand)
        self._config_text = parser.dump(config, skip_unset=False)
        run = RunFolder(Path(config.trainer.default_root_dir))
        if self.config.subcommand == "fit":
            check_folder(run, create=not config.dry_run)
        config.ckpt_path = _checkpoint(run, config.ckpt_path, config.resume)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer, with the self-play loop and loggers that write to the run folder."""
        settings = self._get(self.config_init, "trainer")
        check_strategy(settings.strategy)
        root = Path(settings.default_root_dir)
        callbacks = self._callbacks(list(settings.callbacks or []))
        dry_run = self._get(self.config_init, "dry_run")
        if not dry_run:
            callbacks.append(ConfigFile(root, self._config_text))
        summarized = any(isinstance(callback, ModelSummary) for callback in callbacks)
        if settings.enable_model_summary is not False and not summarized:
            callbacks.append(ParameterCount())
            kwargs["enable_model_summary"] = False
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if settings.enable_progress_bar is None and not has_bar and not console.is_terminal:
            # In a log file a bar is one endless line; `PhaseProgress` writes lines there.
            kwargs["enable_progress_bar"] = False
        if not any(isinstance(callback, Checkpoint) for callback in callbacks):
            # SelfPlay writes checkpoints/last.ckpt; Lightning would add another one.
            kwargs["enable_checkpointing"] = False
        logger = settings.logger
        if dry_run:
            logger = False
        elif logger is None or logger is True:
            logger = [
                RunCSVLogger(root),
                TensorBoardLogger(
                    root / "tensorboard", name="", version="", default_hp_metric=False
                ),
            ]
        try:
            return super().instantiate_trainer(callbacks=callbacks, logger=logger, **kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise SpinError(f"trainer: {first_line(error)}", fix=FIT_HELP) from error

    def _callbacks(self, callbacks: list[L.Callback]) -> list[L.Callback]:
        """The user's callbacks, with the self-play loop and the search for the best iterate."""
        if not any(isinstance(callback, SelfPlay) for callback in callbacks):
            intervals = ("checkpoint_minutes", "checkpoint_steps")
            callbacks.append(SelfPlay(**{n: self._get(self.config_init, n) for n in intervals}))
        if not any(isinstance(callback, BestIterate) for callback in callbacks):
            callbacks.append(BestIterate())
        for callback in callbacks:
            if isinstance(callback, SelfPlay):
                callback.dry_run = self._get(self.config_init, "dry_run")
        return callbacks


def run(args: Sequence[str] | None = None) -> None:
    """Run `fit` or `validate` with these arguments; default: those of the process."""
    quiet_libraries()
    with explained():
        SpinCLI(args)


@contextmanager
def explained() -> Iterator[None]:
    """End a dry run with a line, and turn Lightning's refusals into a user's mistake.

    Raises:
        SpinError: Lightning refused a setting.
    """
    try:
        yield
    except DryRunFinished:
        console.print("Dry run: nothing was trained, and nothing was left in the run folder.")
    except (ValueError, ArgumentError, MisconfigurationException) as error:
        refusal = _refusal_behind(error)
        if refusal is None:
            raise
        raise SpinError(first_line(refusal), fix=FIT_HELP) from error
    except RuntimeError as error:
        if not RankLost.is_cause_of(error):
            raise
        end(RankLost(), 1)


def _refusal_behind(error: Exception) -> MisconfigurationException | None:
    for cause in causes(error):
        if isinstance(cause, SpinError | OSError):
            return None
        if isinstance(cause, MisconfigurationException):
            return cause
    return None


def resolve_testbed(config: Namespace) -> None:
    """Replace the name of the embedded testbed by its paths."""
    for namespace, key in ((config.model.init_args, "model"), (config.data.init_args, "data")):
        named = _EMBEDDED.fullmatch(namespace[key]) if isinstance(namespace[key], str) else None
        if named:
            seed = config.seed_everything if named[2] == "seed" else named[2]
            made = (ensure_noisy if named[1] else ensure)(int(seed or 0))
            namespace[key] = str(getattr(made, key))


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # the name is too long
        return False


def _checkpoint(run: RunFolder, given: str | None, resume: str) -> str | None:
    """The checkpoint to start from.

    Raises:
        RunFolderError: The checkpoint does not exist, or the folder holds a run and resume is
            never.
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
