"""The interface of a policy: one trained model and its frozen iterates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from spin_lightning.out_of_memory import TokenLimit, in_parts
from spin_lightning.packing import halve_responses, pad_prompts, pass_tokens
from spin_lightning.types import PolicyId, PromptBatch, SequenceBatch


class RowRouting(Protocol):
    """Which policy computes each row of a batch, inside `Policy.at_rows`.

    The model's own batch and cache have a lane per row: lane i computes row i. Where rows are mixed
    with the base there are two: of n rows, lane n + i is the base's copy of row i.

    Attributes:
        form: Differs where kernels of the model, or addresses of what they read, differ between
            passes of one shape.
    """

    form: Hashable

    def assign(self, ids: Sequence[PolicyId]) -> None:
        """Set the policy of each row of the forward passes that follow.

        Args:
            ids: One per row, each from the group given to `at_rows`; all of them are mixed with
                the base, or none is. Long rows are fastest with those of one policy side by side.
        """


class Policy(nn.Module, ABC):
    """A trainable policy p_theta with its frozen iterates p_0 … p_t.

    Attributes:
        model: The causal language model. It computes the active policy: the trained one, or inside
            `at` a frozen iterate.
        scoring_limit: Tokens of a scoring pass, as far as memory suffices.
        training_limit: Tokens of a training pass, likewise.
    """

    model: nn.Module

    def __init__(self) -> None:
        """Start without limits."""
        super().__init__()
        self.scoring_limit = TokenLimit("scoring")
        self.training_limit = TokenLimit("training")

    @property
    def deviations(self) -> Mapping[str, str]:
        """What is computed otherwise than the settings say, and why; recorded with the rows."""
        return {}

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device that inputs have to be on."""

    @property
    def training_tokens(self) -> int:
        """Tokens of a training pass; one can be longer by up to one pair."""
        return pass_tokens(self.device)

    @abstractmethod
    def logps(self, batch: SequenceBatch) -> Tensor:
        """log p(y|x) of each sequence under the active policy, nats, float64, shape [n]."""

    @property
    def shares_prompts(self) -> bool:
        """Whether the active policy computes a prompt once for all its responses."""
        return False

    @property
    def largest_bias(self) -> float:
        """How far the mean log-prob of responses may depend on the pass, nats per token."""
        return 0.02

    def prompt_logps(self, batch: PromptBatch) -> Tensor:
        """log p(y|x) of each response under the active policy, nats, float64, shape [responses].

        By default, every response is a separate padded sequence.
        """
        return self.logps(pad_prompts(batch))

    def score(self, batch: PromptBatch) -> Tensor:
        """`prompt_logps`; without gradients, in halves where memory does not suffice.

        Raises:
            SpinError: Memory does not suffice for a single response.
        """
        if torch.is_grad_enabled():
            return self.prompt_logps(batch)  # a step splits its passes itself: `pass_by_pass`
        parts = in_parts(
            [batch],
            self.prompt_logps,
            lambda part: len(part.input_ids),
            halve_responses,
            self.scoring_limit,
            fix="set a smaller data.max_prompt_tokens or data.max_response_tokens, or "
            "model.quantization: nf4",
        )
        return torch.cat(list(parts))

    def check_passes(self, batch: PromptBatch) -> None:
        """Check, on a batch of the data, that fast passes compute what plain ones do."""

    @property
    def is_sharded(self) -> bool:
        """Whether other processes take part in every pass, so that none can be repeated alone."""
        return False

    def sharded_names(self) -> list[str]:
        """Names of the parameters of which this process holds a part; empty for a whole base."""
        return []

    def serve_others(self) -> None:
        """Take part in the passes of other processes, if they need this, until they make none.

        Every process of a run has to call this before it waits for the others in any other way.
        """

    @abstractmethod
    def at(self, iterate: int, token_alpha: float = 0.0) -> AbstractContextManager[None]:
        """Act as a frozen iterate inside the block: eval mode, no gradients.

        With `token_alpha` > 0, act as g_i, whose next token follows
        softmax((1 - token_alpha) log p_i + token_alpha log p_0).

        Leaving the block, also by an exception, restores the active adapter, `requires_grad` of
        every parameter and the mode of every module.
        """

    def batch_groups(self, ids: Collection[PolicyId]) -> list[list[PolicyId]]:
        """Split policies into groups that can share a batch; by default, one per group.

        Policies that are mixed with the base share no group with others.

        Args:
            ids: Policies, with or without repeats.

        Returns:
            Each of them once; the order depends on the set of them alone.
        """
        return [[policy_id] for policy_id in sorted(set(ids))]

    @contextmanager
    def at_rows(self, group: Collection[PolicyId]) -> Iterator[RowRouting]:
        """Act as a group of policies inside the block, row by row; otherwise like `at`.

        Args:
            group: One group of `batch_groups`.

        Yields:
            The routing, whose `assign` sets the policy of each row.
        """
        (policy_id,) = group
        with self.at(*policy_id):
            yield SinglePolicy()

    @abstractmethod
    def snapshot(self, folder: Path) -> dict[str, str]:
        """Write the trained policy into `folder`; return the SHA-256 of each file by name."""

    @abstractmethod
    def use_iterates(self, folders: Mapping[int, Path]) -> None:
        """Set the folder of each frozen iterate."""

    @abstractmethod
    def iterate_folder(self, iterate: int) -> Path | None:
        """PEFT adapter folder of a frozen iterate, None for the bare base."""

    @abstractmethod
    def evict(self, keep: Collection[int] = ()) -> None:
        """Free the memory of every loaded iterate but `keep`; `at` loads them again from disk."""

    @abstractmethod
    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that training changes."""


class SinglePolicy:
    """The routing of a group of one, whose model doubles its batch itself where it has to."""

    form: Hashable = None

    def assign(self, ids: Sequence[PolicyId]) -> None:
        """See `RowRouting.assign`; all ids are the one policy's."""
