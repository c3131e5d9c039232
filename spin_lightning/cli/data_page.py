"""The page of `spin-lightning data`: what was read, how long it is, and examples as ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from spin_lightning.data.data_record import DataRecord, length_columns, shortened
from spin_lightning.data.numbering import place
from spin_lightning.data.overview import Overview
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.types import Example

_PROMPT, _ANSWER, _STOP = "cyan", "green", "bold magenta"
_MOST_TOKENS = 300


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
        record = DataRecord.of(self.overview)
        yield _heading(record.source)
        yield Text("\n  ".join([record.counts, *record.left_out]))
        yield _table(("file", "format", "rows", "used"), record.files, texts=2)
        yield Text(record.columns)
        yield Group(*(Text(f"NOTE: {note}", style="yellow") for note in record.notes))
        yield _table(length_columns(), record.lengths, texts=1)
        yield Text(f"Duplicates: {record.duplicates}")
        for example in self.examples:
            yield self._example(example)

    # ------------------------------------------------------------------ examples

    def _example(self, example: Example) -> RenderableType:
        response, stop = example.answer_ids, example.stop_id
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
            text = self._token_by_token(ids) if self.tokens else shortened(str(decode(list(ids))))
            body.append(Text(label, style="dim"))
            body.append(Text(text, style=style))
        return Group(*body)

    def _token_by_token(self, ids: Sequence[int]) -> str:
        """Each token with its id; blanks and line ends are visible."""
        tokenizer = self.text_format.tokenizer
        shown = [f"{_visible(str(tokenizer.decode([i])))}·{i}" for i in ids[:_MOST_TOKENS]]
        more = [f"… {len(ids) - _MOST_TOKENS:,} more"] * (len(ids) > _MOST_TOKENS)
        return "  ".join([*shown, *more])


def _heading(text: str) -> Text:
    return Text(text, style="bold", overflow="fold")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> RenderableType:
    """A table whose first columns are texts, which are folded; the others are numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in head[:texts]:
        table.add_column(name, overflow="fold")
    for name in head[texts:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _visible(token: str) -> str:
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
