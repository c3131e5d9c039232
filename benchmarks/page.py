"""Tables that a script computes, in the page that shows them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Page:
    """A page with computed blocks, each below a mark and above an empty line.

    Attributes:
        path: The page.
        command: What prints the blocks, as the marks name it.
        blocks: What computes each block, by the name in its mark.
    """

    path: Path
    command: str
    blocks: Mapping[str, Callable[[], str]]

    def filled(self, text: str) -> str:
        """The text of the page with the present blocks below its marks."""
        for name, block in self.blocks.items():
            mark = f"<!-- {name}: {self.command} -->"
            before, rest = text.split(mark)
            _, after = rest.split("\n\n", 1)
            text = f"{before}{mark}\n{block()}\n\n{after}"
        return text

    def main(self, description: str | None) -> None:
        """Print the blocks, or write them into the page, as the command line says."""
        options = argparse.ArgumentParser(description=description)
        options.add_argument("--write", action="store_true", help=f"write them into {self.path}")
        if options.parse_args().write:
            self.path.write_text(self.filled(self.path.read_text()))
        else:
            print("\n\n".join(block() for block in self.blocks.values()))
