"""Contestants of an evaluation: the iterates of a run, and the mixture of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from spin_lightning.mixtures import Mixture, latest, uniform
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import IterateRecord

_MIXTURE = "mixture"


@dataclass(frozen=True)
class Contestant:
    """One policy that answers.

    Attributes:
        name: Its folder below `evaluation/`, such as iterate_002 or mixture.
        mixture: Its iterates with their weights; a single one for an iterate.
        identity: A hash that changes with the weights of any of its iterates.
    """

    name: str
    mixture: Mixture
    identity: str

    @property
    def label(self) -> str:
        """Its name in tables: p2, or mixture."""
        return label_of(self.name)


def label_of(name: str) -> str:
    """A contestant's name in tables: p2 for iterate_002."""
    index = name.removeprefix("iterate_")
    return f"p{int(index)}" if index.isdigit() else name


def iterate_contestant(run: RunFolder, t: int) -> Contestant:
    """Iterate t of a run.

    Raises:
        RunFolderError: The run has no iterate t.
    """
    return _iterate(run, t, run.record)


def contestants(run: RunFolder, names: Sequence[str]) -> list[Contestant]:
    """The contestants of the given names.

    Args:
        run: The run.
        names: Indices of iterates, `best`, `last`, `mixture` (of all iterates, with equal weights)
            or `all`; default: all iterates.

    Returns:
        Each contestant once, in the order of the names.

    Raises:
        SettingError: A name is not one of these.
        RunFolderError: The run has no such iterate, or no best one.
    """
    known, record = run.known_iterates(), cache(run.record)
    chosen: dict[str, Contestant] = {}
    for name in names or ["all"]:
        if name == _MIXTURE:
            chosen.setdefault(_MIXTURE, _mixture(known or [0], record))
            continue
        for t in _indices(run, name, known):
            one = _iterate(run, t, record)
            chosen.setdefault(one.name, one)
    return list(chosen.values())


def current_contestants(run: RunFolder, records: Sequence[IterateRecord]) -> list[Contestant]:
    """All iterates and their mixture, with their present identities.

    Args:
        run: The run.
        records: The records of all its iterates.
    """
    by_index = {record.index: record for record in records}
    iterates = [_iterate(run, t, by_index.__getitem__) for t in by_index]
    return [*iterates, _mixture(by_index, by_index.__getitem__)] if records else []


def _iterate(run: RunFolder, t: int, record: Callable[[int], IterateRecord]) -> Contestant:
    mixture = latest(t)
    return Contestant(run.iterate(t).name, mixture, _identity(mixture, record))


def _mixture(iterates: Iterable[int], record: Callable[[int], IterateRecord]) -> Contestant:
    mixture = uniform(list(iterates))
    return Contestant(_MIXTURE, mixture, _identity(mixture, record))


def _indices(run: RunFolder, name: str, known: list[int]) -> list[int]:
    if name == "all":
        # In a run without iterates, reading the record of iterate 0 raises the error.
        return known or [0]
    return [run.index_of(name)]


def _identity(mixture: Mixture, record: Callable[[int], IterateRecord]) -> str:
    members = {}
    for t, weight in mixture.weights.items():
        one = record(t)
        members[str(t)] = [weight, one.base, one.files, one.fingerprint]
    return fingerprint(members)
