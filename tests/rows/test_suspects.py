"""Rows with non-finite log-probs are named and written to a file, and no others."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from spin_lightning.rows.suspects import NonFiniteError, check_rows, listed
from spin_lightning.types import Row
from tests.toys.runs import play, write_examples

ROW = Row(
    7,
    1,
    (1, 5),
    (6, 2),
    (8, 2),
    0,
    True,
    True,
    (0, 1),
    (-1.0, -2.0),
    (-3.0, -4.0),
    None,
    (),
    (),
    (),
    9,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl", count=40)


def test_scoring_that_overflows_stops_with_the_rows_and_writes_no_part(
    tiny_model_dir, data, tmp_path
):
    """Weights of the head past 65504 are infinite in float16."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1e7
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError) as error:
        play(tmp_path / "run", model, data, settings={"compute_dtype": "float16"})
    message = str(error.value)
    assert "scoring rows of iterate 0, work unit 0" in message
    assert "example " in message
    (file,) = (tmp_path / "run").rglob("not_finite-*.json")
    assert str(file) in message
    assert not list((tmp_path / "run").rglob("*.parquet"))
    assert not list((tmp_path / "run").rglob("*manifest.json"))


def test_check_rows_names_only_rows_with_non_finite_log_probs(tmp_path):
    bad = replace(ROW, example_id=8, member_generated_logps=(-3.0, -math.inf))
    path = tmp_path / "found.json"
    check_rows([ROW], path, "scoring")
    assert not path.exists()
    with pytest.raises(NonFiniteError, match="scoring: the log-probs of example 8 sample 1 are"):
        check_rows([ROW, bad], path, "scoring")
    (row,) = json.loads(path.read_text())["rows"]
    assert row == {
        "example_id": 8,
        "sample": 1,
        "prompt_ids": [1, 5],
        "real_ids": [6, 2],
        "generated_ids": [8, 2],
        "logps": {
            "log p0 of the real response": -1.0,
            "log p1 of the real response": -2.0,
            "log p0 of the generated": -3.0,
            "log p1 of the generated": "-inf",
        },
    }


def test_listed_names_eight_and_counts_the_rest():
    assert listed([f"r{i}" for i in range(8)]) == "r0, r1, r2, r3, r4, r5, r6, r7"
    assert listed([f"r{i}" for i in range(11)]).endswith("r6, r7 and 3 more")
