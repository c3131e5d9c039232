"""A step's gradient is the mean over its rows, however they lie in batches, windows and ranks."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from spin_lightning import SFT, SPIN, AlphaSPIN, FictitiousSPIN, MixtureSPIN
from spin_lightning.data.dataset import EpochBatches
from tests.toys.runs import play, write_examples

VARIANTS = {
    "spin": (SPIN, {}),
    "anchored": (SPIN, {"real_nll_weight": 0.5}),
    "alpha": (AlphaSPIN, {"alpha": 0.3}),
    "fictitious": (FictitiousSPIN, {}),
    "mixture": (MixtureSPIN, {}),
    "sft": (SFT, {}),
}


class Gradients(Callback):
    """The gradient of each optimizer step."""

    def __init__(self) -> None:
        self.by_step: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module, optimizer) -> None:
        grads = [p.grad.flatten() for _, p in pl_module.policy.trainable()]
        self.by_step.append(torch.cat(grads).double())


@pytest.mark.parametrize(
    ("rows", "batch_size", "limit", "weights"),
    [
        # 36 rows in batches of 4 and windows of 2: the ninth batch is a window of its own, whose
        # loss Lightning divides by 2.
        (36, 4, 9, [1, 1, 1, 1, 1, 1, 1, 1, 2]),
        # 38 rows: the tenth batch has 2 rows of the 6 in its window, the ninth 4 of them.
        (38, 4, 10, [1, 1, 1, 1, 1, 1, 1, 1, 4 * 2 / 6, 2 * 2 / 6]),
        (32, 4, 8, [1] * 8),
        # Three of its eight batches are used.
        (32, 4, 3, [1, 1, 2]),
        (2, 4, 1, [2]),
    ],
)
def test_window_share_by_hand(rows, batch_size, limit, weights):
    batches = EpochBatches(rows, batch_size)
    found = [batches.window_share(i, 2, limit) for i in range(limit)]
    assert found == pytest.approx(weights, abs=1e-12)


@pytest.mark.parametrize("rows", [36, 37, 41, 5])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_weights_of_ranks_and_windows_together_give_each_row_the_same_weight(rows, accumulate):
    """A row's weight is 1 / (rows of its step): rank mean, mean of ranks, then the window."""
    world, size = 2, 3
    ranks = [EpochBatches(rows, size, rank=rank, world_size=world) for rank in range(world)]
    count = len(ranks[0])
    for first in range(0, count, accumulate):
        step = range(first, min(first + accumulate, count))
        in_step = sum(min(size * world, rows - i * size * world) for i in step)
        for i in step:
            for rank in ranks:
                there = len(range(rank.rank, min(size * world, rows - i * 6), world))
                if there:
                    weight = rank.share(i) * rank.window_share(i, accumulate, count)
                    assert weight / accumulate / world / there == pytest.approx(1 / in_step)


@pytest.mark.parametrize("examples", [36, 38])
@pytest.mark.parametrize("name", VARIANTS)
def test_accumulation_with_an_odd_last_window_equals_the_full_batch(
    name, examples, tiny_model_dir, tmp_path
):
    variant, settings = VARIANTS[name]
    data = write_examples(tmp_path / "data.jsonl", count=examples)

    def gradients(root: Path, batch_size: int, accumulate: int) -> list[torch.Tensor]:
        found = Gradients()
        play(
            root,
            tiny_model_dir,
            data,
            variant=variant,
            epochs=1,
            callbacks=[found],
            settings=settings,
            data_settings={"batch_size": batch_size, "val_fraction": 0.0},
            trainer_settings={"accumulate_grad_batches": accumulate},
        )
        return found.by_step

    whole = gradients(tmp_path / "whole", 8, 1)
    parts = gradients(tmp_path / "parts", 4, 2)
    assert len(whole) == len(parts) == 5
    for one, other in zip(whole, parts, strict=True):
        # Later steps start from weights that differ by Adam's reaction to rounding.
        assert torch.linalg.norm(one - other) < 1e-2 * torch.linalg.norm(one)
