"""Points at which a run is killed: a function, and which of its calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# An environment variable with target, moment and call of a point, separated by `|`.
VARIABLE = "SPIN_TEST_KILL_AT"
# The rank to harm, in a run of several processes.
RANK = "SPIN_TEST_KILL_RANK"
# The message of a call that raises, and the delay of a slow one in seconds.
BROKEN = "the disk is on fire"
SLOW_SECONDS = 25


@dataclass(frozen=True)
class Point:
    """A failure at the nth call of a function.

    Attributes:
        stage: The stage of the run.
        target: The function, `module:name` or `module:Class.name`.
        moment: before, after: SIGKILL before or after the call; torn: SIGKILL after it, with its
            file cut in half; raises: the call fails; slow: it takes `SLOW_SECONDS` longer.
        call: The number of the call, from 1.
    """

    stage: str
    target: str
    moment: Literal["before", "after", "torn", "raises", "slow"]
    call: int

    @property
    def name(self) -> str:
        function = self.target.rpartition(":")[2]
        return f"{self.stage}: {self.moment} {function} {self.call}"

    @property
    def value(self) -> str:
        return f"{self.target}|{self.moment}|{self.call}"


_GENERATE = "spin_lightning.generation.local:LocalGenerator.generate"
_SCORE = "spin_lightning.rows.making:Synthesis._score"
_PART = "spin_lightning.rows.making:write_part"
_TABLE = "pyarrow.parquet:write_table"
_MANIFEST = "spin_lightning.rows.making:write_manifest"
_STEP = "spin_lightning.modules.base:SelfPlayModule.training_step"
_VALIDATE = "spin_lightning.modules.base:SelfPlayModule.validation_step"
_OPTIMIZER = "torch.optim:AdamW.step"
_SNAPSHOT = "spin_lightning.policies.lora:LoraPolicy.snapshot"
_KEEP = "spin_lightning.callbacks.iterates:replace_synced"
_RECORD = "spin_lightning.run.folder:RunFolder.write_record"
_SAVE = "spin_lightning.callbacks.guard:RunGuard.save"
_RENAME = "spin_lightning.callbacks.guard:replace_synced"
_DUMP = "lightning.pytorch.trainer.trainer:Trainer.save_checkpoint"

# A run of two iterates. Each has one unit of held-out rows and four of training rows, then four
# steps with a checkpoint after every second one. At the end comes a unit of held-out rows.
POINTS = (
    Point("generation", _GENERATE, "before", 1),
    Point("generation", _GENERATE, "after", 3),
    Point("generation", _GENERATE, "before", 8),
    Point("generation", _GENERATE, "after", 11),
    Point("scoring", _SCORE, "before", 2),
    Point("scoring", _SCORE, "after", 9),
    Point("rows", _TABLE, "torn", 4),
    Point("rows", _PART, "after", 7),
    Point("rows", _MANIFEST, "before", 2),
    Point("rows", _MANIFEST, "after", 3),
    Point("training", _STEP, "before", 1),
    Point("training", _STEP, "after", 4),
    Point("training", _OPTIMIZER, "after", 7),
    Point("training", _VALIDATE, "after", 3),
    Point("snapshot", _SNAPSHOT, "after", 1),
    Point("snapshot", _KEEP, "after", 3),
    Point("snapshot", _RECORD, "before", 3),
    Point("checkpoint", _SAVE, "before", 2),
    Point("checkpoint", _DUMP, "torn", 3),
    Point("checkpoint", _RENAME, "before", 4),
)
# One of each kind, for every change.
QUICK = tuple(POINTS[i] for i in (1, 6, 12, 18))
