"""Other packages: where they are installed, and which of their warnings are not the user's."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Final

# Names that Lightning and PEFT use and that torch and transformers are about to rename.
_RENAMED: Final = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "`is_gradient_checkpointing` is deprecated",
)


def package_folder(name: str) -> Path | None:
    """Folder of an installed package, which is not imported; None if it is not installed.

    Args:
        name: Its import name.
    """
    spec = importlib.util.find_spec(name)
    places = None if spec is None else spec.submodule_search_locations
    return Path(next(iter(places))) if places else None


def ignore_renamed() -> None:
    """Ignore warnings that other packages cause in each other, about names to be renamed."""
    for message in _RENAMED:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
