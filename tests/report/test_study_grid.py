"""The file that names a grid's cells, and the table of what they gave."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from spin_lightning.errors import RunFolderError, SettingError, SpinError
from spin_lightning.report.study_grid import Outcome, read_grid, write_table

GRID = {
    "config": "some.yaml",
    "seeds": [3, 4],
    "parts": {
        "beta": {
            "variants": ["SPIN", "MixtureSPIN(history=2)"],
            "settings": {"model.beta": [0.1, 0.3], "trainer.max_epochs": [10]},
        },
        "again": {
            "variants": ["SPIN"],
            "settings": {"model.beta": [0.3], "trainer.max_epochs": [10]},
        },
        "after": {"variants": ["SPIN"], "start": "SFT(lora_r=4)", "start_epochs": 2},
    },
}


def write(folder: Path, **changes: object) -> Path:
    (folder / "some.yaml").touch()
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return path


def test_cells_are_the_products_of_variants_values_and_seeds_seed_by_seed(tmp_path):
    grid = read_grid(write(tmp_path))
    assert grid.config == tmp_path / "some.yaml"
    assert [cell.play.seed for cell in grid.cells.values()] == [3] * 5 + [4] * 5
    names = [name for name in grid.cells if name.endswith("seed3")]
    assert names == [
        "SPIN-model.beta=0.1-trainer.max_epochs=10-seed3",
        "SPIN-model.beta=0.3-trainer.max_epochs=10-seed3",
        "MixtureSPIN_history=2-model.beta=0.1-trainer.max_epochs=10-seed3",
        "MixtureSPIN_history=2-model.beta=0.3-trainer.max_epochs=10-seed3",
        "after-2-epochs-of-SFT_lora_r=4_SPIN-seed3",
    ]
    assert grid.cell(names[1]).parts == ("beta", "again"), "it is played once"
    after = grid.cell(names[4])
    assert after.start is not None
    assert (after.start.name, after.start.epochs) == ("start-SFT_lora_r=4-seed3", 2)
    arguments = grid.cell(names[3]).play.arguments("some.yaml", tmp_path)
    assert {"--model.history=2", "--model.beta=0.3", "--trainer.max_epochs=10"} <= set(arguments)


def test_long_settings_have_short_names_that_stay_apart(tmp_path):
    parts = {
        name: {"variants": ["SPIN"], "settings": {"model.beta": [[0.1] * 80 + [last]]}}
        for name, last in (("one", 0.1), ("two", 0.2))
    }
    names = list(read_grid(write(tmp_path, seeds=[0], parts=parts)).cells)
    assert len(names) == 2
    assert all(len(name) <= 200 for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0.5]}, r"seeds=.*0.5 is not a seed"),
        ({"seeds": []}, r"seeds=\[\]: it is not a list of values"),
        ({"parts": {}}, r"parts=\{\}: it is not a mapping"),
        ({"parts": {"a": {}}}, r"parts.a.variants=None: it is not a list of values"),
        ({"parts": {"a": {"variants": ["SPIN("]}}}, r"variants='SPIN\(': it does not name a class"),
        ({"parts": {"a": {"variant": ["SPIN"]}}}, r"parts.a.variant=.*there is no such setting"),
        (
            {"parts": {"a": {"variants": ["SPIN"], "settings": {"model.beta": 0.1}}}},
            r"parts.a.settings.model.beta=0.1: it is not a list of values",
        ),
        (
            {"parts": {"a": {"variants": ["SPIN"], "settings": {"beta": [0.1]}}}},
            r"parts.a.settings='beta': it is not a setting that cells may differ in",
        ),
        (
            {"parts": {"a": {"variants": ["SPIN"], "settings": {"seed_everything": [1]}}}},
            r"parts.a.settings='seed_everything'",
        ),
        (
            {
                "parts": {
                    "a": {
                        "variants": ["SPIN"],
                        "settings": {"data.max_examples": [1, 2]},
                        "start": "SFT",
                    }
                }
            },
            r"a part with a start has one value of each setting of the data",
        ),
        ({"more": 1}, r"the grid.more=1: there is no such setting"),
        ({"config": "other.yaml"}, r"config='other.yaml': there is no .*other.yaml"),
        ({"parts": {"a/b": {"variants": ["SPIN"]}}}, r"parts='a/b': pictures are named like parts"),
        (
            {"parts": {"a": {"variants": ["SPIN(beta=1)"], "settings": {"model.beta": [2]}}}},
            r"parts.a.settings='model.beta': the variant SPIN\(beta=1\) sets it as well",
        ),
        (
            {
                "parts": {
                    "a": {"variants": ["SPIN"], "settings": {"model.lora_r": [4]}, "start": "SFT"}
                }
            },
            r"parts.a.settings='model.lora_r': runs start from the adapter of SFT",
        ),
        (
            {"parts": {"a": {"variants": ["SPIN(lora_r=4)"], "start": "SFT"}}},
            r"='model.lora_r': runs start from the adapter .*set it there: start: SFT\(lora_r=…\)",
        ),
        (
            {"parts": {"a": {"variants": ["SPIN"], "start": "SFT", "start_epochs": 0}}},
            r"parts.a.start_epochs=0: it is not a number of epochs",
        ),
    ],
)
def test_grid_that_is_not_one_is_refused_with_the_field(changes, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        read_grid(write(tmp_path, **changes))


def test_file_that_is_missing_or_no_yaml_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    for name in ("bad.yaml", "missing.yaml"):
        with pytest.raises(SpinError, match=r"grid='.*' cannot be read"):
            read_grid(tmp_path / name)


def test_cell_that_the_grid_does_not_have_is_answered_with_near_ones(tmp_path):
    grid = read_grid(write(tmp_path))
    with pytest.raises(
        SettingError, match=r"give a name such as .*SPIN-model.beta=0.1-trainer.max_epochs"
    ):
        grid.cell("SPIN-model.beta=0.15-trainer.max_epochs=10-seed3")


def test_table_has_a_row_per_cell_and_iterate_with_settings_and_metrics(tmp_path):
    cells = list(read_grid(write(tmp_path)).cells.values())
    outcomes = [
        Outcome({}, 1.5, [{"exact/kl": 0.5}, {"exact/kl": 0.25, "val/finished": 1.0}]),
        Outcome({}, 2.5, [{"exact/kl": 0.75}], error="it ended"),
    ]
    path = tmp_path / "out" / "study.parquet"
    assert write_table(zip((cells[2], cells[4]), outcomes, strict=True), path) == 3
    rows = pq.read_table(path).to_pylist()
    assert [(r["class"], r["iterate"], r["exact/kl"]) for r in rows] == [
        ("MixtureSPIN", 0, 0.5),
        ("MixtureSPIN", 1, 0.25),
        ("SPIN", 0, 0.75),
    ]
    assert rows[1] | {"val/finished": 1.0, "model.history": 2, "model.beta": 0.1} == rows[1]
    assert rows[2]["model.history"] is None
    assert rows[2]["start"] == "SFT(lora_r=4)"
    assert rows[0]["parts"] == ["beta"]


def test_outcome_survives_its_file_and_a_damaged_one_is_named(tmp_path):
    outcome = Outcome({"seed": 1}, 1.5, [{"exact/kl": 0.5}])
    outcome.write(tmp_path / "cells" / "one.json")
    assert Outcome.read(tmp_path / "cells" / "one.json") == outcome
    assert Outcome.read(tmp_path / "cells" / "two.json") is None
    (tmp_path / "bad.json").write_text('{"seconds": 1}')
    with pytest.raises(RunFolderError, match=r"bad\.json.*Fix: remove it"):
        Outcome.read(tmp_path / "bad.json")
