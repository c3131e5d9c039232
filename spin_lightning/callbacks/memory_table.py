"""The predicted memory of a run by phase, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from spin_lightning.generation.local import default_batch_tokens
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.packing import pack_prompts, split_for
from spin_lightning.policies.memory import Memory, PassSize
from spin_lightning.rows.making import SHARED_TOKENS

_GIB = 1 << 30


@dataclass(frozen=True)
class LongestRow:
    """The longest row that a run can have, in tokens.

    Attributes:
        prompt: Prompt.
        real: Real response.
        generated: Generated response; None without one.
        samples: Generated responses per prompt.
    """

    prompt: int
    real: int
    generated: int | None
    samples: int = 1

    def training_pass(self, pairs: int, device: torch.device) -> PassSize:
        """The largest pass of a training batch of such pairs."""
        generated = () if self.generated is None else (self.generated,)
        return _largest_pass(self.prompt, (self.real, *generated), pairs, device)

    def scoring_pass(self, device: torch.device) -> PassSize:
        """The largest pass that scores such rows."""
        generated = () if self.generated is None else (self.generated,) * self.samples
        group = self.prompt + self.real + sum(generated)
        count = max(1, SHARED_TOKENS // group)
        return _largest_pass(self.prompt, (self.real, *generated), count, device)


class Phase(NamedTuple):
    """A phase of a run.

    Attributes:
        name: What needs the memory.
        size: Bytes.
        in_all: Bytes together with the weights and the adapter, which stay.
    """

    name: str
    size: int
    in_all: int


def predicted_phases(
    module: SelfPlayModule, row: LongestRow, pairs: int, device: torch.device
) -> list[Phase]:
    """The predicted memory of a run.

    Args:
        module: The module, with its policy.
        row: The longest row.
        pairs: Pairs of a training batch.
        device: Where the policy is.

    Raises:
        SpinError: The memory of the policy's passes is not predicted.
    """
    memory = Memory.of(module.policy_spec, device)
    training, scoring = row.training_pass(pairs, device), row.scoring_pass(device)
    tokens = module.generation.batch_tokens or default_batch_tokens(module.policy.model)
    trained = memory.trained(module.optimizer_name)
    held = memory.weights + trained
    passes = {
        f"training pass of {training.tokens:,} tokens": memory.training_pass(training),
        f"scoring pass of {scoring.tokens:,} tokens": memory.scoring_pass(scoring),
        f"decoding {tokens:,} tokens": memory.decoding_batch(tokens),
    }
    return [
        Phase("weights", memory.weights, memory.weights),
        Phase("adapter, gradients, optimizer", trained, held),
        *(Phase(name, size, held + size) for name, size in passes.items()),
    ]


def memory_rows(phases: Sequence[Phase]) -> list[list[str]]:
    """The phases as a table, its head first."""
    return [
        ["predicted memory", "size", "in all"],
        *([phase.name, readable(phase.size), readable(phase.in_all)] for phase in phases),
    ]


def _largest_pass(
    prompt: int, responses: Sequence[int], count: int, device: torch.device
) -> PassSize:
    ids = [[0] * prompt] * count, [[[0] * n for n in responses]] * count
    passes = split_for(device, pack_prompts(*ids))
    largest = max(passes, key=lambda one: len(one.input_ids))
    return PassSize.of(list(zip(largest.prompt_lengths, largest.response_lengths, strict=True)))


def readable(size: int) -> str:
    """Bytes in GiB, of a small size in MiB."""
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{1024 * size / _GIB:.1f} MiB"
