"""Which questions of a benchmark are scored, and which serve as examples in the prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from spin_lightning.evaluation.offline.files import Question, check_files, read_split

# At least this many questions serve as examples where no other split does.
_HELD_OUT: Final = 40


@dataclass(frozen=True)
class Benchmark:
    """Where the questions of a benchmark come from.

    Attributes:
        data: Name of the data set.
        columns: The columns that the harness's task reads.
        text: The column that tells questions apart.
        scored: The split that is scored.
        examples: The split that the official examples come from.
        stand_in: The split of the examples where the official one is missing; None for a part of
            the scored split.
        related: Questions with the same value are either all scored or all examples.
        needs_examples: Whether the official examples must be there, and none replaces them.
    """

    data: str
    columns: tuple[str, ...]
    text: str
    scored: str
    examples: str
    stand_in: str | None = None
    related: Callable[[Question], str] = repr
    needs_examples: bool = False


BENCHMARKS: Final[Mapping[str, Benchmark]] = {
    one.data: one
    for one in (
        Benchmark(
            "arc_challenge",
            ("id", "question", "choices", "answerKey"),
            "question",
            "test",
            "train",
            "validation",
        ),
        Benchmark(
            "hellaswag",
            ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "label"),
            "ctx",
            "validation",
            "train",
            # Questions from one video or article.
            related=lambda q: q["source_id"],
        ),
        Benchmark(
            "mmlu",
            ("question", "subject", "choices", "answer"),
            "question",
            "test",
            "dev",
            needs_examples=True,
        ),
        Benchmark(
            "winogrande",
            ("sentence", "option1", "option2", "answer"),
            "sentence",
            "validation",
            "train",
            # Twins: the same two options, one word changed.
            related=lambda q: "/".join(sorted((q["option1"], q["option2"]))),
        ),
        Benchmark("gsm8k", ("question", "answer"), "question", "test", "train"),
    )
}


class Differences(NamedTuple):
    """What differs from the official task, in a few words each; empty if nothing does.

    Attributes:
        examples: In the examples of the prompts.
        scored: In the questions.
    """

    examples: str = ""
    scored: str = ""

    def at(self, num_fewshot: int) -> str:
        """Everything that concerns prompts with this number of examples."""
        return "; ".join(filter(None, (self.examples if num_fewshot else "", self.scored)))


NO_DIFFERENCES: Final = Differences()


@dataclass(frozen=True)
class Questions:
    """The questions of a benchmark.

    Attributes:
        scored: What is scored, in order.
        examples: What the examples in the prompts are drawn from. None of it is scored, except that
            five of MMLU's official examples are also among its official questions.
        differs: What differs from the official task.
    """

    scored: list[Question]
    examples: list[Question]
    differs: Differences = NO_DIFFERENCES


def check(data: str, own: Path | None) -> None:
    """Check that the files of a benchmark can be found.

    Raises:
        SettingError: They cannot.
    """
    benchmark = BENCHMARKS[data]
    check_files(f"offline_{data}", data, benchmark.scored, own)
    if benchmark.needs_examples:
        check_files(f"offline_{data}", data, benchmark.examples, own)


def questions_of(data: str, own: Path | None) -> Questions:
    """Read a benchmark and set its examples apart.

    Args:
        data: Name of the data set.
        own: Folder of the user's own files.

    Raises:
        SettingError: The benchmark's files are missing.
        DataError: A file cannot be read or lacks a column.
    """
    check(data, own)
    benchmark = BENCHMARKS[data]
    scored = read_split(data, benchmark.scored, benchmark.columns, own)
    assert scored is not None
    examples = read_split(data, benchmark.examples, benchmark.columns, own)
    if examples is not None:
        return Questions(
            scored, examples if data == "mmlu" else _others(benchmark, examples, scored)
        )
    if benchmark.stand_in is not None:
        others = read_split(data, benchmark.stand_in, benchmark.columns, own)
        if others is not None:
            differs = Differences(f"examples from {benchmark.stand_in}, not {benchmark.examples}")
            return Questions(scored, _others(benchmark, others, scored), differs)
    return _set_apart(benchmark, scored)


def _others(
    benchmark: Benchmark, examples: list[Question], scored: list[Question]
) -> list[Question]:
    """The examples without questions that are scored: ARC has four in two splits."""
    texts = {question[benchmark.text] for question in scored}
    return [example for example in examples if example[benchmark.text] not in texts]


def _set_apart(benchmark: Benchmark, questions: list[Question]) -> Questions:
    """Take examples from the scored split, related questions together, by a fixed shuffle.

    What is scored is shuffled, too: HellaSwag begins with all of its videos, so that a limit would
    leave out its articles.
    """
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(benchmark.related(question), []).append(question)
    wanted = min(_HELD_OUT, len(questions) // 2)
    examples: list[Question] = []
    apart: set[str] = set()
    for name in sorted(groups, key=_key):
        if len(examples) >= wanted:
            break
        examples += groups[name]
        apart.add(name)
    scored = [question for question in questions if benchmark.related(question) not in apart]
    differs = Differences(
        f"examples: {len(examples)} of {benchmark.scored}, not {benchmark.examples}",
        f"scored: {len(scored)} of {len(questions)}, shuffled",
    )
    return Questions(sorted(scored, key=_key), examples, differs)


def _key(value: object) -> bytes:
    """A key that sorts values into an order without meaning, the same everywhere."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
