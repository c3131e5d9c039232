"""Sample pairs, and what tells them apart, for loggers that can show tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from transformers import PreTrainedTokenizerBase

from spin_lightning.report.cue_words import TELL_COLUMNS, tell_rows
from spin_lightning.rows.tells import Tells

_COLUMNS = ["prompt", "real", "generated"]


def log_samples(
    loggers: Iterable[Logger], pairs: Sequence[tuple[str, str, str]], step: int
) -> None:
    """Log (prompt, real, generated) texts: as a table if the logger has tables, else as text.

    Args:
        loggers: The trainer's. Loggers that accept only numbers are skipped.
        pairs: The texts.
        step: The step at which the iterate was complete.
    """
    log_table(loggers, "samples", _COLUMNS, pairs, step)


def log_tells(
    loggers: Iterable[Logger], tells: Tells, tokenizer: PreTrainedTokenizerBase, step: int
) -> None:
    """Log the tokens and pairs that tell real from generated responses, likewise as `tells`."""
    rows = tell_rows([*tells.tokens, *tells.pairs], tokenizer)
    log_table(loggers, "tells", TELL_COLUMNS, rows, step)


def log_table(
    loggers: Iterable[Logger],
    key: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    step: int,
) -> None:
    """Log texts in rows: as a table if the logger has tables, else as text.

    Args:
        loggers: The trainer's. Loggers that accept only numbers are skipped.
        key: Name of the table.
        columns: Its head.
        rows: Its cells.
        step: The step that it belongs to.
    """
    for logger in loggers:
        # The name of the method in Lightning's logger for W&B; other loggers may have it too.
        table = getattr(logger, "log_table", None)
        if table is not None:
            table(key, columns=list(columns), data=[list(row) for row in rows], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(key, _markdown(columns, rows), step)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in TensorBoard's Markdown, with the texts escaped."""
    lines = [columns, ["---"] * len(columns), *([_cell(text) for text in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return escaped.replace("\n", "<br>")
