"""Answers to MT-Bench: two turns, sampled at the temperature of their category."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from spin_lightning import keyed
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import SettingError
from spin_lightning.evaluation.contestants import Contestant
from spin_lightning.evaluation.mt_bench.data import Question, by
from spin_lightning.evaluation.mt_bench.judge import append_line, read_lines
from spin_lightning.evaluation.settings import Answering
from spin_lightning.generation.base import Request, Response
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.policies.base import Policy
from spin_lightning.policies.pretrained import context_length_of
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.types import Message


@dataclass(frozen=True)
class Answer:
    """What was said to a question.

    Attributes:
        turns: The answers to both turns.
        cut_off: How many of them were ended by the length allowed.
        did_not_fit: How many are empty since their prompt fills the model's context.
    """

    turns: tuple[str, str]
    cut_off: int
    did_not_fit: int


def answers(
    how: Answering,
    policy: Callable[[], Policy],
    tokenizer: PreTrainedTokenizerBase,
    contestant: Contestant,
    questions: Sequence[Question],
    path: Path,
) -> dict[int, Answer]:
    """Answer every question that is not answered in the file yet.

    Args:
        how: Length limit and seed.
        policy: Gives who can act as the contestant's iterates; not asked if all is answered.
        tokenizer: The run's.
        contestant: Who answers; a mixture draws a member for each conversation.
        questions: The questions.
        path: JSON lines in FastChat's format; grows by the questions of one temperature.

    Returns:
        The answers by question id.

    Raises:
        SettingError: The tokenizer has no chat template, and a second turn needs one.
    """
    if tokenizer.chat_template is None:
        raise SettingError(
            "tokenizer.chat_template",
            None,
            "MT-Bench has two turns, and there is no template to join them",
            fix="evaluate a chat model, or set a template and save it with the tokenizer",
        )
    rows = {row["key"]: row for row in read_lines(path)}
    keys = {q.question_id: _key(how, contestant, q) for q in questions}
    missing = [q for q in questions if keys[q.question_id] not in rows]
    for temperature, group in by(missing, lambda q: q.temperature).items():
        writer = _Writer(policy(), tokenizer, contestant, how, temperature)
        for question, answer in zip(group, writer.conversations(group), strict=True):
            row = _row(keys[question.question_id], contestant, question, answer)
            rows[row["key"]] = row
            append_line(path, row)
    return {number: _answer(rows[key]) for number, key in keys.items()}


def _key(how: Answering, contestant: Contestant, question: Question) -> str:
    return fingerprint(
        {
            "identity": contestant.identity,
            "turns": question.turns,
            "temperature": question.temperature,
            "max_new_tokens": how.max_new_tokens,
            "seed": how.seed,
        }
    )


class _Writer:
    """Writes conversations of one temperature."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        contestant: Contestant,
        how: Answering,
        temperature: float,
    ) -> None:
        model: Any = policy.model
        self._policy = policy
        self._contestant = contestant
        self._how = how
        self._format = PromptFormat.of(tokenizer, model.generation_config.eos_token_id)
        self._context = context_length_of(model.config)
        self._generator = LocalGenerator(
            model.config,
            self._format.stop_ids,
            self._format.pad_id,
            # The most likely token is the one that is left when all others are taken out.
            GenerationSettings(top_k=1)
            if temperature == 0
            else GenerationSettings(temperature=temperature),
        )

    def conversations(self, questions: Sequence[Question]) -> list[Answer]:
        """Both turns of each question; the first answer is part of the second prompt."""
        spoken: list[tuple[Message, ...]] = [() for _ in questions]
        answers: list[list[Response | None]] = [[] for _ in questions]
        for turn in (0, 1):
            for i, question in enumerate(questions):
                spoken[i] = (*spoken[i], Message(role="user", content=question.turns[turn]))
            for i, response in enumerate(self._turn(questions, spoken, turn)):
                answers[i].append(response)
                said = Message(role="assistant", content=self._text(response))
                spoken[i] = (*spoken[i], said)
        return [
            Answer(
                turns=(self._text(first), self._text(second)),
                cut_off=sum(r is not None and not r.finished for r in (first, second)),
                did_not_fit=sum(r is None for r in (first, second)),
            )
            for first, second in answers
        ]

    def _turn(
        self, questions: Sequence[Question], spoken: Sequence[tuple[Message, ...]], turn: int
    ) -> list[Response | None]:
        requests: dict[int, Request] = {}
        for i, question in enumerate(questions):
            prompt = self._format.prompt_ids(spoken[i])
            cap = min(self._how.max_new_tokens, self._context - len(prompt))
            if cap > 0:
                # The member is drawn once for both turns: one of them holds the conversation.
                first = keyed.row_key(self._how.seed, 0, question.question_id, 0)
                member = self._contestant.mixture.draw(keyed.opponent_uniform(first))
                key = keyed.row_key(self._how.seed, 0, question.question_id, turn)
                requests[i] = Request(prompt, member, key, cap)
        written = self._generator.generate(self._policy, list(requests.values()))
        responses = dict(zip(requests, written, strict=True))
        return [responses.get(i) for i in range(len(questions))]

    def _text(self, response: Response | None) -> str:
        if response is None:
            return ""
        decode = self._format.tokenizer.decode
        return str(decode(list(response.ids), skip_special_tokens=True)).strip()


def _row(key: str, contestant: Contestant, question: Question, answer: Answer) -> dict[str, Any]:
    return {
        "question_id": question.question_id,
        "answer_id": key[:22],
        "model_id": contestant.name,
        "choices": [{"index": 0, "turns": list(answer.turns)}],
        "tstamp": time.time(),
        "key": key,
        "cut_off": answer.cut_off,
        "did_not_fit": answer.did_not_fit,
    }


def _answer(row: dict[str, Any]) -> Answer:
    first, second = row["choices"][0]["turns"]
    return Answer((first, second), row["cut_off"], row["did_not_fit"])
