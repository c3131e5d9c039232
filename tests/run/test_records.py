"""Records of iterates: read, checked, and written back with the same bytes."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from spin_lightning.run.files import write_json
from spin_lightning.run.folder import ITERATE_FILE, RunFolder
from spin_lightning.run.records import BestRecord, IterateRecord, TrainingRecord

# As the first version wrote them: iterate 0 of the bare base, and a trained iterate.
FIRST: dict[str, Any] = {
    "index": 0,
    "parent": None,
    "files": {},
    "base": {"name": "tiny", "quantization": "none"},
    "fingerprint": "0f",
    "fingerprint_fields": {"variant": "SPIN", "beta": 0.1, "betas": [0.9, 0.999]},
    "step": 0,
    "training": None,
}
TRAINED: dict[str, Any] = {
    **FIRST,
    "index": 2,
    "parent": 1,
    "files": {"adapter_config.json": "aa", "adapter_model.safetensors": "bb"},
    "step": 8,
    "training": {
        "opponent": "p1",
        "reference": "p1",
        "rows": 114,
        "loss": 0.6931471805599453,
        "margin": None,
        "accuracy": 0.5,
        "seconds": {"generating": 0.1, "scoring": 0.2, "training": 0.3},
    },
}
# As today's version writes them.
TODAY = [
    {**FIRST, "tokenizer_files": {"tokenizer.json": "cc"}},
    {**FIRST, "tokenizer_files": {}, "metrics": {}, "rows": {"rows/real_tokens": 3.5}},
    {**FIRST, "rows": {}, "cues": {}},
    {
        **TRAINED,
        "training": {
            **TRAINED["training"],
            "speed": {},
            "peak_memory": None,
            "early": {"accuracy": 0.5, "loss": 0.69, "pairs": 64},
        },
        "rows": {"rows/tells/best": 0.7},
        "cues": {"first_token": '"Sure" starts real responses'},
    },
    {
        **TRAINED,
        "training": {
            **TRAINED["training"],
            "speed": {"speed/mfu": 0.4},
            "peak_memory": 123_456_789_012,
            "phase_peaks": {"before": 1_000, "training": 123_456_789_012},
        },
        "metrics": {"val/real_nll_per_token": 1.25, "val/kl_base": -0.0, "exact/kl": math.nan},
    },
]


def written(run: RunFolder, t: int) -> bytes:
    return (run.iterate(t) / ITERATE_FILE).read_bytes()


@pytest.mark.parametrize("content", TODAY)
def test_record_of_today_is_written_back_byte_for_byte(content, tmp_path):
    run, t = RunFolder(tmp_path), content["index"]
    write_json(run.iterate(t) / ITERATE_FILE, content)
    before = written(run, t)
    run.write_record(run.record(t))
    assert written(run, t) == before


def test_record_has_the_values_of_its_file():
    record = IterateRecord.of(json.loads(json.dumps(TODAY[-1])), 2)
    assert (record.index, record.parent, record.step) == (2, 1, 8)
    assert record.files == TRAINED["files"]
    assert record.base == {"name": "tiny", "quantization": "none"}
    assert record.fingerprint_fields == FIRST["fingerprint_fields"]
    assert record.training == TrainingRecord(
        opponent="p1",
        reference="p1",
        rows=114,
        loss=0.6931471805599453,
        margin=None,
        accuracy=0.5,
        seconds={"generating": 0.1, "scoring": 0.2, "training": 0.3},
        speed={"speed/mfu": 0.4},
        peak_memory=123_456_789_012,
        phase_peaks={"before": 1_000, "training": 123_456_789_012},
    )
    assert record.tokenizer_files is None
    assert record.rows is None


@pytest.mark.parametrize("content", [FIRST, TRAINED])
def test_record_of_the_first_version_lacks_what_was_not_recorded_yet(content):
    record = IterateRecord.of(content, content["index"])
    assert record.tokenizer_files is record.metrics is record.rows is None
    assert record.measured == {}
    if record.training is not None:
        assert record.training.speed == {}
        assert record.training.peak_memory is None
        assert record.training.phase_peaks == {}


def test_record_measured_later_is_written_with_its_metrics(tmp_path):
    run = RunFolder(tmp_path)
    run.write_record(IterateRecord.of(FIRST, 0))
    assert json.loads(written(run, 0)) == FIRST
    run.write_record(replace(run.record(0), metrics={"exact/kl": 0.5}))
    run.write_record(replace(run.record(0), rows={"rows/distinct_1": 0.25}))
    assert json.loads(written(run, 0)) == {
        **FIRST,
        "metrics": {"exact/kl": 0.5},
        "rows": {"rows/distinct_1": 0.25},
    }
    assert run.record(0).measured == {"exact/kl": 0.5, "rows/distinct_1": 0.25}


def test_fields_of_other_versions_are_kept_when_a_record_is_written_again():
    content = {
        **TODAY[-1],
        "color": {"hue": [1, 2]},
        "training": {**TODAY[-1]["training"], "mood": "good"},
    }
    record = IterateRecord.of(content, 2)
    assert record.others == {"color": {"hue": [1, 2]}}
    assert replace(record, rows={}).to_json() == {**content, "rows": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": 7}, "it is the record of iterate 7"),
        ({"cues": {"length": 3}}, "its 'cues' is not an object of strings"),
        ({"training": {"early": {"loss": "0.5"}}}, "its 'early' is not an object of numbers"),
        ({"index": "2"}, "its 'index' is not the index of an iterate"),
        ({"parent": -1}, "its 'parent' is not the index of an iterate or null"),
        ({"files": ["a"]}, "its 'files' is not an object of hashes by file name"),
        ({"files": {"../a": "0"}}, "its 'files' is not an object of hashes by file name"),
        ({"base": "a model"}, "its 'base' is not an object"),
        ({"fingerprint": 3}, "its 'fingerprint' is not a string"),
        ({"step": -1}, "its 'step' is not a non-negative integer"),
        ({"step": True}, "its 'step' is not a non-negative integer"),
        ({"training": []}, "its 'training' is not an object or null"),
        ({"training": {"rows": 0}}, "its 'rows' is not a positive integer or null"),
        ({"training": {"loss": "low"}}, "its 'loss' is not a number or null"),
        ({"training": {"seconds": {"scoring": "1"}}}, "its 'seconds' is not an object of numbers"),
        ({"tokenizer_files": {"/etc/x": "0"}}, "its 'tokenizer_files' is not an object of hashes"),
        ({"metrics": [1]}, "its 'metrics' is not an object of numbers"),
        ({"metrics": None}, "its 'metrics' is not an object of numbers"),
        ({"rows": {"rows/real_tokens": "3"}}, "its 'rows' is not an object of numbers"),
    ],
)
def test_damaged_record_is_refused_by_its_field(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        IterateRecord.of({**TRAINED, **changes}, 2)


@pytest.mark.parametrize("name", FIRST)
def test_record_without_a_field_that_every_version_wrote_is_refused(name):
    content = {key: value for key, value in FIRST.items() if key != name}
    with pytest.raises(ValueError, match=f"^its '{name}' is missing$"):
        IterateRecord.of(content, 0)


@pytest.mark.parametrize("content", [None, [], "{}", 3])
def test_content_that_is_not_an_object_is_refused(content):
    with pytest.raises(ValueError, match=r"^it is not a JSON object$"):
        IterateRecord.of(content, 0)
    with pytest.raises(ValueError, match=r"^it is not a JSON object$"):
        BestRecord.of(content)


@pytest.mark.parametrize("value", [0.5, 2, math.inf])
def test_best_record_is_read_as_it_was_written(value, tmp_path):
    run = RunFolder(tmp_path)
    assert run.best_record() is None
    run.write_best(3, "exact/kl", value)
    assert run.best_record() == BestRecord(3, "exact/kl", value)
    assert json.loads((run.iterates / "best.json").read_text()) == {
        "index": 3,
        "metric": "exact/kl",
        "value": value,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": "one"}, "its 'index' is not the index of an iterate"),
        ({"metric": 1}, "its 'metric' is not a string"),
        ({"value": "low"}, "its 'value' is not a number"),
        ({"value": None}, "its 'value' is not a number"),
    ],
)
def test_damaged_best_record_is_refused_by_its_field(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        BestRecord.of({"index": 1, "metric": "exact/kl", "value": 0.5, **changes})


@pytest.mark.parametrize("name", ["index", "metric", "value"])
def test_best_record_without_a_field_is_refused(name):
    content = {"index": 1, "metric": "exact/kl", "value": 0.5}
    content.pop(name)
    with pytest.raises(ValueError, match=f"^its '{name}' is missing$"):
        BestRecord.of(content)
