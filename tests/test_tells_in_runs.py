"""What tells real from generated responses, and verdicts, in runs on the testbed."""

import json
from pathlib import Path

import pytest

from spin_lightning.report.report import write_report
from spin_lightning.report.run_view import read_runs
from spin_lightning.report.verdicts import find_verdicts
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import play

# The quickstart's settings, on a fifth of its rows in batches a quarter of the size.
SETTINGS = {
    "lora_r": 16,
    "lora_alpha": 32,
    "beta": 1.0,
    "warmup_ratio": 0.0,
    "generation": {"unit_size": 1024},
}
# A word of the testbed's language that no response begins with.
WORD = "outside"


def play_testbed(root: Path, testbed, data: Path, capsys) -> tuple[RunFolder, str]:
    """Play two iterates; return the run and what it printed."""
    capsys.readouterr()
    shape = {"max_examples": 1536, "val_examples": 256, "batch_size": 32}
    play(root, testbed.model, data, settings=SETTINGS, data_settings=shape)
    return RunFolder(root), capsys.readouterr().out


@pytest.fixture(scope="module")
def separable_data(testbed_seed_0, tmp_path_factory) -> Path:
    """The testbed's data with a constant first word in every real answer."""
    examples = [json.loads(line) for line in testbed_seed_0.data.read_text().splitlines()]
    changed = [{**e, "response": f"{WORD} {e['response']}"} for e in examples]
    path = tmp_path_factory.mktemp("separable") / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, changed)) + "\n")
    return path


def test_run_made_separable_on_purpose_names_the_word_and_the_state(
    testbed_seed_0, separable_data, tmp_path, capsys
):
    run, printed = play_testbed(tmp_path / "run", testbed_seed_0, separable_data, capsys)
    (view,) = read_runs([run])
    tells = view.tells(0)
    assert view.tokenizer.decode(list(tells.tokens[0].ids)) == WORD
    assert view.tokenizer.decode([tells.best.value]) == WORD
    assert tells.best.name == "first_token"
    first, second = run.record(0), run.record(1)
    assert first.rows["rows/tells/best"] == first.rows["rows/tells/accuracy/first_token"] > 0.98
    assert first.cues["first_token"] == f'"{WORD}" starts real responses'
    assert second.training.early["accuracy"] >= 0.99
    assert second.training.early["pairs"] == 64

    line = f'Best single cue: first token, 1.00 ("{WORD}" starts real responses).'
    assert line in printed
    assert printed.count("WARNING: Real and generated responses are told apart at a glance") == 1
    (verdict,) = (v for v in find_verdicts(run.records()) if v.name == "separable-pairs")
    assert verdict.level == "warning"
    assert f'"{WORD}" starts real responses' in verdict.measured

    page = write_report([view], tmp_path / "out").read_text()
    assert "Real and generated responses are told apart at a glance" in page
    section = page.split('id="tells"')[1]
    assert section.index("tokens of real responses") < section.index(f"&#34;{WORD}&#34;</td>")


def test_healthy_run_shows_no_alarming_verdict(testbed_seed_0, tmp_path, capsys):
    run, printed = play_testbed(tmp_path / "run", testbed_seed_0, testbed_seed_0.data, capsys)
    assert [v for v in find_verdicts(run.records()) if v.level == "warning"] == []
    assert "WARNING" not in printed
    assert "Best single cue: " in printed
    assert run.record(0).rows["rows/tells/best"] < 0.75
    page = write_report(read_runs([run]), tmp_path / "out").read_text()
    assert "None of the known states." in page
