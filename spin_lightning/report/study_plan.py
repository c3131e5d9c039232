"""The runs of a study: one per variant and seed. The command line's help text reads this file."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from spin_lightning.errors import SettingError
from spin_lightning.run.fingerprint import fingerprint

# The family, with the smallest history that mixes. The alpha is our own choice.
STABILITY_VARIANTS: Final = (
    "SPIN",
    "MixtureSPIN(history=2)",
    "FictitiousSPIN",
    "AlphaSPIN(alpha=0.3)",
    "SFT",
)
# File systems take 255 bytes, and runs write names of their own beside their folder.
_LONGEST_NAME: Final = 200
LORA_SETTINGS: Final = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


@dataclass(frozen=True)
class Play:
    """One run of a study.

    Attributes:
        variant: The variant with its settings, such as `AlphaSPIN(alpha=0.3)`.
        model: Its class: a name from `spin_lightning`, or an import path.
        settings: Its settings.
        seed: Seed of the run, and of its testbed if it has one.
        epochs: Its number of epochs; None for the config's.
        stage: Beginning of its folder's name.
        overrides: Further settings of `fit` by full name, such as `model.beta`.
    """

    variant: str
    model: str
    settings: Mapping[str, Any]
    seed: int
    epochs: int | None = None
    stage: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, variant: str, seed: int) -> Play:
        """Read `Class` or `Class(setting=value, …)`.

        Raises:
            SettingError: It is neither.
        """
        try:
            node = ast.parse(variant, mode="eval").body
            call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
            settings = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        except (SyntaxError, ValueError) as error:
            raise _unreadable(variant) from error
        if call.args or not isinstance(call.func, ast.Name | ast.Attribute):
            raise _unreadable(variant)
        return cls(variant, ast.unparse(call.func), settings, seed)

    @property
    def name(self) -> str:
        """What it plays, as the name of a folder."""
        parts = [
            f"{self.stage}{self.variant}",
            *(f"{name}={value}" for name, value in self.overrides.items()),
        ]
        names = [re.sub(r"[^\w.=-]+", "_", part).strip("_") for part in parts]
        name = "-".join([*names, f"seed{self.seed}"])
        if len(name) <= _LONGEST_NAME:
            return name
        digest = fingerprint({"parts": parts})[:12]
        return f"{name[: _LONGEST_NAME - 30]}-{digest}-seed{self.seed}"

    def folder(self, out: Path) -> Path:
        """The run's folder below `out`."""
        return out / self.name

    def arguments(self, config: str, out: Path, start: Path | None = None) -> list[str]:
        """The command line that plays the run, from `fit` on.

        Args:
            config: The config of `fit`.
            out: The study's folder.
            start: Adapter to start from, whose settings replace the config's lora_*.
        """
        own = [f"--model.{name}={_text(value)}" for name, value in self.settings.items()]
        own += [f"--{name}={_text(value)}" for name, value in self.overrides.items()]
        if start is not None:
            own += [f"--model.{name}=null" for name in LORA_SETTINGS]
            own += [f"--model.initial_adapter={start}"]
        if self.epochs is not None:
            own += [f"--trainer.max_epochs={self.epochs}"]
        return [
            *("fit", "--config", config, "--model", self.model, *own),
            *(f"--seed_everything={self.seed}", f"--trainer.default_root_dir={self.folder(out)}"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        ]


def _text(value: object) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _unreadable(variant: str) -> SettingError:
    return SettingError(
        "variants",
        variant,
        "it does not name a class",
        fix="write a name such as FictitiousSPIN, or with settings 'AlphaSPIN(alpha=0.3)'",
    )
