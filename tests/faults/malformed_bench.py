"""Damaged files of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.faults.damage import (
    DEEP,
    NO_JSON,
    NOISE,
    Change,
    bytes_,
    cases,
    edited,
    gone,
    half,
    torn,
)

_LINE = '{"key": "a", "judgment": "[[7]]", "prompt_tokens": 1, "completion_tokens": 1}\n'


def verdicts(line: object) -> Change:
    """A file of verdicts with another second line."""
    text = line if isinstance(line, str) else json.dumps(line)
    return lambda path: path.write_text(f"{_LINE}{text}\n{_LINE}") and None


def first_line(**changes: Any) -> Change:
    """JSON lines whose first has other values; None takes a key away."""

    def change(path: Path) -> None:
        first, *others = path.read_text().splitlines()
        new = {k: v for k, v in {**json.loads(first), **changes}.items() if v is not None}
        path.write_text("\n".join([json.dumps(new), *others]) + "\n")

    return change


def first_line_twice(path: Path) -> None:
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, first, *others]) + "\n")


QUESTIONS, PROMPTS, ANSWERS = (
    "question.jsonl",
    "judge_prompts.jsonl",
    "reference_answer/gpt-4.jsonl",
)
MT_BENCH = [
    *cases(
        QUESTIONS,
        "questions",
        ("question.jsonl", "Fix: "),
        gone=gone,
        empty=bytes_(b""),
        torn=torn,
        noise=bytes_(NOISE),
        deep=bytes_(DEEP),
        twice=first_line_twice,
        no_id=first_line(question_id=None),
        id_a_text=first_line(question_id="one"),
        no_category=first_line(category=None),
        category_a_list=first_line(category=["math"]),
        no_turns=first_line(turns=None),
        one_turn=first_line(turns=["w1"]),
        three_turns=first_line(turns=["w1", "w2", "w3"]),
        a_text_for_turns=first_line(turns="w1"),
        two_letters_for_turns=first_line(turns="ab"),
        turns_of_numbers=first_line(turns=[1, 2]),
        no_reference=first_line(question_id=999, category="math"),
    ),
    *cases(
        PROMPTS,
        "questions",
        ("judge_prompts.jsonl", "Fix: "),
        gone=gone,
        empty=bytes_(b""),
        half=half,
        noise=bytes_(NOISE),
        no_template=first_line(prompt_template=None),
        template_a_number=first_line(prompt_template=7),
        no_system=first_line(system_prompt=None),
        another_name=first_line(name="mine"),
        unknown_field=first_line(prompt_template="{question} {secret}"),
        reaching_field=first_line(prompt_template="{question.__class__.__mro__}"),
        index=first_line(prompt_template="{question[0]}"),
        padded=first_line(prompt_template="{question:>9999999999}"),
        cast=first_line(prompt_template="{question!r}"),
        numbered=first_line(prompt_template="{0}"),
        unnamed=first_line(prompt_template="{}"),
        unbalanced=first_line(prompt_template="{question"),
    ),
    *cases(
        ANSWERS,
        "questions",
        ("Fix: ",),
        gone=gone,
        noise=bytes_(NOISE),
        half=half,
        no_choices=first_line(choices=None),
        empty_choices=first_line(choices=[]),
        choices_of_texts=first_line(choices=["w1"]),
        no_turns=first_line(choices=[{}]),
        one_turn=first_line(choices=[{"turns": ["w1"]}]),
    ),
    *cases(
        "verdicts.jsonl",
        "verdicts",
        ("line 2 of", "verdicts.jsonl is damaged", "delete this line"),
        noise=verdicts("nothing"),
        torn=verdicts(_LINE[:20]),
        a_list=verdicts([1]),
        null=verdicts(None),
        deep=verdicts("[" * 10**5),
        no_key=verdicts({"judgment": "[[7]]"}),
        key_a_number=verdicts({"key": 7, "judgment": "[[7]]"}),
        no_judgment=verdicts({"key": "b", "prompt_tokens": 1, "completion_tokens": 1}),
        judgment_a_number=verdicts(
            {"key": "b", "judgment": 7, "prompt_tokens": 1, "completion_tokens": 1}
        ),
        tokens_a_text=verdicts(
            {"key": "b", "judgment": "x", "prompt_tokens": "1", "completion_tokens": 1}
        ),
        no_tokens=verdicts({"key": "b", "judgment": "x"}),
    ),
    *cases("result.json", "results", ("result.json is damaged", "delete it"), **NO_JSON),
    *cases(
        "result.json",
        "results",
        ("result.json is damaged", "delete it"),
        no_scores=edited(scores=None),
        scores_of_texts=edited(scores={"acc": "high"}),
        of_the_future=edited(color="blue"),
        settings_a_list=edited(settings=[]),
        no_identity=edited(identity=None),
        lower_is_better_a_text=edited(lower_is_better="acc"),
        details_a_list=edited(details=[]),
    ),
]


def write_bench(folder: Path) -> None:
    """The smallest valid files of MT-Bench."""
    names = [
        f"{name}{turns}"
        for name in ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1")
        for turns in ("", "-multi-turn")
    ]
    prompts = [{"name": n, "system_prompt": "", "prompt_template": "{question}"} for n in names]
    questions = [{"question_id": i, "category": "math", "turns": ["w1", "w2"]} for i in (1, 2)]
    answers = [{"question_id": i, "choices": [{"turns": ["w3", "w4"]}]} for i in (1, 2)]
    for name, rows in ((QUESTIONS, questions), (PROMPTS, prompts), (ANSWERS, answers)):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
