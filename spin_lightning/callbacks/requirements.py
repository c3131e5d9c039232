"""Checks of the run folder and the strategy, made before anything expensive."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from spin_lightning.callbacks.session import Session
from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.run.files import writing
from spin_lightning.run.fingerprint import differences
from spin_lightning.run.folder import ITERATE_FILE, RunFolder
from spin_lightning.types import PairLogps

# Files of a run that ended before its first iterate, and files of loggers.
_OWN = frozenset(
    {"checkpoints", "config.yaml", "evaluation", "iterates", "metrics.csv", "report", "rows"}
    | {"tensorboard", "tokenizer", "lightning_logs", "mlruns", "wandb"}
)
# Captured output of a run.
_LOGS = frozenset({".log", ".out", ".err", ".tmp"})
_STRATEGIES = frozenset(
    {"auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"}
)


def check_lineage(run: RunFolder, fields_at: Callable[[int], dict[str, Any]]) -> None:
    """Refuse to continue a run folder of another configuration.

    Args:
        run: The run folder.
        fields_at: The fingerprint's fields for iterates up to t, of this configuration.

    Raises:
        RunFolderError: The folder's iterates do not belong to this configuration.
    """
    known = run.known_iterates()
    if not known:
        return
    newest = run.record(known[-1])
    if not newest.fingerprint_fields:
        raise RunFolderError(
            f"{run.iterate(newest.index) / ITERATE_FILE} has no fingerprint_fields",
            fix="restore it from a copy of the run, or start a new run in another folder",
        )
    changed = differences(newest.fingerprint_fields, fields_at(newest.index))
    if changed:
        raise RunFolderError(
            f"{run.root} belongs to another configuration:\n  " + "\n  ".join(changed),
            fix="set these back, or name a new folder with --trainer.default_root_dir",
        )


def check_start(run: RunFolder, trainer: L.Trainer) -> None:
    """Refuse to start from scratch over trained iterates, or from different points on two ranks.

    A run that ended between its first iterate and its first checkpoint may start again: it makes
    the same iterate.

    Args:
        run: The run folder.
        trainer: The trainer; its `ckpt_path` is None for a start from scratch.

    Raises:
        RunFolderError: The folder has trained iterates, and there is no checkpoint to resume; or
            rank 0 resumes from another checkpoint than this rank.
    """
    checkpoint = None if trainer.ckpt_path is None else str(trainer.ckpt_path)
    first = trainer.strategy.broadcast(checkpoint)
    if checkpoint != first:
        raise RunFolderError(
            f"rank {trainer.global_rank} starts from {checkpoint or 'scratch'}, and rank 0 from "
            f"{first or 'scratch'}",
            fix="start the same command again: a machine had an old view of the run folder; and "
            "mount its file system without long caching (NFS: a small acdirmax)",
        )
    known = run.known_iterates()
    untouched = 0 if run.last_checkpoint.exists() else 1
    if checkpoint is None and known and known[-1] > untouched:
        raise RunFolderError(
            f"{run.root} already holds iterates 0 to {known[-1]}, and this run would start from "
            "scratch",
            fix="resume (the command line's resume: auto, or Trainer.fit(ckpt_path="
            f"{str(run.last_checkpoint)!r})), or name a new folder",
        )


def check_folder(run: RunFolder, *, create: bool = True) -> None:
    """Refuse a folder that holds unrelated files; create the folder.

    Args:
        run: The run folder.
        create: Whether to create it; a dry run does not.

    Raises:
        RunFolderError: The folder holds other files and no run, or it cannot be created.
    """
    if run.root.is_dir() and not run.iterates.is_dir():
        foreign = [
            path.name
            for path in sorted(run.root.iterdir())
            if path.name not in _OWN and not path.name.startswith(".") and path.suffix not in _LOGS
        ]
        if foreign:
            raise RunFolderError(
                f"{run.root} holds no run, but {len(foreign)} other files and folders, such as "
                f"{foreign[0]}",
                fix="name a new or an empty folder with --trainer.default_root_dir",
            )
    if create:
        with writing(run.root):
            run.root.mkdir(parents=True, exist_ok=True)


def check_session(session: Session, iterates: int) -> None:
    """Check what can be checked about a session before weights are read.

    Raises:
        SettingError: See `check_validation` and `check_objective`.
        SpinError: The generation engine cannot be used.
    """
    check_validation(session, iterates)
    check_objective(session.module)
    module, data = session.module, session.data
    if module.opponent(0) is not None:
        longest = max(
            (len(e.prompt_ids) + data.max_response_tokens for e in (*data.train, *data.val)),
            default=1,
        )
        text_format = session.text_format
        make = module.make_generator
        generator = make(text_format.stop_ids, text_format.pad_id, module.generation)
        generator.check(min(longest, module.context_length))


def check_validation(session: Session, iterates: int) -> None:
    """Refuse to validate after more batches than an epoch has, which Lightning does too late.

    Raises:
        SettingError: `val_check_interval` is larger than an epoch of some iterate.
    """
    trainer, data = session.trainer, session.data
    interval = trainer.val_check_interval
    if not data.val or not isinstance(interval, int) or trainer.check_val_every_n_epoch is None:
        return
    limit = trainer.limit_train_batches
    counts = [data.batches_per_epoch(t, trainer.world_size) for t in range(iterates)]
    batches = min(min(n, limit) if isinstance(limit, int) else int(n * limit) for n in counts)
    if interval > batches:
        raise SettingError(
            "trainer.val_check_interval",
            interval,
            f"an epoch has only {batches} batches",
            fix=f"give 1 to {batches} batches, a share of an epoch such as 0.5, or leave it out to "
            "validate after each epoch",
        )


def check_objective(module: SelfPlayModule) -> None:
    """Refuse an `objective` that does not return one number, before anything is generated.

    Raises:
        SettingError: It returned something else for two pairs.
    """
    real = torch.tensor([-2.0, -3.0], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 3])
    columns = len(module.further_references(0))
    further = real.detach()[:, None].expand(2, columns) if columns else None
    paired = module.opponent(0) is not None
    logps = PairLogps(
        policy_real=real,
        policy_generated=real - 1 if paired else None,
        reference_real=real.detach(),
        reference_generated=real.detach() - 1 if paired else None,
        real_lengths=lengths,
        generated_lengths=lengths if paired else None,
        policy_first=real - 2 if module.uses_first_responses else None,
        further_real=further,
        further_generated=further,
    )
    try:
        loss: object = module.objective(logps)
    except Exception:
        # It needs more than two pairs, such as the weights: training will tell.
        return
    if not isinstance(loss, torch.Tensor) or loss.dim():
        returned = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise SettingError(
            f"{type(module).__name__}.objective",
            returned,
            "for a batch of 2 pairs it has to return one number, a tensor of shape []",
            fix="return the mean over the pairs: losses.mean()",
        )


def how_to_continue(run: RunFolder) -> str:
    """Where a stopped run continues."""
    last = run.last_checkpoint
    if last.exists():
        where = f"{last} (in Python: Trainer.fit(ckpt_path={str(last)!r}))"
    else:
        where = f"the rows in {run.root}; nothing was trained before the first checkpoint"
    return f"The same command continues from {where}."


def run_root(trainer: L.Trainer, module: L.LightningModule) -> Path:
    """The run folder: the trainer's root folder, by default a new `runs/<Variant>-<n>`."""
    root = Path(trainer.default_root_dir)
    return new_run(type(module).__name__) if root.resolve() == Path.cwd() else root


