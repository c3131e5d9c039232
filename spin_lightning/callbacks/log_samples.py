"""Sample pairs for loggers that can show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning.pytorch.loggers import Logger, TensorBoardLogger

_KEY = "samples"
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
    for logger in loggers:
        # The name of the method in Lightning's logger for W&B; other loggers may have it too.
        table = getattr(logger, "log_table", None)
        if table is not None:
            table(_KEY, columns=_COLUMNS, data=[list(pair) for pair in pairs], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(_KEY, _markdown(pairs), step)


def _markdown(pairs: Sequence[tuple[str, str, str]]) -> str:
    """A table in TensorBoard's Markdown, with the texts escaped."""
    rows = [_COLUMNS, ["---"] * len(_COLUMNS), *([_cell(text) for text in pair] for pair in pairs)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return escaped.replace("\n", "<br>")
