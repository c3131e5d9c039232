"""MT-Bench: iterates answer, and a judge rates each answer or compares those of two iterates."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from spin_lightning.evaluation.base import EvaluatedRun
from spin_lightning.evaluation.contestants import Contestant
from spin_lightning.evaluation.mt_bench.answers import Answer, answer_questions
from spin_lightning.evaluation.mt_bench.data import TURNS, read_mt_bench
from spin_lightning.evaluation.mt_bench.judge import Judge, Verdict
from spin_lightning.evaluation.mt_bench.scores import choice, match_scores, rating, rating_scores
from spin_lightning.evaluation.results import Result, cached_result, write_result
from spin_lightning.evaluation.settings import Answering, JudgeSettings
from spin_lightning.run.folder import RunFolder

_BENCHMARK = "mt_bench"


class MTBench:
    """Rates iterates of a run on MT-Bench, by single-answer grading.

    Each answer and each verdict is stored as soon as it arrives, in FastChat's formats, and is not
    requested again.

    Args:
        source: Folder or hub id of MT-Bench's files.
        judge: The judge.
        answering: How the questions are answered.
        versus: Compare each contestant's answers with this one's instead, in both positions.

    Raises:
        DataError: The files are not FastChat's.
        SettingError: The judge's client or key is missing.
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

    def evaluate(self, run: EvaluatedRun, contestant: Contestant) -> list[Result]:
        """Rate one contestant, or match it with the other one.

        Returns:
            One result, or none for a match of a contestant with itself.

        Raises:
            JudgeError: Some verdicts failed; the others are stored.
            SettingError: The tokenizer has no chat template.
        """
        if self.versus is not None and self.versus.name == contestant.name:
            return []
        benchmark, settings = self._name(), self._settings()
        found = cached_result(run.folder, contestant, benchmark, settings)
        if found is None:
            measure = self._ratings if self.versus is None else self._match
            scores, lower, details = measure(run, contestant)
            found = Result(
                contestant.name, contestant.identity, benchmark, settings, scores, lower, details
            )
            write_result(run.folder, found)
        return [found]

    def _name(self) -> str:
        return _BENCHMARK if self.versus is None else f"{_BENCHMARK}_vs_{self.versus.name}"

    def _settings(self) -> dict[str, Any]:
        return {
            "questions": self.data.fingerprint,
            "judge": self._judge.settings.request_fields,
            "max_new_tokens": self.answering.max_new_tokens,
            "seed": self.answering.seed,
            **({} if self.versus is None else {"versus": self.versus.identity}),
        }

    def _answers(self, run: EvaluatedRun, contestant: Contestant) -> dict[int, Answer]:
        path = run.folder.evaluation(contestant.name) / _BENCHMARK / "answers.jsonl"
        return answer_questions(self.data.questions, run, contestant, self.answering, path)

    def _ratings(
        self, run: EvaluatedRun, contestant: Contestant
    ) -> tuple[dict[str, float], tuple[str, ...], dict[str, Any]]:
        answers = self._answers(run, contestant)
        queries = [
            self.data.single(question, turn, answers[question.question_id].judged)
            for question in self.data.questions
            for turn in TURNS
        ]
        verdicts = self._judge.verdicts(queries, self._path(run.folder, contestant, "single"))
        categories = {q.question_id: q.category for q in self.data.questions}
        ratings = [rating(verdict.text) for verdict in verdicts]
        scores = rating_scores(queries, ratings, categories)
        details = self._details(verdicts, answers.values())
        return scores, ("unparsable",), details

    def _match(
        self, run: EvaluatedRun, contestant: Contestant
    ) -> tuple[dict[str, float], tuple[str, ...], dict[str, Any]]:
        assert self.versus is not None, "evaluate() calls this for a match"
        mine = self._answers(run, contestant)
        theirs = self._answers(run, self.versus)
        queries = []
        for question in self.data.questions:
            us, them = mine[question.question_id].judged, theirs[question.question_id].judged
            for turn in TURNS:
                queries.append(self.data.pair(question, turn, us, them, game=1))
                queries.append(self.data.pair(question, turn, them, us, game=2))
        verdicts = self._judge.verdicts(queries, self._path(run.folder, contestant, self._name()))
        scores = match_scores([choice(verdict.text) for verdict in verdicts])
        lower = ("losses", "unparsable", "inconsistent")
        return scores, lower, self._details(verdicts, [*mine.values(), *theirs.values()])

    def _path(self, run: RunFolder, contestant: Contestant, kind: str) -> Path:
        judge = re.sub(r"[^\w.-]+", "_", self._judge.settings.model)
        return run.evaluation(contestant.name) / _BENCHMARK / f"judgments_{judge}_{kind}.jsonl"

    def _details(self, verdicts: Sequence[Verdict], answers: Collection[Answer]) -> dict[str, Any]:
        return {
            "verdicts": len(verdicts),
            "judge": {
                "base_url": self._judge.settings.base_url,
                **self._judge.settings.request_fields,
            },
            "judge_prompt_tokens": sum(verdict.prompt_tokens for verdict in verdicts),
            "judge_completion_tokens": sum(verdict.completion_tokens for verdict in verdicts),
            "answers_cut_off": sum(answer.cut_off for answer in answers),
            "answers_that_did_not_fit": sum(answer.did_not_fit for answer in answers),
        }


def judge_lines(result: Result) -> list[str]:
    """A summary of a judge's work: parsed verdicts, tokens, answers that were cut off."""
    details = result.details
    if "verdicts" not in details:
        return []
    verdicts, lost = details["verdicts"], int(result.scores["unparsable"])
    what = "verdicts" if result.benchmark == _BENCHMARK else "pairs of verdicts"
    total = verdicts if result.benchmark == _BENCHMARK else verdicts // 2
    read, written = details["judge_prompt_tokens"], details["judge_completion_tokens"]
    parsed = f"{total - lost} of {total} {what} could be read ({(total - lost) / total:.1%})"
    cut_off, did_not_fit = details["answers_cut_off"], details["answers_that_did_not_fit"]
    return [
        f"{result.benchmark}: {parsed}; the judge read {read:,} and wrote {written:,} tokens",
        f"{cut_off} answers reached the length limit, {did_not_fit} prompts exceeded the context",
    ]
