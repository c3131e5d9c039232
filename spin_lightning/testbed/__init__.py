"""An exactly known language: the quickstart's and the study's embedded default."""

from spin_lightning.testbed.build import TestbedPaths, ensure, ensure_noisy, train_base
from spin_lightning.testbed.evaluator import ExactMetrics
from spin_lightning.testbed.exact import exact_metrics, response_log_probs
from spin_lightning.testbed.language import Language, sample
from spin_lightning.testbed.small_model import (
    byte_tokenizer,
    small_config,
    train_small_llama,
    word_tokenizer,
)

__all__ = [
    "ExactMetrics",
    "Language",
    "TestbedPaths",
    "byte_tokenizer",
    "ensure",
    "ensure_noisy",
    "exact_metrics",
    "response_log_probs",
    "sample",
    "small_config",
    "train_base",
    "train_small_llama",
    "word_tokenizer",
]
