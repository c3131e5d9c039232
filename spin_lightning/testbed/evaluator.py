"""Exact metrics of every iterate, inside the run that makes them."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from spin_lightning.callbacks.evaluate import IterateEvaluator
from spin_lightning.data.datamodule import SelfPlayDataModule
from spin_lightning.errors import SettingError
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.testbed.exact import exact_metrics, response_log_probs
from spin_lightning.testbed.language import Language

_LANGUAGE_FILE = "language.json"


class ExactMetrics(IterateEvaluator):
    """Measures iterates by enumeration: the exact KL(p_data || p_t), and more, on the testbed.

    Args:
        language: The testbed's `language.json`; the one beside the data file if nothing is said.
    """

    def __init__(self, language: str | None = None) -> None:
        """Keep where the language lies; it is read by `setup`."""
        self._path = None if language is None else Path(language)
        self._language: Language | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the language.

        Raises:
            SettingError: There is none: the data is not the testbed's.
        """
        data = getattr(trainer, "datamodule", None)
        if self._path is None and isinstance(data, SelfPlayDataModule):
            self._path = Path(data.data).parent / _LANGUAGE_FILE
        if self._path is None or not self._path.is_file():
            raise SettingError(
                "trainer.callbacks",
                "ExactMetrics",
                f"there is no {self._path}: exact metrics need data whose distribution is known",
                fix="use it with data: testbed, or leave the callback out",
            )
        self._language = Language.load(self._path)

    def evaluate_iterate(self, module: SelfPlayModule, t: int) -> dict[str, float]:
        """Score every response of the language under iterate t."""
        assert self._language is not None, "setup() read it"
        with module.policy.at(t):
            log_probs = response_log_probs(module.policy.model, module.tokenizer, self._language)
        return exact_metrics(log_probs, self._language)
