"""MT-Bench as FastChat publishes it: its files, questions and judge prompts.

Everything here follows `fastchat/llm_judge` of https://github.com/lm-sys/FastChat (2306.05685).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Final

from spin_lightning.errors import DataError, first_line
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.validation import INTEGER, LIST, TEXT, Rule, check_fields

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
# Categories whose answers are right or wrong; the judge gets a reference answer for them.
WITH_REFERENCE: Final = frozenset({"math", "reasoning", "coding"})
TURNS: Final = (1, 2)

# Fields that a judge prompt may use.
_FIELDS: Final = frozenset(
    {"question", "answer", "answer_a", "answer_b"}
    | {f"{name}_{turn}" for name in ("question", "answer", "ref_answer") for turn in TURNS}
    | {f"answer_{side}_{turn}" for side in "ab" for turn in TURNS}
)


@dataclass(frozen=True)
class Question:
    """A question of two user turns.

    Attributes:
        question_id: FastChat's number.
        category: One of eight.
        turns: The user's messages.
        reference: A good answer to each turn, if the category needs one.
    """

    question_id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None

    @property
    def temperature(self) -> float:
        """Sampling temperature of its answers."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


@dataclass(frozen=True)
class Query:
    """A request to the judge.

    Attributes:
        question_id: The question.
        turn: The turn whose answer is judged, 1 or 2.
        prompt: Name of the judge prompt.
        system: The system message.
        user: The user message.
        game: Which of the two orders of a pairwise match, 1 or 2; 0 for single answers.
    """

    question_id: int
    turn: int
    prompt: str
    system: str
    user: str
    game: int = 0


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
        """A hash of all their text."""
        return fingerprint(asdict(self))

    def single(self, question: Question, turn: int, answers: tuple[str, str]) -> Query:
        """Ask for a rating, 1 to 10, of one answer.

        Args:
            question: The question.
            turn: The turn to rate, 1 or 2; the second is rated in the context of the first.
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
        """Ask for a comparison of two assistants; `a` are the answers of assistant A."""
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
        for row in _rows(path, name=TEXT, system_prompt=TEXT, prompt_template=TEXT)
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
        for row in _rows(answered, question_id=INTEGER, choices=LIST)
    }
    path = _find(folder, "question.jsonl")
    return MTBenchData(tuple(_questions(path, references)), prompts)


def _questions(path: Path, references: Mapping[int, tuple[str, str]]) -> list[Question]:
    questions: list[Question] = []
    for row in _rows(path, question_id=INTEGER, category=TEXT, turns=LIST):
        number, category = row["question_id"], row["category"]
        if any(question.question_id == number for question in questions):
            raise DataError(f"{path} has question {number} twice", fix="remove one of them")
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
            fix="keep conversations of two turns, both of them strings, and remove the others",
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
    """Refuse a judge prompt whose fields are not plain names of `_FIELDS`.

    A field of `str.format` can also read attributes of its value, and pad it to any width.
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


def _rows(path: Path, **rules: Rule) -> list[dict[str, Any]]:
    """Lines of JSON with these fields."""
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
            rows.append(check_fields(json.loads(line), rules, required=rules))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"line {number} of {path} is not in FastChat's format ({first_line(error)})",
                fix=f"give it the fields {', '.join(rules)}",
            ) from error
    return rows


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(source, repo_type="dataset", allow_patterns=["*.jsonl"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"mt_bench={source!r} is neither a folder nor a data set that the hub provides",
            fix="give a folder with FastChat's files",
        ) from error
    return Path(folder)
