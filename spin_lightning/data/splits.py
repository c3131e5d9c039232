"""Which files of a folder are read: those of one split, as `datasets` would choose them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from spin_lightning.data.files import KINDS, is_data_file
from spin_lightning.errors import DataError

# Words in names of files and folders, as in `datasets.data_files`.
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _KEYWORDS.items() for word in words}
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")
# `data/train-00000-of-00002.parquet`: how the hub names the files of a split.
_HUB_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}.*")
# Files that describe data and hold none.
_DESCRIPTIONS = frozenset(
    {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
# With more, it is a disk, not a data set.
_MOST_FILES = 20_000


@dataclass
class Files:
    """Files of a source.

    Attributes:
        read: Those to read, in order.
        not_read: The others, with the reason.
    """

    read: list[Path]
    not_read: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A folder or pattern as the user gave it.

    Attributes:
        label: The setting and its value, for messages.
        root: The folder that names of files are relative to.
        split: The split that was asked for.
    """

    label: str
    root: Path
    split: str | None = None


def files_of_folder(place: Place, config: str | None = None) -> Files:
    """Choose the files of a folder and the folders in it.

    Args:
        place: The folder.
        config: Configuration of the hub data set whose clone the folder is.

    Raises:
        DataError: There are no such files, or a choice has to be made.
    """
    data, not_read = _walk(place)
    configs = read_configs(place.root)
    if not data:
        raise DataError(
            f"{place.label} holds no {KINDS}",
            fix="give a file of one of these kinds, or a folder of them",
        )
    if not configs:
        return _of_split(
            place, [(file, _split_of(_inside(place, file))) for file in data], not_read
        )
    name = _config(place, configs, config)
    splits = _files_by_split(place.root, configs[name], data)
    for file in data:
        if file not in splits:
            not_read[str(_inside(place, file))] = f"not in the configuration {name!r} of README.md"
    if not splits:
        raise DataError(
            f"{place.label}: no file is there of the configuration {name!r} in README.md",
            fix="clone the data set with all its files, or give a folder without its README.md",
        )
    return _of_split(place, [(file, splits[file]) for file in data if file in splits], not_read)


def files_of_pattern(place: Place, pattern: str, matches: Iterable[str]) -> Files:
    """Choose among the files that a glob matches.

    A pattern that names a split, such as `test-*.jsonl`, asks for it.

    Raises:
        DataError: It matches no file that can be read, or a choice has to be made.
    """
    files = Files([])
    for match in sorted(map(Path, matches)):
        if match.is_file() and is_data_file(match):
            files.read.append(match)
        else:
            kind = "a folder; the pattern names files" if match.is_dir() else "not a data file"
            files.not_read[str(_inside(place, match))] = kind
    if not files.read:
        raise DataError(
            f"{place.label} matches no {KINDS}",
            fix="correct the pattern; `**` stands for any number of folders",
        )
    wanted = place.split or _split_of(PurePath(pattern).relative_to(place.root))
    place = Place(place.label, place.root, wanted)
    return _of_split(
        place, [(file, _split_of(_inside(place, file))) for file in files.read], files.not_read
    )


def choose_split(place: Place, splits: Sequence[str]) -> str:
    """The split to read: the one asked for, else `train`.

    Raises:
        DataError: There is no such split.
    """
    wanted = place.split or "train"
    for name in (wanted, _SPLIT_OF_WORD.get(wanted)):
        if name in splits:
            return str(name)
    example = next(iter(splits))
    raise DataError(
        f"{place.label} has no split {wanted!r}; it has {', '.join(splits)}",
        fix=f"name one of these after a colon, such as '{place.root}:{example}'",
    )


def read_configs(root: Path) -> dict[str, Mapping[str, Any]]:
    """Configurations by name, from the head of a hub data set's README.md; none without one."""
    try:
        text = (root / "README.md").read_text(encoding="utf-8-sig")
        head = text.split("---\n", 2)[1] if text.startswith("---\n") else ""
        configs = (yaml.safe_load(head) or {}).get("configs") or []
        named = {str(one.get("config_name", "default")): one for one in configs}
        return {name: c for name, c in named.items() if "data_files" in c or "data_dir" in c}
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError, IndexError):
        return {}


# ---------------------------------------------------------------------------- details


