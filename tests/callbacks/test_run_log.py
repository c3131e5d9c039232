"""metrics.csv and iterate.json of a run that was cut off are those of one that was not."""

import math
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from spin_lightning import SelfPlay
from spin_lightning.callbacks.run_files import RunCSVLogger
from spin_lightning.modules.epoch_loss import EpochLoss
from tests.toys.runs import logged, play, recorded, write_examples

# Two iterates of two epochs, three batches each.
DATA = {"max_examples": 60, "val_examples": 6, "batch_size": 20}


class PowerCut(Exception):
    """Ends a run in the middle."""


class CutAt(Callback):
    """Ends a run in the nth call of one of Lightning's hooks, after SelfPlay's."""

    def __init__(self, hook: str, call: int) -> None:
        def cut(*args: object) -> None:
            self.left -= 1
            if not self.left:
                raise PowerCut

        self.left = call
        setattr(self, hook, cut)


def play_logged(root: Path, model: Path, data: Path, *callbacks: Callback) -> None:
    checkpoint = root / "checkpoints" / "last.ckpt"
    play(
        root,
        model,
        data,
        epochs=4,
        ckpt_path=checkpoint if checkpoint.exists() else None,
        settings={"epochs_per_iterate": 2},
        callbacks=[SelfPlay(checkpoint_steps=1), *callbacks],
        data_settings=DATA,
        trainer_settings={"logger": RunCSVLogger(root)},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl")


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("whole")
    play_logged(root, tiny_model_dir, data)
    return root


@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("on_train_start", 1),
        *(("on_train_batch_end", call) for call in (1, 3, 5, 6, 10, 12)),
        ("on_validation_end", 4),
        ("on_train_epoch_end", 1),
        ("on_train_epoch_end", 2),
        ("on_fit_end", 1),
    ],
)
def test_run_that_is_cut_off_logs_every_line_once(
    hook, call, whole, tiny_model_dir, data, tmp_path
):
    with pytest.raises(PowerCut):
        play_logged(tmp_path, tiny_model_dir, data, CutAt(hook, call))
    play_logged(tmp_path, tiny_model_dir, data)
    assert logged(tmp_path) == logged(whole)
    assert recorded(tmp_path) == recorded(whole)


def test_epoch_loss_is_the_mean_of_its_batches_and_in_the_record(whole):
    lines = logged(whole)
    for epoch in range(4):
        steps = [line for line in lines if line.get("epoch") == str(epoch)]
        losses = [float(line["train/loss"]) for line in steps if "train/loss" in line]
        (mean,) = (float(line["train/loss_epoch"]) for line in steps if "train/loss_epoch" in line)
        # 54 rows: batches of 20, 20 and 14.
        assert mean == pytest.approx((20 * losses[0] + 20 * losses[1] + 14 * losses[2]) / 54)
    last = [float(line["train/loss_epoch"]) for line in lines if "train/loss_epoch" in line]
    assert [record["training"]["loss"] for record in recorded(whole)[1:]] == [
        pytest.approx(last[1]),
        pytest.approx(last[3]),
    ]


def test_epoch_loss_is_logged_before_the_next_rows(whole):
    names = [set(line) for line in logged(whole)]
    ends = [i for i, line in enumerate(names) if "train/loss_epoch" in line]
    measured = [i for i, line in enumerate(names) if "iterate" in line]
    assert ends[1] < measured[1] < ends[2] < ends[3] < measured[2]


class Ranks:
    """A trainer of two ranks, as far as `EpochLoss` uses it."""

    world_size = 2

    def __init__(self, rank: int, totals: list[list[float]]) -> None:
        self.global_rank, self.totals = rank, totals
        self.strategy = self
        self.root_device = torch.device("cpu")

    def all_gather(self, total: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.totals, dtype=torch.float64)


def test_epoch_loss_of_unequal_ranks_is_the_mean_over_rows():
    # Rank 0 has losses 1 and 2 of 4 and 2 rows, rank 1 has loss 3 of 4 rows and a repeated row.
    loss = EpochLoss()
    loss.add(0, torch.tensor(3.0), 4)
    loss.add(0, torch.tensor(9.0), 0)
    assert loss.total.tolist() == [12.0, 4.0]
    trainer = Ranks(1, [[8.0, 6.0], [12.0, 4.0]])
    state = loss.state(trainer)
    assert loss.take(trainer) == 2.0
    assert not loss.has_batches
    resumed = EpochLoss()
    resumed.restore(state, trainer)
    assert resumed.total.tolist() == [12.0, 4.0]
    # One process continues from the sum of both.
    resumed.restore(state, None)
    assert resumed.total.tolist() == [20.0, 10.0]
    resumed.restore(None, None)
    assert resumed.take(L.Trainer(accelerator="cpu", logger=False)) is None


def test_batch_of_another_epoch_starts_a_new_sum():
    loss = EpochLoss()
    loss.add(0, torch.tensor(math.pi), 3)
    loss.add(1, torch.tensor(0.5), 2)
    assert (loss.epoch, loss.total.tolist()) == (1, [1.0, 2.0])


def test_metrics_csv_is_cut_back_and_a_log_of_another_folder_is_not(tmp_path):
    logger = RunCSVLogger(tmp_path)
    for step in range(3):
        logger.log_metrics({"loss": step / 2}, step=step)
    again = RunCSVLogger(tmp_path)
    assert again.lines == 3
    again.cut(1)
    again.log_metrics({"loss": 7.0, "more": 1.0}, step=9)
    assert logged(tmp_path) == [
        {"loss": "0.0", "step": "0"},
        {"loss": "7.0", "more": "1.0", "step": "9"},
    ]
