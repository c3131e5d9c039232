"""Known states of a run, recognized from the records of its iterates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from spin_lightning.report.cue_words import CUE_NAMES
from spin_lightning.run.records import BestRecord, IterateRecord

PAGE: Final = "docs/troubleshooting.md"
_NLL: Final = "val/real_nll_per_token"
_ACCURACY: Final = "rows/tells/accuracy/"


class Limit(NamedTuple):
    """A threshold, and why it is what it is."""

    value: float
    reason: str


_SAME_ANSWERS: Final = "every iterate scores the same held-out answers; less is noise of training"
LIMITS: Final[Mapping[str, Limit]] = {
    "early_accuracy": Limit(0.99, "in the first tenth little can be learned but a shortcut"),
    "early_pairs": Limit(32, "of fewer pairs all may be won by chance"),
    "cue_accuracy": Limit(0.98, "one look at one token or number then solves the whole task"),
    "nll_rise": Limit(0.02, _SAME_ANSWERS),
    "length_ratio": Limit(2.0, "a mere change of style moves mean lengths by less"),
    "finished_drop": Limit(0.2, "on 100 held-out responses, three to four standard errors"),
    "kl_per_token": Limit(0.5, "the average token is 1.6 times as likely as under the base"),
    "flat_loss": Limit(0.01, "a logistic loss near log 2 moves that far with a margin of 0.014"),
    "flat_margin": Limit(0.05, "the odds of the real response are then 51 to 49"),
    "worse_than_best": Limit(0.02, _SAME_ANSWERS),
    "above_base": Limit(0.02, _SAME_ANSWERS),
}


@dataclass(frozen=True)
class Verdict:
    """A known state of a run.

    Attributes:
        name: Its name, which is the anchor of its entry in `docs/troubleshooting.md`.
        level: warning: something to act on; note: usual.
        iterates: The iterates that are in this state, ascending.
        state: The state, in a few words.
        measured: What was measured, at the last of these iterates.
        cause: What causes it.
        advice: What to do.
    """

    name: str
    level: Literal["warning", "note"]
    iterates: tuple[int, ...]
    state: str
    measured: str
    cause: str
    advice: str

    @property
    def where(self) -> str:
        """The iterates, such as `p2, p3`."""
        return ", ".join(f"p{t}" for t in self.iterates)

    @property
    def entry(self) -> str:
        """Where the documentation says more."""
        return f"{PAGE}#{self.name}"


@dataclass(frozen=True)
class _History:
    """The records of the iterates 0 to the newest, and the best one if the run has ranked them."""

    records: Sequence[IterateRecord]
    best: BestRecord | None

    def value(self, t: int, name: str) -> float | None:
        """A metric of iterate t or of its rows; None if it has none or it is NaN."""
        value = self.records[t].measured.get(name)
        return None if value is None or value != value else float(value)


@dataclass(frozen=True)
class _State:
    """A state that can be recognized.

    Attributes:
        measure: What was measured at iterate t, in words; None if t is not in this state.
    """

    name: str
    level: Literal["warning", "note"]
    state: str
    cause: str
    advice: str
    measure: Callable[[_History, int], str | None]


def find_verdicts(
    records: Sequence[IterateRecord], best: BestRecord | None = None
) -> list[Verdict]:
    """Recognize the states of a run, each once, warnings first.

    Args:
        records: The record of each iterate from 0 to the newest, ascending.
        best: The best iterate, if the run has ranked them.
    """
    history, found = _History(records, best), []
    for s in _STATES:
        measured = {t: text for t in range(len(records)) if (text := s.measure(history, t))}
        if measured:
            text = measured[max(measured)]
            found.append(
                Verdict(s.name, s.level, tuple(measured), s.state, text, s.cause, s.advice)
            )
    return found


def _separable(history: _History, t: int) -> str | None:
    """Rows of p_t whose sides one look tells apart, or whose pairs were won at once."""
    accuracies = {name: history.value(t, _ACCURACY + name) for name in CUE_NAMES}
    known = {name: value for name, value in accuracies.items() if value is not None}
    cue = max(known, key=lambda name: known[name], default=None)
    parts = []
    after = history.records[t + 1].training if t + 1 < len(history.records) else None
    early = (after.early if after else None) or {}
    won, pairs = early.get("accuracy", 0.0), early.get("pairs", 0)
    early_is_high = won >= LIMITS["early_accuracy"].value and pairs >= LIMITS["early_pairs"].value
    if early_is_high:
        parts.append(f"reward accuracy {won:.2f} in the first tenth of training p{t + 1}")
    elif cue is None or known[cue] < LIMITS["cue_accuracy"].value:
        return None
    if cue is not None:
        words = (history.records[t].cues or {}).get(cue)
        unclear = ", which does not explain it" if early_is_high else ""
        rule = f" ({words})" if words else unclear
        parts.append(f"best single cue: {CUE_NAMES[cue]}, {known[cue]:.2f}{rule}")
    return "; ".join(parts)


def _real_log_probs_fall(history: _History, t: int) -> str | None:
    training = history.records[t].training
    margin = None if training is None else training.margin
    now, before = history.value(t, _NLL), history.value(t - 1, _NLL) if t else None
    if margin is None or margin <= 0 or now is None or before is None:
        return None
    if now <= before * (1 + LIMITS["nll_rise"].value):
        return None
    return f"NLL of real responses {before:.3f} → {now:.3f} nats per token, margin {margin:+.2f}"


def _length_runs_off(history: _History, t: int) -> str | None:
    """Lengths that are far from the real ones and further from them than those of p_0."""
    now, first = (history.value(i, "val/generated_tokens") for i in (t, 0))
    real = history.value(t, "val/real_tokens")
    if not now or not first or not real:
        return None
    ratio = LIMITS["length_ratio"].value
    if max(now, real) <= ratio * min(now, real) or max(now, first) <= ratio * min(now, first):
        return None
    # On the way from the base's length to the real one.
    if min(first, real) <= now <= max(first, real):
        return None
    return f"{now:.1f} tokens on average; the base wrote {first:.1f}, the real ones have {real:.1f}"


def _finished_drops(history: _History, t: int) -> str | None:
    now, first = (history.value(i, "val/finished") for i in (t, 0))
    real = history.value(t, "val/real_finished")
    if now is None or first is None or real is None:
        return None
    if min(first, real) - now <= LIMITS["finished_drop"].value:
        return None
    return f"{now:.0%} of the responses end; of the base's {first:.0%}, of the real ones {real:.0%}"


def _far_from_base(history: _History, t: int) -> str | None:
    kl, bound = history.value(t, "val/kl_base_per_token"), LIMITS["kl_per_token"].value
    if kl is None or kl <= bound:
        return None
    return f"KL to the base {kl:.2f} nats per token; the bound is {bound:.2f}"


def _flat_loss(history: _History, t: int) -> str | None:
    """The first iterate's loss; later ones are flat when there is nothing left to learn."""
    training = history.records[t].training
    if t != 1 or training is None or training.margin is None or training.loss is None:
        return None
    start = (training.early or {}).get("loss")
    if start is None or abs(training.margin) >= LIMITS["flat_margin"].value:
        return None
    if abs(training.loss - start) > LIMITS["flat_loss"].value * abs(start):
        return None
    return (
        f"loss {start:.4f} in the first tenth, {training.loss:.4f} over the epoch, held-out margin "
        f"{training.margin:+.3f}"
    )


