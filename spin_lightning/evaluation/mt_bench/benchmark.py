"""MT-Bench: iterates answer, a judge rates each answer, or two iterates' answers side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from spin_lightning.evaluation.contestants import Contestant
from spin_lightning.evaluation.mt_bench.answers import Answer, answers
from spin_lightning.evaluation.mt_bench.data import (
    TURNS,
    Query,
    choice,
    rating,
    read_mt_bench,
)
from spin_lightning.evaluation.mt_bench.judge import Judge, Verdict
from spin_lightning.evaluation.results import Result, cached_result, write_result
from spin_lightning.evaluation.settings import Answering, JudgeSettings
from spin_lightning.policies.base import Policy
from spin_lightning.run.folder import RunFolder

_BENCHMARK = "mt_bench"


class MTBench:
    """Rates iterates of a run on MT-Bench, by single-answer grading.

    Answers and verdicts are kept as they come, in FastChat's formats; what is there is neither
    written nor judged again.

    Args:
        source: Folder or hub id of MT-Bench's files.
        judge: Who judges.
        answering: How the questions are answered.
        versus: Judge each contestant's answers against this one's instead, in both positions.

    Raises:
        DataError: The files are not FastChat's.
        SettingError: The judge cannot be asked.
    """

    def __init__(
        self,
        source: str,
        judge: JudgeSettings,
        answering: Answering | None = None,
        versus: Contestant | None = None,
    ) -> None:
        """Read the files."""
        self.data = read_mt_bench(source)
        self.answering = answering or Answering()
        self.versus = versus
        self._judge = Judge(judge)

    def evaluate(
        self,
        run: RunFolder,
        policy: Callable[[], Policy],
        tokenizer: PreTrainedTokenizerBase,
        contestant: Contestant,
    ) -> list[Result]:
        """Rate one contestant, or match it with the other one.

        Args:
            run: The run folder.
            policy: Gives who can act as the contestant's iterates; not asked if all is answered.
            tokenizer: The run's.
            contestant: Who answers.

        Returns:
            One result; none for a match of a contestant with itself.

        Raises:
            JudgeError: Some verdicts could not be had; the others are kept.
            SettingError: The tokenizer has no chat template.
        """
        if self.versus is not None and self.versus.name == contestant.name:
            return []
        benchmark, settings = self._what(), self._settings()
        found = cached_result(run, contestant, benchmark, settings)
        if found is None:
            measure = self._ratings if self.versus is None else self._match
            scores, lower, details = measure(run, policy, tokenizer, contestant)
            found = Result(
                contestant.name, contestant.identity, benchmark, settings, scores, lower, details
            )
            write_result(run, found)
        return [found]

    def _what(self) -> str:
        return _BENCHMARK if self.versus is None else f"{_BENCHMARK}_vs_{self.versus.name}"

    def _settings(self) -> dict[str, Any]:
        return {
            "questions": self.data.fingerprint,
            "judge": self._judge.settings.asked,
            "max_new_tokens": self.answering.max_new_tokens,
            "seed": self.answering.seed,
            **({} if self.versus is None else {"versus": self.versus.identity}),
        }

    def _answers(
        self,
        run: RunFolder,
        policy: Callable[[], Policy],
        tokenizer: PreTrainedTokenizerBase,
        contestant: Contestant,
    ) -> dict[int, Answer]:
        path = run.evaluation(contestant.name) / _BENCHMARK / "answers.jsonl"
        questions = self.data.questions
        return answers(self.answering, policy, tokenizer, contestant, questions, path)

    def _ratings(
        self,
        run: RunFolder,
        policy: Callable[[], Policy],
        tokenizer: PreTrainedTokenizerBase,
        contestant: Contestant,
    ) -> tuple[dict[str, float], tuple[str, ...], dict[str, Any]]:
        answers = self._answers(run, policy, tokenizer, contestant)
        queries = [
            self.data.single(question, turn, answers[question.question_id].turns)
            for question in self.data.questions
            for turn in TURNS
        ]
        verdicts = self._judge.verdicts(queries, self._path(run, contestant, "single"))
        categories = {q.question_id: q.category for q in self.data.questions}
        ratings = [rating(verdict.text) for verdict in verdicts]
        scores = rating_scores(queries, ratings, categories)
        details = self._details(verdicts, answers.values())
        return scores, ("unparsable",), details

    def _match(
        self,
        run: RunFolder,
        policy: Callable[[], Policy],
        tokenizer: PreTrainedTokenizerBase,
        contestant: Contestant,
    ) -> tuple[dict[str, float], tuple[str, ...], dict[str, Any]]:
        assert self.versus is not None, "evaluate() asked"
        mine = self._answers(run, policy, tokenizer, contestant)
        theirs = self._answers(run, policy, tokenizer, self.versus)
        queries = []
        for question in self.data.questions:
            us, them = mine[question.question_id].turns, theirs[question.question_id].turns
            for turn in TURNS:
                queries.append(self.data.pair(question, turn, us, them, game=1))
                queries.append(self.data.pair(question, turn, them, us, game=2))
        verdicts = self._judge.verdicts(queries, self._path(run, contestant, self._what()))
        scores = match_scores([choice(verdict.text) for verdict in verdicts])
        lower = ("losses", "unparsable", "inconsistent")
        return scores, lower, self._details(verdicts, [*mine.values(), *theirs.values()])

    def _path(self, run: RunFolder, contestant: Contestant, kind: str) -> Path:
        judge = re.sub(r"[^\w.-]+", "_", self._judge.settings.model)
        return run.evaluation(contestant.name) / _BENCHMARK / f"judgments_{judge}_{kind}.jsonl"

    def _details(self, verdicts: Sequence[Verdict], answers: Collection[Answer]) -> dict[str, Any]:
        return {
            "verdicts": len(verdicts),
            "judge": {"base_url": self._judge.settings.base_url, **self._judge.settings.asked},
            "judge_prompt_tokens": sum(verdict.prompt_tokens for verdict in verdicts),
            "judge_completion_tokens": sum(verdict.completion_tokens for verdict in verdicts),
            "answers_cut_off": sum(answer.cut_off for answer in answers),
            "answers_that_did_not_fit": sum(answer.did_not_fit for answer in answers),
        }


def judge_lines(result: Result) -> list[str]:
    """What a judge's work came to: verdicts that could be read, tokens, answers cut short."""
    details = result.details
    if "verdicts" not in details:
        return []
    asked, lost = details["verdicts"], int(result.scores["unparsable"])
    what = "verdicts" if result.benchmark == _BENCHMARK else "pairs of verdicts"
    total = asked if result.benchmark == _BENCHMARK else asked // 2
    read, written = details["judge_prompt_tokens"], details["judge_completion_tokens"]
    parsed = f"{total - lost} of {total} {what} could be read ({(total - lost) / total:.1%})"
    cut_off, did_not_fit = details["answers_cut_off"], details["answers_that_did_not_fit"]
    return [
        f"{result.benchmark}: {parsed}; the judge read {read:,} and wrote {written:,} tokens",
        f"{cut_off} answers were cut off by their length, {did_not_fit} prompts did not fit in",
    ]


def rating_scores(
    queries: Sequence[Query], ratings: Sequence[float | None], categories: Mapping[int, str]
) -> dict[str, float]:
    """Mean ratings, 1 to 10, as FastChat's show_result takes them.

    Args:
        queries: What was asked.
        ratings: The rating of each; None where a verdict has none.
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
    """What comes of a match in which every answer was judged in both positions.

    Args:
        choices: For each question and turn two verdicts, with the contestant as A, then as B:
            "A", "B", "tie", or None where a verdict does not say.

    Returns:
        `win_rate` (wins and half of the ties over all pairs that were judged; absent without any),
        `wins`, `losses`, `ties`, `inconsistent` (ties since the verdict moved with the position)
        and `unparsable` (pairs with a verdict that does not say; they do not count).
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
