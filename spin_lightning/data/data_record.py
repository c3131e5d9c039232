"""What a source holds, in a bounded form for people: on the terminal, and kept with a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from spin_lightning.data.lengths import PERCENTILES, Lengths
from spin_lightning.data.numbering import place
from spin_lightning.data.overview import Overview
from spin_lightning.redaction import masked
from spin_lightning.run.validation import LIST, TEXT, TEXTS, WHOLE, check_fields
from spin_lightning.types import Example

# Of files, reasons, columns and notes the first are shown, and the number of the others.
MOST_LISTED: Final = 12
_MOST_COLUMNS: Final = 40
# Longer texts are cut in the middle.
MOST_CHARACTERS: Final = 1500
_MOST_OF_A_LINE: Final = 400


@dataclass(frozen=True)
class ShownExample:
    """An example as text.

    Attributes:
        title: Its place in the source.
        prompt: Its prompt, as the template writes it.
        prompt_tokens: Length of the prompt.
        answer: The response without its stop id.
        answer_tokens: Length of the answer.
        stop: The stop token and its id; empty for a response that is cut.
    """

    title: str
    prompt: str
    prompt_tokens: int
    answer: str
    answer_tokens: int
    stop: str

    @classmethod
    def of(cls, example: Example, tokenizer: PreTrainedTokenizerBase) -> ShownExample:
        """Decode an example."""
        stop = example.stop_id
        return cls(
            f"Example {place(example.example_id)}",
            str(tokenizer.decode(list(example.prompt_ids))),
            len(example.prompt_ids),
            str(tokenizer.decode(list(example.answer_ids))),
            len(example.answer_ids),
            "" if stop is None else f"{tokenizer.decode([stop])} (id {stop})",
        )


@dataclass(frozen=True)
class DataRecord:
    """What was read from a source and how it fits a model, as a run's `data.json` keeps it.

    Attributes:
        source: The setting and its value.
        counts: Rows and examples that were read, used and left out, in a sentence.
        left_out: What is left out and why, a line each, the most frequent first.
        files: Name, format, rows and used rows of each file.
        columns: Columns used and not used, in a sentence.
        notes: One line for each other thing that was not used as it came.
        lengths: A row per kind of text: its name, percentiles, cap, and number over the cap.
        duplicates: Repeated prompts and pairs, in a sentence.
        examples: Some examples.
    """

    source: str
    counts: str
    left_out: Sequence[str]
    files: Sequence[Sequence[str]]
    columns: str
    notes: Sequence[str]
    lengths: Sequence[Sequence[str]]
    duplicates: str
    examples: Sequence[ShownExample] = ()

    @classmethod
    def of(
        cls,
        overview: Overview,
        examples: Iterable[Example] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> DataRecord:
        """Describe a source, and some of its examples."""
        kinds = {"prompt": overview.prompts, "response": overview.responses}
        return cls(
            source=overview.report.source,
            counts=_counts(overview),
            left_out=_left_out(overview),
            files=_files(overview),
            columns=_columns(overview),
            notes=_first(_notes(overview)),
            lengths=[_length_row(kind, lengths) for kind, lengths in kinds.items()],
            duplicates=f"{overview.repeated_prompts:,} of {overview.examples:,} examples have the "
            f"prompt of an earlier one, {overview.repeated_pairs:,} of them its response, too.",
            examples=[ShownExample.of(e, tokenizer) for e in examples] if tokenizer else [],
        )

    @classmethod
    def read(cls, content: object) -> DataRecord:
        """Read a record from JSON.

        Raises:
            ValueError: A field is missing or has an invalid value.
        """
        known = check_fields(content, _RULES, required=_RULES)
        for name, size in (("files", 4), ("lengths", len(length_columns()))):
            for row in known[name]:
                check_fields({name: row}, {name: TEXTS})
                if len(row) != size:
                    raise ValueError(f"its {name!r} has a row of {len(row)} cells, not {size}")
        examples = [check_fields(e, _EXAMPLE_RULES, _EXAMPLE_RULES) for e in known["examples"]]
        shown = [ShownExample(**{name: e[name] for name in _EXAMPLE_RULES}) for e in examples]
        return cls(**{**{name: known[name] for name in _RULES}, "examples": shown})

    def to_json(self) -> dict[str, Any]:
        """The record as plain values, without secrets, every text shortened."""
        plain: dict[str, Any] = _bounded(asdict(self))
        return plain


def read_data_records(content: object) -> list[DataRecord]:
    """The records in the content of a run's `data.json`.

    Raises:
        ValueError: A record is missing or invalid.
    """
    known = check_fields(content, {"sources": LIST}, required=("sources",))
    return [DataRecord.read(source) for source in known["sources"]]


def chosen(examples: Sequence[Example], count: int = 3) -> list[Example]:
    """Examples from the beginning, the middle and the end.

    >>> chosen("abcdefg")
    ['a', 'd', 'g']
    """
    count = min(count, len(examples))
    at = [round(i * (len(examples) - 1) / max(1, count - 1)) for i in range(count)]
    return [examples[i] for i in at]


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text, the middle of a long one left out."""
    if len(text) <= most:
        return text
    half = most // 2
    left = len(text) - 2 * half
    return f"{text[:half]}\n… {left:,} characters more …\n{text[-half:]}"


