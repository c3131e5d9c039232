"""Who is evaluated: an iterate of a run, or the mixture of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spin_lightning.errors import SettingError
from spin_lightning.mixtures import Mixture, latest, uniform
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.folder import RunFolder

_MIXTURE = "mixture"


@dataclass(frozen=True)
class Contestant:
    """One policy that answers.

    Attributes:
        name: Its folder below `evaluation/`, such as iterate_002 or mixture.
        mixture: The iterates that make it up, with their weights; one for an iterate.
        identity: Changes when the weights of any of them change.
    """

    name: str
    mixture: Mixture
    identity: str

    @property
    def label(self) -> str:
        """The name in tables: p2, or mixture."""
        return label_of(self.name)


def label_of(name: str) -> str:
    """How a contestant's folder is called in tables: iterate_002 is p2."""
    index = name.removeprefix("iterate_")
    return f"p{int(index)}" if index.isdigit() else name


def iterate_contestant(run: RunFolder, t: int) -> Contestant:
    """Iterate t of a run.

    Raises:
        RunFolderError: The run has no iterate t.
    """
    mixture = latest(t)
    return Contestant(run.iterate(t).name, mixture, _identity(run, mixture))


def contestants(run: RunFolder, names: Sequence[str]) -> list[Contestant]:
    """Read who is asked for.

    Args:
        run: The run.
        names: Indices of iterates, `best`, `last`, `mixture` (of all iterates, equal weights) or
            `all`; nobody twice. All iterates where nobody is named.

    Returns:
        Iterates in the order they were named.

    Raises:
        SettingError: There is no such name.
        RunFolderError: The run has no such iterate, or knows of no best one.
    """
    known = run.known_iterates()
    chosen: dict[str, Contestant] = {}
    for name in names or ["all"]:
        if name == _MIXTURE:
            mixture = uniform(known or [0])
            one = Contestant(_MIXTURE, mixture, _identity(run, mixture))
            chosen.setdefault(one.name, one)
            continue
        for t in _indices(run, name, known):
            one = iterate_contestant(run, t)
            chosen.setdefault(one.name, one)
    return list(chosen.values())


def _indices(run: RunFolder, name: str, known: list[int]) -> list[int]:
    if name == "all":
        # A run without iterates is told so by the look for iterate 0.
        return known or [0]
    if name == "last":
        return [max(known, default=0)]
    if name == "best":
        return [run.best()]
    if not name.isdigit():
        raise SettingError(
            "iterates",
            name,
            "there is no such iterate",
            fix="give numbers, best, last, mixture or all",
        )
    return [int(name)]


def _identity(run: RunFolder, mixture: Mixture) -> str:
    made_of = {}
    for t, weight in mixture.weights.items():
        said = [run.field(t, name) for name in ("base", "files", "fingerprint")]
        made_of[str(t)] = [weight, *said]
    return fingerprint(made_of)
