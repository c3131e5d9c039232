"""`fit` and `validate`, from their arguments to the files they leave."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from spin_lightning.run.folder import RunFolder
from tests.toys.command_line import fit_arguments
from tests.toys.runs import contents


def metrics_rows(root: Path) -> list[dict[str, str]]:
    with (root / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_fit_leaves_config_logs_and_checkpoint_in_the_run_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "checkpoints",
        "config.yaml",
        "conversations.json",
        "data.json",
        "iterates",
        "metrics.csv",
        "progress.json",
        "report",
        "rows",
        "tensorboard",
        "times.json",
        "tokenizer",
    }
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["last.ckpt"]
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["model"]["class_path"] == "spin_lightning.SPIN"
    assert config["model"]["init_args"]["generation"]["unit_size"] == 32
    by_iterate = {
        r["iterate"]: r["val/real_nll_per_token"] for r in metrics_rows(finished) if r["iterate"]
    }
    assert by_iterate.keys() == {"0", "1", "2"}
    assert all(by_iterate.values())


def test_fit_saved_config_alone_repeats_the_run_byte_for_byte(finished, spin, tmp_path):
    config = finished / "config.yaml"
    spin("fit", "--config", config, "--trainer.default_root_dir", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(finished)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the test moved the folder
def test_fit_again_in_a_finished_folder_changes_no_byte_and_keeps_the_log(finished, spin, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    text = (finished / "config.yaml").read_text().replace(str(finished), str(again))
    (again / "config.yaml").write_text(text)
    before = metrics_rows(again)
    spin("fit", "--config", again / "config.yaml")
    assert contents(again) == contents(finished)
    assert metrics_rows(again)[: len(before)] == before
    assert not (again / "config.resumed-1.yaml").exists()
    spin("fit", "--config", again / "config.yaml", "--trainer.max_epochs", "3")
    assert RunFolder(again).known_iterates() == [0, 1, 2, 3]
    assert (
        yaml.safe_load((again / "config.resumed-1.yaml").read_text())["trainer"]["max_epochs"] == 3
    )
    assert len(metrics_rows(again)) > len(before)


def test_fit_resume_never_refuses_a_run_with_exit_code_two(finished, spin, capsys):
    with pytest.raises(SystemExit) as end:
        spin("fit", "--config", finished / "config.yaml", "--resume", "never")
    assert end.value.code == 2
    assert "already holds a run" in capsys.readouterr().err


def test_fit_ckpt_path_last_without_one_is_an_error(spin, tiny_model_dir, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        spin(*fit_arguments(tmp_path, tiny_model_dir, data), "--ckpt_path", "last")
    assert end.value.code == 2
    assert "ckpt_path is last, and there is no" in capsys.readouterr().err


def test_fit_ckpt_path_of_a_file_that_is_not_there_is_an_error(
    spin, tiny_model_dir, data, tmp_path, capsys
):
    with pytest.raises(SystemExit) as end:
        spin(*fit_arguments(tmp_path, tiny_model_dir, data), "--ckpt_path", tmp_path / "x.ckpt")
    assert end.value.code == 2
    assert "x.ckpt': there is no such file" in capsys.readouterr().err


def test_fit_without_a_folder_takes_the_next_one_and_the_users_callbacks_as_they_are(
    spin, tiny_model_dir, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "SPIN-0").mkdir(parents=True)
    arguments = list(map(str, fit_arguments(tmp_path, tiny_model_dir, data)))
    place = arguments.index("--trainer.default_root_dir")
    del arguments[place : place + 2]
    callbacks = ("SelfPlay", "callbacks.best_iterate.BestIterate")
    more = [part for c in callbacks for part in ("--trainer.callbacks+", f"spin_lightning.{c}")]
    more += ["--trainer.callbacks+", "lightning.pytorch.callbacks.ModelCheckpoint"]
    more += ["--trainer.max_epochs", "1", "--data.max_examples", "40", "--trainer.logger", "false"]
    spin(*arguments, *more)
    run = RunFolder(tmp_path / "runs" / "SPIN-1")
    assert run.known_iterates() == [0, 1]
    assert run.best_record() is not None
    assert len(list(run.root.rglob("*.ckpt"))) == 2
    assert not (run.root / "metrics.csv").exists()


def test_fit_other_settings_in_the_same_folder_lists_each_difference(finished, spin, capsys):
    before = contents(finished)
    with pytest.raises(SystemExit) as end:
        spin(
            *("fit", "--config", finished / "config.yaml"),
            *("--model.lora_r", 4, "--data.batch_size", 16, "--model.optimizer", "rmsprop"),
        )
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "batch_size: run has 32, you gave 16" in said
    assert "lora_r: run has None, you gave 4" in said
    assert "optimizer: run has 'adamw', you gave 'rmsprop'" in said
    assert "--trainer.default_root_dir" in said
    assert contents(finished) == before


def test_fit_dry_run_says_rows_tokens_and_time_and_leaves_nothing(
    finished, spin, tiny_model_dir, data, tmp_path, capsys
):
    root = tmp_path / "dry"
    arguments = fit_arguments(root, tiny_model_dir, data)
    spin(*arguments, "--dry_run", "true", "--data.batch_size", 16)
    said = capsys.readouterr().out
    assert "Each of 2 iterates: 114 rows" in said
    assert "Estimated per iterate:" in said
    assert "predicted memory" in said
    assert "training pass of" in said
    assert "decoding 131,072 tokens" in said
    assert not root.exists()
    # So the run itself may have another batch size.
    spin(*arguments)
    assert contents(root) == contents(finished)


def test_fit_dry_run_says_where_memory_is_not_predicted(
    spin, tiny_model_dir, data, tmp_path, capsys
):
    arguments = fit_arguments(tmp_path / "dry", tiny_model_dir, data)
    spin(*arguments, "--dry_run", "true", "--model.packing", "padded")
    assert (
        "No table of memory: memory is not predicted with packing: padded."
        in capsys.readouterr().out
    )


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the test moved the folder
def test_fit_dry_run_in_the_folder_of_a_run_changes_no_file(finished, spin, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    more = ("--trainer.default_root_dir", root, "--dry_run", "true")
    spin("fit", "--config", finished / "config.yaml", *more)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_fit_user_variant_by_import_path_plays(spin, tiny_model_dir, data, tmp_path, monkeypatch):
    (tmp_path / "my_variants.py").write_text(
        '''
from typing import Any
from spin_lightning import Mixture, SelfPlayModule


class DecayingSPIN(SelfPlayModule):
    """Opponent drawn with geometrically decaying weight over past iterates."""

    def __init__(self, decay: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.decay = decay

    def opponent(self, t: int) -> Mixture:
        return Mixture.normalized({k: self.decay ** (t - k) for k in range(t + 1)})

    def reference(self, t: int) -> Mixture:
        return self.opponent(t)
'''
    )
    monkeypatch.chdir(tmp_path)
    arguments = fit_arguments(
        tmp_path / "run", tiny_model_dir, data, "--model", "my_variants.DecayingSPIN"
    )
    spin(*arguments, "--model.decay", "0.25")
    manifest = yaml.safe_load(
        (tmp_path / "run/rows/iterate_001/__about__/manifest.json").read_text()
    )
    assert manifest["opponent"] == pytest.approx({"0": 0.2, "1": 0.8})
    assert manifest["members"] == [0, 1]
    assert manifest["fingerprint_fields"]["decay"] == 0.25


def test_fit_setting_with_a_typo_is_rejected(spin, tiny_model_dir, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        spin(*fit_arguments(tmp_path, tiny_model_dir, data), "--model.betta", "0.1")
    assert end.value.code == 2
    assert "betta" in capsys.readouterr().err


def test_fit_sft_does_not_take_beta(spin, tiny_model_dir, data, tmp_path, capsys):
    arguments = fit_arguments(tmp_path, tiny_model_dir, data, "--model", "SFT")
    with pytest.raises(SystemExit):
        spin(*arguments, "--model.beta", "0.1")
    assert "beta" in capsys.readouterr().err


def test_validate_finished_run_reports_the_held_out_metrics(finished, spin, capsys):
    spin("validate", "--config", finished / "config.yaml")
    assert "val/real_nll_per_token" in capsys.readouterr().out


def test_fit_that_lost_another_process_says_so_in_one_line(spin, monkeypatch, capsys):
    def lose(args):
        raise RuntimeError(
            "[pair.cc:547] Connection closed by peer [127.0.0.1]:4711. There is more."
        )

    monkeypatch.setattr("spin_lightning.cli.fit.SpinCLI", lose)
    with pytest.raises(SystemExit) as end:
        spin("fit")
    assert end.value.code == 1
    told = capsys.readouterr().err
    assert told == "Error: another process of this run failed; see its error message\n"


def test_fit_with_an_error_of_another_kind_keeps_its_traceback(spin, monkeypatch):
    def fail(args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("spin_lightning.cli.fit.SpinCLI", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        spin("fit")


def test_fit_a_whole_number_of_batches_stays_one_whatever_was_imported_before():
    """`limit_val_batches: 1` is one batch, 1.0 all of them."""
    config = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    limits = {"train": "1", "val": "1.0"}
    call = [sys.executable, "-m", "spin_lightning", "fit", "--config", config, "--print_config"]
    for name, value in limits.items():
        call += [f"--trainer.limit_{name}_batches", value]
    printed = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    trainer = yaml.safe_load(printed)["trainer"]
    assert {name: repr(trainer[f"limit_{name}_batches"]) for name in limits} == limits


@pytest.mark.parametrize("name", ["SFT", "SPACE", "SPIN", "AlphaSPIN", "FictitiousSPIN"])
def test_fit_help_of_a_variant_by_its_bare_name(name, spin, capsys):
    with pytest.raises(SystemExit) as end:
        spin("fit", "--model.help", name)
    assert end.value.code == 0
    assert f"Help for --model.help=spin_lightning.{name}" in capsys.readouterr().out