def length_columns() -> list[str]:
    """What the cells of a row of lengths are."""
    names = [f"{p} %" if p < 100 else "longest" for p in PERCENTILES]
    return ["tokens", *names, "cap", "over the cap"]


def _counted(count: int, unit: str) -> str:
    return f"{count:,} {unit}{'s' * (count != 1)}"


def _counts(overview: Overview) -> str:
    report = overview.report
    drawn = "" if overview.tried == report.conversations else f", {overview.tried:,} drawn"
    return (
        f"{_counted(report.rows, 'row')} read with {_counted(report.conversations, 'example')}"
        f"{drawn}, {overview.examples:,} used. Left out: "
        f"{_counted(len(report.bad), 'row')}, {_counted(len(overview.unfit), 'example')}."
    )


def _left_out(overview: Overview) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for row in overview.left_out:
        kinds.setdefault(row.reason.partition(": ")[0], []).append(place(row.example_id))
    reasons = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    lines = [
        f"{len(rows):,} left out: {reason} (row {', '.join(rows[:3])}{', …' * (len(rows) > 3)})"
        for reason, rows in reasons[:MOST_LISTED]
    ]
    others = [f"and {len(reasons) - MOST_LISTED} other reasons"]
    return lines + others * (len(reasons) > MOST_LISTED)


def _files(overview: Overview) -> list[list[str]]:
    files = overview.report.files
    rows = [
        [file.name, file.format or "not recognized", f"{file.rows:,}", f"{file.used:,}"]
        for file in files[:MOST_LISTED]
    ]
    rest = files[MOST_LISTED:]
    if rest:
        total, used = sum(file.rows for file in rest), sum(file.used for file in rest)
        rows.append([f"and {len(rest):,} more", "", f"{total:,}", f"{used:,}"])
    return rows


def _columns(overview: Overview) -> str:
    report = overview.report
    used, unused = _named(report.columns_used), _named(report.columns_not_used)
    return f"Columns (rows with a value): {used}. Not used: {unused}."


def _named(columns: Mapping[str, int]) -> str:
    names = [f"{name} ({rows:,})" for name, rows in columns.items()]
    return ", ".join(_first(names, _MOST_COLUMNS)) or "none"


def _notes(overview: Overview) -> list[str]:
    """What the columns' line does not show."""
    return [n for n in overview.notes() if not n.startswith("columns not used: ")] + [
        f"column {name} is not used: {why}" for name, why in overview.report.why_not_used.items()
    ]


def _length_row(kind: str, lengths: Lengths) -> list[str]:
    values = [f"{lengths.percentiles[p]:,}" for p in PERCENTILES if p in lengths.percentiles]
    values += ["-"] * (len(PERCENTILES) - len(values))
    cap = "-" if lengths.cap is None else f"{lengths.cap:,}"
    return [kind, *values, cap, f"{lengths.over:,}"]


def _first(names: list[str], most: int = MOST_LISTED) -> list[str]:
    return names[:most] + [f"and {len(names) - most} more"] * (len(names) > most)


def _bounded(value: Any, name: str = "") -> Any:
    """Plain values whose texts are masked and shortened."""
    if isinstance(value, str):
        long = name in ("prompt", "answer", "columns")
        return shortened(masked(value), MOST_CHARACTERS if long else _MOST_OF_A_LINE)
    if isinstance(value, dict):
        return {key: _bounded(part, key) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_bounded(part, name) for part in value]
    return value


_RULES: Final = {
    "source": TEXT,
    "counts": TEXT,
    "left_out": TEXTS,
    "files": LIST,
    "columns": TEXT,
    "notes": TEXTS,
    "lengths": LIST,
    "duplicates": TEXT,
    "examples": LIST,
}
_EXAMPLE_RULES: Final = {
    "title": TEXT,
    "prompt": TEXT,
    "prompt_tokens": WHOLE,
    "answer": TEXT,
    "answer_tokens": WHOLE,
    "stop": TEXT,
}
