"""A grid of runs: one YAML file names the cells, one parquet file holds what was measured."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from spin_lightning.errors import SettingError, check_names, is_whole
from spin_lightning.report.study_plan import LORA_SETTINGS, Play
from spin_lightning.run.files import read_json, read_yaml, replace_synced, write_json

_KEYS: Final = ("config", "seeds", "parts")
_PART_KEYS: Final = ("variants", "settings", "start", "start_epochs")
# Settings that a run gets from elsewhere in a grid.
_TAKEN: Final = ("seed_everything", "trainer.default_root_dir")


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        play: What is played.
        parts: The parts of the grid that name it.
        start: What is played first, whose best iterate it starts from; None starts from the model.
    """

    play: Play
    parts: tuple[str, ...]
    start: Play | None = None

    @property
    def name(self) -> str:
        """Its name, which is that of its run folder."""
        return self.play.name

    @property
    def content(self) -> dict[str, Any]:
        """What it is, as plain values: equal for equal cells."""
        return {
            "variant": self.play.variant,
            "seed": self.play.seed,
            "settings": dict(self.play.overrides),
            "start": None if self.start is None else self.start.name,
            "start_epochs": None if self.start is None else self.start.epochs,
        }


@dataclass(frozen=True)
class Grid:
    """The cells of a study.

    Attributes:
        config: The config of `fit` that all cells share.
        cells: The cells by name, in the order in which they are played: seed by seed, so that a
            study that is cut off has whole seeds.
    """

    config: Path
    cells: Mapping[str, Cell]

    def cell(self, name: str) -> Cell:
        """The cell of this name.

        Raises:
            SettingError: There is none.
        """
        if name not in self.cells:
            near = difflib.get_close_matches(name, self.cells, n=3)
            raise SettingError(
                "cell",
                name,
                "the grid has no such cell",
                fix=f"give a name such as {', '.join(near or list(self.cells)[:3])}",
            )
        return self.cells[name]


def read_grid(path: Path) -> Grid:
    """Read a grid: `config`, `seeds` and `parts`.

    Each part has a name, and is the product of its `variants`, the values of its `settings` (full
    names of settings of `fit`, each with a list of values) and the seeds. With `start`, a variant
    is played first for each seed, for `start_epochs`, and the part's runs start from its iterate
    with the lowest held-out NLL. A cell that several parts name is played once.

    Raises:
        SettingError: A name is unknown, or a value is not of its kind.
        SpinError: The file cannot be read.
    """
    read = read_yaml(path, "grid", "give a grid, such as configs/study/smoke.yaml")
    content = _mapping("grid", read)
    check_names("the grid", content, _KEYS)
    for key in _KEYS:
        if key not in content:
            raise SettingError(key, None, "the grid does not have it", fix=f"add {key}: …")
    seeds = _list("seeds", content["seeds"])
    for seed in seeds:
        if not is_whole(seed, 0):
            raise SettingError("seeds", seeds, f"{seed!r} is not a seed", fix="give whole numbers")
    parts = _mapping("parts", content["parts"])
    config = (path.parent / str(content["config"])).resolve()
    if not config.is_file():
        raise SettingError(
            "config",
            content["config"],
            f"there is no {config}",
            fix="name a config of `fit`, relative to the grid",
        )
    found: dict[str, Cell] = {}
    for seed in seeds:
        for name, part in parts.items():
            for cell in _cells(str(name), _mapping(f"parts.{name}", part), seed):
                known = found.get(cell.name)
                names = cell.parts if known is None else (*known.parts, *cell.parts)
                found[cell.name] = replace(cell, parts=names)
    return Grid(config, found)


def _cells(name: str, part: Mapping[str, Any], seed: int) -> Iterator[Cell]:
    """The cells of one part with one seed."""
    where = f"parts.{name}"
    if not re.fullmatch(r"\w[\w-]*", name):
        raise SettingError(
            "parts", name, "pictures are named like parts", fix="use letters, digits, _ and -"
        )
    check_names(where, part, _PART_KEYS)
    settings = _mapping(f"{where}.settings", part.get("settings", {}))
    for setting in settings:
        if setting in _TAKEN or "." not in setting:
            raise SettingError(
                f"{where}.settings",
                setting,
                "it is not a setting that cells may differ in",
                fix="give full names, such as model.beta or data.max_examples",
            )
    values = [_list(f"{where}.settings.{key}", value) for key, value in settings.items()]
    start = None
    if part.get("start") is not None:
        # The start shares what is not the model's: its own settings are in its name.
        shared = {k: v[0] for k, v in zip(settings, values, strict=True) if k.startswith("data.")}
        if any(k.startswith("data.") and len(v) > 1 for k, v in zip(settings, values, strict=True)):
            raise SettingError(
                f"{where}.settings",
                list(settings),
                "a part with a start has one value of each setting of the data",
                fix="make a part for each of them",
            )
        epochs = part.get("start_epochs", 1)
        if not is_whole(epochs, 1):
            raise SettingError(
                f"{where}.start_epochs",
                epochs,
                "it is not a number of epochs",
                fix="give 1 or more",
            )
        start = replace(
            Play.of(str(part["start"]), seed),
            epochs=epochs,
            stage="start-",
            overrides=shared,
        )
    for variant in _list(f"{where}.variants", part.get("variants")):
        played = Play.of(str(variant), seed)
        _check_settings(where, played, settings, start)
        for chosen in itertools.product(*values):
            overrides = dict(zip(settings, chosen, strict=True))
            stage = "" if start is None else f"after-{start.epochs}-epochs-of-{start.variant},"
            yield Cell(replace(played, overrides=overrides, stage=stage), (name,), start)


