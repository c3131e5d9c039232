"""MT-Bench on a run: ratings worked out by hand, matches in both positions, the command."""

import json

import pytest

from spin_lightning.cli.main import main
from spin_lightning.evaluation.mt_bench.data import read_mt_bench
from tests.evaluation.mt_bench.bench import CATEGORIES, rate
from tests.evaluation.scripted_judge import scripted_judge


def test_known_ratings_give_the_means_worked_out_by_hand(run, bench):
    """Category k has rating k + 1 in turn 1 and k + 3 in turn 2, so k + 2 on average.

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
    output = capsys.readouterr().out
    assert "31 of 32 verdicts could be read (96.9%)" in output
    assert "read 3,200 and wrote 224 tokens" in output
    assert "mt_bench/overall" in output
    assert "8.0000" in output
