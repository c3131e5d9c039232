"""Studies: the table and picture of several variants, each with several seeds."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median

import pytest
import yaml

from spin_lightning.cli.main import main
from spin_lightning.errors import RunFolderError
from spin_lightning.report.study import draw_study, study_curves, study_table
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import IterateRecord

CONFIG = Path(__file__).parents[2] / "configs" / "testbed" / "stability.yaml"


def finished(root: Path, metrics: list[dict[str, float]]) -> RunFolder:
    """A run whose iterates have these metrics."""
    run = RunFolder(root)
    for t, measured in enumerate(metrics):
        run.write_record(IterateRecord(t, metrics=measured))
    return run


def test_table_has_the_median_over_seeds_and_that_of_the_later_half(tmp_path):
    """Medians at p0 … p4 are 1, 2, 4, 8, 16; means of p3 and p4 are 9, 12 and 15."""
    seeds = [[1, 2, 4, 8, 10], [1, 1, 5, 7, 17], [1, 3, 3, 14, 16]]
    runs = [
        finished(tmp_path / str(i), [{"exact/kl": float(kl)} for kl in values])
        for i, values in enumerate(seeds)
    ]
    head, row = study_table(study_curves({"SPIN": runs}))
    assert head == ["median over seeds", "variant", "p0", "p1", "p2", "p3", "p4", "mean p3–p4"]
    assert row == ["exact/kl", "SPIN", "1.000", "2.000", "4.000", "8.000", "16.000", "12.000"]


def test_table_and_picture_of_a_run_that_stopped_early_end_where_it_did(tmp_path):
    short = finished(tmp_path / "a", [{"val/real_nll_per_token": 2.0}])
    long = finished(tmp_path / "b", [{"val/real_nll_per_token": 2.0}] * 3)
    curves = study_curves({"SPIN": [short], "SFT": [long]})
    assert study_table(curves)[1][2:] == ["2.000", "-", "-", "2.000"]
    picture = draw_study(curves, tmp_path / "new" / "study.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_runs_without_a_common_metric_are_refused(tmp_path):
    groups = {"SPIN": [finished(tmp_path / "a", [{}])]}
    with pytest.raises(RunFolderError, match=r"Fix: hold examples out"):
        study_curves(groups)


def study(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["spin-lightning", "study", *map(str, arguments)])
    main()


def test_study_plays_every_variant_and_seed_and_is_not_played_twice(
    tmp_path, monkeypatch, capsys, testbed_seed_0
):
    config = yaml.safe_load(CONFIG.read_text())
    config["data"]["init_args"] |= {"max_examples": 640, "val_examples": 64}
    config["trainer"] |= {"max_epochs": 1, "log_every_n_steps": 1}
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(config))
    arguments = ("--config", tmp_path / "cut.yaml", "--seeds", 0, "--out", tmp_path / "out")
    variants = ("--variants", "SPIN", "AlphaSPIN(alpha=0.3)")
    study(monkeypatch, *arguments, *variants)
    output = capsys.readouterr().out
    assert "[2/2] AlphaSPIN(alpha=0.3), seed 0" in output
    assert "exact/mixture_kl" in output
    assert "Picture:" in output
    assert "Run folder" not in output, "runs are quiet"
    runs = sorted(folder.name for folder in (tmp_path / "out").iterdir() if folder.is_dir())
    assert runs == ["AlphaSPIN_alpha=0.3-seed0", "SPIN-seed0"]
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.parquet")}
    study(monkeypatch, *arguments, *variants)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.parquet")} == files


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fictitious_play_is_stable_where_spin_runs_away(tmp_path, monkeypatch, capsys):
    """The mean exact KL of iterates 5 to 8, median over seeds: at least 3 times larger for SPIN."""
    arguments = ("--config", CONFIG, "--variants", "SPIN", "FictitiousSPIN", "--out", tmp_path)
    study(monkeypatch, *arguments)
    print(capsys.readouterr().out)
    curves = defaultdict(list)
    for folder in sorted(path for path in tmp_path.iterdir() if path.is_dir()):
        metrics = [
            json.loads((folder / f"iterates/iterate_{t:03d}/iterate.json").read_text())["metrics"]
            for t in range(9)
        ]
        curves[folder.name.partition("-")[0]].append([m["exact/kl"] for m in metrics])
    late = {name: median(fmean(kl[5:]) for kl in runs) for name, runs in curves.items()}
    assert late["SPIN"] >= 3 * late["FictitiousSPIN"], late
    assert median(kl[-1] - kl[0] for kl in curves["SPIN"]) > 0, curves["SPIN"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_reservoir_of_fictitious_play_generates_the_harmonic_share_of_rows(tmp_path, monkeypatch):
    """Eight iterates: N (1 + 1/2 + … + 1/8) rows within 5 percent."""
    root = ("--trainer.default_root_dir", tmp_path, "--trainer.enable_progress_bar", "false")
    variant = ("--model", "FictitiousSPIN", "--model.refresh", "reservoir")
    arguments = ("fit", "--config", CONFIG, *variant, *root)
    monkeypatch.setattr("sys.argv", ["spin-lightning", *map(str, arguments)])
    main()
    records = [RunFolder(tmp_path).record(t) for t in range(8)]
    shares = [record.measured["rows/regenerated"] for record in records]
    print(shares)
    assert sum(shares) == pytest.approx(sum(1 / k for k in range(1, 9)), rel=0.05)
