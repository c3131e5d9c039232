"""Where rows come from: files, folders, patterns, hub data sets, and data that lies in memory."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeGuard

from spin_lightning.data.files import KINDS, is_data_file, read_file
from spin_lightning.data.objects import dataset_table, describe, object_table
from spin_lightning.data.splits import (
    Files,
    Place,
    choose_split,
    files_of_folder,
    files_of_pattern,
    read_configs,
)
from spin_lightning.data.tables import Table
from spin_lightning.errors import DataError, first_line

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(/(?P<config>\w[\w.-]*))?(:(?P<split>.+))?")
# A pattern without its last parts, from the first wildcard on, is a folder.
_FIXED_PART = re.compile(r"[^*?\[]*(?=/)")

# Data that come with the package, by their names: folders with the files of all splits.
PACKAGED: Final = {"gsm8k_small": Path(__file__).parent / "gsm8k_small"}

_Name = str | os.PathLike[str]


@dataclass(frozen=True)
class Opened:
    """A source whose rows are about to be read.

    Attributes:
        label: The setting and its value, for messages.
        tables: Its files or objects, one after the other; each is opened when it is asked for.
        not_read: Files that are left alone, with the reason.
    """

    label: str
    tables: Iterator[Table]
    not_read: Mapping[str, str] = field(default_factory=dict)


def source_name(source: object) -> str:
    """A source in a sentence: as it was given, or what it is if it lies in memory."""
    if _is_name(source):
        return os.fspath(source)[:200]
    if _is_names(source):
        return ", ".join(os.fspath(name) for name in source[:5]) + ", …" * (len(source) > 5)
    return describe(source)


def source_label(source: object, setting: str) -> str:
    """The setting and its value, for messages."""
    is_named = _is_name(source) or _is_names(source)
    return f"{setting}={source_name(source)!r}" if is_named else f"{setting} ({describe(source)})"


def open_source(source: object, setting: str) -> Opened:
    """Find the rows that a source stands for.

    Args:
        source: The name of packaged data, a file, a folder, a glob, a folder that is a clone of a hub data set or that
            `save_to_disk` wrote, each with `:split` after it or without; a hub id
            `owner/name[/configuration][:split]`; a list of these; or an object, see `objects`.
        setting: Which setting named the source, for messages.

    Raises:
        DataError: No such data, or data that cannot be read; also while the rows are iterated.
    """
    label = source_label(source, setting)
    if _is_names(source):
        each = [_open_name(name, source_label(name, setting), setting) for name in source]
        not_read = {file: why for opened in each for file, why in opened.not_read.items()}
        return Opened(label, (t for opened in each for t in opened.tables), not_read)
    if _is_name(source):
        return _open_name(source, label, setting)
    return Opened(label, iter([object_table(source, setting)]))


def _is_name(source: object) -> TypeGuard[_Name]:
    return isinstance(source, str | os.PathLike)


def _is_names(source: object) -> TypeGuard[Sequence[_Name]]:
    return isinstance(source, list | tuple) and bool(source) and all(map(_is_name, source))


def _open_name(source: _Name, label: str, setting: str) -> Opened:
    text = os.fspath(source)
    try:
        found = _open_local(text, label, setting)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{label} cannot be opened ({first_line(error)})",
            fix="check the path and who may read it",
        ) from error
    if found is not None:
        return found
    hub_id = _HUB_ID.fullmatch(text)
    if hub_id is None or not isinstance(source, str) or is_data_file(Path(text)):
        raise DataError(
            f"{label}: there is no such file",
            fix="check the path, or give a hub id owner/name[/configuration][:split]",
        )
    return Opened(label, iter([_read_hub(text, hub_id, label)]))


# ---------------------------------------------------------------------------- on this machine


def _open_local(text: str, label: str, setting: str) -> Opened | None:
    """A file, folder or pattern; None where there is nothing by this name."""
    before, _, after = text.rpartition(":")
    # A name with a colon in it comes before a split.
    for name, split in ((text, None), (before, after)):
        if not name.strip():  # an empty name would be the folder that the process was started in
            continue
        path = PACKAGED.get(name) or Path(name).expanduser()
        if path.is_dir():
            return _open_folder(Place(label, path, split), setting)
        if path.exists():
            return _open_file(path, split, label, setting)
        if glob.has_magic(name) and (matches := _matches(path)):
            fixed = _FIXED_PART.match(str(path))
            place = Place(label, Path(fixed[0] or "/") if fixed else Path(), split)
            return _opened(place, files_of_pattern(place, str(path), matches), setting)
        if path.parent.is_dir() and path.name in read_configs(path.parent):
            place = Place(label, path.parent, split)
            return _opened(place, files_of_folder(place, path.name), setting)
    return None


def _open_file(path: Path, split: str | None, label: str, setting: str) -> Opened:
    if not is_data_file(path):
        raise DataError(
            f"{label} is no {KINDS}", fix="give a file of one of these kinds, or a folder of them"
        )
    if split is not None:
        raise DataError(
            f"{label}: a single file has no splits",
            fix=f"leave out ':{split}', or give the folder with the files of all splits",
        )
    return _opened(Place(label, path.parent), Files([path]), setting)


def _open_folder(place: Place, setting: str) -> Opened:
    if (place.root / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in place.root.iterdir() if (p / "state.json").is_file())
        if splits:
            chosen = choose_split(place, splits)
            others = {name: f"split {name}" for name in splits if name != chosen}
            return _open_saved(place.root / chosen, place, others)
    if (place.root / "state.json").is_file() and (place.root / "dataset_info.json").is_file():
        if place.split is not None:
            raise DataError(
                f"{place.label}: this folder is a single split", fix=f"leave out ':{place.split}'"
            )
        return _open_saved(place.root, place, {})
    return _opened(place, files_of_folder(place), setting)


def _open_saved(folder: Path, place: Place, not_read: Mapping[str, str]) -> Opened:
    """A folder that `Dataset.save_to_disk` wrote."""
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    # Its errors have no base class in common.
    except Exception as error:
        raise DataError(
            f"{place.label} cannot be read as what `save_to_disk` wrote ({first_line(error)})",
            fix="save it again with the current version of datasets, or write it with to_parquet",
        ) from error
    return Opened(place.label, iter([dataset_table(data, str(folder))]), not_read)


def _matches(pattern: Path) -> list[str]:
    # `Path.glob` takes no absolute patterns.
    return glob.glob(str(pattern), recursive=True)  # noqa: PTH207


def _opened(place: Place, files: Files, setting: str) -> Opened:
    return Opened(place.label, (read_file(file, setting) for file in files.read), files.not_read)


# ---------------------------------------------------------------------------- the hub


def _read_hub(source: str, hub_id: re.Match[str], label: str) -> Table:
    import datasets
    import huggingface_hub

    try:
        if not huggingface_hub.is_offline_mode():
            # Without a network `load_dataset` tries for half a minute before it reports that.
            huggingface_hub.HfApi().dataset_info(hub_id["name"], timeout=10)
        data = datasets.load_dataset(
            hub_id["name"], hub_id["config"], split=hub_id["split"] or "train"
        )
    # Whatever a client of the network raises: its errors have no base class in common.
    except Exception as error:
        raise DataError(
            f"{label} is no file, and reading it from the hub failed "
            f"({first_line(error.__cause__ or error)})",
            fix="check the path or the hub id owner/name[/configuration][:split]; without a "
            "network give a file, or set HF_HUB_OFFLINE=1 to use what was downloaded before",
        ) from error
    return dataset_table(data, source)
