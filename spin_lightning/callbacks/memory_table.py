"""The predicted memory of a run by phase, as a table."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from spin_lightning.generation.local import default_batch_tokens
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.packing import pack_prompts, pass_tokens, split_prompts
from spin_lightning.policies.memory import Memory, PassSize
from spin_lightning.policies.pass_size import training_tokens
from spin_lightning.rows.making import SHARED_TOKENS

_GIB = 1 << 30
_LARGEST_BATCH = 1024


@dataclass(frozen=True)
class LongestRow:
    """The longest row that a run can have, in tokens.

    Attributes:
        prompt: Prompt.
        real: Real response.
        generated: Generated response; None without one.
        samples: Generated responses per prompt.
        uses_first: Whether a training pair also holds the response of iterate 0.
    """

    prompt: int
    real: int
    generated: int | None
    samples: int = 1
    uses_first: bool = False

    @property
    def pair(self) -> tuple[int, tuple[int, ...]]:
        """Tokens of the prompt, and of each response of a training pair."""
        generated = () if self.generated is None else (self.generated,)
        return self.prompt, (self.real, *generated * (2 if self.uses_first else 1))

    @property
    def group(self) -> tuple[int, tuple[int, ...]]:
        """Tokens of the prompt, and of each response that is scored with it."""
        generated = () if self.generated is None else (self.generated,) * self.samples
        return self.prompt, (self.real, *generated)

    def training_pass(self, pairs: int, most: int) -> PassSize:
        """The largest pass of a training batch of such pairs, split after `most` tokens."""
        return _largest_pass(*self.pair, pairs, most)

    def scoring_pass(self, device: torch.device) -> PassSize:
        """The largest pass that scores such rows."""
        prompt, responses = self.group
        count = max(1, SHARED_TOKENS // (prompt + sum(responses)))
        return _largest_pass(prompt, responses, count, pass_tokens(device))


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
    spec = module.policy_spec
    memory = Memory.of(spec, device)
    config: Any = module.policy.model.config
    most = training_tokens(config, memory.dtype, device, spec.activation_checkpointing)
    training, scoring = row.training_pass(pairs, most), row.scoring_pass(device)
    tokens = module.generation.batch_tokens or default_batch_tokens(module.policy.model)
    trained = memory.trained(module.optimizer_name)
    held = memory.weights + trained
    passes = {
        f"training pass of {training.tokens:,} tokens": memory.training_pass(training),
        f"scoring pass of {scoring.tokens:,} tokens": memory.scoring_pass(scoring),
    }
    if module.generation.engine == "local":
        passes[f"decoding {tokens:,} tokens"] = memory.decoding_batch(tokens)
    return [
        Phase("weights", memory.weights, memory.weights),
        Phase("adapter, gradients, optimizer", trained, held),
        *(Phase(name, size, held + size) for name, size in passes.items()),
    ]


class LargestBatches(NamedTuple):
    """How many of the longest rows fit into memory at once, by phase.

    Attributes:
        training: Pairs of a training pass.
        scoring: Prompts of a scoring pass, each with its responses.
        decoding: Rows that are decoded at once; those that a unit has beyond them wait. None where
            servers generate.
    """

    training: int
    scoring: int
    decoding: int | None


def largest_batches(
    module: SelfPlayModule, row: LongestRow, device: torch.device, total: int
) -> LargestBatches:
    """The largest batch of each phase, by the predicted memory.

    Args:
        module: The module, with its policy.
        row: The longest row.
        device: Where the policy is.
        total: Memory of the device, in bytes.

    Raises:
        SpinError: The memory of the policy's passes is not predicted.
    """
    memory = Memory.of(module.policy_spec, device)
    room = total - memory.weights - memory.trained(module.optimizer_name)
    tokens = module.generation.batch_tokens or default_batch_tokens(module.policy.model)
    columns = row.prompt + (row.generated or row.real)
    return LargestBatches(
        training=_most(lambda n: memory.training_pass(PassSize.of([row.pair] * n)) <= room),
        scoring=_most(lambda n: memory.scoring_pass(PassSize.of([row.group] * n)) <= room),
        decoding=_most(
            lambda n: n * columns <= tokens and memory.decoding_batch(n * columns) <= room
        )
        if module.generation.engine == "local"
        else None,
    )


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number up to 1,024 that fits, if all smaller ones do; 0 if none does."""
    return bisect_left(range(1, _LARGEST_BATCH + 1), True, key=lambda n: not fits(n))


def memory_rows(phases: Sequence[Phase]) -> list[list[str]]:
    """The phases as a table, its head first."""
    return [
        ["predicted memory", "size", "in all"],
        *([phase.name, readable(phase.size), readable(phase.in_all)] for phase in phases),
    ]


def _largest_pass(prompt: int, responses: Sequence[int], count: int, most: int) -> PassSize:
    ids = [[0] * prompt] * count, [[[0] * n for n in responses]] * count
    passes = split_prompts(pack_prompts(*ids), most)
    largest = max(passes, key=lambda one: len(one.input_ids))
    return PassSize.of(list(zip(largest.prompt_lengths, largest.response_lengths, strict=True)))


def readable(size: int) -> str:
    """Bytes in GiB, of a small size in MiB."""
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{1024 * size / _GIB:.1f} MiB"
