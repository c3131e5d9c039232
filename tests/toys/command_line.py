"""Arguments of a small `fit`, and a call of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

CommandLine = Callable[..., None]


def fit_arguments(root: Path, model: Path, data: Path, *more: object) -> list[object]:
    """Two iterates of SPIN in a few seconds, or of the variant that `--model` in `more` names."""
    settings = {
        "trainer.default_root_dir": root,
        "trainer.max_epochs": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.log_every_n_steps": 1,
        "model.model": model,
        "model.learning_rate": 3e-3,
        "model.generation.unit_size": 32,
        "data.data": data,
        "data.batch_size": 32,
        "data.max_response_tokens": 8,
        "seed_everything": 1,
    }
    if "--model" not in more:
        more = ("--model", "SPIN", *more)
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    # The classes come first: their settings are checked against them.
    classes = [*more[:2], "--data", "SelfPlayDataModule"]
    return ["fit", *classes, *flags, *more[2:]]
