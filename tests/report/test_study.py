"""Studies: the table and picture of several variants, each with several seeds."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median

import pytest
import yaml
from scipy import stats

from spin_lightning.cli.main import main
from spin_lightning.errors import RunFolderError
from spin_lightning.evaluation.contestants import iterate_contestant
from spin_lightning.evaluation.results import Result, read_results, write_result
from spin_lightning.report.study import (
    benchmark_scores,
    difference_table,
    draw_study,
    paired_interval,
    study_curves,
    study_table,
)
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import IterateRecord
from tests.toys.runs import write_examples
from tests.toys.tasks import write_tasks

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
    long = finished(tmp_path / "b", [{"val/real_nll_per_token": 2.0}] * 5)
    curves = study_curves({"SPIN": [short], "SFT": [long]})
    assert study_table(curves)[1][2:] == ["2.000", "-", "-", "-", "-", "2.000"]
    two = finished(tmp_path / "c", [{"val/real_nll_per_token": 2.0}] * 3)
    assert study_table(study_curves({"SPIN": [two]}))[0][2:] == ["p0", "p1", "p2"]
    picture = draw_study(curves, tmp_path / "new" / "study.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_differences_are_taken_seed_by_seed(tmp_path):
    """SPIN - SFT is 1, 2, 3: mean 2, standard deviation 1, half width 4.303 / sqrt(3) = 2.484."""
    groups = {
        "SPIN": [
            finished(tmp_path / f"spin{i}", [{"exact/kl": 0.0}, {"exact/kl": value}])
            for i, value in enumerate([11.0, 5.0, 8.0])
        ],
        "SFT": [
            finished(tmp_path / f"sft{i}", [{"exact/kl": 0.0}, {"exact/kl": value}])
            for i, value in enumerate([10.0, 3.0, 5.0])
        ],
    }
    head, spin, sft = difference_table(study_curves(groups), "SFT")
    assert head == ["last iterate", "variant", "mean", "minus SFT", "95 % interval"]
    assert spin == ["exact/kl", "SPIN", "8.000", "+2.000", "-0.484 to +4.484"]
    assert sft == ["exact/kl", "SFT", "6.000", "-", "-"]


def test_benchmark_scores_are_those_that_all_runs_have_of_the_iterate(tmp_path):
    """SPIN - start is 0.1, 0.3: mean 0.2, deviation 0.1 sqrt(2), half width 12.706 · 0.1."""
    runs = [finished(tmp_path / str(i), [{"exact/kl": 0.0}] * 2) for i in range(4)]

    def scored(run: RunFolder, t: int, benchmark: str, score: float) -> None:
        one = iterate_contestant(run, t)
        scores = {"acc": score, "acc_error": 0.01}
        write_result(run, Result(one.name, one.identity, benchmark, {"limit": 9}, scores))

    assert benchmark_scores({"SPIN": [(run, 1) for run in runs]}) == {}
    for run, score in zip(runs, (0.4, 0.7, 0.3, 0.4), strict=True):
        scored(run, 1, "lm_eval/arc", score)
        scored(run, 0, "lm_eval/arc", 0.9)
    scored(runs[0], 1, "lm_eval/mmlu", 0.5)
    scores = benchmark_scores(
        {"SPIN": [(run, 1) for run in runs[:2]], "start": [(run, 1) for run in runs[2:]]}
    )
    assert scores == {
        "lm_eval/arc/acc": {"SPIN": [[0.4], [0.7]], "start": [[0.3], [0.4]]},
    }
    _, spin, _ = difference_table(scores, "start")
    assert spin == ["lm_eval/arc/acc", "SPIN", "0.550", "+0.200", "-1.071 to +1.471"]


@pytest.mark.parametrize("seeds", [2, 3, 5, 21])
def test_interval_is_that_of_the_paired_t_test(seeds):
    own = [(7 * i) % 5 + 0.1 * i for i in range(seeds)]
    theirs = [(3 * i) % 4 + 0.2 * i for i in range(seeds)]
    theory = stats.ttest_rel(own, theirs).confidence_interval(0.95)
    low, mean, high = paired_interval(own, theirs)
    assert (low, high) == pytest.approx((theory.low, theory.high), rel=1e-3)
    assert mean == pytest.approx((low + high) / 2)


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


def test_variants_start_from_the_best_iterate_of_the_start(
    tmp_path, monkeypatch, capsys, testbed_seed_0
):
    config = yaml.safe_load(CONFIG.read_text())
    config["data"]["init_args"] |= {"max_examples": 640, "val_examples": 64}
    config["trainer"] |= {"max_epochs": 1, "log_every_n_steps": 1}
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(config))
    study(
        monkeypatch,
        *("--config", tmp_path / "cut.yaml", "--seeds", 0, 1, "--out", tmp_path / "out"),
        *("--start", "SFT(learning_rate=1e-3)", "--start_epochs", 2, "--variants", "SPIN", "SFT"),
    )
    output = capsys.readouterr().out
    assert "minus SFT" in output
    for seed in (0, 1):
        start = RunFolder(tmp_path / "out" / f"start-SFT_learning_rate=1e-3-seed{seed}")
        assert start.known_iterates() == [0, 1, 2]
        for variant in ("SPIN", "SFT"):
            run = RunFolder(tmp_path / "out" / f"{variant}-seed{seed}")
            assert run.known_iterates() == [0, 1]
            weights = [
                folder / "adapter_model.safetensors"
                for folder in (run.iterate(0), start.iterate(start.best()))
            ]
            assert weights[0].read_bytes() == weights[1].read_bytes()


def test_last_iterates_and_the_start_are_scored_on_benchmarks(
    tmp_path, monkeypatch, capsys, tiny_model_dir
):
    pytest.importorskip("lm_eval")
    config = {
        "model": {"class_path": "SPIN", "init_args": {"model": str(tiny_model_dir)}},
        "data": {
            "class_path": "SelfPlayDataModule",
            "init_args": {
                "data": str(write_examples(tmp_path / "data.jsonl", 40)),
                "val_examples": 8,
                "max_response_tokens": 8,
            },
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    arguments = (
        *("--config", tmp_path / "tiny.yaml", "--seeds", 0, 1, "--out", tmp_path / "out"),
        *("--start", "SFT", "--start_epochs", 2, "--variants", "SPIN"),
        *("--tasks", write_tasks(tmp_path / "tasks"), "--benchmark.limit", 5),
    )
    study(monkeypatch, *arguments)
    output = capsys.readouterr().out
    assert "[benchmarks] SPIN: p1 of SPIN-seed0" in output
    assert "minus start" in output
    assert "toy_choice/acc" in output
    for seed in (0, 1):
        run = RunFolder(tmp_path / "out" / f"SPIN-seed{seed}")
        start = RunFolder(tmp_path / "out" / f"start-SFT-seed{seed}")
        assert {r.contestant for r in read_results(run)} == {"iterate_001"}
        assert {r.contestant for r in read_results(start)} == {start.iterate(start.best()).name}
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("evaluation/**/*.json")}
    assert len(files) >= 4
    study(monkeypatch, *arguments)
    assert {path: path.stat().st_mtime_ns for path in files} == files, "results are cached"


def test_control_that_is_not_played_is_refused(monkeypatch, tmp_path):
    arguments = ("--config", CONFIG, "--variants", "SPIN", "--control", "SFT", "--out", tmp_path)
    with pytest.raises(SystemExit):
        study(monkeypatch, *arguments)


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
