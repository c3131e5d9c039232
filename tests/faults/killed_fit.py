"""The command line with a failure injected at a point: `python -m tests.faults.killed_fit`.

The library has no hook for this: functions are wrapped from outside.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.points import BROKEN, RANK, SLOW_SECONDS, VARIABLE


def kill_at(target: str, moment: str, call: int) -> None:
    """Wrap a function so that one of its calls ends this process as a power cut would.

    With the moments raises and slow, the call fails or takes long instead.
    """
    module_name, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module_name)
    for part in owners:
        owner = getattr(owner, part)
    function: Callable[..., Any] = getattr(owner, name)
    calls = 0

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        here = calls == call
        if here and moment == "before":
            _die()
        if here and moment == "raises":
            raise RuntimeError(BROKEN)
        if here and moment == "slow":
            time.sleep(SLOW_SECONDS)
        result = function(*args, **kwargs)
        if here and moment in ("after", "torn"):
            if moment == "torn":
                file = next(Path(a) for a in args if isinstance(a, str | Path))
                os.truncate(file, file.stat().st_size // 2)
            _die()
        return result

    setattr(owner, name, wrapped)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from spin_lightning.cli.main import main

    # (Processes that Lightning starts have a LOCAL_RANK alone.)
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if os.environ.get(VARIABLE) and os.environ.get(RANK, rank) == rank and is_first:
        target, moment, call = os.environ[VARIABLE].split("|")
        kill_at(target, moment, int(call))
    main()
