"""The rows of an iterate as a data set, in an order that depends on the seed and the epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from spin_lightning import keyed
from spin_lightning.errors import RunFolderError
from spin_lightning.rows.store import RowTable
from spin_lightning.types import Density, PairBatch


class Pair(NamedTuple):
    """One row as training uses it; what a method does not use is empty."""

    prompt_ids: NDArray[np.int32]
    real_ids: NDArray[np.int32]
    generated_ids: NDArray[np.int32]
    reference_real: float
    reference_generated: float
    example_id: int = -1
    sample: int = -1
    first_ids: NDArray[np.int32] = np.empty(0, dtype=np.int32)
    further_real: tuple[float, ...] = ()
    further_generated: tuple[float, ...] = ()


class PairDataset(Dataset[Pair]):
    """Rows with the references' log-probs, computed once from those of their members.

    Args:
        table: The rows.
        reference: The denominator of log-ratios. Its log-probs are NaN for rows that store none.
        further: Further references.
        first: The rows of iterate 0, whose responses become part of the pairs of the same example
            and sample; None for a method that does not use them.

    Raises:
        RunFolderError: Rows of iterate 0 are missing.
    """

    def __init__(
        self,
        table: RowTable,
        reference: Density,
        further: Sequence[Density] = (),
        first: RowTable | None = None,
    ) -> None:
        """Compute log R of every row."""
        self._table = table
        self._real, self._generated = _both_sides(table, reference)
        sides = [_both_sides(table, density) for density in further]
        self._further_real = [real for real, _ in sides]
        self._further_generated = [generated for _, generated in sides]
        self._first = None if first is None else first.generated_ids
        self._first_rows = [] if first is None else _rows_of(first, table)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._table)

    def __getitem__(self, index: int) -> Pair:
        """Row `index`."""
        return Pair(
            self._table.prompt_ids[index],
            self._table.real_ids[index],
            self._table.generated_ids[index],
            float(self._real[index]),
            float(self._generated[index]),
            int(self._table.example_id[index]),
            int(self._table.sample[index]),
            self._table.generated_ids[index][:0]
            if self._first is None
            else self._first[self._first_rows[index]],
            tuple(float(logps[index]) for logps in self._further_real),
            tuple(float(logps[index]) for logps in self._further_generated),
        )


def _both_sides(table: RowTable, density: Density) -> tuple[Tensor, Tensor]:
    """Log-density of the real and the generated response of each row; NaN where none is stored."""
    if not table.members:
        unknown = torch.full((len(table),), math.nan, dtype=torch.float64)
        return unknown, unknown
    real = density.logps(table.real_logps, table.token_real_logps)
    return real, density.logps(table.generated_logps, table.token_generated_logps)


def _rows_of(first: RowTable, table: RowTable) -> list[int]:
    """The row of iterate 0 with the example and sample of each row of a table."""
    known = {pair: row for row, pair in enumerate(first.row_ids)}
    wanted = table.row_ids
    missing = [pair for pair in wanted if pair not in known]
    if missing:
        example, sample = missing[0]
        raise RunFolderError(
            f"the rows of iterate 0 lack {len(missing)} of {len(wanted)} responses, such as "
            f"example {example}, sample {sample}",
            fix="restore the folder rows/iterate_000 of this run from a copy, or start a new run",
        )
    return [known[pair] for pair in wanted]


@dataclass
class EpochBatches(Sampler[list[int]]):
    """Batches of row indices of one epoch.

    Rows are first divided into global batches, which are then split over the ranks, so two
    processes with batches of b together get the batches of one process with batches of 2b.

    Attributes:
        rows: Number of rows.
        batch_size: Rows of a batch on one rank.
        seed: Seed of the run.
        epoch: The epoch, which determines the order; None keeps the rows' order.
        rank: This process's rank.
        world_size: Number of ranks.
        start: Number of batches to skip at the start, after a resume.
    """

    rows: int
    batch_size: int
    seed: int = 0
    epoch: int | None = None
    rank: int = 0
    world_size: int = 1
    start: int = 0

    def __len__(self) -> int:
        """Number of batches of the whole epoch, including skipped ones."""
        return -(-self.rows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's share of each global batch."""
        order = (
            np.arange(self.rows)
            if self.epoch is None
            else keyed.epoch_order(self.seed, self.epoch, self.rows)
        ).tolist()
        size = self.batch_size * self.world_size
        for first in range(self.start * size, self.rows, size):
            batch = order[first : first + size]
            # A rank without a row of the last batch repeats one, since all ranks have to step.
            yield batch[self.rank :: self.world_size] or batch[-1:]

    def share(self, index: int) -> float:
        """Weight of this rank's mean over batch `index` in the mean of all ranks' means.

        It is 1 except in an uneven last batch. With these weights the mean of the ranks is the mean
        over the rows of the global batch, and a repeated row has no weight.
        """
        rows = self._rows_of(index)
        return len(range(self.rank, rows, self.world_size)) * self.world_size / rows

    def window_share(self, index: int, batches: int, limit: int) -> float:
        """Weight of batch `index` of all ranks in the mean over the batches of its window.

        A window is the batches whose gradients are accumulated for one step. The weight is 1 except
        in the last window of an epoch, whose batches are fewer, or of which the last has fewer
        rows: with these weights the sum over the window divided by `batches` is the mean over its
        rows.

        Args:
            index: Index of the batch in its epoch.
            batches: Batches of a full window.
            limit: Batches of the epoch that are used.
        """
        first = index - index % batches
        window = [self._rows_of(i) for i in range(first, min(first + batches, len(self), limit))]
        return self._rows_of(index) * batches / sum(window)

    def _rows_of(self, index: int) -> int:
        """Rows of a batch of all ranks together."""
        size = self.batch_size * self.world_size
        return min(size, self.rows - index * size)


class RowLoader(DataLoader[Any]):
    """A loader that saves its position, so a checkpoint within an epoch resumes there."""

    def __init__(self, dataset: PairDataset, batches: EpochBatches, **kwargs: Any) -> None:
        """Load `dataset` in the order of `batches`."""
        super().__init__(dataset, batch_sampler=batches, **kwargs)
        self._batches = batches
        self._position = 0

    def __iter__(self) -> Iterator[PairBatch]:  # type: ignore[override]  # a generator suffices
        """Yield batches from the saved position on."""
        self._position = self._batches.start
        for batch in super().__iter__():
            self._position += 1
            yield batch
        self._batches.start = 0

    def state_dict(self) -> dict[str, int]:
        """The position; the end of an epoch is the start of the next."""
        return {"position": self._position % max(1, len(self._batches))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration at the saved position."""
        self._batches.start = self._position = state["position"]
