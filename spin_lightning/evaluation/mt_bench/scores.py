"""Scores of MT-Bench from the judge's verdicts, by FastChat's rules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Final, Literal

from spin_lightning.evaluation.mt_bench.data import Query

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_RATING_IN_ONE_BRACKET = re.compile(r"\[(\d+\.?\d*)\]")
_CHOICES: Final[Mapping[str, Literal["A", "B", "tie"]]] = {
    "[[A]]": "A",
    "[[B]]": "B",
    "[[C]]": "tie",
}


def rating(verdict: str) -> float | None:
    """The rating of a verdict, "[[7]]"; None without one between 1 and 10.

    >>> rating("Helpful. Rating: [[7]]"), rating("[8.5]"), rating("Seven."), rating("[[70]]")
    (7.0, 8.5, None, None)
    """
    found = _RATING.search(verdict) or _RATING_IN_ONE_BRACKET.search(verdict)
    value = float(found.group(1)) if found else 0.0
    return value if 1 <= value <= 10 else None


def choice(verdict: str) -> Literal["A", "B", "tie"] | None:
    """The assistant that a verdict of a match prefers; None if it names neither.

    >>> choice("Both are fine. [[C]]"), choice("A is better")
    ('tie', None)
    """
    return next((side for mark, side in _CHOICES.items() if mark in verdict), None)


def rating_scores(
    queries: Sequence[Query], ratings: Sequence[float | None], categories: Mapping[int, str]
) -> dict[str, float]:
    """Mean ratings, 1 to 10, as FastChat's show_result computes them.

    Args:
        queries: The requests to the judge.
        ratings: The rating of each; None for a verdict without one.
        categories: Category of each question.

    Returns:
        `overall`, `turn_1`, `turn_2` and `category/<name>`, each the mean over the verdicts that
        have a rating (absent where none has), and `unparsable`, the number of those without.
    """
    groups: dict[str, list[float]] = {}
    for query, value in zip(queries, ratings, strict=True):
        if value is not None:
            for name in (
                "overall",
                f"turn_{query.turn}",
                f"category/{categories[query.question_id]}",
            ):
                groups.setdefault(name, []).append(value)
    means = {name: fmean(values) for name, values in groups.items()}
    return means | {"unparsable": float(sum(value is None for value in ratings))}


def match_scores(choices: Sequence[str | None]) -> dict[str, float]:
    """Scores of a match in which every answer was judged in both positions.

    Args:
        choices: For each question and turn two verdicts, with the contestant as A, then as B:
            "A", "B", "tie", or None for a verdict without a choice.

    Returns:
        `win_rate` (wins and half of the ties over all judged pairs; absent without any), `wins`,
        `losses`, `ties`, `inconsistent` (ties because the verdict changed with the position) and
        `unparsable` (pairs with a verdict without a choice; they do not count).
    """
    wins = losses = ties = inconsistent = unparsable = 0
    for first, second in zip(choices[::2], choices[1::2], strict=True):
        if first is None or second is None:
            unparsable += 1
        elif (first, second) == ("A", "B"):
            wins += 1
        elif (first, second) == ("B", "A"):
            losses += 1
        else:
            ties += 1
            inconsistent += (first, second) != ("tie", "tie")
    judged = wins + losses + ties
    counts = {
        "wins": wins,
        "losses": losses,
        "ties": ties,
        "inconsistent": inconsistent,
        "unparsable": unparsable,
    }
    rate = {"win_rate": (wins + ties / 2) / judged} if judged else {}
    return {**rate, **{name: float(count) for name, count in counts.items()}}
