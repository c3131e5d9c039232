"""Answers in two turns: they repeat, are written once, and come from the engine that is given."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.evaluation.base import EvaluatedRun
from spin_lightning.evaluation.contestants import contestants
from spin_lightning.evaluation.mt_bench.answers import Answer, answer_questions
from spin_lightning.evaluation.mt_bench.data import read_mt_bench
from spin_lightning.evaluation.settings import Answering
from spin_lightning.generation.base import Generator, Response
from spin_lightning.policies import lora
from spin_lightning.policies.saved import load_policy
from spin_lightning.run.folder import RunFolder
from tests.evaluation.mt_bench.bench import rate
from tests.evaluation.scripted_judge import scripted_judge


def test_answers_repeat_and_are_written_once(run, bench, monkeypatch, tmp_path):
    loads = []
    load = lora.load_base
    monkeypatch.setattr(lora, "load_base", lambda *a, **k: loads.append(1) or load(*a, **k))
    shutil.copytree(run.root, tmp_path / "again")
    with scripted_judge(lambda *_: (200, "[[5]]")) as judge:
        rate(run, bench, judge.base_url)
        assert len(judge.asked) == 32
        rate(run, bench, judge.base_url)
        assert len(judge.asked) == 32
        assert len(loads) == 1
        rate(RunFolder(tmp_path / "again"), bench, judge.base_url)
        assert sorted(judge.asked[32:]) == sorted(judge.asked[:32])


def test_second_prompt_holds_the_first_answer(run, bench):
    with scripted_judge(lambda *_: (200, "[[5]]")) as judge:
        rate(run, bench, judge.base_url)
    rows = (run.evaluation("iterate_001") / "mt_bench/answers.jsonl").read_text().splitlines()
    turns = {row["question_id"]: row["choices"][0]["turns"] for row in map(json.loads, rows)}
    assert len({tuple(t) for t in turns.values()}) > 8
    question = read_mt_bench(str(bench)).questions[0]
    one, two = turns[question.question_id]
    second = f"Rate the second.\n{question.turns[0]}\n{one}\n{question.turns[1]}\n---\n{two}"
    assert ("system of single-v1-multi-turn", second) in judge.asked


def test_model_without_a_chat_template_is_refused(finished_run, bench, tmp_path):
    shutil.copytree(finished_run.root, tmp_path / "plain")
    with pytest.raises(SettingError, match="no template to join them"):
        rate(RunFolder(tmp_path / "plain"), bench, "http://127.0.0.1:1/v1")


class LastWords(Generator):
    """Repeats the last two ids of each prompt."""

    def __init__(self, stop_ids, pad_id, settings):
        self.made_with.append((stop_ids, pad_id, settings.temperature, settings.top_k))

    made_with: list = []  # noqa: RUF012 (read by the test)

    def generate(self, policy, requests):
        return [Response(request.prompt_ids[-2:], finished=True) for request in requests]


def test_answers_come_from_the_engine_that_is_given(run, bench, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    policy = load_policy(run.root)
    evaluated = EvaluatedRun(run, lambda: policy, tokenizer, LastWords)
    (contestant,) = contestants(run, ["1"])
    questions = read_mt_bench(str(bench)).questions
    LastWords.made_with.clear()
    path = tmp_path / "answers.jsonl"
    found = answer_questions(questions, evaluated, contestant, Answering(max_new_tokens=3), path)
    # The template ends a prompt with the user's last word and " w1 ".
    assert found == {q.question_id: Answer(_last_words(q), 0, 0) for q in questions}
    # One engine for each temperature; the most likely token has temperature 0.
    assert sorted(sampling for _, _, *sampling in LastWords.made_with) == [
        [0.1, 0],
        [0.7, 0],
        [1.0, 1],
    ]
    assert {made[:2] for made in LastWords.made_with} == {((2,), 0)}


def _last_words(question):
    return tuple(f"{turn.split()[-1]} w1" for turn in question.turns)


@pytest.mark.parametrize(
    "changes",
    [
        {"choices": []},
        {"choices": [{"turns": ["one"]}]},
        {"choices": [{"turns": ["one", 2]}]},
        {"choices": ["one"]},
        {"cut_off": "no"},
        {"did_not_fit": None},
        {"key": 7},
    ],
)
def test_damaged_answer_is_one_error_with_its_line(changes, run, bench):
    path = run.evaluation("iterate_001") / "mt_bench" / "answers.jsonl"
    path.parent.mkdir(parents=True)
    row = {"key": "a", "choices": [{"turns": ["one", "two"]}], "cut_off": 0, "did_not_fit": 0}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, **changes}) + "\n")
    with pytest.raises(RunFolderError, match=r"line 2 of .*answers.jsonl is damaged"):
        rate(run, bench, "http://127.0.0.1:1/v1")
