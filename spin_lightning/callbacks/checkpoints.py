"""Reading checkpoints safely: no pickled code runs, and a checkpoint must be of this run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.trainer.states import TrainerFn

from spin_lightning.errors import RunFolderError
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.folder import RunFolder

_LINEAGE = "run_lineage"
# Keys in every self-play checkpoint, and additional keys that training needs.
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
    """Loads tensors and plain values only, whatever the caller requests.

    Args:
        to_train_on: Whether training will continue from the checkpoint, which needs more of it.
    """

    def __init__(self, to_train_on: bool) -> None:
        """Choose the parts that a checkpoint must have."""
        super().__init__()
        self._parts = _PARTS | (_TRAINING_PARTS if to_train_on else {})

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint of self-play.

        Raises:
            RunFolderError: The file is missing or damaged, is not a checkpoint of self-play, or
                holds more than tensors and plain values.
        """
        kwargs["weights_only"] = True
        try:
            content = super().load_checkpoint(path, *args[:1], **kwargs)
        except FileNotFoundError as error:
            raise _refusal(path, "there is no such file") from error
        # Torch's readers raise exceptions of many classes without a common base.
        except Exception as error:
            raise _refusal(
                path,
                "it is damaged, or holds more than tensors and plain values, which is never loaded "
                f"since it could run code ({type(error).__name__})",
            ) from error
        if not isinstance(content, dict):
            raise _refusal(path, "it is not a checkpoint of a training run")
        for name, kind in self._parts.items():
            if not isinstance(content.get(name), kind):
                raise _refusal(path, f"it is not a checkpoint of self-play ({name!r} is missing)")
        if not isinstance(content["self_play"].get("iterate"), int):
            raise _refusal(path, "its index of the current iterate is missing")
        return content


def read_safely(trainer: L.Trainer) -> None:
    """Make a trainer read checkpoints by `RunCheckpointIO`, unless it has another plugin."""
    if type(trainer.strategy.checkpoint_io) in (TorchCheckpointIO, RunCheckpointIO):
        trainer.strategy.checkpoint_io = RunCheckpointIO(trainer.state.fn == TrainerFn.FITTING)


def write_lineage(checkpoint: dict[str, Any], run: RunFolder, iterate: int) -> None:
    """Store in a checkpoint which iterate of which run it continues from."""
    checkpoint[_LINEAGE] = _lineage(run, iterate)


def drop_timers(checkpoint: dict[str, Any], callbacks: Iterable[Callback]) -> None:
    """Remove the time used so far: `max_time` is a limit of each start, as in a job's queue.

    Otherwise each further start of a run whose time was up would end after one batch.
    """
    for callback in callbacks:
        if isinstance(callback, Timer):
            checkpoint["callbacks"].pop(callback.state_key, None)


def check_lineage_of(checkpoint: Mapping[str, Any], run: RunFolder) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        RunFolderError: The run has no such iterate, or a different one with this index.
    """
    iterate = checkpoint["self_play"]["iterate"]
    there = iterate in run.known_iterates()
    # (A checkpoint of an earlier version has no lineage.)
    if there and checkpoint.get(_LINEAGE, _lineage(run, iterate)) == _lineage(run, iterate):
        return
    raise RunFolderError(
        f"the checkpoint continues from iterate {iterate} of another run: {run.root} has "
        f"{f'a different iterate {iterate}' if there else f'no iterate {iterate}'}",
        fix="name a checkpoint of this run, or name the folder of the run that it belongs to with "
        "--trainer.default_root_dir",
    )


def _lineage(run: RunFolder, iterate: int) -> str:
    record = run.record(iterate)
    return fingerprint({"fingerprint": record.fingerprint, "files": record.files})


def _refusal(path: object, problem: str) -> RunFolderError:
    others = Path(str(path)).parent
    return RunFolderError(
        f"the checkpoint {path} cannot be used: {problem}",
        fix=f"name another checkpoint (see {others}) with --ckpt_path; if there is none, move "
        "the folder's iterates away or name a new folder to start again",
    )
