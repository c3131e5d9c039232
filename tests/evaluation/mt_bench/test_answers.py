"""Answers in two turns: they repeat, are written once, and come from the engine that is given."""

import json
import shutil

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.evaluation.base import EvaluatedRun
from spin_lightning.evaluation.contestants import contestants
from spin_lightning.evaluation.mt_bench.answers import Answer, answer_questions
from spin_lightning.evaluation.mt_bench.benchmark import MTBench
from spin_lightning.evaluation.mt_bench.data import read_mt_bench
from spin_lightning.evaluation.settings import Answering, JudgeSettings
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


class Thinker(Generator):
    """Answers every prompt with the same ids."""

    ids: tuple[int, ...] = ()
    prompts: list[tuple[int, ...]] = []  # noqa: RUF012 (read by the test)

    def __init__(self, stop_ids, pad_id, settings):
        pass

    def generate(self, policy, requests):
        self.prompts.extend(request.prompt_ids for request in requests)
        return [Response(self.ids, finished=self.ids[-1] == 2) for _ in requests]


# Ids 4, 5, … are w0, w1, …; <think> and </think> are added as 24 and 25.
THOUGHTS = {
    "no thought": ((5, 6, 2), "", "w1 w2", "w1 w2"),
    "a thought": ((24, 5, 25, 6, 2), "", "<think> w1 </think> w2", "w2"),
    "a thought that does not end": ((24, 5, 6), "", "<think> w1 w2", ""),
    "opened by the template": ((5, 25, 6, 2), "<think>", "<think>\nw1 </think> w2", "w2"),
    "opened, and does not end": ((5, 6), "<think>", "<think>\nw1 w2", ""),
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("case", THOUGHTS)
def test_judge_reads_answers_without_their_thoughts(
    case, special, run, bench, monkeypatch, tmp_path
):
    ids, opening, written, judged = THOUGHTS[case]
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    marks = [AddedToken(mark, special=special) for mark in ("<think>", "</think>")]
    tokenizer.add_tokens(marks, special_tokens=special)
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == [24, 25]
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ ' w1 '", f"{{{{ ' w1 {opening}'")
    policy = load_policy(run.root)
    monkeypatch.setattr(Thinker, "ids", ids)
    monkeypatch.setattr(Thinker, "prompts", [])
    (contestant,) = contestants(run, ["1"])
    evaluated = EvaluatedRun(run, lambda: policy, tokenizer, Thinker)
    with scripted_judge(lambda *_: (200, "[[5]]")) as judge:
        settings = JudgeSettings(base_url=judge.base_url, model="scripted")
        MTBench(str(bench), settings, Answering(), None).evaluate(evaluated, contestant)
    question = read_mt_bench(str(bench)).questions[0]
    one, two = question.turns
    asked = [text for _, text in judge.asked]
    assert f"Rate this.\n{one}\n---\n{judged}" in asked
    assert f"Rate the second.\n{one}\n{judged}\n{two}\n---\n{judged}" in asked
    # What was written is kept, and is what the second turn follows.
    rows = (run.evaluation("iterate_001") / "mt_bench/answers.jsonl").read_text().splitlines()
    assert {tuple(json.loads(row)["choices"][0]["turns"]) for row in rows} == {(written, written)}
    thought = [i for i in ids if i in (24, 25)]
    follows = [i for i in Thinker.prompts[-1] if i in (24, 25)]
    assert follows == ([24, *thought, 24] if opening else thought)


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