def _walk(place: Place) -> tuple[list[Path], dict[str, str]]:
    """Data files below a folder by name, and what else there is, with the reason."""
    data: list[Path] = []
    others: dict[str, str] = {}
    for folder, names, files in os.walk(place.root):
        for path in [Path(folder, name) for name in names]:
            if path.name.startswith((".", "__")) or path.is_symlink():
                names.remove(path.name)
                others[str(_inside(place, path))] = "a link" if path.is_symlink() else "hidden"
        for path in (Path(folder, name) for name in files):
            if path.name.startswith("."):
                others[str(_inside(place, path))] = "hidden"
            elif path.name in _DESCRIPTIONS or not is_data_file(path):
                others[str(_inside(place, path))] = "not a data file"
            else:
                data.append(path)
        if len(data) + len(others) > _MOST_FILES:
            raise DataError(
                f"{place.label} holds more than {_MOST_FILES:,} files",
                fix="give the folder of the data itself, or a pattern such as 'folder/**/*.jsonl'",
            )
    return sorted(data), dict(sorted(others.items()))


def _inside(place: Place, path: Path) -> PurePath:
    return path.relative_to(place.root)


def _split_of(path: PurePath) -> str | None:
    """The split that a relative path names: by a folder of it, else by the file's name."""
    shard = _HUB_SHARD.fullmatch(path.name)
    if shard is not None and path.parent.name == "data":
        return shard["split"]
    for part in path.parts:
        for word in _BETWEEN_WORDS.split(part.lower()):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return None


def _of_split(
    place: Place, files: Sequence[tuple[Path, str | None]], not_read: dict[str, str]
) -> Files:
    """The files of one split.

    Without a split asked for it is `train`; where none has this name, files that name no split.
    """
    splits = list(dict.fromkeys(split for _, split in files if split is not None))
    chosen: str | None = None
    if place.split is not None or "train" in splits or all(split for _, split in files):
        if not splits:
            raise DataError(
                f"{place.label}: no file names a split",
                fix=f"leave out ':{place.split}', or put the split into the files' names",
            )
        chosen = choose_split(place, splits)
    for file, split in files:
        if split != chosen:
            reason = f"split {split}" if split else "its name has no split, those of others have"
            not_read[str(_inside(place, file))] = reason
    return Files([file for file, split in files if split == chosen], not_read)


def _config(place: Place, configs: Mapping[str, Mapping[str, Any]], asked: str | None) -> str:
    """Name of the configuration to read."""
    if asked is not None:
        return asked
    defaults = [name for name, one in configs.items() if one.get("default") or name == "default"]
    if len(configs) == 1 or defaults:
        return (defaults or list(configs))[0]
    raise DataError(
        f"{place.label} is a data set of several configurations: {', '.join(configs)}",
        fix=f"name one after the folder, such as '{place.root}/{next(iter(configs))}'",
    )


def _files_by_split(
    root: Path, config: Mapping[str, Any], data: Sequence[Path]
) -> dict[Path, str | None]:
    """The files of a configuration, with the split that README.md or their name gives them."""
    known = set(data)
    base = root / str(config.get("data_dir") or ".")
    given = config.get("data_files")
    if given is None:
        return {f: _split_of(f.relative_to(base)) for f in data if f.is_relative_to(base)}
    found: dict[Path, str | None] = {}
    for split, pattern in _patterns(given):
        for file in _matching(base, pattern):
            if file in known:
                found.setdefault(file, split)
    return found


def _patterns(given: Any) -> Iterator[tuple[str, str]]:
    """Splits with their patterns: a pattern, a list of them, or each with the split it makes."""
    if isinstance(given, dict):
        given = [{"split": split, "path": path} for split, path in given.items()]
    for one in given if isinstance(given, list) else [given]:
        paths = one.get("path", []) if isinstance(one, dict) else one
        split = str(one.get("split", "train")) if isinstance(one, dict) else "train"
        for path in paths if isinstance(paths, list) else [paths]:
            yield split, str(path)


def _matching(base: Path, pattern: str) -> list[Path]:
    try:
        return [base / match.relative_to(base) for match in base.glob(pattern)]
    except (ValueError, NotImplementedError):  # an absolute pattern, or an empty one
        return []
