"""The page of `spin-lightning data`: what was read, how long it is, and examples as ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from spin_lightning.data.lengths import PERCENTILES, Lengths
from spin_lightning.data.numbering import place
from spin_lightning.data.overview import Overview
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.types import Example

_PROMPT, _ANSWER, _STOP = "cyan", "green", "bold magenta"
# Longer texts of an example are cut in the middle.
_MOST_CHARACTERS = 1500
_MOST_TOKENS = 300
_MOST_LISTED = 12


@dataclass(frozen=True)
class DataPage:
    """Shows a source on the terminal.

    Attributes:
        overview: What was read.
        text_format: How it became ids.
        examples: The examples to show.
        tokens: Show them token by token.
    """

    overview: Overview
    text_format: PromptFormat
    examples: Sequence[Example]
    tokens: bool = False

    def show(self, console: Console) -> None:
        """Print the page, wrapped between words; without a terminal nothing is wrapped."""
        for part in self._parts():
            console.print(part, soft_wrap=not console.is_terminal)

    def _parts(self) -> Iterable[RenderableType]:
        overview = self.overview
        yield _heading(overview.report.source)
        yield Text(self._counts())
        yield _files(overview)
        yield self._columns()
        yield Group(*(Text(f"NOTE: {note}", style="yellow") for note in self._notes()))
        yield _lengths({"prompt": overview.prompts, "response": overview.responses})
        yield Text(
            f"Duplicates: {overview.repeated_prompts:,} of {overview.examples:,} examples have the "
            f"prompt of an earlier one, {overview.repeated_pairs:,} of them its response, too."
        )
        for example in self.examples:
            yield self._example(example)

    def _counts(self) -> str:
        overview, report = self.overview, self.overview.report
        drawn = "" if overview.tried == report.conversations else f", {overview.tried:,} drawn"
        line = (
            f"{_counted(report.rows, 'row')} read with {_counted(report.conversations, 'example')}"
            f"{drawn}, {overview.examples:,} used. Left out: "
            f"{_counted(len(report.bad), 'row')}, {_counted(len(overview.unfit), 'example')}."
        )
        kinds: dict[str, list[str]] = {}
        for row in overview.left_out:
            kinds.setdefault(row.reason.partition(": ")[0], []).append(place(row.example_id))
        reasons = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
        for reason, rows in reasons[:_MOST_LISTED]:
            shown = ", ".join(rows[:3]) + ", …" * (len(rows) > 3)
            line += f"\n  {len(rows):,} left out: {reason} (row {shown})"
        if len(reasons) > _MOST_LISTED:
            line += f"\n  and {len(reasons) - _MOST_LISTED} other reasons"
        return line

    def _columns(self) -> RenderableType:
        report = self.overview.report
        used = ", ".join(f"{name} ({rows:,})" for name, rows in report.columns_used.items())
        unused = ", ".join(f"{name} ({rows:,})" for name, rows in report.columns_not_used.items())
        return Text(f"Columns (rows with a value): {used or 'none'}. Not used: {unused or 'none'}.")

    def _notes(self) -> list[str]:
        """What the columns' line does not show."""
        return [n for n in self.overview.notes() if not n.startswith("columns not used: ")] + [
            f"column {name} is not used: {why}"
            for name, why in self.overview.report.why_not_used.items()
        ]

    # ------------------------------------------------------------------ examples

    def _example(self, example: Example) -> RenderableType:
        response = example.real_ids[:-1] if example.real_finished else example.real_ids
        stop = example.real_ids[-1] if example.real_finished else None
        title = Text(f"\nExample {place(example.example_id)}: ", style="bold")
        title.append(f"prompt of {len(example.prompt_ids):,} tokens", style=_PROMPT)
        title.append(", ")
        title.append(f"answer of {len(response):,}", style=_ANSWER)
        title.append(", ")
        decode = self.text_format.tokenizer.decode
        ending = "cut, without a stop id" if stop is None else f"stop id {stop} {decode([stop])}"
        title.append(ending, style=_STOP)
        parts = [("prompt", example.prompt_ids, _PROMPT), ("answer", response, _ANSWER)]
        if stop is not None:
            parts.append(("stop", (stop,), _STOP))
        body: list[RenderableType] = [title]
        for label, ids, style in parts:
            text = self._token_by_token(ids) if self.tokens else _shortened(str(decode(list(ids))))
            body.append(Text(label, style="dim"))
            body.append(Text(text, style=style))
        return Group(*body)

    def _token_by_token(self, ids: Sequence[int]) -> str:
        """Each token with its id; blanks and line ends are visible."""
        tokenizer = self.text_format.tokenizer
        shown = [f"{_visible(str(tokenizer.decode([i])))}·{i}" for i in ids[:_MOST_TOKENS]]
        more = [f"… {len(ids) - _MOST_TOKENS:,} more"] * (len(ids) > _MOST_TOKENS)
        return "  ".join([*shown, *more])


def chosen(examples: Sequence[Example], count: int = 3) -> list[Example]:
    """Examples from the beginning, the middle and the end.

    >>> chosen("abcdefg")
    ['a', 'd', 'g']
    """
    count = min(count, len(examples))
    at = [round(i * (len(examples) - 1) / max(1, count - 1)) for i in range(count)]
    return [examples[i] for i in at]


def _counted(count: int, unit: str) -> str:
    return f"{count:,} {unit}{'s' * (count != 1)}"


def _heading(text: str) -> Text:
    return Text(text, style="bold", overflow="fold")


def _files(overview: Overview) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("file", overflow="fold")
    table.add_column("format", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("used", justify="right", no_wrap=True)
    files = overview.report.files
    for file in files[:_MOST_LISTED]:
        table.add_row(
            Text(file.name), file.format or "not recognized", f"{file.rows:,}", f"{file.used:,}"
        )
    if len(files) > _MOST_LISTED:
        rest = files[_MOST_LISTED:]
        rows, used = sum(file.rows for file in rest), sum(file.used for file in rest)
        table.add_row(f"and {len(rest):,} more", "", f"{rows:,}", f"{used:,}")
    return table


def _lengths(kinds: Mapping[str, Lengths]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("tokens")
    names = [f"{p} %" if p < 100 else "longest" for p in PERCENTILES]
    for name in (*names, "cap", "over the cap"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind, lengths in kinds.items():
        values = [f"{lengths.percentiles[p]:,}" for p in PERCENTILES if p in lengths.percentiles]
        values += ["-"] * (len(PERCENTILES) - len(values))
        cap = "-" if lengths.cap is None else f"{lengths.cap:,}"
        table.add_row(kind, *values, cap, f"{lengths.over:,}")
    return table


def _visible(token: str) -> str:
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _shortened(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    left = len(text) - 2 * half
    return f"{text[:half]}\n… {left:,} characters more …\n{text[-half:]}"
