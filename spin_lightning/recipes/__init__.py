"""Recipes: configs of `fit` that come with the package.

A recipe is a YAML file in this folder. Its first line says what it plays, its second what it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from spin_lightning.errors import SettingError

_FOLDER: Final = Path(__file__).parent
_NEEDS: Final = "# Needs: "


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        path: Its file.
        summary: What it plays, in one line.
        needs: The hardware that it needs; of GPUs with their memory.
    """

    path: Path
    summary: str
    needs: str

    @property
    def name(self) -> str:
        """Its name."""
        return self.path.stem

    @property
    def text(self) -> str:
        """The config."""
        return self.path.read_text(encoding="utf-8")


def all_recipes() -> list[Recipe]:
    """Every recipe, in the order of their names."""
    return [_read(path) for path in sorted(_FOLDER.glob("*.yaml"))]


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        SettingError: There is none.
    """
    known = {one.name: one for one in all_recipes()}
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise SettingError(
            "recipe",
            name,
            "there is no such recipe",
            fix=f"give {near[0]}" if near else f"choose from {', '.join(known)}",
        )
    return known[name]


def _read(path: Path) -> Recipe:
    summary, needs = path.read_text(encoding="utf-8").splitlines()[:2]
    return Recipe(path, summary.removeprefix("# "), needs.removeprefix(_NEEDS))
