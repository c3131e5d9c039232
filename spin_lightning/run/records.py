"""Typed records of iterates: what `iterate.json` and `best.json` hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from spin_lightning.run.validation import (
    COUNT,
    DATE,
    FILE_HASHES,
    INDEX,
    NUMBER,
    NUMBERS,
    OBJECT,
    TEXT,
    TEXT_BY_NAME,
    WHOLE,
    check_fields,
    optional,
)

# What making an iterate consists of, and, with what comes before it, the phases of its memory.
STAGES: Final = ("generating", "scoring", "training")
PHASES: Final = ("before", *STAGES)


@dataclass(frozen=True)
class TrainingRecord:
    """How an iterate was trained.

    Attributes:
        opponent: The opponent, as shown in tables; None without an opponent.
        reference: The reference of the log-ratios.
        rows: Training rows.
        loss: Mean loss of the last epoch; None where Lightning has no figure.
        margin: Mean reward margin of the held-out pairs, in units of beta times nats.
        accuracy: Share of held-out pairs whose real response has the larger reward.
        seconds: Time of each of `STAGES`, over all starts of the run.
        speed: Metrics of speed, see `callbacks.speed`; older versions did not record them.
        peak_memory: Bytes.
        phase_peaks: Peak memory at the end of each of `PHASES` that raised it, bytes.
        early: Mean `accuracy` and `loss` of the batches in the second half of the iterate's first
            tenth, and their number of `pairs`; None for fewer than ten batches.
        deviations: Settings overridden at run time, for want of memory; of any process.
        others: Fields of other versions, written back as they were read.
    """

    opponent: str | None = None
    reference: str | None = None
    rows: int | None = None
    loss: float | None = None
    margin: float | None = None
    accuracy: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    speed: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    phase_peaks: Mapping[str, int] = field(default_factory=dict)
    early: Mapping[str, float] | None = None
    deviations: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, content: object) -> TrainingRecord:
        """Read a record from JSON.

        Raises:
            ValueError: A field has an invalid value.
        """
        own, others = _split(check_fields(content, _TRAINING_RULES), _TRAINING_RULES)
        return cls(**own, others=others)

    def to_json(self) -> dict[str, Any]:
        """The record as plain values."""
        plain = asdict(self)
        for name in ("early", "phase_peaks", "deviations"):
            if not plain[name]:
                del plain[name]
        return {**plain.pop("others"), **plain}


@dataclass(frozen=True)
class IterateRecord:
    """One iterate, as `iterates/iterate_00t/iterate.json` holds it.

    Attributes:
        index: Index t of the iterate.
        parent: The iterate that it was trained from; None for iterate 0.
        files: SHA-256 of each adapter file, by name; empty for the bare base.
        base: Fields of the frozen base (`policies.pretrained.FrozenBase`).
        fingerprint: Hash of `fingerprint_fields`.
        fingerprint_fields: All settings that two iterates of the same run share.
        step: Optimizer steps of the run when the iterate was complete.
        training: How it was trained; None for iterate 0.
        tokenizer_files: SHA-256 of each file of the run's tokenizer; recorded with iterate 0 only,
            and not by older versions.
        template_date: The date (2026-01-31) that the chat template writes as today's; recorded with
            iterate 0 only, and where the template writes one.
        metrics: Its held-out and benchmark metrics; None until it is measured.
        rows: Metrics of the rows that it generated for the next iterate; None until they are made.
        cues: What each single cue that tells real from generated responses says, in words;
            recorded with the rows' metrics.
        others: Fields of other versions, written back as they were read.
    """

    index: int
    parent: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    fingerprint_fields: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    training: TrainingRecord | None = None
    tokenizer_files: Mapping[str, str] | None = None
    template_date: str | None = None
    metrics: Mapping[str, float] | None = None
    rows: Mapping[str, float] | None = None
    cues: Mapping[str, str] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """Name of the module's class; empty where it was not recorded."""
        return str(self.fingerprint_fields.get("variant", "")).rsplit(".", 1)[-1]

    @classmethod
    def of(cls, content: object, t: int) -> IterateRecord:
        """Read the record of iterate t from JSON.

        Raises:
            ValueError: It is not the record of iterate t, or a field is missing or invalid.
        """
        known = check_fields(content, _RULES, required=set(_RULES) - set(_LATE))
        if known["index"] != t:
            raise ValueError(f"it is the record of iterate {known['index']}")
        own, others = _split(known, _RULES)
        if own["training"] is not None:
            own["training"] = TrainingRecord.of(own["training"])
        return cls(**own, others=others)

    def to_json(self) -> dict[str, Any]:
        """The record as plain values, without the fields that have no value yet."""
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        others = plain.pop("others")
        if self.training is not None:
            plain["training"] = self.training.to_json()
        return {**others, **{n: v for n, v in plain.items() if n not in _LATE or v is not None}}

    @property
    def measured(self) -> Mapping[str, float]:
        """Its metrics and those of its rows, if any."""
        return {**(self.metrics or {}), **(self.rows or {})}


@dataclass(frozen=True)
class BestRecord:
    """The best iterate, as `iterates/best.json` holds it.

    Attributes:
        index: Index of the iterate.
        metric: The metric that ranks the iterates.
        value: Its value at this iterate.
    """

    index: int
    metric: str
    value: float

    @classmethod
    def of(cls, content: object) -> BestRecord:
        """Read a record from JSON.

        Raises:
            ValueError: A field is missing or has an invalid value.
        """
        rules = {"index": INDEX, "metric": TEXT, "value": NUMBER}
        known = check_fields(content, rules, required=rules)
        return cls(known["index"], known["metric"], float(known["value"]))


def _split(
    known: Mapping[str, Any], own: Mapping[str, object]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of this version, and those of others."""
    return (
        {name: value for name, value in known.items() if name in own},
        {name: value for name, value in known.items() if name not in own},
    )


_RULES: Final = {
    "index": INDEX,
    "parent": optional(INDEX),
    "files": FILE_HASHES,
    "base": OBJECT,
    "fingerprint": TEXT,
    "fingerprint_fields": OBJECT,
    "step": WHOLE,
    "training": optional(OBJECT),
    "tokenizer_files": FILE_HASHES,
    "template_date": DATE,
    "metrics": NUMBERS,
    "rows": NUMBERS,
    "cues": TEXT_BY_NAME,
}
# Every version wrote the other fields, at the moment it kept the iterate.
_LATE: Final = ("tokenizer_files", "template_date", "metrics", "rows", "cues")
_TRAINING_RULES: Final = {
    "opponent": optional(TEXT),
    "reference": optional(TEXT),
    "rows": optional(COUNT),
    "loss": optional(NUMBER),
    "margin": optional(NUMBER),
    "accuracy": optional(NUMBER),
    "seconds": NUMBERS,
    "speed": NUMBERS,
    "peak_memory": optional(NUMBER),
    "phase_peaks": NUMBERS,
    "early": NUMBERS,
    "deviations": OBJECT,
}
