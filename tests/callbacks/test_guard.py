"""When checkpoints are written, and how a signal ends a run."""

import os
import signal
import threading

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from spin_lightning import SelfPlay
from spin_lightning.callbacks.guard import STOPPED, Stopped
from spin_lightning.errors import SettingError
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.lock import LOCK_FILE
from tests.toys.runs import contents, play, write_examples


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl")


@pytest.fixture(scope="module")
def whole(tiny_model_dir, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    play(root, tiny_model_dir, data)
    return contents(root)


class Watch(Callback):
    """The step of `last.ckpt` at the start of each batch."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.saved: list[int | None] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        last = self.run.last_checkpoint
        state = torch.load(last, weights_only=True) if last.exists() else {}
        self.saved.append(state.get("global_step"))


class SignalAt(Callback):
    """Sends this process a SIGTERM at one call of a hook."""

    def __init__(self, hook: str, call: int) -> None:
        self.left = call
        setattr(self, hook, self._send)

    def _send(self, *args, **kwargs) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("intervals", "saved"),
    [
        # Two iterates of four steps; a checkpoint at the end of each in any case.
        ({"checkpoint_minutes": None}, [None, None, None, None, 4, 4, 4, 4]),
        ({"checkpoint_minutes": None, "checkpoint_steps": 3}, [None, None, None, 3, 4, 4, 4, 7]),
        ({"checkpoint_minutes": 1e-9}, [None, 1, 2, 3, 4, 5, 6, 7]),
        ({}, [None, None, None, None, 4, 4, 4, 4]),
    ],
)
def test_checkpoint_is_written_after_steps_or_minutes(
    intervals, saved, tiny_model_dir, data, tmp_path
):
    watch = Watch(RunFolder(tmp_path))
    play(tmp_path, tiny_model_dir, data, callbacks=[SelfPlay(pairs_shown=0, **intervals), watch])
    assert watch.saved == saved


@pytest.mark.parametrize("name", ["checkpoint_minutes", "checkpoint_steps"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_interval_that_is_not_positive_is_refused(name, value):
    with pytest.raises(SettingError, match=rf"{name}=.*Fix: give more than 0"):
        SelfPlay(**{name: value})


@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("setup", 1),  # before the first row
        ("on_train_batch_start", 2),
        ("on_train_batch_end", 7),
        ("on_validation_end", 3),
        ("on_train_epoch_end", 1),  # before the rows of the next iterate
    ],
)
def test_sigterm_saves_ends_with_143_and_the_same_start_continues(
    hook, call, whole, tiny_model_dir, data, tmp_path
):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as end:
        play(tmp_path, tiny_model_dir, data, callbacks=[SelfPlay(), SignalAt(hook, call)])
    assert end.value.code == STOPPED == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / LOCK_FILE).exists()
    last = RunFolder(tmp_path).last_checkpoint
    play(tmp_path, tiny_model_dir, data, ckpt_path=last if last.exists() else None)
    assert contents(tmp_path) == whole


def test_sigterm_reaches_the_handler_installed_before(tiny_model_dir, data, tmp_path):
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
    try:
        with pytest.raises(Stopped):
            play(tmp_path, tiny_model_dir, data, callbacks=[SignalAt("on_train_batch_start", 2)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_run_in_another_thread_than_the_main_one_plays_without_its_signals(
    whole, tiny_model_dir, data, tmp_path
):
    before, failed = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        try:
            play(tmp_path, tiny_model_dir, data)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed
    assert signal.getsignal(signal.SIGTERM) is before
    assert contents(tmp_path) == whole
