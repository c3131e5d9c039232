"""A judge that is rate-limited, retried and cached, and that stores every verdict once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spin_lightning.errors import SettingError
from spin_lightning.evaluation.mt_bench.judge import Judge, JudgeError
from spin_lightning.evaluation.settings import JudgeSettings
from tests.evaluation.mt_bench.bench import queries
from tests.evaluation.scripted_judge import scripted_judge


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
from tests.evaluation.mt_bench.bench import queries
from spin_lightning.evaluation.mt_bench.judge import Judge
from spin_lightning.evaluation.settings import JudgeSettings
judge = Judge(JudgeSettings(sys.argv[1], "m", concurrency=4))
judge.verdicts(queries(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def test_judge_killed_in_the_middle_asks_for_no_verdict_twice(bench, tmp_path):
    path = tmp_path / "v.jsonl"

    def slow(*_):
        time.sleep(0.1)
        return 200, "[[5]]"

    with scripted_judge(slow) as server:
        root = Path(__file__).parents[3]
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
