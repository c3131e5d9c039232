"""Installed packages whose files are read without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def package_folder(name: str) -> Path | None:
    """Folder of an installed package, which is not imported; None if it is not installed.

    Args:
        name: Its import name.
    """
    spec = importlib.util.find_spec(name)
    places = None if spec is None else spec.submodule_search_locations
    return Path(next(iter(places))) if places else None
