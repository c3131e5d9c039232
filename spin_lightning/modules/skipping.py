"""Whether a batch whose loss is no number ends the run or is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spin_lightning.rows.suspects import (
    NotFiniteError,
    Suspect,
    all_finite,
    listed,
    stop_at,
    suspects_of_batch,
    write_suspects,
)
from spin_lightning.types import PairBatch, PairLogps


def leaves_out(module: Any, batch: PairBatch, logps: PairLogps, loss: Tensor) -> bool:
    """Whether a batch is left out, since its loss or a log-prob is nan or infinite.

    All ranks decide alike: one that meets such a batch takes the others along.

    Args:
        module: The `SelfPlayModule` in training; counts in `skipped_batches` what is left out.
        batch: n pairs.
        logps: Their log-probs.
        loss: The objective.

    Raises:
        NotFiniteError: More batches than `max_skipped_batches` would be left out.
    """
    trainer, here = module.trainer, not all_finite(logps, loss)
    shared = trainer.world_size > 1
    if not (trainer.strategy.reduce_boolean_decision(here, all=False) if shared else here):
        return False
    suspects = suspects_of_batch(batch, logps) if here else []
    kept = _keep(module, suspects, loss) if here else None
    names = [suspect.name for suspect in suspects]
    found = [(names, str(kept))] if here else []
    if shared:
        gathered: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(gathered, found)
        found = [one for ranks in gathered for one in ranks]
    module.skipped_batches += 1
    problem = (
        f"training iterate {module.iterate + 1}, step {module.global_step}: the loss or a "
        "log-prob is nan or infinite, in the rows "
        f"{listed([name for names, _ in found for name in names])}; they are written to "
        f"{', '.join(path for _, path in found)}"
    )
    if module.skipped_batches > module.max_skipped_batches:
        raise stop_at(problem)
    module.print(
        f"WARNING: {problem}. The batch is left out: {module.skipped_batches} of at most "
        f"{module.max_skipped_batches} (max_skipped_batches)."
    )
    return True


def no_gradient(module: Any) -> Tensor:
    """A loss of 0 that reaches every trained weight, so that all ranks and steps go on in pace."""
    return torch.stack([p.sum() * 0.0 for _, p in module.policy.trainable()]).sum()


def check_weights(module: Any) -> None:
    """Refuse to keep an adapter with weights that are no numbers.

    Raises:
        NotFiniteError: Some are nan or infinite.
    """
    bad = [name for name, p in module.policy.trainable() if not bool(p.isfinite().all())]
    if bad:
        raise NotFiniteError(
            f"training iterate {module.iterate + 1}: the adapter has weights that are nan or "
            f"infinite, {len(bad)} tensors such as {bad[0]}; it was not kept",
            fix="what was kept before is whole: start a new run with a lower learning_rate or "
            "gradient clipping, or with compute_dtype: float32",
        )


def _keep(module: Any, suspects: list[Suspect], loss: Tensor) -> Path:
    """Write the rows beside those of their iterate."""
    rank, step = module.global_rank, module.global_step
    folder: Path = module.trainer.datamodule.run_folder.rows(module.iterate)
    path = folder / f"not_finite-step_{step:06d}-rank_{rank}.json"
    write_suspects(
        path,
        suspects,
        module.tokenizer.decode,
        what=f"training iterate {module.iterate + 1}",
        step=step,
        loss=float(loss.detach()),
        beta=module.reward_scale,
    )
    return path
