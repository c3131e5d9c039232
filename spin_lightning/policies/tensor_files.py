"""Writing tensors as a safetensors file."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from spin_lightning.errors import first_line
from spin_lightning.run.files import writing


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors on the CPU, by name, into a file whose folder may not exist yet.

    Raises:
        SpinError: The disk refuses, see `writing`.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(dict(tensors), path, metadata={"format": "pt"})
        except SafetensorError as error:
            # It carries the error of the disk as text only.
            raise OSError(_os_errno(error), first_line(error)) from error


def _os_errno(error: Exception) -> int:
    """The number in `… (os error 28)`, which safetensors appends to its message."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else errno.EIO
