"""What a config of `fit` names, without running it."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning import seed_everything

from spin_lightning.cli.fit import SpinCLI, resolve_testbed
from spin_lightning.cli.mistakes import mistake_behind
from spin_lightning.data.datamodule import SelfPlayDataModule
from spin_lightning.errors import SpinError
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.run.files import read_yaml


class _Reading(SpinCLI):
    """A command line that is read, with the module and the data that it names, and not run."""

    def before_instantiate_classes(self) -> None:
        """Leave names and folders as they are."""

    def instantiate_classes(self) -> None:
        """Make the module and the data, which check their settings and read no weights."""
        named = self.config[self.config.subcommand]
        chosen = Namespace(model=named.model, data=named.data)
        self._parser(self.config.subcommand).instantiate_classes(chosen)

    def _set_seed(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def check_arguments(args: Sequence[str]) -> None:
    """Read a command line of `fit` without running it.

    Raises:
        SpinError: A setting is unknown, or its value cannot work.
    """
    try:
        _Reading(args)
    except (ArgumentError, ValueError) as error:
        mistake = mistake_behind(error, "fit")
        if mistake is None:
            raise
        raise mistake from error


def data_and_model(
    config: str | None, data: dict[str, Any], model: str | None
) -> tuple[SelfPlayDataModule, SelfPlayModule]:
    """The data module and the module of a config of `fit`, before any weights are read.

    Args:
        config: Path of the config; None for the defaults.
        data: Settings of the data module that replace the config's.
        model: Folder or hub id that replaces the config's.
    """
    known = {} if config is None else read_config(Path(config))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SelfPlayModule, "model", required=True)
    parser.add_subclass_arguments(SelfPlayDataModule, "data", required=True)
    given = {"model": {} if model is None else {"model": model}, "data": data}
    default = {"model": "SPIN", "data": "SelfPlayDataModule"}
    chosen = {}
    for name, settings in given.items():
        part = known.get(name) or {}
        part = {"class_path": part} if isinstance(part, str) else part
        init_args = {**(part.get("init_args") or {}), **settings}
        chosen[name] = {"class_path": part.get("class_path", default[name]), "init_args": init_args}
    parsed = parser.parse_object(chosen)
    parsed.seed_everything = known.get("seed_everything") or 0
    resolve_testbed(parsed)
    seed_everything(parsed.seed_everything, verbose=False)
    made = parser.instantiate_classes(Namespace(model=parsed.model, data=parsed.data))
    return made.data, made.model


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        SpinError: It cannot be read, or holds no settings.
    """
    fix = "give a config of `fit`, such as the config.yaml of a run"
    content = read_yaml(path, "config", fix)
    if not isinstance(content, dict):
        raise SpinError(f"config={str(path)!r} holds no settings", fix=fix)
    return content
