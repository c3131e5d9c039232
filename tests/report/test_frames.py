"""Metrics and tells of a run as tables."""

import json

import pytest

from spin_lightning import SFT, SelfPlayDataModule, load_metrics, load_rows, load_tells, quiet
from spin_lightning.errors import RunFolderError
from tests.toys.runs import play, quiet_trainer, write_examples


def test_metrics_are_those_of_the_records(finished_run):
    frame = load_metrics(finished_run.root)
    assert frame.index.tolist() == [0, 1, 2, 3, 4]
    assert frame.index.name == "iterate"
    for t in frame.index:
        file = finished_run.iterate(t) / "iterate.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        measured = {**content["metrics"], **content.get("rows", {})}
        assert frame.loc[t].dropna().to_dict() == pytest.approx(measured)
    # The last iterate has made no rows for another.
    assert frame["rows/duplicates"].notna().tolist() == [True] * 4 + [False]


def test_metrics_of_a_folder_without_iterates_are_one_error(tmp_path):
    with pytest.raises(RunFolderError, match="holds no iterates"):
        load_metrics(tmp_path)


def test_tells_count_the_responses_that_contain_a_token(finished_run):
    cues, tokens = load_tells(finished_run.root, 0)
    names = ["finished", "special_token", "first_token", "last_token", "length"]
    assert cues["cue"].tolist() == names
    assert cues["accuracy"].between(0, 1).all()
    assert ((cues["rule"] != "") == cues["clear"]).all()
    # Real responses of the toy data are words w0 to w9, the random model's any of w0 to w19.
    single = tokens[~tokens["text"].str.contains(" ")].set_index("text")
    assert set(single.index[single["side"] == "generated"]) & {f"w{i}" for i in range(10, 20)}
    rows = load_rows(finished_run.root, 0)
    for text, tell in single.iterrows():
        assert tell["generated"] == sum(text in words.split() for words in rows["generated"])
        real = rows.drop_duplicates("example_id")["real"]
        assert tell["real"] == sum(text in words.split() for words in real)
        assert (tell["z"] > 0) == (tell["log_odds"] > 0) == (tell["side"] == "real")


def test_tells_without_generated_responses_are_empty_tables(tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "examples.jsonl", count=30)
    play(tmp_path / "run", tiny_model_dir, data, variant=SFT, epochs=1)
    cues, tokens = load_tells(tmp_path / "run", 0)
    assert (len(cues), len(tokens)) == (0, 0)
    assert list(tokens.columns) == ["side", "text", "real", "generated", "log_odds", "z"]


def test_quiet_runs_print_nothing(tiny_model_dir, tmp_path, capfd):
    data = write_examples(tmp_path / "examples.jsonl", count=30)
    with quiet():
        module = SFT(model=str(tiny_model_dir))
        trainer = quiet_trainer(tmp_path / "run", epochs=1)
        trainer.fit(module, SelfPlayDataModule(str(data), max_response_tokens=8, val_examples=4))
    assert capfd.readouterr() == ("", "")
