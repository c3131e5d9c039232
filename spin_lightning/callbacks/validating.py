"""Validation outside Lightning's own schedule, and of finished iterates."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from spin_lightning.callbacks.session import Session
from spin_lightning.modules.base import SelfPlayModule


def validate_ended_epoch(trainer: L.Trainer) -> None:
    """Validate at the end of the epoch before, if Lightning would have."""
    every, epoch = trainer.check_val_every_n_epoch, trainer.fit_loop.epoch_progress.current
    batches, interval = trainer.num_training_batches, trainer.val_check_batch
    if not trainer.enable_validation or (every is not None and epoch.completed % every):
        return
    if isinstance(interval, int) and batches % interval:
        return
    # Loggers get the index of the epoch in which the checkpoint was taken.
    epoch.completed -= 1
    try:
        validate_now(trainer)
    finally:
        epoch.completed += 1


def validate_now(trainer: L.Trainer) -> None:
    """Run the validation loop once, as Lightning does it in the middle of training."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating = True
    loop.run()
    trainer.training = True


class AsTrained:
    """Lets `Trainer.validate` measure a finished iterate as its own training did.

    A policy that equals iterate t is at the start of training iterate t + 1, whose reference may be
    iterate t itself: every margin is then 0, and the loss log 2. So it is validated like at the end
    of its training: on the pairs of iterate t - 1, with that reference and beta.
    """

    def __init__(self) -> None:
        """Change nothing yet."""
        self._iterate: int | None = None

    def start(self, session: Session) -> None:
        """Set the module back by one iterate, if its policy is a finished iterate."""
        module, t = session.module, session.module.iterate
        if t == 0 or not _is_iterate(session, t):
            return
        self._iterate, module.iterate = t, t - 1
        rank_zero_info(
            f"Iterate {t} is finished. It is validated as at the end of its training: on held-out "
            f"pairs of iterate {t - 1}, against the reference {module.reference(t - 1)}."
        )

    def end(self, module: L.LightningModule) -> None:
        """Set the module to its iterate again; a second call does nothing."""
        if self._iterate is not None:
            assert isinstance(module, SelfPlayModule), "start() got it"
            module.iterate, self._iterate = self._iterate, None


def _is_iterate(session: Session, t: int) -> bool:
    """Whether the module's policy is iterate t of the run, bit by bit."""
    run, policy = session.run, session.module._modules.get("policy")
    if policy is None or t not in run.known_iterates():
        return False
    with TemporaryDirectory(prefix="spin-lightning-validate-") as folder:
        return session.module.policy.snapshot(Path(folder)) == dict(run.record(t).files)
