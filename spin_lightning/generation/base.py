"""The interface of a generation engine: requests in, responses out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.policies.base import Policy
from spin_lightning.types import PolicyId


@dataclass(frozen=True, slots=True)
class Request:
    """One response to sample.

    Attributes:
        prompt_ids: The prompt, at least one token.
        opponent: Index of the iterate that generates.
        key: Key of the row's random numbers (`keyed.row_key`).
        cap: Maximum number of response tokens, including the stop id.
        token_alpha: Weight of the base at every token; 0 for the iterate itself.
    """

    prompt_ids: tuple[int, ...]
    opponent: int
    key: int
    cap: int
    token_alpha: float = 0.0

    @property
    def policy(self) -> PolicyId:
        """The frozen policy that generates."""
        return PolicyId(self.opponent, self.token_alpha)

    @property
    def total(self) -> int:
        """Most tokens of prompt and response together."""
        return len(self.prompt_ids) + self.cap


@dataclass(frozen=True, slots=True)
class Response:
    """A sampled response.

    Attributes:
        ids: Up to and including the one that ends it, or the first `cap` ids.
        finished: Whether it ended by itself: at a stop id, or where its decoder's `ends` says.
        logp: log-prob of the ids under the policy that generated them, at temperature 1 without
            truncation, summed while sampling, nats; None if it was not recorded.
    """

    ids: tuple[int, ...]
    finished: bool
    logp: float | None = None


class Generator(ABC):
    """A generation engine: samples responses from the frozen iterates of a policy.

    To add an engine, subclass this class in its own file and implement `generate`. An engine
    uses only these members of a policy:

    - `model` and `device`: the causal language model with its `config`, and where inputs go.
    - `batch_groups(ids)`: which of the requested policies (`Request.policy`) can share a batch.
    - `at_rows(group)`: act as such a group inside a block, a policy per row of the batch.
    - `at(iterate, token_alpha)`: act as one frozen policy inside a block.
    - `iterate_folder(iterate)`: the PEFT adapter folder of an iterate, None for the bare base, for
      engines that load adapters into a separate server or process.

    `SelfPlayModule.make_generator` chooses the engine.

    Attributes:
        on_progress: Set while somebody watches: call it with the number of responses that have
            just been completed, as often as you like.
        scratch: Set while a work unit's rows are made: a folder for what the engine wants to find
            again if the process ends in the middle. It is deleted with the unit's last row.
        computes_elsewhere: Whether another program computes the policies, with kernels and rounding
            of its own. The gap between its log-probs and ours is then logged; otherwise a gap that
            rounding does not explain stops the run.
    """

    on_progress: Callable[[int], None] | None = None
    scratch: Path | None = None
    computes_elsewhere: ClassVar[bool] = False

    def check(self, longest: int) -> None:  # noqa: B027
        """Check all that can be checked before weights are read; by default nothing.

        Args:
            longest: Tokens of the longest prompt and response together.
        """

    def rest(self) -> None:  # noqa: B027
        """Free what is not needed until the next rows; by default nothing. Called on one rank."""

    @abstractmethod
    def generate(self, policy: Policy, requests: Sequence[Request]) -> list[Response]:
        """Sample one response per request.

        The same policy and the same list of requests have to give the same responses: draw every
        token from the request's key and the token's position (`keyed.position_uniforms`), never
        from global random state. A response ends with its first stop id or after `cap` tokens.

        Args:
            policy: The policy whose iterates generate.
            requests: Prompts, each with its iterate, key and cap.

        Returns:
            Responses in the order of the requests.
        """

    @property
    def deviations(self) -> Mapping[str, Any]:
        """Settings overridden at run time, by name, for the manifest; none by default."""
        return {}


class MakeGenerator(Protocol):
    """Builds a generation engine; the class `LocalGenerator` is one."""

    def __call__(
        self, stop_ids: tuple[int, ...], pad_id: int, settings: GenerationSettings
    ) -> Generator:
        """Build an engine.

        Args:
            stop_ids: A response ends with the first of these.
            pad_id: Any valid id, for padded columns, which are masked.
            settings: Sampling settings and batch size.
        """
