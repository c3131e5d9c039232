"""Exact metrics of every iterate, inside the run that makes them."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from spin_lightning.callbacks.interfaces import IterateEvaluator
from spin_lightning.data.datamodule import SelfPlayDataModule
from spin_lightning.errors import SettingError
from spin_lightning.mixtures import mixture_logps
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.testbed.exact import exact_metrics, response_log_probs
from spin_lightning.testbed.language import Language

_LANGUAGE_FILE = "language.json"


class ExactMetrics(IterateEvaluator):
    """Measures iterates by enumeration: the exact KL(p_data || p_t), and more, on the testbed.

    It also measures the exact KL of the mixture policy, the mean of all iterates up to t.

    Args:
        language: The testbed's `language.json`; default: the one beside the data file.
    """

    def __init__(self, language: str | None = None) -> None:
        """Keep the path; `setup` reads the file."""
        self._path = None if language is None else Path(language)
        self._language: Language | None = None
        self._log_probs: dict[int, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the language.

        Raises:
            SettingError: The file does not exist; the data is not the testbed's.
        """
        data = getattr(trainer, "datamodule", None)
        source = data.data if isinstance(data, SelfPlayDataModule) else None
        if self._path is None and isinstance(source, str | Path):
            self._path = Path(source).parent / _LANGUAGE_FILE
        if self._path is None or not self._path.is_file():
            raise SettingError(
                "trainer.callbacks",
                "ExactMetrics",
                f"there is no {self._path}: exact metrics need data whose distribution is known",
                fix="use it with data: testbed, or leave the callback out",
            )
        self._language = Language.load(self._path)

    def evaluate_iterate(self, module: SelfPlayModule, t: int) -> dict[str, float]:
        """Score all responses under iterate t, and after a resume under earlier ones as well."""
        assert self._language is not None, "setup() read it"
        for i in range(t + 1):
            if i not in self._log_probs:
                self._log_probs[i] = self._score(module, i)
        log_probs = [self._log_probs[i] for i in range(t + 1)]
        mixture = mixture_logps(torch.stack(log_probs, dim=-1))
        return {
            **exact_metrics(log_probs[t], self._language),
            "exact/mixture_kl": exact_metrics(mixture, self._language)["exact/kl"],
        }

    def _score(self, module: SelfPlayModule, t: int) -> Tensor:
        assert self._language is not None, "setup() read it"
        with module.policy.at(t):
            return response_log_probs(module.policy.model, module.tokenizer, self._language)
