"""What the first tenth of an iterate was like: which batches count, and a run that was cut off."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from spin_lightning import SFT, SelfPlay
from spin_lightning.callbacks.early import EarlySteps
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import play, write_examples


def session_of(batches: int, epoch: int, epochs: int = 1, **metrics: float) -> SimpleNamespace:
    names = {"accuracy": "train/rewards/accuracies", "loss": "train/loss"}
    values = {names[name]: torch.tensor(value) for name, value in metrics.items()}
    return SimpleNamespace(
        trainer=SimpleNamespace(
            num_training_batches=batches, current_epoch=epoch, callback_metrics=values
        ),
        module=SimpleNamespace(epochs_per_iterate=epochs),
        data=SimpleNamespace(batch_size=8),
    )


def counted(batches: int, epochs: int = 1) -> list[int]:
    """The places, from 1, of the batches of an iterate that count."""
    early, places = EarlySteps(), []
    for epoch in range(epochs):
        for i in range(batches):
            before = early.state_dict()["batches"]
            # The second iterate of the run.
            early.add(session_of(batches, epochs + epoch, epochs), i)
            if early.state_dict()["batches"] > before:
                places.append(epoch * batches + i + 1)
    return places


@pytest.mark.parametrize(
    ("batches", "epochs", "expected"),
    [
        (9, 1, []),
        (10, 1, [1]),
        (20, 1, [2]),
        (60, 1, [4, 5, 6]),
        (69, 1, [4, 5, 6]),
        (6, 4, [2]),
        (30, 2, [4, 5, 6]),
    ],
)
def test_batches_in_the_second_half_of_the_first_tenth_count(batches, epochs, expected):
    assert counted(batches, epochs) == expected


def test_means_of_accuracy_and_loss_by_hand():
    early = EarlySteps()
    assert early.means() is None
    batches = [(0.5, 0.69), (0.5, 0.6), (0.75, 0.5), (1.0, 0.25), (0.0, 9.0)]
    for i, (accuracy, loss) in enumerate(batches):
        early.add(session_of(40, 0, accuracy=accuracy, loss=loss), i)
    # Batches 3 and 4 of 40.
    assert early.means() == {"accuracy": 0.875, "loss": 0.375, "pairs": 16}


def test_next_iterate_starts_again():
    early = EarlySteps()
    for epoch, loss in ((0, 0.5), (1, 0.25)):
        for i in range(20):
            early.add(session_of(20, epoch, loss=loss), i)
    assert early.means() == {"loss": 0.25, "pairs": 8}
    for i in range(9):
        early.add(session_of(9, 2, loss=0.125), i)
    assert early.means() is None


class StopHere(Exception):
    """A crash."""


class CrashAfter(Callback):
    def __init__(self, batches: int) -> None:
        self._left = batches

    def on_train_batch_end(self, *args) -> None:
        self._left -= 1
        if self._left == 0:
            raise StopHere


def test_run_cut_off_in_its_first_tenth_records_the_same(tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "examples.jsonl")
    shape = {"data_settings": {"batch_size": 2}, "epochs": 1}
    play(tmp_path / "whole", tiny_model_dir, data, **shape)
    # 57 batches of 114 rows: 3, 4 and 5 count. The run crashes after batch 4 and its checkpoint.
    callbacks = [SelfPlay(checkpoint_steps=2), CrashAfter(4)]
    with pytest.raises(StopHere):
        play(tmp_path / "cut", tiny_model_dir, data, callbacks=callbacks, **shape)
    run = RunFolder(tmp_path / "cut")
    play(run.root, tiny_model_dir, data, ckpt_path=run.last_checkpoint, **shape)
    early = run.record(1).training.early
    assert early["pairs"] == 6
    assert early == RunFolder(tmp_path / "whole").record(1).training.early


def test_method_without_pairs_records_its_loss(tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "examples.jsonl", count=40)
    settings = {"batch_size": 2}
    play(tmp_path, tiny_model_dir, data, variant=SFT, data_settings=settings, epochs=1)
    run = RunFolder(tmp_path)
    assert run.record(1).training.early.keys() == {"loss", "pairs"}
    record = json.loads((run.iterate(0) / "iterate.json").read_text())
    assert "cues" not in record
    assert not any("tells" in name for name in record["rows"])
