"""Responses of an unfinished work unit, kept in a file: a killed process finds them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, TextIO

from spin_lightning.generation.base import Response
from spin_lightning.run.files import writing
from spin_lightning.run.validation import INDICES, NUMBER, TEXT, Rule, check_fields


class Journal:
    """Finished responses by key, one line each, appended as they come.

    Lines are handed to the system at once, without waiting for the disk: a killed process loses
    none, a machine without power perhaps the last ones, which are then generated again. So are
    those of torn or damaged lines.

    Args:
        path: The file; None to keep nothing.

    Attributes:
        found: The responses of earlier processes, by key.
    """

    def __init__(self, path: Path | None) -> None:
        """Read what there is."""
        self._path = path
        self._file: TextIO | None = None
        self.found: dict[str, Response] = {}
        if path is not None and path.exists():
            with writing(path):
                lines = path.read_bytes().split(b"\n")
            self.found = dict(kept for line in lines if (kept := _read(line)) is not None)

    def add(self, key: str, response: Response) -> None:
        """Keep a response.

        Raises:
            RunFolderError: The disk refuses the file.
        """
        if self._path is None:
            return
        row = {"key": key, "ids": response.ids, "finished": response.finished}
        with writing(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
                # Ends a line that was torn, which is then a damaged one.
                self._file.write("\n")
            self._file.write(json.dumps({**row, "logp": response.logp}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _read(line: bytes) -> tuple[str, Response] | None:
    """The key and the response of a line; None for a damaged one."""
    try:
        row = check_fields(json.loads(line), _RULES, required=_RULES)
    except (ValueError, RecursionError):
        return None
    return row["key"], Response(tuple(row["ids"]), row["finished"], row["logp"])


_RULES: Final = {
    "key": TEXT,
    "ids": INDICES,  # whole numbers >= 0
    "finished": Rule("true or false", lambda value: isinstance(value, bool)),
    "logp": NUMBER,
}
