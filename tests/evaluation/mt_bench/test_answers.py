"""Answers in two turns: they repeat, are written once, and come from the engine that is given."""

import json
import shutil

import pytest

from spin_lightning.errors import SettingError
from spin_lightning.evaluation.mt_bench.data import read_mt_bench
from spin_lightning.policies import lora
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