def _check_settings(
    where: str, play: Play, settings: Mapping[str, Any], start: Play | None
) -> None:
    """Refuse settings that a variant has itself, and those that an adapter to start from has."""
    for name in play.settings:
        if f"model.{name}" in settings:
            raise SettingError(
                f"{where}.settings",
                f"model.{name}",
                f"the variant {play.variant} sets it as well",
                fix="leave it to one of the two",
            )
    given = [*settings, *(f"model.{name}" for name in play.settings)]
    taken = [name for name in given if name.removeprefix("model.") in LORA_SETTINGS]
    if start is not None and taken:
        raise SettingError(
            f"{where}.settings",
            taken[0],
            f"runs start from the adapter of {start.variant}, which has its own",
            fix=f"set it there: start: {start.model}({taken[0].removeprefix('model.')}=…)",
        )


@dataclass(frozen=True)
class Outcome:
    """What a cell gave, as its file holds it.

    Attributes:
        content: `Cell.content`, and the hash of the config.
        seconds: Time that it took, with its start if that was played for it.
        rows: The metrics of each iterate, ascending.
        error: Why it ended early; None if it is complete.
    """

    content: Mapping[str, Any]
    seconds: float
    rows: Sequence[Mapping[str, float]]
    error: str | None = None

    def write(self, path: Path) -> None:
        """Write it to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {name: getattr(self, name) for name in _OUTCOME})

    @classmethod
    def read(cls, path: Path) -> Outcome | None:
        """Read it from a file; None if there is none.

        Raises:
            RunFolderError: The file is damaged.
        """
        if not path.exists():
            return None
        return read_json(path, "remove it: the cell is played again", _outcome)


_OUTCOME: Final = ("content", "seconds", "rows", "error")


def _outcome(content: Any) -> Outcome:
    if not isinstance(content, dict) or set(content) != set(_OUTCOME):
        raise ValueError(f"it does not hold {', '.join(_OUTCOME)}")
    return Outcome(**content)


def write_table(cells: Iterable[tuple[Cell, Outcome]], path: Path) -> int:
    """Write one row per cell and iterate to a parquet file, and return their number.

    Columns are the cell's name, parts, variant and seed, its class, its settings (those of the
    variant as `model.…`), whether it is complete or ended early, the iterate, the cell's seconds,
    and every metric, null where a cell lacks it.
    """
    rows = [row for cell, outcome in cells for row in _rows(cell, outcome)]
    columns = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: _column([row.get(name) for row in rows]) for name in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    pq.write_table(table, temporary)
    replace_synced(temporary, path)
    return len(rows)


def _rows(cell: Cell, outcome: Outcome) -> Iterator[dict[str, Any]]:
    own = {f"model.{name}": value for name, value in cell.play.settings.items()}
    for t, metrics in enumerate(outcome.rows):
        yield {
            "cell": cell.name,
            "parts": list(cell.parts),
            "variant": cell.play.variant,
            "class": cell.play.model,
            "start": None if cell.start is None else cell.start.variant,
            "seed": cell.play.seed,
            **own,
            **cell.play.overrides,
            "complete": outcome.error is None,
            "iterate": t,
            "seconds": outcome.seconds,
            **metrics,
        }


def _column(values: list[Any]) -> pa.Array:
    """An array of numbers or lists where all values are; else of text."""
    known = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in known) or all(
        isinstance(value, int) and not isinstance(value, bool) for value in known
    ):
        return pa.array(values)
    if all(isinstance(value, int | float) for value in known):
        return pa.array([None if v is None else float(v) for v in values])
    if all(isinstance(v, list) and all(isinstance(x, str) for x in v) for v in known):
        return pa.array(values)
    return pa.array([v if v is None or isinstance(v, str) else json.dumps(v) for v in values])


def _mapping(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or (name == "parts" and not value):
        raise SettingError(name, value, "it is not a mapping", fix="see configs/study/smoke.yaml")
    return value


def _list(name: str, value: object) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise SettingError(name, value, "it is not a list of values", fix="give a list: [0.1, 0.3]")
    return value