def new_run(variant: str) -> Path:
    """The first `runs/<variant>-<n>` that does not exist.

    Raises:
        SettingError: torchrun or srun has started this process: each process, and each restart,
            would choose another folder.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise SettingError(
            "trainer.default_root_dir",
            None,
            "each process that torchrun or srun starts would choose a run folder of its own",
            fix="name a folder that all of them share",
        )
    number = 0
    while (folder := Path("runs") / f"{variant}-{number}").exists():
        number += 1
    return folder


def check_strategy(strategy: str | Strategy) -> None:
    """Refuse strategies under which a process cannot switch between iterates.

    Args:
        strategy: A trainer's strategy, or its name.

    Raises:
        SettingError: A strategy that shards the module over devices, or that sends it to other
            processes by pickling it.
    """
    if isinstance(strategy, str):
        name, works = strategy, strategy in _STRATEGIES
    else:
        name = type(strategy).__name__
        spawns = isinstance(strategy.launcher, _MultiProcessingLauncher)
        works = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not spawns
    if not works:
        raise SettingError(
            "trainer.strategy",
            name,
            "each process that fit starts must hold the whole adapter; this strategy shards or "
            "pickles the module",
            fix="use ddp; if memory is short, with model.quantization: nf4, "
            "model.activation_checkpointing: true, or model.shard_base: true",
        )
