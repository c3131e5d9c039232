"""What the self-play loop needs from a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from spin_lightning.packing import pad_prompts
from spin_lightning.types import PromptBatch, SequenceBatch


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

    @abstractmethod
    def snapshot(self, folder: Path) -> dict[str, str]:
        """Write the trained policy into `folder`; return the SHA-256 of each file by name."""

    @abstractmethod
    def use_bank(self, folders: Mapping[int, Path]) -> None:
        """Say where the iterates lie."""

    @abstractmethod
    def evict(self, keep: Collection[int] = ()) -> None:
        """Free the memory of every loaded iterate but `keep`; they come back from disk."""

    @abstractmethod
    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that training changes."""
