"""What a run knows of its iterates: typed records of `iterate.json` and `best.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Final

from spin_lightning.run.validation import (
    COUNT,
    FILE_HASHES,
    INDEX,
    NUMBER,
    OBJECT,
    TEXT,
    check_fields,
    optional,
)

_EMPTY: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True)
class TrainingRecord:
    """How an iterate was trained.

    Attributes:
        opponent: Who generated, as tables show it; None where nobody did.
        reference: What log-ratios were taken against.
        rows: Training rows.
        loss: Mean loss of the last epoch; None where Lightning has no figure.
        margin: Mean reward margin of the held-out pairs, in units of beta times nats.
        accuracy: Share of held-out pairs whose real response has the larger reward.
        seconds: Time of each stage (generating, scoring, training).
        speed: Metrics of speed, see `callbacks.speed`.
        peak_memory: Bytes.
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


@dataclass(frozen=True)
class IterateRecord:
    """What is known of one iterate, as `iterates/iterate_00t/iterate.json` holds it.

    Attributes:
        index: Index t of the iterate.
        parent: The iterate that it was trained from; None for iterate 0.
        files: SHA-256 of each adapter file, by name; empty for the bare base.
        base: Fields of the frozen base (`policies.pretrained.FrozenBase`).
        fingerprint: Hash of `fingerprint_fields`.
        fingerprint_fields: All that makes the iterate this run's and no other's.
        step: Optimizer steps of the run when the iterate was complete.
        training: How it was trained; None for iterate 0.
        tokenizer_files: SHA-256 of each file of the run's tokenizer; with iterate 0 alone.
        metrics: Its held-out and benchmark metrics; None until it is measured.
        rows: Metrics of the rows that it generated for the next; None until they are made.
        others: Fields that this version does not know; they are written back as they were read.
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
    metrics: Mapping[str, float] | None = None
    rows: Mapping[str, float] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, content: object, t: int) -> IterateRecord:
        """Read a record of iterate t from JSON.

        Raises:
            ValueError: It is not a record of iterate t, or a field has a value it cannot have.
        """
        known = check_fields(content, _RULES)
        if known.get("index", t) != t:
            raise ValueError(f"it is the record of iterate {known['index']}")
        training = known.get("training")
        own = {f.name for f in fields(cls)} - {"index", "training", "others"}
        return cls(
            index=t,
            training=None if training is None else _training(training),
            others={n: v for n, v in known.items() if n not in own | {"index", "training"}},
            **{name: value for name, value in known.items() if name in own},
        )

    def to_json(self) -> dict[str, Any]:
        """The same as plain values; what is not known yet is left out."""
        plain = asdict(self)
        others = plain.pop("others")
        late = ("tokenizer_files", "metrics", "rows")
        return {**others, **{n: v for n, v in plain.items() if n not in late or v is not None}}

    @property
    def measured(self) -> Mapping[str, float]:
        """Its metrics and those of its rows, as far as they are known."""
        return {**(self.metrics or _EMPTY), **(self.rows or _EMPTY)}


@dataclass(frozen=True)
class BestRecord:
    """Which iterate is the best, as `iterates/best.json` holds it.

    Attributes:
        index: Index of the iterate.
        metric: By which metric.
        value: Its value there.
    """

    index: int
    metric: str
    value: float

    @classmethod
    def of(cls, content: object) -> BestRecord:
        """Read a record from JSON.

        Raises:
            ValueError: A field is missing or has a value it cannot have.
        """
        rules = {"index": INDEX, "metric": TEXT, "value": NUMBER}
        known = check_fields(content, rules, required=rules)
        return cls(known["index"], known["metric"], float(known["value"]))


def _training(content: object) -> TrainingRecord:
    known = check_fields(content, _TRAINING_RULES)
    names = {f.name for f in fields(TrainingRecord)}
    return TrainingRecord(**{name: value for name, value in known.items() if name in names})


_RULES: Final = {
    "index": INDEX,
    "parent": optional(INDEX),
    "files": FILE_HASHES,
    "base": OBJECT,
    "fingerprint": TEXT,
    "fingerprint_fields": OBJECT,
    "step": INDEX,
    "training": optional(OBJECT),
    "tokenizer_files": OBJECT,
    "metrics": OBJECT,
    "rows": OBJECT,
}
_TRAINING_RULES: Final = {
    "opponent": optional(TEXT),
    "reference": optional(TEXT),
    "rows": optional(COUNT),
    "seconds": OBJECT,
    "speed": OBJECT,
    "peak_memory": optional(NUMBER),
}
