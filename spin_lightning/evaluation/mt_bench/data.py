"""MT-Bench as FastChat publishes it: its files, its judge prompts, and how verdicts are read.

Everything here follows `fastchat/llm_judge` of https://github.com/lm-sys/FastChat (2306.05685).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Final, Literal

from spin_lightning.errors import DataError
from spin_lightning.run.fingerprint import fingerprint

# Temperature of the answers by category; 0 takes the most likely token.
TEMPERATURES: Final[Mapping[str, float]] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE: Final = 0.7
# What has an answer that is right or wrong is judged with a reference answer at hand.
WITH_REFERENCE: Final = frozenset({"math", "reasoning", "coding"})
TURNS: Final = (1, 2)

# What a judge prompt may ask for.
_FIELDS: Final = frozenset(
    {"question", "answer", "answer_a", "answer_b"}
    | {f"{name}_{turn}" for name in ("question", "answer", "ref_answer") for turn in TURNS}
    | {f"answer_{side}_{turn}" for side in "ab" for turn in TURNS}
)

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_RATING_IN_ONE_BRACKET = re.compile(r"\[(\d+\.?\d*)\]")
_CHOICES: Final[Mapping[str, Literal["A", "B", "tie"]]] = {
    "[[A]]": "A",
    "[[B]]": "B",
    "[[C]]": "tie",
}


@dataclass(frozen=True)
class Question:
    """Two turns of a user.

    Attributes:
        question_id: FastChat's number.
        category: One of eight.
        turns: What the user says.
        reference: A good answer to each turn, where the category needs one.
    """

    question_id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None

    @property
    def temperature(self) -> float:
        """At which the answers are sampled."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


@dataclass(frozen=True)
class Query:
    """What a judge is asked.

    Attributes:
        question_id: About which question.
        turn: About the answer to which turn, 1 or 2.
        prompt: Name of the judge prompt.
        system: The system message.
        user: The user message.
        game: Which of two positions in a pairwise match, 1 or 2; 0 for single answers.
    """

    question_id: int
    turn: int
    prompt: str
    system: str
    user: str
    game: int = 0


Answers = Mapping[int, tuple[str, str]]


@dataclass(frozen=True)
class MTBenchData:
    """The questions and the judge's prompts.

    Attributes:
        questions: In the file's order.
        prompts: (system message, template) by name.
    """

    questions: tuple[Question, ...]
    prompts: Mapping[str, tuple[str, str]]

    @property
    def fingerprint(self) -> str:
        """Changes with any word of them."""
        return fingerprint(asdict(self))

    def single(self, question: Question, turn: int, answers: tuple[str, str]) -> Query:
        """Ask for a rating, 1 to 10, of one answer.

        Args:
            question: The question.
            turn: Whose answer is rated; the second is rated with the first in sight.
            answers: The answers to both turns.
        """
        values = {"question": question.turns[0], "answer": answers[0]}
        values |= {f"question_{i}": text for i, text in enumerate(question.turns, 1)}
        values |= {f"answer_{i}": text for i, text in enumerate(answers, 1)}
        name = "single-math-v1" if question.category in WITH_REFERENCE else "single-v1"
        return self._query(name, question, turn, values)

    def pair(
        self, question: Question, turn: int, a: tuple[str, str], b: tuple[str, str], game: int
    ) -> Query:
        """Ask which of two assistants answered better; `a` are the answers of assistant A."""
        values = {"question": question.turns[0], "answer_a": a[0], "answer_b": b[0]}
        values |= {f"question_{i}": text for i, text in enumerate(question.turns, 1)}
        for side, answers in (("a", a), ("b", b)):
            values |= {f"answer_{side}_{i}": text for i, text in enumerate(answers, 1)}
        name = "pair-math-v1" if question.category in WITH_REFERENCE else "pair-v2"
        return self._query(name, question, turn, values, game)

    def _query(
        self, name: str, question: Question, turn: int, values: dict[str, str], game: int = 0
    ) -> Query:
        if question.reference is not None:
            values |= {f"ref_answer_{i}": text for i, text in enumerate(question.reference, 1)}
        name += "-multi-turn" if turn == 2 else ""
        system, template = self.prompts[name]
        return Query(question.question_id, turn, name, system, template.format(**values), game)


def rating(verdict: str) -> float | None:
    """The rating of a verdict, "[[7]]"; None where there is none between 1 and 10.

    >>> rating("Helpful. Rating: [[7]]"), rating("[8.5]"), rating("Seven."), rating("[[70]]")
    (7.0, 8.5, None, None)
    """
    found = _RATING.search(verdict) or _RATING_IN_ONE_BRACKET.search(verdict)
    value = float(found.group(1)) if found else 0.0
    return value if 1 <= value <= 10 else None


def choice(verdict: str) -> Literal["A", "B", "tie"] | None:
    """Who a verdict of a match prefers; None where it does not say.

    >>> choice("Both are fine. [[C]]"), choice("A is better")
    ('tie', None)
    """
    return next((who for mark, who in _CHOICES.items() if mark in verdict), None)


