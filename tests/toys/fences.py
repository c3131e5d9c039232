"""Fenced blocks of the documents, and how the commands in them are checked."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from jsonargparse import ArgumentParser

from spin_lightning.cli.main import main

ROOT = Path(__file__).parents[2]
# A block that cannot run here says why in a comment above it, which readers of the page do not see.
_MARK = re.compile(r"<!-- needs (a GPU|a network|a server|the run above) -->\s*$")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """A block.

    Attributes:
        page: Path of its page, relative to the repository.
        line: Line of the page that it starts at.
        language: The word after the fence; empty if there is none.
        text: What is in it.
        needs: What it needs that a test lacks; None if it runs anywhere.
    """

    page: str
    line: int
    language: str
    text: str
    needs: str | None

    @property
    def name(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"

    @property
    def words(self) -> list[list[str]]:
        """The words of each command, with `VARIABLE=value` in front left out."""
        joined = _whole(self.text.replace("\\\n", " ").splitlines())
        found = [shlex.split(line, comments=True) for line in joined]
        return [without_variables(words) for words in found if words]


def _whole(lines: list[str]) -> Iterator[str]:
    """Commands, in which an open quote joins a line with the next."""
    open_text = ""
    for line in lines:
        open_text += line
        try:
            shlex.split(open_text, comments=True)
        except ValueError:
            open_text += "\n"
        else:
            yield open_text
            open_text = ""
    assert not open_text, f"a quote is open: {open_text}"


def without_variables(words: list[str]) -> list[str]:
    """A command without the variables that are set for it."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def fences(page: Path) -> list[Fence]:
    """The blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        mark = _MARK.search(before)
        indent, language, content = match.groups()
        content = re.sub(f"^{indent}", "", content, flags=re.MULTILINE)
        name = page.relative_to(ROOT).as_posix()
        needs = mark[1] if mark else None
        found.append(Fence(name, before.count("\n") + 1, language, content, needs))
    return found


class _Parsed(BaseException):
    """The arguments were read."""


def parse(arguments: list[str]) -> None:
    """Read the arguments of `spin-lightning` as the command would, and stop there.

    Raises:
        SystemExit: They are refused.
    """
    original = ArgumentParser.parse_args
    depth = 0

    def stopping(self: ArgumentParser, *args: object, **kwargs: object) -> object:
        nonlocal depth
        depth += 1
        try:
            result = original(self, *args, **kwargs)
        finally:
            depth -= 1
        if depth == 0:
            raise _Parsed
        return result

    with (
        mock.patch.object(ArgumentParser, "parse_args", stopping),
        mock.patch("sys.argv", ["spin-lightning", *arguments]),
    ):
        try:
            main()
        except _Parsed:
            return
        except SystemExit as end:
            # A help page, or the settings that --print_config prints.
            if end.code:
                raise
