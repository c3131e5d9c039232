"""How far an evaluation is, for logs without a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from lightning.pytorch.utilities import rank_zero_info

from spin_lightning.run.progress import ProgressLog


@contextmanager
def counting(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Write a line every half minute inside the block, where there is no terminal for bars.

    Args:
        what: What is done.
        total: How much there is to do, at most.
        unit: What is counted.

    Yields:
        A function to call with the number of units that were just done.
    """
    write = None if sys.stderr.isatty() else rank_zero_info
    with ProgressLog(write) as log, log.phase(what, total, unit) as phase:
        yield partial(log.advance, phase)
