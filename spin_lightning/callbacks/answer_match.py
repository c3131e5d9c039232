"""How often an iterate's greedy answers to held-out prompts are the data's."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import lightning as L
import numpy as np

from spin_lightning.callbacks.interfaces import IterateEvaluator
from spin_lightning.callbacks.session import Session, run_folder_of
from spin_lightning.errors import SettingError
from spin_lightning.generation.base import Request, Response
from spin_lightning.metrics import distinct
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.rows.store import RowTable, read_rows

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# A period between digits is part of a number.
_PUNCTUATION = re.compile(rf"(?<!\d)\.|\.(?!\d)|[{re.escape(string.punctuation.replace('.', ''))}]")


def normalized(answer: str) -> str:
    """An answer in lower case, without punctuation, articles and repeated spaces.

    The rule of SQuAD's exact match (Rajpurkar et al., https://arxiv.org/abs/1606.05250), except
    that the period of a number stays.
    """
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub("", answer.casefold())).split())


class AnswerMatch(IterateEvaluator):
    """Compares every iterate's answers to the held-out prompts with those of the data.

    For data whose answers are short or end in a result. Needs held-out examples.

    Metrics: `answers/exact_match` of greedy answers and `answers/exact_match_sampled` of the
    held-out rows' sampled ones, shares of the held-out examples; of the greedy answers also
    `answers/finished`, `answers/tokens` and `answers/distinct_1`, and with a pattern
    `answers/in_format`, the share of answers that it is found in.

    Args:
        pattern: A regular expression whose first group is the part to compare, such as `#### (.+)`
            for GSM8K; default: the whole answer. An answer without it matches nothing.
        max_examples: Use the first so many held-out examples; default all.

    Raises:
        SettingError: The pattern is not a regular expression with a group, or there are no
            held-out examples.
    """

    def __init__(self, pattern: str | None = None, max_examples: int | None = None) -> None:
        """Check the settings."""
        fix = r"give a regular expression with one group, such as '#### (.+)'"
        try:
            self._pattern = None if pattern is None else re.compile(pattern)
        except re.error as error:
            raise SettingError("pattern", pattern, str(error), fix=fix) from error
        if self._pattern is not None and not self._pattern.groups:
            raise SettingError("pattern", pattern, "it has no group", fix=fix)
        if max_examples is not None and max_examples < 1:
            raise SettingError("max_examples", max_examples, "out of range", fix="give 1 or more")
        self._max_examples = max_examples

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there are held-out examples."""
        data = getattr(trainer, "datamodule", None)
        if stage == "fit" and not getattr(data, "val", True):
            raise SettingError(
                "data.val_examples",
                0,
                "AnswerMatch compares answers to held-out prompts",
                fix="hold examples out with data.val_fraction, or name data.val_data",
            )

    def evaluate_iterate(self, module: SelfPlayModule, t: int) -> dict[str, float]:
        """Answer the held-out prompts greedily, and compare."""
        run = run_folder_of(module.trainer)
        session = Session.of(module.trainer, module, run)
        table = read_rows(run.val_rows(t))
        real = [self._part(session, table.real_ids[i].tolist()) for i in range(len(table))]
        sampled = [self._part(session, table.generated_ids[i].tolist()) for i in range(len(table))]
        answers = self._greedy(session, table, t)
        greedy = [self._part(session, answer.ids) for answer in answers]
        metrics = {
            "answers/exact_match": _share_equal(greedy, real[: len(greedy)]),
            "answers/exact_match_sampled": _share_equal(sampled, real),
            "answers/finished": float(np.mean([answer.finished for answer in answers])),
            "answers/tokens": float(np.mean([len(answer.ids) for answer in answers])),
            "answers/distinct_1": _distinct_1(answers),
        }
        if self._pattern is not None:
            metrics["answers/in_format"] = float(np.mean([part is not None for part in greedy]))
        return metrics

    def _greedy(self, session: Session, table: RowTable, t: int) -> list[Response]:
        """Iterate t's answers to the first prompts of the held-out rows."""
        module, data, text_format = session.module, session.data, session.text_format
        greedy = replace(module.generation, temperature=1.0, top_p=1.0, top_k=1)
        generator = module.make_generator(text_format.stop_ids, text_format.pad_id, greedy)
        requests = [
            # The most likely token does not depend on the key.
            Request(tuple(table.prompt_ids[i].tolist()), t, key=0, cap=data.max_response_tokens)
            for i in range(len(table))[: self._max_examples]
        ]
        return generator.generate(module.policy, requests)

    def _part(self, session: Session, ids: Sequence[int]) -> str | None:
        """The part of a response to compare; None if the pattern is not in it."""
        tokenizer = session.text_format.tokenizer
        text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
        if self._pattern is None:
            return normalized(text)
        found = self._pattern.search(text)
        return None if found is None else normalized(found[1])


def _share_equal(answers: Sequence[str | None], wanted: Sequence[str | None]) -> float:
    """Share of answers that are the wanted ones; None equals nothing."""
    pairs = zip(answers, wanted, strict=True)
    return float(np.mean([answer is not None and answer == right for answer, right in pairs]))


def _distinct_1(answers: Sequence[Response]) -> float:
    lengths = [len(answer.ids) for answer in answers]
    offsets = np.array([0, *accumulate(lengths)])
    return distinct(np.array([i for a in answers for i in a.ids]), offsets, 1)
