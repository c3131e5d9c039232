"""Training batches with a non-finite loss or log-prob: reported, and skipped up to a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from spin_lightning.modules.trainer_access import datamodule_of
from spin_lightning.policies.base import Policy
from spin_lightning.rows.suspects import (
    all_finite,
    listed,
    suspects_of_batch,
    too_many_skipped,
    write_suspects,
)
from spin_lightning.run.row_folder import about
from spin_lightning.types import PairBatch, PairLogps


def is_non_finite(trainer: L.Trainer, logps: PairLogps, loss: Tensor) -> bool:
    """Whether the loss or a log-prob is NaN or infinite, on this rank or on any other.

    Args:
        trainer: Its ranks all call this function for the same step.
        logps: Log-probs of this rank's batch.
        loss: The objective of this rank's batch.
    """
    here = not all_finite(logps, loss)
    if trainer.world_size == 1:
        return here
    return trainer.strategy.reduce_boolean_decision(here, all=False)


def zero_loss(policy: Policy) -> Tensor:
    """A loss of 0 that depends on every trained weight, so that ranks and steps stay in sync."""
    return torch.stack([p.sum() * 0.0 for _, p in policy.trainable()]).sum()


@dataclass(frozen=True)
class BatchContext:
    """What the report on a batch contains besides its rows.

    Attributes:
        iterate: Index t; p_{t+1} is in training.
        beta: Temperature of the implicit reward.
        decode: Converts token ids to text.
    """

    iterate: int
    beta: float
    decode: Callable[[Sequence[int]], str]


class SkippedBatches:
    """Counts the skipped batches of a run and ends it beyond a limit.

    Args:
        limit: Most batches that may be skipped.

    Attributes:
        count: Batches skipped so far.
    """

    def __init__(self, limit: int) -> None:
        """Start at 0."""
        self.count = 0
        self._limit = limit

    def skip(
        self,
        trainer: L.Trainer,
        batch: PairBatch,
        logps: PairLogps,
        loss: Tensor,
        context: BatchContext,
    ) -> str:
        """Report a batch for which `is_non_finite` holds, and count it. Every rank has to call it.

        Args:
            trainer: The Trainer of the run.
            batch: n pairs.
            logps: Their log-probs.
            loss: The objective.
            context: What the report contains besides the rows.

        Returns:
            A warning for the user.

        Raises:
            NonFiniteError: The limit is exceeded.
        """
        reports = _on_all_ranks(trainer, _report(trainer, batch, logps, loss, context))
        names = listed([name for report in reports for name in report.rows])
        self.count += 1
        problem = (
            f"training iterate {context.iterate + 1}, step {trainer.global_step}: the loss or a "
            f"log-prob is NaN or infinite, in the rows {names}; they are written to "
            f"{', '.join(report.path for report in reports)}"
        )
        if self.count > self._limit:
            raise too_many_skipped(problem)
        return (
            f"WARNING: {problem}. The batch is skipped: {self.count} of at most {self._limit} "
            "(max_skipped_batches)."
        )


@dataclass(frozen=True)
class _Report:
    """Names of the suspect rows of a rank, and the file that holds them."""

    rows: list[str]
    path: str


def _report(
    trainer: L.Trainer, batch: PairBatch, logps: PairLogps, loss: Tensor, context: BatchContext
) -> list[_Report]:
    """Write the suspect rows of this rank's batch to a file; no report if the batch is finite."""
    if all_finite(logps, loss):
        return []
    suspects = suspects_of_batch(batch, logps)
    rank, step = trainer.global_rank, trainer.global_step
    folder = about(datamodule_of(trainer).rows_folder(context.iterate))
    path = folder / f"not_finite-step_{step:06d}-rank_{rank}.json"
    write_suspects(
        path,
        suspects,
        context.decode,
        what=f"training iterate {context.iterate + 1}",
        step=step,
        loss=float(loss.detach()),
        beta=context.beta,
    )
    return [_Report([suspect.name for suspect in suspects], str(path))]


def _on_all_ranks(trainer: L.Trainer, reports: list[_Report]) -> list[_Report]:
    if trainer.world_size == 1:
        return reports
    gathered: list[list[_Report]] = [[] for _ in range(trainer.world_size)]
    dist.all_gather_object(gathered, reports)
    return [report for of_rank in gathered for report in of_rank]
