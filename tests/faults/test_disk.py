"""Disk errors and foreign folders: one error message with a fix."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.fabric.plugins.io.torch_io as torch_io
import pytest
import yaml
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoTokenizer

from spin_lightning import load_iterate
from spin_lightning.callbacks.requirements import check_folder
from spin_lightning.callbacks.run_files import RunCSVLogger
from spin_lightning.cli.main import main
from spin_lightning.errors import RunFolderError
from spin_lightning.policies import tensor_files
from spin_lightning.run.files import append_line
from spin_lightning.run.fingerprint import differences
from spin_lightning.run.folder import RunFolder
from tests.cli.test_fit import fit_arguments
from tests.toys.runs import contents, play, write_examples

GO_ON = "start the same command again: everything that was written before is complete and is used"
CommandLine = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl")


@pytest.fixture
def said(capsys, monkeypatch) -> CommandLine:
    """The message of the command line for arguments that end in an error."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["spin-lightning", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert (error.count("Error: "), "Traceback" in error) == (1, False)
        return " ".join(error.split())

    return run


def start(arguments: list[object]) -> None:
    """Run the command line without an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["spin-lightning", *map(str, arguments)])
        main()


def refusing(number: int) -> Callable[..., Any]:
    """Stands for a call that fails with a disk error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def full_for_safetensors(*args: Any, **kwargs: Any) -> None:
    # What safetensors 0.8 raises; it has no errno.
    raise SafetensorError("I/O error: No space left on device (os error 28)")


# ------------------------------------------------------------------------ every writer of a run

WRITERS = {
    "adapter": ("spin_lightning.policies.tensor_files.save_file", "adapter_model.safetensors"),
    "part": ("pyarrow.parquet.write_table", "part-00000.parquet"),
    "checkpoint": (f"{torch_io.__name__}._atomic_save", "last.ckpt"),
    "metrics": ("lightning.fabric.loggers.csv_logs._ExperimentWriter.save", "metrics.csv"),
    "tensorboard": (f"{SummaryWriter.__module__}.SummaryWriter.add_scalar", "a file"),
    "tokenizer": ("transformers.PreTrainedTokenizerBase.save_pretrained", "tokenizer"),
    "texts": ("spin_lightning.run.files.replace_synced", ""),
}


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space there"),
        (errno.EROFS, "mount it writable, or name another folder"),
    ],
)
@pytest.mark.parametrize("writer", list(WRITERS))
def test_disk_error_is_one_message_and_the_same_command_continues(
    writer, number, advice, said, played, tiny_model_dir, data, tmp_path
):
    target, file = WRITERS[writer]
    arguments = fit_arguments(tmp_path / "run", tiny_model_dir, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, refusing(number))
        message = said(*arguments)
    assert f"{file} cannot be written ({os.strerror(number)})" in message
    assert f"Fix: {advice}" in message
    assert GO_ON in message
    if writer in ("adapter", "checkpoint") and number == errno.ENOSPC:
        start(arguments)
        assert contents(tmp_path / "run") == contents(played)


def test_full_disk_as_safetensors_reports_it_is_one_error(said, tiny_model_dir, data, tmp_path):
    arguments = fit_arguments(tmp_path / "run", tiny_model_dir, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "save_file", full_for_safetensors)
        message = said(*arguments)
    assert "adapter_model.safetensors cannot be written" in message
    assert "Fix: free some space there" in message
    assert RunFolder(tmp_path / "run").known_iterates() == [0]


