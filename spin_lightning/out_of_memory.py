"""Recognizing a lack of memory, and going on with smaller parts."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from spin_lightning.errors import SpinError, first_line

Part = TypeVar("Part")
Result = TypeVar("Result")

# Below Lightning's own logger, so that the lines of every process appear.
_log = logging.getLogger("lightning.pytorch.spin_lightning")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; torch has a class for some of them only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = (
        "can't allocate memory",  # CPU
        "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN and others, for their workspace
        "CUDA error: out of memory",  # driver
    )
    return any(sign in str(error) for sign in signs)


@dataclass
class TokenLimit:
    """The most tokens of a pass, once memory did not suffice for one.

    Attributes:
        stage: What the passes do, such as `training`.
        tokens: The limit; `sys.maxsize` while every pass has fitted.
        retries: Whether a pass that did not fit is computed again in halves.
    """

    stage: str
    tokens: int = sys.maxsize
    retries: bool = True

    @property
    def deviations(self) -> dict[str, int]:
        """The limit by its name in records; empty without one."""
        return {} if self.tokens == sys.maxsize else {f"{self.stage}_tokens": self.tokens}

    def halve(self, tokens: int) -> None:
        """Set the limit to half the tokens of a pass that did not fit, and log it."""
        self.tokens = tokens // 2
        _log.info(
            f"NOTE: memory did not suffice for a {self.stage} pass of {tokens:,} tokens. From now "
            f"on such a pass has at most {self.tokens:,} where it can be split; results change by "
            "rounding."
        )


def in_parts(
    parts: Sequence[Part],
    compute: Callable[[Part], Result],
    tokens: Callable[[Part], int],
    halve: Callable[[Part], Sequence[Part]],
    limit: TokenLimit,
    fix: str,
) -> Iterator[Result]:
    """Compute parts one by one, those that memory does not suffice for in halves.

    Args:
        parts: What to compute, in this order.
        compute: Computes a part, and may be called again after it ran out of memory.
        tokens: Number of tokens of a part.
        halve: Two parts in place of one, in order; none if it cannot be split.
        limit: Parts above the limit are split at once; it is lowered where memory runs out.
        fix: What the user can do if a part that cannot be split does not fit.

    Yields:
        The result of each part, or those of its pieces.

    Raises:
        SpinError: Memory does not suffice for a part that cannot be split.
    """
    waiting = list(reversed(parts))
    while waiting:
        part = waiting.pop()
        halves = halve(part) if tokens(part) > limit.tokens else ()
        if halves:
            waiting += reversed(halves)
            continue
        try:
            result = compute(part)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not (limit.retries and halve(part)):
                reason = "cannot be split" if limit.retries else "a sharded base cannot repeat"
                raise SpinError(
                    f"there is not enough memory for a {limit.stage} pass of {tokens(part):,} "
                    f"tokens, which {reason} ({first_line(error)})",
                    fix=fix,
                ) from error
        else:
            yield result
            continue
        # Outside `except`: the error's traceback held the tensors of the pass.
        free_memory()
        limit.halve(tokens(part))
        waiting.append(part)


@contextmanager
def enough_memory(what: str, fix: str) -> Iterator[None]:
    """Name what memory ran out for, where nothing smaller can be computed.

    Args:
        what: What is computed inside the block.
        fix: What the user can do.

    Raises:
        SpinError: Memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SpinError(
            f"there is not enough memory for {what} ({first_line(error)})", fix=fix
        ) from error


def free_memory() -> None:
    """Return to the device what no tensor uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
