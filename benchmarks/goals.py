"""The goal of each figure, and the figures that a size measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """A bound on one field of a figure."""

    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float) -> bool:
        """Whether the value is within the bound, at the two digits that are printed."""
        value = round(value, 2)
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )

    def __str__(self) -> str:
        """The bound as it is printed."""
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"


@dataclass(frozen=True)
class Subject:
    """What a figure is about.

    Attributes:
        what: What is measured.
        against: What it is compared with.
        goals: Bounds by field of the figure.
    """

    what: str
    against: str
    goals: dict[str, Goal]


_TRL = "TRL's DPOTrainer at its best"
_GENERATE = "`generate`, one adapter after the other, plain batches"

# By name of the figure. ratio: the other side's time over ours; floor: our time over that of the
# bare matrix products; peak: our peak memory over the other side's; cost, spread: see `against`.
SUBJECTS: dict[str, Subject] = {
    "step_a": Subject(
        "training step, workload A",
        _TRL,
        {"ratio": Goal(2.2), "floor": Goal(at_most=1.10), "peak": Goal(at_most=0.25)},
    ),
    "step_b": Subject(
        "training step, workload B", _TRL, {"ratio": Goal(2.6), "floor": Goal(at_most=1.15)}
    ),
    "step_a_nf4": Subject("training step, workload A, NF4", _TRL, {"ratio": Goal(3.0)}),
    "scoring_first": Subject(
        "reference log-probs under 4 iterates and the base",
        "a loop of padded passes with all logits",
        {"ratio": Goal(2.4)},
    ),
    "scoring_next": Subject(
        "the same for the next iterate's rows, fictitious play with a reservoir",
        "the same loop",
        {"ratio": Goal(4.0)},
    ),
    "generation": Subject("generating from 4 iterates", _GENERATE, {"ratio": Goal(3.0)}),
    "generation_nf4": Subject("generating from 4 iterates, NF4", _GENERATE, {"ratio": Goal(2.0)}),
    "token_mixture": Subject(
        "sampling a token-level mixture with the base",
        "plain sampling of the same decoder",
        {"cost": Goal(at_most=1.4)},
    ),
    "token_mixture_nf4": Subject(
        "sampling a token-level mixture with the base, NF4",
        "plain sampling of the same decoder",
        {"cost": Goal(at_most=1.15)},
    ),
    "reservoir": Subject(
        "responses generated per iterate, fictitious play",
        "N/(t+1), t = 0 to 4: the largest excess",
        {"excess": Goal(at_most=1.1)},
    ),
    "iterate": Subject(
        "one whole iterate: generate, score, 2 epochs",
        "`generate` and TRL's DPOTrainer",
        {"ratio": Goal(2.5)},
    ),
    "growth_pairs": Subject(
        "time per pair at 4, 8, 16 and 32 pairs", "itself", {"spread": Goal(at_most=1.2)}
    ),
    "growth_prompt": Subject(
        "time per distinct token, prompts of 128 to 1024", "itself", {"spread": Goal(at_most=1.2)}
    ),
    "growth_memory": Subject(
        "peak memory at 4, 8, 16 and 32 pairs", "itself", {"spread": Goal(at_most=2.0)}
    ),
    "iterate_nf4": Subject(
        "one whole iterate: generate, score, 2 epochs, NF4", "`generate` and TRL's DPOTrainer", {}
    ),
    **{
        f"slots_{slots}{suffix}": Subject(
            f"decoding from 4 iterates in {slots} slots{kind}",
            "`generate`, one adapter after the other, batches of as many rows",
            {},
        )
        for suffix, kind in (("", ""), ("_nf4", ", NF4"))
        for slots in (16, 64, 128)
    },
}
# Figures of large models, which only the sizes for a GPU measure.
_ON_A_GPU = ("iterate_nf4", *(name for name in SUBJECTS if name.startswith("slots_")))

# Sizes that measure only some of the figures, with goals of their own; none where it is empty.
_OF_SIZE: dict[str, dict[str, dict[str, Goal]]] = {
    "smollm2": {
        "step_a": {"ratio": Goal(4.0), "peak": Goal(at_most=0.33)},
        "scoring_first": {},
        "scoring_next": {},
        "generation": {"ratio": Goal(3.0)},
        "token_mixture": {},
        "iterate": {},
    },
}


def goals_of(size: str) -> Mapping[str, Mapping[str, Goal]]:
    """The figures that a size measures, and the goals of each."""
    everything = {name: subject.goals for name, subject in SUBJECTS.items()}
    if size == "22m":
        return {name: goals for name, goals in everything.items() if name not in _ON_A_GPU}
    return _OF_SIZE.get(size, everything)
