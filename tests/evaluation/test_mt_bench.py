"""MT-Bench: FastChat's prompts and numbers, a judge that is asked once, answers that repeat."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig

from spin_lightning.callbacks.evaluate_iterates import EvaluateIterates
from spin_lightning.cli.fit import main
from spin_lightning.errors import DataError, SettingError
from spin_lightning.evaluation.base import evaluate_run
from spin_lightning.evaluation.contestants import contestants
from spin_lightning.evaluation.mt_bench.answers import Answering
from spin_lightning.evaluation.mt_bench.benchmark import MTBench, match_scores
from spin_lightning.evaluation.mt_bench.data import TURNS, read_mt_bench
from spin_lightning.evaluation.mt_bench.judge import Judge, JudgeError, JudgeSettings
from spin_lightning.policies import lora
from spin_lightning.run.folder import RunFolder
from tests.evaluation.scripted_judge import scripted_judge
from tests.toys.models import write_model
from tests.toys.runs import contents, play, write_examples

REAL = Path(__file__).parents[3] / "shared" / "data" / "mt_bench"
CATEGORIES = (
    *("writing", "roleplay", "reasoning", "math"),
    *("coding", "extraction", "stem", "humanities"),
)
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' if m.role == 'user' else ' w1 ' }}{{ m.content }}"
    "{{ ' </s> ' if m.role == 'assistant' }}{% endfor %}"
    "{{ ' w1 ' if add_generation_prompt }}"
)
SINGLE = "Rate this.\n{question}\n---\n{answer}"
SINGLE_2 = "Rate the second.\n{question_1}\n{answer_1}\n{question_2}\n---\n{answer_2}"


def write_small_bench(folder: Path) -> Path:
    """Eight categories with two questions each, in the form of FastChat's files."""
    folder.mkdir(parents=True)
    questions, references, number = [], [], 0
    for k, category in enumerate(CATEGORIES):
        for i in range(2):
            turns = [f"w{k} w{i} w2", f"w{i} w{k} w9"]
            questions.append({"question_id": number, "category": category, "turns": turns})
            if category in ("math", "reasoning", "coding"):
                choice = {"index": 0, "turns": [f"reference {number}", f"second {number}"]}
                references.append({"question_id": number, "choices": [choice]})
            number += 1
    reference = "\n<ref>{ref_answer_1}</ref>"
    texts = {
        "single-v1": SINGLE,
        "single-math-v1": SINGLE + reference,
        "single-v1-multi-turn": SINGLE_2,
        "single-math-v1-multi-turn": SINGLE_2 + reference + "<ref>{ref_answer_2}</ref>",
        "pair-v2": "{question}\nA: {answer_a}\nB: {answer_b}",
        "pair-math-v1": "{question}\nA: {answer_a}\nB: {answer_b}" + reference,
        "pair-v2-multi-turn": "{question_2}\nA: {answer_a_2}\nB: {answer_b_2}",
        "pair-math-v1-multi-turn": "{question_2}\nA: {answer_a_2}\nB: {answer_b_2}" + reference,
    }
    prompts = [
        {"name": name, "system_prompt": f"system of {name}", "prompt_template": text}
        for name, text in texts.items()
    ]
    for name, rows in (
        ("question.jsonl", questions),
        ("judge_prompts.jsonl", prompts),
        ("reference_answer_gpt-4.jsonl", references),
    ):
        (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Path:
    return write_small_bench(tmp_path_factory.mktemp("bench") / "mt_bench")


@pytest.fixture(scope="session")
def chat_run(tiny_model_dir, tmp_path_factory) -> RunFolder:
    """Two iterates of a chat model. Not to be written to: copy it."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(tiny_model_dir, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    config = LlamaConfig.from_pretrained(folder / "model")
    config.max_position_embeddings = 512
    write_model(config, folder / "model")
    data = write_examples(folder / "examples.jsonl")
    play(folder / "run", folder / "model", data, epochs=1)
    return RunFolder(folder / "run")


@pytest.fixture
def run(chat_run, tmp_path) -> RunFolder:
    shutil.copytree(chat_run.root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def rate(run, source, base_url, who=("1",), versus=None, **judge):
    settings = JudgeSettings(base_url=base_url, model="scripted", **judge)
    rival = contestants(run, [versus])[0] if versus else None
    bench = MTBench(str(source), settings, Answering(max_new_tokens=12), rival)
    return [r for _, results in evaluate_run(run, who, [bench]) for r in results]


def real_data():
    if not REAL.is_dir():
        pytest.skip("the real MT-Bench files do not lie beside the repository")
    return read_mt_bench(str(REAL))


# ------------------------------------------------------------------ files and prompts


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
    ("file", "said"),
    [
        ("question.jsonl", "there is no question.jsonl"),
        ("judge_prompts.jsonl", "there is no judge_prompts.jsonl"),
        ("reference_answer_gpt-4.jsonl", "there is no reference_answer"),
    ],
)
def test_folder_without_a_file_is_refused(file, said, bench, tmp_path):
    shutil.copytree(bench, tmp_path / "bench")
    (tmp_path / "bench" / file).unlink()
    with pytest.raises(DataError, match=said):
        read_mt_bench(str(tmp_path / "bench"))


def test_question_without_its_reference_answer_is_refused(bench, tmp_path):
    shutil.copytree(bench, tmp_path / "bench")
    path = tmp_path / "bench" / "reference_answer_gpt-4.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    with pytest.raises(DataError, match=r"question 4 \(reasoning\).*no reference answer"):
        read_mt_bench(str(tmp_path / "bench"))


@pytest.mark.parametrize(
    ("file", "edit", "said"),
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
def test_file_of_another_form_is_refused(file, edit, said, bench, tmp_path):
    shutil.copytree(bench, tmp_path / "bench")
    path = tmp_path / "bench" / file
    path.write_text(edit(path.read_text()))
    with pytest.raises(DataError, match=said):
        read_mt_bench(str(tmp_path / "bench"))


def test_bench_that_is_neither_folder_nor_on_the_hub_is_refused(tmp_path):
    with pytest.raises(DataError, match="is no folder, and no data set that the hub gives"):
        read_mt_bench(str(tmp_path / "nowhere"))


def test_contestants_are_named_by_number_and_by_what_they_are(run):
    assert [c.label for c in contestants(run, ["last"])] == [
        c.label for c in contestants(run, ["1"])
    ]
    assert len(contestants(run, ["all", "1", "last"])) == 2
    run.write_best(0, "val/real_nll_per_token", 1.0)
    assert contestants(run, ["best"]) == contestants(run, ["0"])
    with pytest.raises(SettingError, match=r"iterates='first'.*best, last, mixture or all"):
        contestants(run, ["first"])


# ------------------------------------------------------------------ scores


def test_known_ratings_give_the_means_worked_out_by_hand(run, bench):
    """Category k has rating k + 1 in turn 1 and k + 3 in turn 2, so k + 2 on the mean.

    Turn 1: (1 + … + 8) / 8 = 4.5; turn 2: (3 + … + 10) / 8 = 6.5; all: 5.5. The two verdicts
    on turn 1 of math (k = 3, two questions) have no rating: turn 1 is then over 14 verdicts,
    2 · (36 - 4) / 14 = 32/7; math has turn 2 alone, 6; all: (64 + 104) / 30 = 5.6.
    """

    def reply(system, user, number):
        question = user.split("\n")[1]
        k = int(question.split()[0][1:])
        if k == 3 and "multi-turn" not in system:
            return 200, "No idea."
        return 200, f"Fine. Rating: [[{k + (3 if 'multi-turn' in system else 1)}]]"

    with scripted_judge(reply) as judge:
        (result,) = rate(run, bench, judge.base_url)
    means = {name: k + 2 for k, name in enumerate(CATEGORIES)} | {"math": 6}
    assert result.scores == {
        "overall": pytest.approx(5.6),
        "turn_1": pytest.approx(32 / 7),
        "turn_2": pytest.approx(6.5),
        **{f"category/{name}": pytest.approx(mean) for name, mean in means.items()},
        "unparsable": 2.0,
    }
    assert result.details["verdicts"] == 32 == len(judge.asked)
    assert result.details["judge_prompt_tokens"] == 3200
    assert result.details["judge_completion_tokens"] == 224
    assert {(b["model"], b["temperature"], b["max_tokens"]) for b in judge.bodies} == {
        ("scripted", 0.0, 2048)
    }


def test_matches_count_wins_losses_ties_and_positions():
    """Wins 1, losses 1, ties 2 of which one moved with the position; one pair says nothing."""
    pairs = [("A", "B"), ("B", "A"), ("tie", "tie"), ("A", "A"), ("A", None)]
    scores = match_scores([side for pair in pairs for side in pair])
    assert scores == {
        "win_rate": pytest.approx((1 + 2 / 2) / 4),
        "wins": 1,
        "losses": 1,
        "ties": 2,
        "inconsistent": 1,
        "unparsable": 1,
    }


def test_match_asks_in_both_positions_and_never_plays_against_itself(run, bench):
    """A judge that always says A sees every pair twice: all ties, none consistent."""
    with scripted_judge(lambda *_: (200, "[[A]]")) as judge:
        results = rate(run, bench, judge.base_url, ["0", "1"], versus="0")
    (result,) = results
    assert (result.contestant, result.benchmark) == ("iterate_001", "mt_bench_vs_iterate_000")
    assert len(judge.asked) == 64
    assert result.scores["win_rate"] == 0.5
    assert result.scores["ties"] == result.scores["inconsistent"] == 32
    answers = [
        {
            row["question_id"]: row["choices"][0]["turns"]
            for row in map(
                json.loads,
                (run.evaluation(name) / "mt_bench/answers.jsonl").read_text().splitlines(),
            )
        }
        for name in ("iterate_001", "iterate_000")
    ]
    users = {user for _, user in judge.asked}
    question = read_mt_bench(str(bench)).questions[0]
    mine, theirs = (one[question.question_id][0] for one in answers)
    assert f"{question.turns[0]}\nA: {mine}\nB: {theirs}" in users
    assert f"{question.turns[0]}\nA: {theirs}\nB: {mine}" in users


# ------------------------------------------------------------------ the judge


def queries(source):
    data = read_mt_bench(str(source))
    return [data.single(q, turn, ("one", "two")) for q in data.questions for turn in TURNS]


def test_judge_survives_server_errors_and_rate_limits(bench, tmp_path):
    failing = {0: 500, 1: 429, 2: 503, 5: 429}
    with scripted_judge(lambda s, u, n: (failing.get(n, 200), "[[5]]")) as server:
        judge = Judge(JudgeSettings(server.base_url, "m", concurrency=1))
        verdicts = judge.verdicts(queries(bench), tmp_path / "v.jsonl")
    assert [v.text for v in verdicts] == ["[[5]]"] * 32
    assert len(server.asked) == 36


def test_judge_that_gives_up_keeps_what_it_has_and_asks_only_for_the_rest(bench, tmp_path):
    def reply(system, user, number):
        return (400, "too long") if "w3 w0 w2" in user else (200, "[[5]]")

    asked = queries(bench)
    with scripted_judge(reply) as server:
        judge = Judge(JudgeSettings(server.base_url, "m"))
        with pytest.raises(JudgeError, match=r"gave 30 of 32 verdicts.*too long"):
            judge.verdicts(asked, tmp_path / "v.jsonl")
    with scripted_judge(lambda *_: (200, "[[6]]")) as server:
        verdicts = Judge(JudgeSettings(server.base_url, "m")).verdicts(asked, tmp_path / "v.jsonl")
    assert len(server.asked) == 2
    assert sorted(v.text for v in verdicts) == ["[[5]]"] * 30 + ["[[6]]"] * 2


def test_judge_without_access_stops_at_once(bench, tmp_path):
    with scripted_judge(lambda *_: (401, "wrong key")) as server:
        judge = Judge(JudgeSettings(server.base_url, "m", concurrency=2))
        with pytest.raises(JudgeError, match="wrong key"):
            judge.verdicts(queries(bench), tmp_path / "v.jsonl")
    assert len(server.asked) < 32


def test_judge_keeps_to_its_concurrency_and_its_pace(bench, tmp_path):
    def slow(*_):
        time.sleep(0.05)
        return 200, "[[5]]"

    asked = queries(bench)
    with scripted_judge(slow) as server:
        Judge(JudgeSettings(server.base_url, "m", concurrency=3)).verdicts(
            asked[:12], tmp_path / "a.jsonl"
        )
        assert server.most_at_once == 3
        start = time.monotonic()
        paced = JudgeSettings(server.base_url, "m", concurrency=4, requests_per_minute=600)
        Judge(paced).verdicts(asked[:8], tmp_path / "b.jsonl")
        # Seven intervals of 0.1 seconds between eight starts.
        assert time.monotonic() - start > 0.7


def test_judge_sends_the_key_of_the_environment(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_JUDGE", "sesame")
    with scripted_judge(lambda *_: (200, "[[5]]")) as server:
        settings = JudgeSettings(server.base_url, "m", key_variable="MY_JUDGE")
        Judge(settings).verdicts(queries(bench)[:1], tmp_path / "v.jsonl")
    assert server.headers[0]["authorization"] == "Bearer sesame"
    assert server.bodies[0]["path"] == "/v1/chat/completions"
    assert "sesame" not in (tmp_path / "v.jsonl").read_text()


def test_judge_of_openai_without_a_key_is_refused(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SettingError, match="export OPENAI_API_KEY"):
        Judge(JudgeSettings())


def test_judge_without_its_client_is_one_error_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"pip install 'spin-lightning\[eval\]'"):
        Judge(JudgeSettings("http://127.0.0.1:1/v1"))


KILLED = """
import sys
from pathlib import Path
from tests.evaluation.test_mt_bench import queries
from spin_lightning.evaluation.mt_bench.judge import Judge, JudgeSettings
judge = Judge(JudgeSettings(sys.argv[1], "m", concurrency=4))
judge.verdicts(queries(sys.argv[2]), Path(sys.argv[3]))
"""


def test_judge_killed_in_the_middle_asks_for_no_verdict_twice(bench, tmp_path):
    path = tmp_path / "v.jsonl"

    def slow(*_):
        time.sleep(0.1)
        return 200, "[[5]]"

    with scripted_judge(slow) as server:
        root = Path(__file__).parents[2]
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, server.base_url, str(bench), str(path)],
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        while not path.exists() or len(path.read_text().splitlines()) < 7:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with path.open("a") as file:
            file.write('{"key": "torn li')
        kept = [json.loads(line) for line in path.read_text().splitlines()[:-1]]
        before = len(server.asked)
        judge = Judge(JudgeSettings(server.base_url, "m"))
        verdicts = judge.verdicts(queries(bench), path)
    later = [user for _, user in server.asked[before:]]
    assert 7 <= len(kept) < 32
    assert len(later) == 32 - len(kept)
    assert not {row["user_prompt"] for row in kept} & set(later)
    assert len(verdicts) == 32
    assert len(path.read_text().splitlines()) == 32


# ------------------------------------------------------------------ answers


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


def test_command_shows_ratings_tokens_and_what_could_not_be_read(run, bench, monkeypatch, capsys):
    def reply(system, user, number):
        return 200, "[[8]]" if number else "Eight."

    with scripted_judge(reply) as judge:
        arguments = [
            *("evaluate", "--run", run.root, "--iterates", "1", "--mt-bench", bench),
            *("--judge.base_url", judge.base_url, "--judge.model", "scripted"),
            *("--answers.max_new_tokens", 12),
        ]
        monkeypatch.setattr("sys.argv", ["spin-lightning", *map(str, arguments)])
        main()
    said = capsys.readouterr().out
    assert "31 of 32 verdicts could be read (96.9%)" in said
    assert "read 3,200 and wrote 224 tokens" in said
    assert "mt_bench/overall" in said
    assert "8.0000" in said


def test_judge_inside_a_run_rates_every_iterate_and_its_outage_does_not_end_the_run(
    chat_run, bench, tmp_path
):
    model = chat_run.root.parent / "model"
    data = write_examples(tmp_path / "examples.jsonl")

    def play_judged(name, reply):
        with scripted_judge(reply) as judge:
            settings = {"base_url": judge.base_url, "model": "scripted", "retries": 0}
            evaluator = EvaluateIterates(mt_bench=str(bench), judge=settings, max_new_tokens=12)
            play(tmp_path / name, model, data, epochs=1, callbacks=[evaluator])
        return [RunFolder(tmp_path / name).read_iterate(t)["metrics"] for t in (0, 1)]

    judged = play_judged("judged", lambda *_: (200, "[[7]]"))
    assert [metrics["mt_bench/overall"] for metrics in judged] == [7.0, 7.0]
    without = play_judged("without", lambda *_: (500, "down"))
    assert not any("mt_bench/overall" in metrics for metrics in without)
    assert contents(tmp_path / "judged") == contents(tmp_path / "without")
    play(tmp_path / "plain", model, data, epochs=1)
    assert contents(tmp_path / "judged") == contents(tmp_path / "plain")


def test_judge_setting_with_a_typo_is_refused(bench):
    with pytest.raises(SettingError, match=r"judge\.modle.*choose from base_url, model"):
        EvaluateIterates(mt_bench=str(bench), judge={"modle": "x"})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"concurrency": 0}, "judge.concurrency=0.*1 or more"),
        ({"requests_per_minute": 0}, "judge.requests_per_minute=0.*number > 0"),
    ],
)
def test_judge_setting_out_of_range_is_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        JudgeSettings(**settings)


def test_evaluation_of_nothing_is_refused():
    with pytest.raises(SettingError, match=r"nothing to evaluate.*name a task, or mt_bench"):
        EvaluateIterates()
