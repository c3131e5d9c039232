"""Gradient accumulation: the run saves between steps; other checkpoints hold half a step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from spin_lightning import SelfPlay
from spin_lightning.callbacks.guard import Stopped
from spin_lightning.errors import RunFolderError
from spin_lightning.run.folder import RunFolder
from tests.callbacks.test_guard import SignalAt
from tests.callbacks.test_self_play import CrashAt, KeepCheckpoints, LearningRates, StopHere
from tests.toys.runs import contents, play, write_examples

# 93 rows: six batches of 16 or less, three steps of two batches; twice over.
SETTINGS = {
    "data_settings": {"max_examples": 99, "val_examples": 6, "batch_size": 16},
    "trainer_settings": {"accumulate_grad_batches": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl")


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Checkpoints of every batch of a run without interruption."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def whole(kept, tiny_model_dir, data, tmp_path_factory):
    root, rates = tmp_path_factory.mktemp("whole"), LearningRates()
    play(root, tiny_model_dir, data, callbacks=[rates, KeepCheckpoints(kept)], **SETTINGS)
    assert list(rates.by_step) == list(range(6))
    return root, contents(root), rates.by_step


def resume(root: Path, model: Path, data: Path, checkpoint: Path | None = None):
    rates, last = LearningRates(), checkpoint or RunFolder(root).last_checkpoint
    play(root, model, data, ckpt_path=last, callbacks=[rates], **SETTINGS)
    return rates.by_step


@pytest.mark.parametrize("batch", range(2, 13))
def test_crash_at_any_batch_then_resume_gives_the_same_bytes_and_rates(
    batch, whole, tiny_model_dir, data, tmp_path
):
    """Before the checkpoint of the batch is written, so the one before is used."""
    guard = SelfPlay(pairs_shown=0, checkpoint_steps=1)
    crash = CrashAt("on_train_batch_end", count=batch)
    with pytest.raises(StopHere):
        play(tmp_path, tiny_model_dir, data, callbacks=[crash, guard], **SETTINGS)
    last = RunFolder(tmp_path).last_checkpoint
    saved = (batch - 1) // 2
    if not saved:
        assert not last.exists()
        return
    assert torch.load(last, weights_only=True)["global_step"] == saved
    rates = resume(tmp_path, tiny_model_dir, data)
    _, files, all_rates = whole
    assert contents(tmp_path) == files
    assert rates == {step: rate for step, rate in all_rates.items() if step >= saved}


def test_sigterm_inside_an_accumulation_waits_for_its_step(whole, tiny_model_dir, data, tmp_path):
    stop = SignalAt("on_train_batch_end", 3)
    with pytest.raises(Stopped):
        play(tmp_path, tiny_model_dir, data, callbacks=[stop], **SETTINGS)
    last = torch.load(RunFolder(tmp_path).last_checkpoint, weights_only=True)
    assert last["global_step"] == 2
    resume(tmp_path, tiny_model_dir, data)
    assert contents(tmp_path) == whole[1]


@pytest.mark.parametrize("batch", range(6))
def test_checkpoint_of_any_batch_holds_the_gradients_of_a_half_done_step(
    batch, whole, kept, tiny_model_dir, data, tmp_path
):
    checkpoint = kept / f"batch-0-{batch}.ckpt"
    gradients = torch.load(checkpoint, weights_only=True)["self_play"]["gradients"]
    # After batches 0, 2 and 4 a step is half done.
    assert bool(gradients) == (batch % 2 == 0)
    root, files, all_rates = whole
    again = tmp_path / "again"
    shutil.copytree(root, again)
    # Everything after the checkpoint is made again from scratch.
    RunFolder(again).discard_after(0)
    rates = resume(again, tiny_model_dir, data, checkpoint)
    assert contents(again) == files
    assert rates == {step: rate for step, rate in all_rates.items() if step >= (batch + 1) // 2}


def test_checkpoint_inside_a_step_of_several_processes_is_refused(
    whole, kept, tiny_model_dir, data, tmp_path
):
    content = torch.load(kept / "batch-0-0.ckpt", weights_only=True)
    content["self_play"]["gradients"] = None
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(RunFolderError, match=r"several processes accumulated.*last\.ckpt"):
        resume(tmp_path / "run", tiny_model_dir, data, tmp_path / "other.ckpt")
