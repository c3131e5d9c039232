"""The metrics of iterates that reports show, each with its meaning in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from spin_lightning.run.records import IterateRecord


@dataclass(frozen=True)
class Measure:
    """A metric over the iterates.

    Attributes:
        name: Its name in the iterates' records.
        title: Its title, with the unit.
        meaning: Its definition, in one line.
        best: Which end is better; None if neither is.
        log: Whether its axis is logarithmic.
    """

    name: str
    title: str
    meaning: str
    best: Literal["min", "max"] | None = None
    log: bool = False


MEASURES: Final = (
    Measure(
        "exact/kl",
        "Exact KL to the data, nats",
        "KL(p_data ‖ p_t) by enumeration, mean over prompts: the distance that self-play closes.",
        "min",
        log=True,
    ),
    Measure(
        "exact/mixture_kl",
        "Exact KL of the mixture policy, nats",
        "KL(p_data ‖ mean of p_0 … p_t): the mixture policy of all iterates so far.",
        "min",
        log=True,
    ),
    Measure(
        "exact/reverse_kl",
        "Exact reverse KL, nats",
        "KL(p_t ‖ p_data) of p_t within the language: large if p_t generates what the data lack.",
        "min",
    ),
    Measure(
        "exact/total_variation",
        "Total variation",
        "Half the summed difference of p_t and p_data over all strings, 0 to 1.",
        "min",
    ),
    Measure(
        "exact/entropy",
        "Entropy, nats",
        "Entropy of p_t within the language, mean over prompts: it falls as responses narrow.",
    ),
    Measure(
        "exact/outside_mass",
        "Mass outside the language",
        "Probability that p_t generates a string outside the language.",
        "min",
    ),
    Measure(
        "val/real_nll_per_token",
        "NLL of real responses, nats per token",
        "−Σ log p_t(y|x) / Σ |y| over held-out real responses; compares across iterates and runs.",
        "min",
    ),
    Measure(
        "val/kl_base",
        "KL to the base, nats per response",
        "KL(p_t ‖ p_0): mean log p_t(y′) − log p_0(y′) of held-out y′ ~ p_t, ± standard error.",
    ),
    Measure(
        "val/kl_previous",
        "KL to the iterate before, nats per response",
        "KL(p_t ‖ p_{t−1}), likewise: how far the last iterate moved.",
    ),
    Measure(
        "val/generated_tokens",
        "Length of generated responses, tokens",
        "Mean length of held-out y′ ~ p_t; dashed: of the real responses.",
    ),
    Measure(
        "val/finished",
        "Share of responses that end",
        "Held-out responses that reach a stop token before the cap.",
    ),
    Measure(
        "rows/distinct_1",
        "Distinct 1-grams",
        "Distinct tokens over all tokens of the responses that train the next iterate.",
    ),
    Measure(
        "rows/distinct_2",
        "Distinct 2-grams",
        "Distinct pairs of neighboring tokens over all such pairs, likewise.",
    ),
    Measure(
        "rows/duplicates",
        "Duplicates",
        "Share of the training rows' responses that another row also has.",
    ),
    Measure(
        "rows/tells/best",
        "Best single cue, balanced accuracy",
        "How well the best of first and last token, length, special token and end tells real from "
        "generated responses; 0.5 is a coin.",
    ),
    Measure(
        "rows/regenerated",
        "Share regenerated",
        "Share of rows that were generated at this iterate, not kept from the one before.",
    ),
)
# Metrics that tables of benchmarks show, or other measures beside their own line.
_SHOWN_ELSEWHERE = ("lm_eval/", "mt_bench")
_BESIDE = ("val/real_tokens", "val/real_finished", "iterate")
_PARTS = ("_error", "_per_token")

Records = Sequence[IterateRecord]


def points(records: Records, name: str) -> dict[int, float]:
    """Values of a metric by iterate, for the iterates that have it."""
    return {
        record.index: float(record.measured[name]) for record in records if name in record.measured
    }


def measures_of(histories: Iterable[Records]) -> list[Measure]:
    """The measures that some run has, then metrics logged by the run's other callbacks."""
    names: dict[str, None] = {}
    for records in histories:
        for record in records:
            names |= dict.fromkeys(record.measured)
    known = [measure for measure in MEASURES if measure.name in names]
    ours = {measure.name for measure in MEASURES}
    others = [
        name
        for name in names
        if name not in ours
        and not name.startswith((*_SHOWN_ELSEWHERE, "rows/", "val/kl_"))
        and name not in _BESIDE
        and not name.endswith(_PARTS)
    ]
    return known + [Measure(name, name, "Logged by a callback of the run.") for name in others]


def best_of(measure: Measure, values: Mapping[int, float]) -> int | None:
    """The only iterate at the better end; None if neither end is better, or for a single value."""
    if measure.best is None or len(values) < 2:
        return None
    wanted = min(values.values()) if measure.best == "min" else max(values.values())
    best = [t for t, value in values.items() if value == wanted]
    return best[0] if len(best) == 1 else None
