"""Names of the files beside the parts in a folder of rows, of this version and of earlier ones.

pandas, pyarrow and datasets read every file of a folder, except those in folders whose names begin
with two underscores. So everything that is not rows lies in such folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

MANIFEST: Final = "manifest.json"
_ABOUT: Final = "__about__"
_HELD_OUT: Final = "__held_out__"
# Earlier versions kept the manifest among the parts, and the held-out rows in this folder.
_EARLIER_HELD_OUT: Final = "val"


def manifest_path(folder: Path) -> Path:
    """The manifest of a folder of rows: where an earlier version wrote it, if it did."""
    earlier = folder / MANIFEST
    return earlier if earlier.exists() else about(folder) / MANIFEST


def held_out_rows(folder: Path) -> Path:
    """The held-out rows that belong to a folder of rows; those of an earlier version, if any."""
    earlier = folder / _EARLIER_HELD_OUT
    return earlier if earlier.is_dir() else folder / _HELD_OUT


def about(folder: Path) -> Path:
    """The folder for what is said about the rows: the manifest, and batches that are not finite."""
    return folder / _ABOUT
