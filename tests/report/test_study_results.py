"""Lines, tables and pictures of a grid's results, from numbers by hand."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.axes import Axes
from PIL import Image

from spin_lightning.errors import RunFolderError
from spin_lightning.report.study_figures import draw_part
from spin_lightning.report.study_results import best, read_results, results_table, unfinished

KL = {
    # Two seeds of three iterates each; the second half is the last one alone.
    ("SFT", None): [[0.6, 0.3, 0.1], [0.8, 0.4, 0.3]],
    ("SPIN", 0.1): [[0.6, 1.0, 2.0], [0.8, 1.0, 3.0]],
    ("SPIN", 0.5): [[0.6, 0.5, 0.5], [0.8, 0.9, 0.9]],
    ("SPIN", 1.0): [[0.6, 0.4, 0.2], [0.8, 0.5, 0.4]],
}


def row(**changes: object) -> dict[str, object]:
    """A row of a run of one iterate."""
    cell = {"cell": "a", "parts": ["a"], "variant": "SPIN", "seed": 0, "complete": True}
    return {**cell, "iterate": 0, "exact/kl": 0.5, **changes}


def write(path: Path) -> Path:
    rows = []
    for (variant, beta), runs in KL.items():
        for seed, points in enumerate(runs):
            for t, kl in enumerate(points):
                rows.append(
                    {
                        "cell": f"{variant}-{beta}-{seed}",
                        "parts": ["pays"] if beta is None else ["pays", "threshold"],
                        "variant": variant,
                        "seed": seed,
                        "model.beta": beta,
                        "complete": True,
                        "trainer.max_epochs": 2,
                        "iterate": t,
                        "exact/kl": kl,
                        "exact/mixture_kl": kl / 2,
                        "val/real_nll_per_token": 1 + kl,
                    }
                )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def parts(tmp_path):
    return read_results(write(tmp_path / "study.parquet"))


def test_lines_are_runs_that_differ_in_their_seed_alone(parts):
    assert list(parts) == ["pays", "threshold"]
    lines = parts["threshold"]
    assert [line.label for line in lines] == ["SPIN, beta=0.1", "SPIN, beta=0.5", "SPIN, beta=1.0"]
    assert [dict(line.settings) for line in lines] == [
        {"model.beta": 0.1},
        {"model.beta": 0.5},
        {"model.beta": 1.0},
    ]
    assert lines[0].points("exact/kl") == KL["SPIN", 0.1]
    assert parts["pays"][0].label == "SFT"


def test_best_is_the_lowest_held_out_nll_and_late_the_second_half(parts):
    line = parts["threshold"][1]
    assert [best(run) for run in line.runs.values()] == [1, 0]
    assert line.at_best("exact/kl") == {0: 0.5, 1: 0.8}
    assert line.late("exact/kl") == [0.5, 0.9]


def test_table_has_medians_ranges_and_paired_differences(parts):
    header, *rows = results_table(parts["pays"])
    assert header == [
        *("variant", "beta", "settled", "late kl", "late mixture kl", "best kl"),
        *("best real nll per token", "best kl minus SFT"),
    ]
    sft, *_, last = rows
    assert sft[:3] == ["SFT", "", "2 of 2"]
    assert sft[3] == "0.200 (0.10–0.30)"
    assert sft[-1] == "-"
    assert last[:6] == [
        *("SPIN", "1.0", "2 of 2", "0.300 (0.20–0.40)", "0.150 (0.10–0.20)", "0.300 (0.20–0.40)"),
    ]
    # Both seeds differ by 0.1: no spread.
    assert last[-1] == "+0.100 (+0.10 to +0.10)"
    assert [row[2] for row in rows] == ["2 of 2", "0 of 2", "1 of 2", "2 of 2"]


def test_pictures_are_drawn_over_the_setting_or_over_iterates(parts, tmp_path):
    for part, lines in parts.items():
        picture = draw_part(lines, tmp_path / "pictures" / f"{part}.png")
        assert picture is not None
        with Image.open(picture) as image:
            assert min(image.size) > 400


def test_run_that_ended_early_is_left_out_and_named(tmp_path):
    path = tmp_path / "study.parquet"
    rows = [row(), row(cell="b", seed=1, complete=False)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    (line,) = read_results(path)["a"]
    assert list(line.runs) == [0]
    assert unfinished(path) == ["b"]


def test_control_with_other_settings_is_none(tmp_path):
    path = tmp_path / "study.parquet"
    rows = [
        row(variant=variant, seed=seed, **{"data.max_examples": n})
        for variant, n in (("SFT", 10), ("SPIN", 10), ("SPIN", 20))
        for seed in (0, 1)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    _, sft, same, other = results_table(read_results(path)["a"])
    assert sft[-1] == other[-1] == "-"
    assert same[-1] == "+0.000 (+0.00 to +0.00)"


def test_lists_of_a_setting_are_told_apart(tmp_path):
    path = tmp_path / "study.parquet"
    targets = (["q_proj"], ["q_proj", "v_proj"], ["o_proj"])
    rows = [row(**{"model.lora_target_modules": one}) for one in targets]
    pq.write_table(pa.Table.from_pylist(rows), path)
    lines = read_results(path)["a"]
    assert len(lines) == 3
    assert draw_part(lines, tmp_path / "a.png") is not None


@pytest.mark.parametrize(("loss", "drawn"), [("logistic", True), ("ipo", False)])
def test_threshold_is_drawn_for_the_loss_that_it_is_known_for(loss, drawn, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Axes, "axvline", lambda _, x, **__: seen.append(x))
    path = tmp_path / "study.parquet"
    rows = [row(**{"model.loss": loss, "model.beta": beta}) for beta in (0.1, 0.3, 1.0)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    draw_part(read_results(path)["a"], tmp_path / "a.png")
    assert seen == ([0.5] if drawn else [])


def test_what_is_not_a_grids_table_is_refused(tmp_path):
    path = tmp_path / "study.parquet"
    with pytest.raises(RunFolderError, match=r"there is no file .*study --grid"):
        read_results(path)
    path.write_text("no table")
    with pytest.raises(RunFolderError, match=r"cannot be read.*study --grid"):
        read_results(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(RunFolderError, match="is not the table of a grid"):
        read_results(path)
