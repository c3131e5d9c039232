"""What a checkpoint holds of a module: the trained adapter, and the gradients of an open step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor

from spin_lightning.errors import RunFolderError
from spin_lightning.modules.trainer_access import is_mid_step
from spin_lightning.policies.base import Policy
from spin_lightning.rows.suspects import NonFiniteError


def check_weights(policy: Policy, iterate: int) -> None:
    """Check that the trained adapter is finite, before it is kept.

    Args:
        policy: Its trained adapter is checked.
        iterate: Index t; p_{t+1} is in training.

    Raises:
        NonFiniteError: Weights are NaN or infinite.
    """
    bad = [name for name, p in policy.trainable() if not bool(p.isfinite().all())]
    if bad:
        raise NonFiniteError(
            f"training iterate {iterate + 1}: the adapter has weights that are NaN or infinite, "
            f"{len(bad)} tensors such as {bad[0]}; it was not kept",
            fix="the earlier iterates and checkpoints are intact: start a new run with a lower "
            "learning_rate or gradient clipping, or with compute_dtype: float32",
        )


def trained_state(policy: Policy, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a module's state that belong to the trained adapter."""
    trained = _shapes(policy)
    return {name: state[name] for name in state if name in trained}


def check_state(policy: Policy, state: Mapping[str, Any], *, strict: bool) -> None:
    """Check that a checkpoint's state fits the trained adapter.

    Args:
        policy: The policy to load into.
        state: Weights by name.
        strict: Whether all weights have to be there, and no others.

    Raises:
        RunFolderError: Names or shapes differ.
    """
    shapes = _shapes(policy)
    other_names = set(shapes) ^ set(state) if strict else set()
    other_shapes = {n for n, shape in shapes.items() if n in state and state[n].shape != shape}
    for kind, names in (("names", other_names), ("shapes", other_shapes)):
        if names:
            raise RunFolderError(
                f"the checkpoint holds another adapter: {len(names)} {kind} differ, such as "
                f"{min(names)}",
                fix="use the model and the lora_* settings that the checkpoint was made with",
            )


def accumulated_gradients(trainer: L.Trainer, policy: Policy) -> dict[str, Tensor] | None:
    """Gradients that have accumulated since the last step; None if they differ between ranks."""
    if not is_mid_step(trainer):
        return {}
    if trainer.world_size > 1:
        return None
    return {name: p.grad for name, p in policy.trainable() if p.grad is not None}


def gradients_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The accumulated gradients in a checkpoint's `self_play` entry.

    Raises:
        RunFolderError: The checkpoint was taken while several processes accumulated gradients.
    """
    gradients = checkpoint.get("gradients", {})
    if gradients is None:
        raise RunFolderError(
            "the checkpoint was taken while several processes accumulated gradients, each its own",
            fix="resume from the run's checkpoints/last.ckpt, which is taken between two steps",
        )
    return gradients


def restore_gradients(policy: Policy, gradients: Mapping[str, Tensor]) -> None:
    """Set the accumulated gradients of an open step."""
    for name, parameter in policy.trainable():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter)


def _shapes(policy: Policy) -> dict[str, Any]:
    """Shapes of the trained weights, by their name in the module's state."""
    return {f"policy.{name}": weight.shape for name, weight in policy.trainable()}
