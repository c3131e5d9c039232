"""Six ways to end an epoch early: the iterate is not kept, and the same command goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer

from spin_lightning import BestIterate, SelfPlay
from spin_lightning.errors import RunFolderError, SettingError, SpinError
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import contents, play, write_examples

# 96 rows: six batches of 16 in an epoch.
DATA = {"batch_size": 16, "max_examples": 102, "val_examples": 6}


class At(Callback):
    """Does something at the end of the n-th batch of the run, before or after `SelfPlay`."""

    def __init__(self, batch: int, act: Any) -> None:
        self.left, self.act = batch, act

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.act(trainer)


class SkipRest(Callback):
    """Ends an epoch as Lightning offers it, by -1."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> int | None:
        self.left -= 1
        return -1 if self.left < 0 else None


class TimeIsUp(Timer):
    """`max_time` that ends after a number of batches instead of minutes."""

    def __init__(self, batch: int) -> None:
        super().__init__("00:01:00:00")
        self.left = batch

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left <= 0:
            self._duration = 0.0
        super().on_train_batch_end(trainer, *args, **kwargs)


class LossStopped(EarlyStopping):
    """Early stopping on a training metric, checked in every batch."""

    def __init__(self, batch: int) -> None:
        super().__init__("train/loss", stopping_threshold=1e9, check_on_train_epoch_end=False)
        self.left = batch

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self._run_early_stopping_check(trainer)


def stop(trainer: L.Trainer) -> None:
    trainer.should_stop = True


def raise_(error: BaseException) -> Any:
    def act(trainer: L.Trainer) -> None:
        raise error

    return act


