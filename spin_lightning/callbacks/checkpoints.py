"""Reading checkpoints: nothing that is pickled in them runs, and they belong to the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from spin_lightning.errors import RunFolderError
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.folder import RunFolder

_LINEAGE = "run_lineage"
# What every checkpoint of ours holds, and what training needs besides.
_PARTS = {"state_dict": dict, "self_play": dict, "pytorch-lightning_version": str}
_TRAINING_PARTS = {
    "callbacks": dict,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
}


class RunCheckpointIO(TorchCheckpointIO):
    """Loads tensors and plain values only, whatever it is asked for.

    Args:
        to_train_on: Whether training is to go on from what is loaded.
    """

    def __init__(self, to_train_on: bool) -> None:
        """Say what it is for."""
        super().__init__()
        self._parts = _PARTS | (_TRAINING_PARTS if to_train_on else {})

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint of self-play.

        Raises:
            RunFolderError: The file is damaged, no such checkpoint, or holds more than tensors and
                plain values.
        """
        kwargs["weights_only"] = True
        try:
            content = super().load_checkpoint(path, *args[:1], **kwargs)
        except FileNotFoundError as error:
            raise _refusal(path, "there is no such file") from error
        # Torch's readers raise whatever they stumble over; there is no base class.
        except Exception as error:
            raise _refusal(
                path,
                "it is damaged, or holds more than tensors and plain values, which is never loaded "
                f"since it could run code ({type(error).__name__})",
            ) from error
        if not isinstance(content, dict):
            raise _refusal(path, "it is no checkpoint of a training run")
        for name, kind in self._parts.items():
            if not isinstance(content.get(name), kind):
                raise _refusal(path, f"it is no checkpoint of self-play, its {name!r} is missing")
        if not isinstance(content["self_play"].get("iterate"), int):
            raise _refusal(path, "it does not say which iterate it is on its way to")
        return content


def read_safely(trainer: L.Trainer) -> None:
    """Make a trainer read checkpoints by `RunCheckpointIO`, unless it has a plugin of its own."""
    if type(trainer.strategy.checkpoint_io) in (TorchCheckpointIO, RunCheckpointIO):
        trainer.strategy.checkpoint_io = RunCheckpointIO(trainer.state.fn == TrainerFn.FITTING)


def write_lineage(checkpoint: dict[str, Any], run: RunFolder, iterate: int) -> None:
    """Say in a checkpoint which iterate of which run it goes on from."""
    checkpoint[_LINEAGE] = _lineage(run, iterate)


def check_lineage_of(checkpoint: Mapping[str, Any], run: RunFolder) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        RunFolderError: The run has no such iterate, or another one of its number.
    """
    iterate = checkpoint["self_play"]["iterate"]
    there = iterate in run.known_iterates()
    # (A checkpoint of an earlier version does not say.)
    if there and checkpoint.get(_LINEAGE, _lineage(run, iterate)) == _lineage(run, iterate):
        return
    raise RunFolderError(
        f"the checkpoint goes on from iterate {iterate} of another run: {run.root} has "
        f"{'another iterate of this number' if there else f'no iterate {iterate}'}",
        fix="name a checkpoint of this run, or the folder of the run that it belongs to with "
        "--trainer.default_root_dir",
    )


def _lineage(run: RunFolder, iterate: int) -> str:
    record = run.read_iterate(iterate)
    return fingerprint({name: record.get(name) for name in ("fingerprint", "files")})


def _refusal(path: object, problem: str) -> RunFolderError:
    others = Path(str(path)).parent
    return RunFolderError(
        f"the checkpoint {path} cannot be used: {problem}",
        fix=f"name another checkpoint (see {others}) with --ckpt_path; without any, move the "
        "folder's iterates away or name a new folder to start again",
    )