def test_read_only_folder_is_refused_before_anything_is_made(said, tiny_model_dir, data, tmp_path):
    arguments = fit_arguments(tmp_path / "run", tiny_model_dir, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", refusing(errno.EACCES))
        message = said(*arguments)
    assert "run cannot be written (Permission denied)" in message
    assert "Fix: make it writable, or name another folder" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into any folder")
def test_folder_without_write_permission_is_refused(said, tiny_model_dir, data, tmp_path):
    root = tmp_path / "run"
    root.mkdir(mode=0o555)
    assert "cannot be written" in said(*fit_arguments(root, tiny_model_dir, data))


def test_full_disk_at_a_judges_verdict_and_a_metric_name_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refusing(errno.EDQUOT))
    with pytest.raises(RunFolderError, match=r"verdicts.jsonl cannot .* free some of your quota"):
        append_line(tmp_path / "verdicts.jsonl", {"key": "a"})
    logger = RunCSVLogger(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning.fabric.loggers.csv_logs._ExperimentWriter.save", refusing(28))
        with pytest.raises(RunFolderError, match=r"metrics.csv cannot be written \(No space"):
            logger.log_metrics({"a": 1.0}, step=0)


# ------------------------------------------------------------------------ another run's files


@pytest.fixture(scope="module")
def played(tiny_model_dir, data, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("played") / "run"
    start(fit_arguments(root, tiny_model_dir, data))
    return root


def moved(played: Path, root: Path, **trainer: Any) -> Path:
    """A copy of a run, and a config for it."""
    shutil.copytree(played, root)
    config = yaml.safe_load((root / "config.yaml").read_text())
    config["trainer"] |= {"default_root_dir": str(root), **trainer}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root / "config.yaml"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("seed", [2, 1])
def test_checkpoint_of_another_run_is_refused(seed, said, played, tiny_model_dir, data, tmp_path):
    """It has the same model and adapter, and another seed or other examples."""
    other = tmp_path / "other"
    play(other, tiny_model_dir, data, epochs=2, seed=seed, data_settings={"val_examples": 8})
    config, before = moved(played, tmp_path / "run", max_epochs=3), contents(played)
    last = RunFolder(other).last_checkpoint
    message = said("fit", "--config", config, "--ckpt_path", last)
    assert "the checkpoint continues from iterate 2 of another run" in message
    assert "a different iterate 2" in message
    assert "Fix: name a checkpoint of this run" in message
    assert contents(tmp_path / "run") == before


def test_checkpoint_in_a_folder_without_its_iterates_is_refused(
    said, played, tiny_model_dir, data, tmp_path
):
    arguments = fit_arguments(tmp_path / "run", tiny_model_dir, data)
    message = said(*arguments, "--ckpt_path", RunFolder(played).last_checkpoint)
    assert "continues from iterate 2 of another run" in message
    assert "has no iterate 2" in message


def test_checkpoint_of_another_adapter_is_refused(said, tiny_model_dir, data, tmp_path):
    play(tmp_path / "other", tiny_model_dir, data, epochs=1, settings={"lora_r": 3})
    last = RunFolder(tmp_path / "other").last_checkpoint
    arguments = fit_arguments(tmp_path / "run", tiny_model_dir, data)
    message = said(*arguments, "--ckpt_path", last)
    assert "the checkpoint holds another adapter" in message
    assert "shapes differ" in message
    assert "Fix: use the model and the lora_* settings" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json"])
def test_base_folder_that_was_edited_names_the_file(name, said, tiny_model_dir, data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    play(tmp_path / "run", model, data, epochs=1)
    path = model / name
    if name.endswith(".json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    # (A new process would not have the cached config.)
    message = said(*fit_arguments(tmp_path / "run", model, data), "--trainer.max_epochs=2")
    assert f"base_files.{name}: run has '" in message
    assert message.count("base_files.") == 1
    assert "Fix: set these back, or name a new folder" in message


def test_differences_of_files_are_listed_one_by_one():
    run = {"base_files": {"a": "1", "b": "2"}, "seed": 1}
    given = {"base_files": {"a": "1", "b": "3", "c": "4"}, "seed": 1}
    assert differences(run, given) == [
        "base_files.b: run has '2', you gave '3'",
        "base_files.c: run has None, you gave '4'",
    ]


def test_tokenizer_that_is_not_the_runs_is_refused(said, played, tiny_model_dir, tmp_path):
    root = tmp_path / "run"
    config = moved(played, root, max_epochs=3)
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    tokenizer.add_tokens(["w99"])
    tokenizer.save_pretrained(root / "tokenizer")
    with pytest.raises(RunFolderError, match=r"tokenizer.json has changed since the run wrote it"):
        load_iterate(root, 1)
    message = said("fit", "--config", config)
    assert "tokenizer.json has changed since the run wrote it" in message
    assert "Fix: restore it from a copy of the run" in message


# ------------------------------------------------------------------------ foreign folders


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("train.log", "slurm-7.out", ".git"),
        ("config.yaml", "tensorboard", "metrics.csv"),
        ("iterates/iterate_000", "notes.txt"),
        ("wandb", "lightning_logs"),
    ],
)
def test_folder_of_a_run_or_an_empty_one_is_taken(names, tmp_path):
    for name in names:
        (tmp_path / "run" / name).mkdir(parents=True)
    check_folder(RunFolder(tmp_path / "run"))
    assert (tmp_path / "run").is_dir()


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "config.yaml").touch()
    with pytest.raises(RunFolderError, match="1 other files and folders, such as thesis"):
        check_folder(RunFolder(tmp_path))
