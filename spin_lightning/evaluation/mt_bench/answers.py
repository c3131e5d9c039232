"""Answers to MT-Bench: two turns, sampled at the temperature of their category."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from spin_lightning import keyed
from spin_lightning.data.thoughts import THOUGHT_MARKS, spoken_answer
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import SettingError
from spin_lightning.evaluation.base import EvaluatedRun
from spin_lightning.evaluation.contestants import Contestant
from spin_lightning.evaluation.counting import counting
from spin_lightning.evaluation.mt_bench.data import Question
from spin_lightning.evaluation.settings import Answering
from spin_lightning.generation.base import Request, Response
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.policies.pretrained import context_length_of
from spin_lightning.run.files import append_line, read_lines
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.validation import LIST, TEXT, TEXTS, WHOLE, check_fields
from spin_lightning.types import Message


@dataclass(frozen=True)
class Answer:
    """The answers to a question.

    Attributes:
        turns: The answers to both turns, as they were written.
        cut_off: How many of them reached the length limit.
        did_not_fit: How many are empty because their prompt fills the model's context.
    """

    turns: tuple[str, str]
    cut_off: int
    did_not_fit: int

    @property
    def judged(self) -> tuple[str, str]:
        """The answers to both turns without their thoughts: what the judge reads."""
        first, second = self.turns
        return spoken_answer(first), spoken_answer(second)


def answer_questions(
    questions: Sequence[Question],
    run: EvaluatedRun,
    contestant: Contestant,
    how: Answering,
    path: Path,
) -> dict[int, Answer]:
    """Answer every question that has no answer in the file yet.

    Args:
        questions: The questions.
        run: The run.
        contestant: The policy that answers; for a mixture, one member is drawn per conversation.
        how: Length limit and seed.
        path: JSON lines in FastChat's format; the questions of one temperature are added together.

    Returns:
        The answers by question id.

    Raises:
        SettingError: The tokenizer has no chat template, and a second turn needs one.
    """
    if run.tokenizer.chat_template is None:
        raise SettingError(
            "tokenizer.chat_template",
            None,
            "MT-Bench has two turns, and there is no template to join them",
            fix="evaluate a chat model, or set a template and save it with the tokenizer",
        )
    found = dict(read_lines(path, _read_row))
    keys = {q.question_id: _key(how, contestant, q) for q in questions}
    missing = [q for q in questions if keys[q.question_id] not in found]
    for temperature, group in _by_temperature(missing).items():
        writer = _Writer(run, contestant, how, temperature)
        for question, answer in zip(group, writer.conversations(group), strict=True):
            key = keys[question.question_id]
            append_line(path, _row(key, contestant, question, answer))
            found[key] = answer
    return {number: found[key] for number, key in keys.items()}


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


def _by_temperature(questions: Sequence[Question]) -> dict[float, list[Question]]:
    """The questions of each temperature, in order of first appearance."""
    groups: dict[float, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.temperature, []).append(question)
    return groups


class _Writer:
    """Generates conversations at one temperature."""

    def __init__(
        self, run: EvaluatedRun, contestant: Contestant, how: Answering, temperature: float
    ) -> None:
        self._policy = run.policy()
        model: Any = self._policy.model
        self._contestant = contestant
        self._how = how
        self._format = PromptFormat.of(
            run.tokenizer, model.generation_config.eos_token_id, date=run.folder.first_date()
        )
        self._context = context_length_of(model.config)
        # Temperature 0 means the most likely token.
        sampling = {"top_k": 1} if temperature == 0 else {"temperature": temperature}
        self._generator = run.make_generator(
            self._format.stop_ids, self._format.pad_id, GenerationSettings.of(sampling)
        )

    def conversations(self, questions: Sequence[Question]) -> list[Answer]:
        """Both turns of each question; the first answer is part of the second prompt."""
        dialogs: list[tuple[Message, ...]] = [() for _ in questions]
        answers: list[list[Response | None]] = [[] for _ in questions]
        for turn in (0, 1):
            for i, question in enumerate(questions):
                dialogs[i] = (*dialogs[i], Message(role="user", content=question.turns[turn]))
            for i, response in enumerate(self._turn(questions, dialogs, turn)):
                answers[i].append(response)
                # With its thought, if it has one: the template decides what stays of it.
                reply = Message(role="assistant", content=self._text(response, dialogs[i]))
                dialogs[i] = (*dialogs[i], reply)
        return [
            Answer(
                turns=(dialog[1]["content"], dialog[3]["content"]),
                cut_off=sum(r is not None and not r.finished for r in responses),
                did_not_fit=sum(r is None for r in responses),
            )
            for dialog, responses in zip(dialogs, answers, strict=True)
        ]

    def _turn(
        self, questions: Sequence[Question], dialogs: Sequence[tuple[Message, ...]], turn: int
    ) -> list[Response | None]:
        requests: dict[int, Request] = {}
        for i, question in enumerate(questions):
            prompt = self._format.prompt_ids(dialogs[i])
            cap = min(self._how.max_new_tokens, self._context - len(prompt))
            if cap > 0:
                # The member is drawn once for both turns, so that it leads the whole conversation.
                first = keyed.row_key(self._how.seed, 0, question.question_id, 0)
                member = self._contestant.mixture.draw(keyed.opponent_uniform(first))
                key = keyed.row_key(self._how.seed, 0, question.question_id, turn)
                requests[i] = Request(prompt, member, key, cap)
        what = f"{self._contestant.label}: turn {turn + 1} of MT-Bench"
        with counting(what, len(requests), "answers") as self._generator.on_progress:
            written = self._generator.generate(self._policy, list(requests.values()))
        responses = dict(zip(requests, written, strict=True))
        return [responses.get(i) for i in range(len(questions))]

    def _text(self, response: Response | None, dialog: tuple[Message, ...]) -> str:
        """An answer as text, with the marks of its thought, wherever they were written."""
        if response is None:
            return ""
        opens, _ = THOUGHT_MARKS
        tokenizer = self._format.tokenizer
        added = tokenizer.get_added_vocab()
        marks = {added[mark] for mark in THOUGHT_MARKS if mark in added}
        hidden = set(tokenizer.all_special_ids) - marks
        ids = [i for i in response.ids if i not in hidden]
        text = str(tokenizer.decode(ids, skip_special_tokens=not marks & set(ids))).strip()
        # Some templates open the thought in the prompt.
        prompt = str(tokenizer.decode(list(self._format.prompt_ids(dialog)))).rstrip()
        return f"{opens}\n{text}" if prompt.endswith(opens) and text else text


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


def _read_row(content: object) -> tuple[str, Answer]:
    """The key and the answer of a line of the file."""
    row = check_fields(content, _RULES, required=_RULES)
    choice = check_fields(
        row["choices"][0] if row["choices"] else None, {"turns": TEXTS}, ["turns"]
    )
    if len(choice["turns"]) != 2:
        raise ValueError("its 'turns' are not two")
    first, second = choice["turns"]
    return row["key"], Answer((first, second), row["cut_off"], row["did_not_fit"])


_RULES: Final = {"key": TEXT, "choices": LIST, "cut_off": WHOLE, "did_not_fit": WHOLE}
