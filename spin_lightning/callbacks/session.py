"""What the self-play loop uses: the trainer, the module, the data and the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from transformers import PreTrainedTokenizerBase

from spin_lightning import keyed
from spin_lightning.data.datamodule import SelfPlayDataModule
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import SettingError
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.run.folder import RunFolder


def run_folder_of(trainer: L.Trainer) -> RunFolder:
    """The run folder of a trainer with a `SelfPlay` callback, once that is set up."""
    folder = _data_of(trainer).run_folder
    assert folder is not None, "SelfPlay.setup() has set it"
    return folder


def tokenizer_of(trainer: L.Trainer) -> PreTrainedTokenizerBase:
    """The tokenizer of a trainer's run, with the chat template as used."""
    text_format = _data_of(trainer).format
    assert text_format is not None, "setup() of the data module chose it"
    return text_format.tokenizer


def _data_of(trainer: L.Trainer) -> SelfPlayDataModule:
    data = getattr(trainer, "datamodule", None)
    assert isinstance(data, SelfPlayDataModule), "SelfPlay.setup() has checked it"
    return data


@dataclass(frozen=True)
class Session:
    """One `Trainer.fit` of a self-play run.

    Attributes:
        trainer: The trainer.
        module: Its module.
        data: Its data module.
        run: The run folder.
    """

    trainer: L.Trainer
    module: SelfPlayModule
    data: SelfPlayDataModule
    run: RunFolder

    @classmethod
    def of(cls, trainer: L.Trainer, pl_module: L.LightningModule, run: RunFolder) -> Session:
        """Check the classes of a trainer's module and data module.

        Raises:
            SettingError: One of them is not a class for self-play.
        """
        data = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, SelfPlayModule) or not isinstance(data, SelfPlayDataModule):
            raise SettingError(
                "callbacks",
                "SelfPlay",
                f"it got a {type(pl_module).__name__} and a {type(data).__name__}",
                fix="train a SelfPlayModule with a SelfPlayDataModule: "
                "Trainer.fit(module, datamodule)",
            )
        return cls(trainer, pl_module, data, run)

    def fingerprint_fields(self, t: int) -> dict[str, Any]:
        """Everything that must stay the same for iterates up to t to belong to the same run."""
        trainer, data = self.trainer, self.data
        batch = data.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        return {
            **self.module.fingerprint_fields(t),
            **data.fingerprint_fields(),
            "seed": keyed.global_seed(),
            "batch_size": batch,
            "gradient_clip_val": trainer.gradient_clip_val,
            "precision": str(trainer.precision),
            "limit_train_batches": trainer.limit_train_batches,
        }

    @property
    def text_format(self) -> PromptFormat:
        """How text becomes ids in this run."""
        assert self.data.format is not None, "setup() of the data module chose it"
        return self.data.format

    @property
    def callbacks(self) -> list[Callback]:
        """The trainer's callbacks."""
        # (mypy does not see what Lightning's connectors set.)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return callbacks

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics to all loggers of the trainer."""
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(metrics), step=step)
