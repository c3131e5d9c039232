"""The metrics of iterates, each with what it means in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal


@dataclass(frozen=True)
class Measure:
    """A metric over the iterates.

    Attributes:
        name: In the iterates' records.
        title: What it is called, with the unit.
        meaning: What it is, in one line.
        best: Which end is good; None where neither is.
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
        "KL(p_t ‖ p_data) of p_t within the language: large where p_t says what the data do not.",
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
        "Entropy of p_t within the language, mean over prompts: it falls where responses narrow.",
    ),
    Measure(
        "exact/outside_mass",
        "Mass outside the language",
        "Probability that p_t says anything that is no sentence of the language.",
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
        "Different tokens over all tokens of the responses that train the next iterate.",
    ),
    Measure(
        "rows/distinct_2",
        "Distinct 2-grams",
        "Different pairs of neighboring tokens over all such pairs, likewise.",
    ),
    Measure(
        "rows/duplicates",
        "Duplicates",
        "Share of the training rows' responses that another row has as well.",
    ),
    Measure(
        "rows/regenerated",
        "Share generated anew",
        "Rows that were generated at this iterate and not kept from the one before.",
    ),
)
# What other measures show beside their own line, or the tables of benchmarks have.
_SHOWN_ELSEWHERE = ("lm_eval/", "mt_bench")
_BESIDE = ("val/real_tokens", "val/real_finished", "iterate")
_PARTS = ("_error", "_per_token")


Records = Sequence[Mapping[str, Any]]


def points(records: Records, name: str) -> dict[int, float]:
    """Values of a metric by iterate, where it is known."""
    values = {}
    for record in records:
        known = {**(record.get("metrics") or {}), **(record.get("rows") or {})}
        if name in known:
            values[int(record["index"])] = float(known[name])
    return values


def measures_of(histories: Iterable[Records]) -> list[Measure]:
    """The measures that some run has, and those that a callback of its own has logged."""
    names: dict[str, None] = {}
    for records in histories:
        for record in records:
            names |= dict.fromkeys({**(record.get("metrics") or {}), **(record.get("rows") or {})})
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
    """The iterate at the good end; None where there is no such end, or nothing to compare."""
    if measure.best is None or len(values) < 2:
        return None
    sign = 1 if measure.best == "min" else -1
    return min(values, key=lambda t: (sign * values[t], t))
