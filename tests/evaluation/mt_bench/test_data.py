"""MT-Bench's files and judge prompts, word for word those of FastChat."""

import shutil
from pathlib import Path

import pytest

from spin_lightning.errors import DataError
from spin_lightning.evaluation.mt_bench.data import read_mt_bench
from tests.evaluation.mt_bench.bench import CATEGORIES

REAL = Path(__file__).parents[4] / "shared" / "data" / "mt_bench"


def real_data():
    if not REAL.is_dir():
        pytest.skip("the real MT-Bench files do not lie beside the repository")
    return read_mt_bench(str(REAL))


def test_real_files_hold_eighty_questions_of_eight_categories():
    data = real_data()
    assert len(data.questions) == 80
    counts = {c: sum(q.category == c for q in data.questions) for c in CATEGORIES}
    assert counts == dict.fromkeys(CATEGORIES, 10)
    with_reference = {q.category for q in data.questions if q.reference}
    assert with_reference == {"math", "reasoning", "coding"}


def test_real_prompts_of_the_first_turn_are_fastchats_word_for_word():
    data = real_data()
    question = next(q for q in data.questions if q.question_id == 101)
    query = data.single(question, 1, ("Second place.", "Still {that}."))
    assert query.prompt == "single-math-v1"
    assert query.system == "You are a helpful assistant."
    assert query.user.endswith(
        f"[Question]\n{question.turns[0]}\n\n[The Start of Reference Answer]\n"
        "If you have just overtaken the second person, your current position is now second place. "
        "The person you just overtook is now in third place.\n[The End of Reference Answer]\n\n"
        "[The Start of Assistant's Answer]\nSecond place.\n[The End of Assistant's Answer]"
    )


def test_real_prompts_of_the_second_turn_show_both_turns():
    data = real_data()
    question = data.questions[0]
    query = data.single(question, 2, ("Aloha.", "Aloha again. {x}"))
    assert query.prompt == "single-v1-multi-turn"
    assert "focus on the assistant's answer to the second user question" in query.system
    assert query.user == (
        "<|The Start of Assistant A's Conversation with User|>\n\n### User:\n"
        f"{question.turns[0]}\n\n### Assistant A:\nAloha.\n\n### User:\n{question.turns[1]}\n\n"
        "### Assistant A:\nAloha again. {x}\n\n"
        "<|The End of Assistant A's Conversation with User|>"
    )


def test_pairwise_prompt_puts_the_answers_in_their_positions(bench):
    data = read_mt_bench(str(bench))
    us, them = ("our 1", "our 2"), ("their 1", "their 2")
    math = next(q for q in data.questions if q.category == "math")
    first = data.pair(math, 1, us, them, game=1)
    assert first.prompt == "pair-math-v1"
    assert first.user == (
        f"{math.turns[0]}\nA: our 1\nB: their 1\n<ref>reference {math.question_id}</ref>"
    )
    second = data.pair(data.questions[0], 2, them, us, game=2)
    assert second.prompt == "pair-v2-multi-turn"
    assert second.user == f"{data.questions[0].turns[1]}\nA: their 2\nB: our 2"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("question.jsonl", "there is no question.jsonl"),
        ("judge_prompts.jsonl", "there is no judge_prompts.jsonl"),
        ("reference_answer_gpt-4.jsonl", "there is no reference_answer"),
    ],
)
def test_folder_without_a_file_is_refused(file, message, bench, tmp_path):
    shutil.copytree(bench, tmp_path / "bench")
    (tmp_path / "bench" / file).unlink()
    with pytest.raises(DataError, match=message):
        read_mt_bench(str(tmp_path / "bench"))


def test_question_without_its_reference_answer_is_refused(bench, tmp_path):
    shutil.copytree(bench, tmp_path / "bench")
    path = tmp_path / "bench" / "reference_answer_gpt-4.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    with pytest.raises(DataError, match=r"question 4 \(reasoning\).*no reference answer"):
        read_mt_bench(str(tmp_path / "bench"))


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        (
            "judge_prompts.jsonl",
            lambda text: text.replace("pair-v2-multi-turn", "mine"),
            "has no prompt pair-v2-multi-turn",
        ),
        (
            "question.jsonl",
            lambda text: text.replace('"w0 w0 w2"', '"w0 w0 w2", "a third turn"'),
            "a conversation of 3 turns",
        ),
        ("question.jsonl", lambda text: text + "{\n", r"line 17 of .* not in FastChat's format"),
        (
            "question.jsonl",
            lambda text: text.replace('"category"', '"kind"', 1),
            "line 1 of .*category",
        ),
    ],
)
def test_file_of_another_form_is_refused(file, edit, message, bench, tmp_path):
    shutil.copytree(bench, tmp_path / "bench")
    path = tmp_path / "bench" / file
    path.write_text(edit(path.read_text()))
    with pytest.raises(DataError, match=message):
        read_mt_bench(str(tmp_path / "bench"))


def test_bench_that_is_neither_folder_nor_on_the_hub_is_refused(tmp_path):
    with pytest.raises(DataError, match="is neither a folder nor a data set that the hub provides"):
        read_mt_bench(str(tmp_path / "nowhere"))