def _overshoots(history: _History, t: int) -> str | None:
    """The newest iterate of self-play, from p2 on: p1 overshoots in runs that settle as well."""
    training = history.records[t].training
    if t < 2 or t != history.records[-1].index or training is None or training.opponent is None:
        return None
    now, first = (history.value(i, _NLL) for i in (t, 0))
    if now is None or first is None:
        return None
    if now <= first * (1 + LIMITS["above_base"].value):
        return None
    return f"NLL of held-out real responses {now:.3f} nats per token; p0 had {first:.3f}"


def _worse_than_best(history: _History, t: int) -> str | None:
    """The newest iterate only: what came before has been seen."""
    if t != history.records[-1].index:
        return None
    name = history.best.metric if history.best else _NLL
    values = {i: v for i in range(t + 1) if (v := history.value(i, name)) is not None}
    if t not in values:
        return None
    # Without a ranking, by the default metric. What differs from the best is worse.
    best = history.best.index if history.best else min(values, key=lambda i: (values[i], i))
    if best not in values or best == t:
        return None
    if abs(values[t] - values[best]) <= LIMITS["worse_than_best"].value * abs(values[best]):
        return None
    return f"{name} {values[t]:.4g}; p{best} had {values[best]:.4g}"


_STATES: Final = (
    _State(
        "separable-pairs",
        "warning",
        "Real and generated responses are told apart at a glance",
        "One property separates them, so the loss is solved without learning anything else.",
        "Look at what tells them apart. Remove a cue that the template or the preparation of the "
        "data wrote; for one of style, start from an adapter of SFT.",
        _separable,
    ),
    _State(
        "length",
        "warning",
        "The length of generated responses runs off",
        "Longer or shorter responses win the pairs, and the policy went on past the real ones.",
        "Use the iterate before; lower the learning rate or raise beta, or anchor with "
        "real_nll_weight.",
        _length_runs_off,
    ),
    _State(
        "unfinished",
        "warning",
        "Fewer and fewer responses end",
        "The stop token lost probability: too large steps, or real responses that are cut at "
        "max_response_tokens and so have no stop token.",
        "Raise max_response_tokens until real responses end, lower the learning rate, or anchor "
        "with real_nll_weight.",
        _finished_drops,
    ),
    _State(
        "far-from-base",
        "warning",
        "The policy is far from the base",
        "The loss can go on growing margins after the responses have become good.",
        "Prefer an earlier iterate; raise beta, lower the learning rate or play fewer iterates.",
        _far_from_base,
    ),
    _State(
        "flat-loss",
        "warning",
        "The loss is flat from the start",
        "The learning rate is too small, beta is tiny, the adapter is not trained, or the base "
        "already writes like the data.",
        "Multiply the learning rate by ten. If no cue and no token tells the responses apart, "
        "there is nothing to learn.",
        _flat_loss,
    ),
    _State(
        "overshoot",
        "warning",
        "Real responses are less likely than before self-play",
        "Each iterate goes past its best response, and the next one past it on the other side: "
        "beta is too small for this many steps and this history. If it rose slowly instead, few "
        "examples are being learned by heart.",
        "Use an earlier iterate. Raise beta, lower the learning rate, or play against more past "
        "iterates (FictitiousSPIN).",
        _overshoots,
    ),
    _State(
        "worse-than-best",
        "warning",
        "The newest iterate is worse than the best",
        "Self-play need not improve with every iterate: margins can be won by pushing both "
        "responses down.",
        'Use load_iterate(run, "best"); set patience of BestIterate, or a smaller learning rate '
        "for later iterates.",
        _worse_than_best,
    ),
    _State(
        "real-log-probs-fall",
        "note",
        "Log-probs of real responses fall while margins grow",
        "Usual for losses of the margin: they only ask that generated responses fall faster.",
        "It matters if scores or samples get worse too; then anchor with real_nll_weight or raise "
        "beta.",
        _real_log_probs_fall,
    ),
)
# The names, in the order of the list.
STATES: Final = tuple(state.name for state in _STATES)
