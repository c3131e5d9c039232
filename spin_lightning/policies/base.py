"""What the self-play loop needs from a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from spin_lightning.packing import pad_prompts
from spin_lightning.types import PolicyId, PromptBatch, SequenceBatch


class Lanes(NamedTuple):
    """The rows of a model's batch and cache: one for each row that is asked for, or two.

    Attributes:
        rows: The row that each lane belongs to, int64, shape [lanes].
        seconds: Where a lane is the second one of a row that is mixed with the base, bool.
    """

    rows: Tensor
    seconds: Tensor


class Seats(Protocol):
    """Who acts in which row of the batches that a model is given."""

    def take(self, actors: Sequence[PolicyId]) -> Lanes:
        """Say who acts in each row of the forward passes to come.

        Args:
            actors: One for each row, out of the team that acts.

        Returns:
            The lanes in which the model reads them.
        """

    def keep(self, staying: Tensor) -> Tensor:
        """Go on without some rows.

        Args:
            staying: Which rows stay, in their order, bool, shape [n].

        Returns:
            The lane that is to become each lane, int64.
        """


class Policy(nn.Module, ABC):
    """A trainable policy p_theta and the bank of its frozen iterates p_0 … p_t.

    Attributes:
        model: The causal language model that acts now: the trained policy, or inside `at` an
            iterate.
    """

    model: nn.Module

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where inputs have to be."""

    @abstractmethod
    def logps(self, batch: SequenceBatch) -> Tensor:
        """log p(y|x) of each sequence under whoever acts now, nats, float64, shape [n]."""

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt is computed once for all its responses by whoever acts now."""
        return False

    def prompt_logps(self, batch: PromptBatch) -> Tensor:
        """log p(y|x) of each response under whoever acts now, nats, float64, shape [responses].

        Plainly: every response as a padded sequence of its own.
        """
        return self.logps(pad_prompts(batch))

    @abstractmethod
    def at(self, iterate: int, token_alpha: float = 0.0) -> AbstractContextManager[None]:
        """Act as a frozen iterate inside the block: eval mode, no gradients.

        With a `token_alpha` > 0, act as g_i, whose next token follows
        softmax((1 - token_alpha) log p_i + token_alpha log p_0).

        Which adapter was active, `requires_grad` of every parameter and the mode of every module
        are as before when the block is left, also by an exception.
        """

    def teams(self, actors: Collection[PolicyId]) -> list[list[PolicyId]]:
        """Split actors into teams that can act in one batch; each alone if nothing else is known.

        Args:
            actors: Who is to act.

        Returns:
            Every one of them once, in an order that depends on nothing else.
        """
        return [[actor] for actor in sorted(set(actors))]

    @contextmanager
    def at_rows(self, team: Collection[PolicyId]) -> Iterator[Seats]:
        """Act as a team inside the block, each row as whoever takes its seat; else like `at`.

        Args:
            team: One of `teams`.

        Yields:
            The seats: `take` says who acts in which row of the next forward passes.
        """
        (actor,) = team
        with self.at(*actor):
            yield _Alone(self.device, doubled=actor.mixes_base)

    @abstractmethod
    def snapshot(self, folder: Path) -> dict[str, str]:
        """Write the trained policy into `folder`; return the SHA-256 of each file by name."""

    @abstractmethod
    def use_iterates(self, folders: Mapping[int, Path]) -> None:
        """Say where the iterates lie."""

    @abstractmethod
    def evict(self, keep: Collection[int] = ()) -> None:
        """Free the memory of every loaded iterate but `keep`; they come back from disk."""

    @abstractmethod
    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that training changes."""


class _Alone:
    """The seats of a team of one."""

    def __init__(self, device: torch.device, *, doubled: bool) -> None:
        self._device = device
        self._copies = 2 if doubled else 1

    def take(self, actors: Sequence[PolicyId]) -> Lanes:
        rows = torch.arange(len(actors), device=self._device)
        lanes = torch.arange(len(actors) * self._copies, device=self._device)
        return Lanes(rows.repeat(self._copies), lanes >= len(actors))

    def keep(self, staying: Tensor) -> Tensor:
        return staying.repeat(self._copies).nonzero().squeeze(-1)
