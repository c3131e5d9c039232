"""Tests run on a mutant in a fork of a process that has already imported the large packages."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

from tests.mutation.mutants import ROOT, Mutant

Verdict = Literal["killed", "timeout", "survived"]
# No test of these takes a tenth of it; a mutant may loop, or ask for a tensor of any size.
_SECONDS = 20
_MEMORY = 6 << 30
_OWN = ("spin_lightning", "tests")
_PYTEST = [
    *("-x", "-q", "--no-header", "--no-summary", "--show-capture=no", "--tb=no"),
    *("-p", "no:cacheprovider", "-p", "pytest_timeout", "-p", "_hypothesis_pytestplugin"),
    # Its plugins were imported by the parent.
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
]


def warm_up(suite: Sequence[str]) -> None:
    """Import what a suite imports of other packages; refuse one that fails on the code as it is.

    The suite itself runs in a fork: torch's autograd must not have run in a process that forks.
    """
    for name in _modules_after(suite):
        if name.split(".")[0] not in _OWN:
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
    # Else every mutant would seem to be killed.
    _modules_after(suite)


def _modules_after(suite: Sequence[str]) -> list[str]:
    """Run a suite in a fork; the names of the modules that are there afterwards."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        passed = _passes(suite)
        os.write(writing, "\n".join(sys.modules if passed else ()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        names = pipe.read().split("\n")
    os.waitpid(child, 0)
    if not any(names):
        raise SystemExit(f"{' '.join(suite)}: it fails without a mutant")
    return names


def judge(
    mutants: Iterable[Mutant], suites: Mapping[str, Sequence[str]], workers: int
) -> Iterator[tuple[Mutant, Verdict, float]]:
    """Run each mutant's suite until its first failure.

    Yields:
        The mutant, what came of it, and the seconds that took.
    """
    waiting, running = list(reversed(list(mutants))), dict[int, tuple[Mutant, float]]()
    while waiting or running:
        while waiting and len(running) < workers:
            mutant = waiting.pop()
            running[_fork(mutant, suites[mutant.module])] = (mutant, time.monotonic())
        for child, (mutant, start) in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            seconds = time.monotonic() - start
            if ended:
                yield mutant, "killed" if status else "survived", seconds
            elif seconds > _SECONDS:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                yield mutant, "timeout", seconds
            else:
                continue
            del running[child]
        time.sleep(0.005)


def _fork(mutant: Mutant, suite: Sequence[str]) -> int:
    child = os.fork()
    if child == 0:
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (most + _MEMORY, most + _MEMORY))
        sys.meta_path.insert(0, _Mutated(mutant))
        os._exit(0 if _passes(suite) else 1)
    return child


def _passes(suite: Sequence[str]) -> bool:
    """Run a suite with our own modules imported anew."""
    for name in [name for name in sys.modules if name.split(".")[0] in _OWN]:
        del sys.modules[name]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.chdir(ROOT)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    import pytest

    try:
        return pytest.main([*_PYTEST, *suite]) == 0
    except BaseException:
        return False


class _Mutated(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Finds the mutated module, and leaves all others to Python."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(f"spin_lightning.{mutant.module}", str(mutant.path))
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: object, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> object:
        return compile(self._mutant.source, self.path, "exec", dont_inherit=True)
