"""Metrics and samples of a run, read back from the files of its loggers."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spin_lightning.callbacks.interfaces import IterateEvaluator
from spin_lightning.callbacks.log_origin import git_commit
from spin_lightning.callbacks.run_files import ConfigFile, RunCSVLogger
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import play, write_examples


class Fixed(IterateEvaluator):
    """An evaluator with fixed scores."""

    def evaluate_iterate(self, module, t):
        return {"lm_eval/task/acc": 0.25 * (t + 1)}


def play_with(logger, root: Path, model: Path) -> RunFolder:
    data = write_examples(root / "examples.jsonl")
    play(root / "run", model, data, callbacks=[Fixed()], trainer_settings={"logger": logger})
    return RunFolder(root / "run")


def recorded(run: RunFolder, name: str) -> dict[int, float]:
    return {record.step: record.metrics[name] for record in run.records()}


def test_tensorboard_has_every_iterates_metrics_and_samples(tiny_model_dir, tmp_path):
    run = play_with(TensorBoardLogger(tmp_path, name="tb", version=""), tmp_path, tiny_model_dir)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    for name in ("val/real_nll_per_token", "val/kl_base", "lm_eval/task/acc"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        for step, value in recorded(run, name).items():
            assert logged[step] == pytest.approx(value, rel=1e-6)
    texts = {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("samples/text_summary")
    }
    assert sorted(texts) == sorted(recorded(run, "val/kl_base"))
    head, rule, first, *_ = texts[0].splitlines()
    assert (head, rule) == ("| prompt | real | generated |", "| --- | --- | --- |")
    assert "&lt;/s>" in first
    tells = {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("tells/text_summary")
    }
    rows = {record.step: record.rows for record in run.records() if record.rows}
    assert sorted(tells) == sorted(rows)
    assert tells[0].startswith("| side | text | real | generated | log-odds | z |\n")
    logged = {event.step: event.value for event in events.Scalars("rows/tells/best")}
    assert logged == pytest.approx({step: r["rows/tells/best"] for step, r in rows.items()})


def test_csv_has_every_iterates_metrics(tiny_model_dir, tmp_path):
    run = play_with(RunCSVLogger(tmp_path / "csv"), tmp_path, tiny_model_dir)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("val/kl_base", "lm_eval/task/acc"):
        logged = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert logged == pytest.approx(recorded(run, name))


def test_wandb_offline_has_metrics_and_a_table_of_samples(tiny_model_dir, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_SILENT", "WANDB_DISABLE_GIT", "WANDB_DISABLE_CODE"):
        monkeypatch.setenv(name, "true")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    run = play_with(logger, tmp_path, tiny_model_dir)
    summary = dict(logger.experiment.summary)
    wandb.finish()
    last = max(run.known_iterates())
    metrics = run.record(last).metrics
    assert summary["lm_eval/task/acc"] == pytest.approx(0.25 * (last + 1))
    assert summary["val/kl_base"] == pytest.approx(metrics["val/kl_base"])
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))
    tables = sorted(offline.rglob("samples*.table.json"))
    assert len(tables) == len(run.known_iterates())
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["prompt", "real", "generated"]
    assert len(table["data"]) > 3
    assert sorted(offline.rglob("tells*.table.json"))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A W&B logger without a network."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_SILENT", "WANDB_DISABLE_GIT", "WANDB_DISABLE_CODE"):
        monkeypatch.setenv(name, "true")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    yield WandbLogger(save_dir=tmp_path, offline=True)
    wandb.finish()


def test_wandb_and_tensorboard_have_the_same_names_and_lead_back_to_the_run(
    offline, tiny_model_dir, tmp_path, monkeypatch
):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("c0ffee" + "0" * 34 + "\n")
    monkeypatch.chdir(tmp_path)
    board = TensorBoardLogger(tmp_path, name="tb", version="", default_hp_metric=False)
    config = ConfigFile(tmp_path / "run", "model: {beta: 0.25}\napi_key: abc123\n")
    data = write_examples(tmp_path / "examples.jsonl")
    play(
        tmp_path / "run",
        tiny_model_dir,
        data,
        callbacks=[Fixed(), config],
        trainer_settings={"logger": [board, offline]},
    )
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tables = {"samples", "tells", "run/origin", "run/config"}
    assert {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]} == tables
    theirs = {key for key in dict(offline.experiment.summary) if not key.startswith("_")}
    own_of_lightning = {"trainer/global_step"}
    assert theirs - tables - own_of_lightning == set(events.Tags()["scalars"])
    assert {"val/kl_base", "train/loss", "rows/tells/best", "speed/share_training"} <= theirs
    assert {key.partition("/")[0] for key in theirs - tables - own_of_lightning} == {
        *("train", "val", "rows", "speed", "lm_eval", "iterate", "epoch")
    }
    found = dict(offline.experiment.config)
    assert found["run/folder"] == str((tmp_path / "run").resolve())
    assert found["run/commit"] == "c0ffee" + "0" * 34
    kept = yaml.safe_load((tmp_path / "tb" / "hparams.yaml").read_text())
    assert kept["run/folder"] == found["run/folder"]
    (event,) = events.Tensors("run/config/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert "| model.beta | 0.25 |" in text
    assert "abc123" not in text


@pytest.mark.parametrize("packed", [False, True])
def test_commit_is_read_in_a_branch_and_in_a_worktree(packed, tmp_path):
    assert git_commit(tmp_path) is None
    main = tmp_path / "main" / ".git"
    (main / "refs/heads").mkdir(parents=True)
    (main / "HEAD").write_text("ref: refs/heads/work\n")
    commit = "ab" * 20
    if packed:
        (main / "packed-refs").write_text(
            f"# pack-refs\n{'0' * 40} refs/heads/x\n{commit} refs/heads/work\n"
        )
    else:
        (main / "refs/heads/work").write_text(f"{commit}\n")
    (tmp_path / "main" / "deeper").mkdir()
    assert git_commit(tmp_path / "main" / "deeper") == commit
    tree = main / "worktrees" / "tree"
    tree.mkdir(parents=True)
    (tree / "HEAD").write_text("ref: refs/heads/work\n")
    (tree / "commondir").write_text("../..\n")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / ".git").write_text(f"gitdir: {tree}\n")
    assert git_commit(tmp_path / "tree") == commit


def test_metrics_csv_with_a_torn_line_loses_that_line_alone(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("loss,step\n0.5,1\n0.2")
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.25}, step=2)
    logger.save()
    lines = file.read_text().splitlines()
    assert list(csv.DictReader(lines)) == [
        {"loss": "0.5", "step": "1"},
        {"loss": "0.25", "step": "2"},
    ]