# By name: the callbacks, and what `fit` raises.
ENDINGS: dict[str, Any] = {
    "max_time": (lambda n: [TimeIsUp(n)], None),
    "should_stop": (lambda n: [At(n, stop)], None),
    "should_stop_after_the_loop": (lambda n: [SelfPlay(), At(n, stop)], None),
    "early_stopping": (lambda n: [LossStopped(n)], None),
    "keyboard_interrupt": (lambda n: [At(n, raise_(KeyboardInterrupt()))], SystemExit),
    "exception": (lambda n: [At(n, raise_(RuntimeError("power")))], RuntimeError),
    "minus_one": (lambda n: [SkipRest(n)], SpinError),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture(scope="module")
def wholes(tiny_model_dir, data, tmp_path_factory) -> dict[int, dict[str, str]]:
    """Files of runs of two iterates without interruption, by epochs per iterate."""
    found = {}
    for epochs in (1, 2):
        root = tmp_path_factory.mktemp("whole")
        run_fit(root, tiny_model_dir, data, epochs)
        found[epochs] = contents(root)
    return found


def run_fit(root: Path, model: Path, data: Path, epochs: int, **settings: Any) -> Any:
    return play(
        root,
        model,
        data,
        epochs=2 * epochs,
        data_settings=DATA,
        settings={"epochs_per_iterate": epochs},
        **settings,
    )


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("batch", [3, 9])
def test_iterate_whose_epoch_ends_early_is_not_kept_and_is_finished_by_the_same_command(
    batch, ending, epochs, wholes, tiny_model_dir, data, tmp_path
):
    """Batch 3 is in the first epoch, 9 in the second: of iterate 2, or again of iterate 1."""
    make, error = ENDINGS[ending]
    kept = [0, 1] if batch > 6 and epochs == 1 else [0]
    if error is None:
        run_fit(tmp_path, tiny_model_dir, data, epochs, callbacks=make(batch))
    else:
        with pytest.raises(error):
            run_fit(tmp_path, tiny_model_dir, data, epochs, callbacks=make(batch))
    run = RunFolder(tmp_path)
    assert run.known_iterates() == kept
    last = run.last_checkpoint
    if error is None:
        assert torch.load(last, weights_only=True)["global_step"] == batch
    run_fit(tmp_path, tiny_model_dir, data, epochs, ckpt_path=last if last.exists() else None)
    assert run.known_iterates() == [0, 1, 2]
    assert contents(tmp_path) == wholes[epochs]


def test_limit_that_changed_is_refused_before_training_goes_on(tiny_model_dir, data, tmp_path):
    run_fit(tmp_path, tiny_model_dir, data, 1, callbacks=[At(3, stop)])
    with pytest.raises(RunFolderError, match=r"limit_train_batches: run has 1\.0, you gave 0\.5"):
        run_fit(
            tmp_path,
            tiny_model_dir,
            data,
            1,
            ckpt_path=RunFolder(tmp_path).last_checkpoint,
            trainer_settings={"limit_train_batches": 0.5},
        )


@pytest.mark.parametrize("batch", [3, 4])
def test_stop_inside_an_accumulation_is_continued_as_well(batch, tiny_model_dir, data, tmp_path):
    settings = {"trainer_settings": {"accumulate_grad_batches": 2}}
    run_fit(tmp_path / "whole", tiny_model_dir, data, 1, **settings)
    root = tmp_path / "parts"
    run_fit(root, tiny_model_dir, data, 1, callbacks=[At(batch, stop)], **settings)
    assert RunFolder(root).known_iterates() == [0]
    last = RunFolder(root).last_checkpoint
    run_fit(root, tiny_model_dir, data, 1, ckpt_path=last, **settings)
    assert contents(root) == contents(tmp_path / "whole")


def test_stop_at_the_end_of_an_iterate_keeps_it(tiny_model_dir, data, tmp_path):
    run_fit(tmp_path, tiny_model_dir, data, 1, callbacks=[At(6, stop)])
    assert RunFolder(tmp_path).known_iterates() == [0, 1]


def test_patience_still_stops_at_the_end_of_an_iterate(tiny_model_dir, data, tmp_path):
    guard = BestIterate("val/real_nll_per_token", mode="max", patience=1)
    run_fit(tmp_path, tiny_model_dir, data, 1, callbacks=[guard])
    assert RunFolder(tmp_path).known_iterates() == [0, 1]


# ------------------------------------------------------------------------------ a second fit


@pytest.mark.parametrize("ending", [None, "keyboard_interrupt", "exception"])
def test_second_fit_of_a_module_starts_from_its_settings(
    ending, wholes, tiny_model_dir, data, tmp_path
):
    make, error = ENDINGS[ending] if ending else (lambda n: [], None)
    module, datamodule = build(tiny_model_dir, data)
    first = trainer_in(tmp_path / "first", make(9))
    if error is None:
        first.fit(module, datamodule)
    else:
        with pytest.raises(error):
            first.fit(module, datamodule)
    trainer_in(tmp_path / "second").fit(module, datamodule)
    assert contents(tmp_path / "second") == wholes[1]


def test_second_fit_of_a_module_continues_the_run_from_its_checkpoint(
    wholes, tiny_model_dir, data, tmp_path
):
    module, datamodule = build(tiny_model_dir, data)
    with pytest.raises(RuntimeError):
        trainer_in(tmp_path, ENDINGS["exception"][0](9)).fit(module, datamodule)
    last = RunFolder(tmp_path).last_checkpoint
    trainer_in(tmp_path).fit(module, datamodule, ckpt_path=last, weights_only=True)
    assert contents(tmp_path) == wholes[1]


def test_second_fit_of_a_trainer_is_refused_with_the_reason(tiny_model_dir, data, tmp_path):
    module, datamodule = build(tiny_model_dir, data)
    trainer = trainer_in(tmp_path)
    trainer.fit(module, datamodule)
    with pytest.raises(SettingError, match=r"trainer=.*earlier fit.*epoch 2 of 2.*new Trainer"):
        trainer.fit(module, datamodule)


def build(model: Path, data: Path) -> tuple[Any, Any]:
    from spin_lightning import SPIN, SelfPlayDataModule

    L.seed_everything(1, verbose=False)
    module = SPIN(str(model), learning_rate=3e-3, generation={"unit_size": 32})
    return module, SelfPlayDataModule(str(data), max_response_tokens=8, **DATA)


def trainer_in(root: Path, callbacks: Any = ()) -> L.Trainer:
    return L.Trainer(
        max_epochs=2,
        default_root_dir=root,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        logger=False,
        callbacks=list(callbacks),
    )