def read_mt_bench(source: str) -> MTBenchData:
    """Read questions, judge prompts and reference answers.

    Args:
        source: A folder that has, somewhere below it, question.jsonl, judge_prompts.jsonl and
            reference_answer*.jsonl or reference_answer/*.jsonl; or the hub id of such a data set.

    Raises:
        DataError: A file, a prompt or a reference answer is missing or malformed.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(source)
    path = _find(folder, "judge_prompts.jsonl")
    prompts = {
        row["name"]: (row["system_prompt"], row["prompt_template"])
        for row in _rows(path, name=str, system_prompt=str, prompt_template=str)
    }
    for name, (_, template) in prompts.items():
        _check_template(name, template, path)
    for name in ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1"):
        for full in (name, f"{name}-multi-turn"):
            if full not in prompts:
                raise DataError(
                    f"judge_prompts.jsonl in {folder} has no prompt {full}",
                    fix="use FastChat's fastchat/llm_judge/data/judge_prompts.jsonl",
                )
    answered = _find(folder, "reference_answer*.jsonl", "reference_answer/*.jsonl")
    references = {
        row["question_id"]: _two(_first_turns(row["choices"]), answered)
        for row in _rows(answered, question_id=int, choices=list)
    }
    path = _find(folder, "question.jsonl")
    return MTBenchData(tuple(_questions(path, references)), prompts)


def _questions(path: Path, references: Mapping[int, tuple[str, str]]) -> list[Question]:
    questions: list[Question] = []
    for row in _rows(path, question_id=int, category=str, turns=list):
        number, category = row["question_id"], row["category"]
        if any(question.question_id == number for question in questions):
            raise DataError(f"{path} has question {number} twice", fix="leave one of them out")
        needed = category in WITH_REFERENCE
        if needed and number not in references:
            raise DataError(
                f"question {number} ({category}) of {path} has no reference answer",
                fix="put FastChat's reference_answer/gpt-4.jsonl beside it",
            )
        reference = references[number] if needed else None
        questions.append(Question(number, category, _two(row["turns"], path), reference))
    if not questions:
        raise DataError(f"{path} has no questions", fix="use FastChat's question.jsonl")
    return questions


def _first_turns(choices: Any) -> Any:
    first = choices[0] if choices else None
    return first.get("turns") if isinstance(first, dict) else None


def _two(turns: Any, path: Path) -> tuple[str, str]:
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(t, str) for t in turns):
        what = f"{len(turns)} turns" if isinstance(turns, list) else "no turns"
        raise DataError(
            f"{path} has a conversation of {what}",
            fix="MT-Bench has two turns in each, both of them texts; leave the others out",
        )
    return turns[0], turns[1]


def _find(folder: Path, *patterns: str) -> Path:
    found = sorted(path for pattern in patterns for path in folder.rglob(pattern))
    if not found:
        raise DataError(
            f"there is no {patterns[0]} below {folder}",
            fix="give a folder with FastChat's question.jsonl, judge_prompts.jsonl and "
            "reference_answer/gpt-4.jsonl",
        )
    return found[0]


def _check_template(name: str, template: str, path: Path) -> None:
    """Refuse a judge prompt whose fields are not plain names that a query fills in.

    A field of `str.format` may reach into what it names, and be padded to any width.
    """
    try:
        fields = [(f, spec, cast) for _, f, spec, cast in Formatter().parse(template)]
        if any(f is not None and (f not in _FIELDS or spec or cast) for f, spec, cast in fields):
            raise ValueError(f"it has other fields than {', '.join(sorted(_FIELDS))}")
    except ValueError as error:
        raise DataError(
            f"the prompt {name} of {path} cannot be filled in ({error})",
            fix="use FastChat's fastchat/llm_judge/data/judge_prompts.jsonl",
        ) from error


def _rows(path: Path, **fields: type) -> list[dict[str, Any]]:
    """Lines of JSON that have these fields, of these types."""
    rows = []
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read ({error})", fix="give FastChat's file, in UTF-8"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            for name, kind in fields.items():
                if not isinstance(row[name], kind):
                    raise ValueError(f"its {name} is no {kind.__name__}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"line {number} of {path} is not in FastChat's format ({error!r})",
                fix=f"give it the fields {', '.join(fields)}",
            ) from error
        rows.append(row)
    return rows


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(source, repo_type="dataset", allow_patterns=["*.jsonl"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"mt_bench={source!r} is no folder, and no data set that the hub gives",
            fix="give a folder with FastChat's files",
        ) from error
    return Path(folder)


def by(questions: Sequence[Question], key: Callable[[Question], Any]) -> dict[Any, list[Question]]:
    """Questions in groups, in order of first appearance."""
    groups: dict[Any, list[Question]] = {}
    for question in questions:
        groups.setdefault(key(question), []).append(question)
    return groups
