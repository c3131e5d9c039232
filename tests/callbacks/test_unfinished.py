"""Six ways to end an epoch early: the iterate is not kept, and the same command goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer
from lightning.pytorch.trainer.states import RunningStage

from spin_lightning import SPIN, BestIterate, SelfPlay, SelfPlayDataModule
from spin_lightning.callbacks.run_files import RunCSVLogger
from spin_lightning.errors import RunFolderError, SettingError, SpinError
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import contents, logged, play, quiet_trainer, recorded, write_examples
from tests.toys.stopping import At, StopAfter

# 96 rows: six batches of 16 in an epoch.
DATA = {"batch_size": 16, "max_examples": 102, "val_examples": 6}


class SkipRest(Callback):
    """Ends an epoch before a batch, as Lightning allows."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def on_train_batch_start(self, *args: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise StopIteration


class SkippingSPIN(SPIN):
    """Ends its second epoch before batch 3 by -1."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 1 and batch_idx == 3 else None


class TimeIsUp(Timer):
    """`max_time` whose clock jumps ahead after a number of batches of this start."""

    def __init__(self, batch: int) -> None:
        super().__init__("00:01:00:00")
        self.left = batch

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if not self.left:
            self._start_time[RunningStage.TRAINING] -= 3601
        super().on_train_batch_end(trainer, *args, **kwargs)


def raise_(error: BaseException) -> Any:
    def act(trainer: L.Trainer) -> None:
        raise error

    return act


# By name: the callbacks, and what `fit` raises.
ENDINGS: dict[str, Any] = {
    "max_time": (lambda n: [TimeIsUp(n)], None),
    "should_stop": (lambda n: [StopAfter(n)], None),
    "should_stop_after_the_loop": (lambda n: [SelfPlay(), StopAfter(n)], None),
    "keyboard_interrupt": (lambda n: [At(n, raise_(KeyboardInterrupt()))], SystemExit),
    "exception": (lambda n: [At(n, raise_(RuntimeError("power")))], RuntimeError),
    "stop_iteration": (lambda n: [SkipRest(n)], SpinError),
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


@pytest.mark.parametrize(("batch", "epochs"), [(3, 1), (9, 1), (9, 2)])
@pytest.mark.parametrize("ending", ENDINGS)
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


def test_rest_of_an_epoch_skipped_by_minus_one_is_refused(wholes, tiny_model_dir, data, tmp_path):
    with pytest.raises(SpinError, match=r"after 3 of 6 batches of an epoch of iterate 2.*-1"):
        run_fit(tmp_path, tiny_model_dir, data, 1, variant=SkippingSPIN)
    assert RunFolder(tmp_path).known_iterates() == [0, 1]


def test_max_time_counts_from_each_start(wholes, tiny_model_dir, data, tmp_path):
    """A job of a queue with a time limit gets on by five batches in each of its starts."""
    last = RunFolder(tmp_path).last_checkpoint
    kept = []
    for _ in range(3):
        checkpoint = last if last.exists() else None
        run_fit(tmp_path, tiny_model_dir, data, 1, ckpt_path=checkpoint, callbacks=[TimeIsUp(5)])
        kept.append(RunFolder(tmp_path).known_iterates()[-1])
    assert kept == [0, 1, 2]
    assert contents(tmp_path) == wholes[1]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_early_stopping_within_an_epoch(wholes, tiny_model_dir, data, tmp_path):
    """Validations of p0 and after batch 3: the second is lower, which is no gain here."""
    impatient = EarlyStopping("val/loss", mode="max", patience=1, check_on_train_epoch_end=False)
    often = {"trainer_settings": {"val_check_interval": 3}}
    run_fit(tmp_path, tiny_model_dir, data, 1, callbacks=[impatient], **often)
    last = RunFolder(tmp_path).last_checkpoint
    assert RunFolder(tmp_path).known_iterates() == [0]
    assert torch.load(last, weights_only=True)["global_step"] == 3
    run_fit(tmp_path, tiny_model_dir, data, 1, ckpt_path=last, **often)
    assert contents(tmp_path) == wholes[1]


@pytest.mark.parametrize("batch", [2, 3, 5, 6, 8, 9])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_metrics_of_a_run_that_was_stopped_are_those_of_one_that_was_not(
    batch, accumulated, tiny_model_dir, data, tmp_path
):
    """Lightning validates when it stops; that line is the only one more."""

    def fit(root: Path, *callbacks: Callback) -> None:
        last = RunFolder(root).last_checkpoint
        run_fit(
            root,
            tiny_model_dir,
            data,
            1,
            ckpt_path=last if last.exists() else None,
            callbacks=callbacks,
            trainer_settings={
                "logger": RunCSVLogger(root),
                "val_check_interval": 3,
                "accumulate_grad_batches": accumulated,
            },
        )

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole)
    fit(parts, StopAfter(batch))
    fit(parts)
    lines = logged(parts)
    more = [line for line in lines if line not in logged(whole)]
    assert [("val/loss" in line, "train/loss" in line) for line in more] == (
        [] if batch % 3 == 0 else [(True, False)]
    )
    assert [line for line in lines if line not in more] == logged(whole)
    assert recorded(parts) == recorded(whole)
    assert contents(parts) == contents(whole)


def test_limit_that_changed_is_refused_before_training_goes_on(tiny_model_dir, data, tmp_path):
    run_fit(tmp_path, tiny_model_dir, data, 1, callbacks=[StopAfter(3)])
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
    run_fit(root, tiny_model_dir, data, 1, callbacks=[StopAfter(batch)], **settings)
    assert RunFolder(root).known_iterates() == [0]
    last = RunFolder(root).last_checkpoint
    run_fit(root, tiny_model_dir, data, 1, ckpt_path=last, **settings)
    assert contents(root) == contents(tmp_path / "whole")


def test_stop_at_the_end_of_an_iterate_keeps_it(tiny_model_dir, data, tmp_path):
    run_fit(tmp_path, tiny_model_dir, data, 1, callbacks=[StopAfter(6)])
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
    first = quiet_trainer(tmp_path / "first", callbacks=make(9))
    if error is None:
        first.fit(module, datamodule)
    else:
        with pytest.raises(error):
            first.fit(module, datamodule)
    quiet_trainer(tmp_path / "second").fit(module, datamodule)
    assert contents(tmp_path / "second") == wholes[1]


def test_second_fit_of_a_module_continues_the_run_from_its_checkpoint(
    wholes, tiny_model_dir, data, tmp_path
):
    module, datamodule = build(tiny_model_dir, data)
    with pytest.raises(RuntimeError):
        quiet_trainer(tmp_path, callbacks=ENDINGS["exception"][0](9)).fit(module, datamodule)
    last = RunFolder(tmp_path).last_checkpoint
    quiet_trainer(tmp_path).fit(module, datamodule, ckpt_path=last, weights_only=True)
    assert contents(tmp_path) == wholes[1]


def test_second_fit_with_the_same_callback_writes_into_its_own_folder(
    wholes, tiny_model_dir, data, tmp_path
):
    module, datamodule = build(tiny_model_dir, data)
    callback = SelfPlay()
    for name in ("first", "second"):
        quiet_trainer(tmp_path / name, callbacks=[callback]).fit(module, datamodule)
    assert contents(tmp_path / "first") == contents(tmp_path / "second") == wholes[1]


@pytest.mark.parametrize("ending", [None, "should_stop", "keyboard_interrupt", "exception"])
def test_second_fit_of_a_trainer_is_refused_with_the_reason(
    ending, tiny_model_dir, data, tmp_path, monkeypatch
):
    """As in a notebook whose cell builds nothing, but trains; without a folder of its own."""
    monkeypatch.chdir(tmp_path)
    make, error = ENDINGS[ending] if ending else (lambda n: [], None)
    module, datamodule = build(tiny_model_dir, data)
    trainer = quiet_trainer(None, callbacks=make(9))
    if error is None:
        trainer.fit(module, datamodule)
    else:
        with pytest.raises(error):
            trainer.fit(module, datamodule)
    with pytest.raises(SettingError, match=r"trainer=.*fit before, to epoch [12] of 2.*new Train"):
        trainer.fit(module, datamodule)
    assert [path.name for path in Path("runs").iterdir()] == ["SPIN-0"]


def build(model: Path, data: Path) -> tuple[Any, Any]:
    L.seed_everything(1, verbose=False)
    module = SPIN(str(model), learning_rate=3e-3, generation={"unit_size": 32})
    return module, SelfPlayDataModule(str(data), max_response_tokens=8, **DATA)
