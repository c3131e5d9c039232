"""What generation takes and gives, whoever does it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.policies.base import Policy
from spin_lightning.types import PolicyId


@dataclass(frozen=True, slots=True)
class Request:
    """One response to sample.

    Attributes:
        prompt_ids: The prompt, at least one token.
        opponent: The iterate that answers.
        key: Key of the row's random numbers (`keyed.row_key`).
        cap: Most response tokens, the stop id counted.
        token_alpha: Weight of the base at every token; 0 for the iterate itself.
    """

    prompt_ids: tuple[int, ...]
    opponent: int
    key: int
    cap: int
    token_alpha: float = 0.0

    @property
    def actor(self) -> PolicyId:
        """Who answers."""
        return PolicyId(self.opponent, self.token_alpha)


@dataclass(frozen=True, slots=True)
class Response:
    """A sampled response.

    Attributes:
        ids: Up to and including the stop id, or the first `cap` ids.
        finished: Whether the last of them is a stop id.
        logp: log-prob of the ids under whoever wrote them, at temperature 1 without truncation,
            as it was met while sampling, nats; None where it was not kept.
    """

    ids: tuple[int, ...]
    finished: bool
    logp: float | None = None


class Generator(ABC):
    """Samples responses from the iterates of a policy."""

    @abstractmethod
    def generate(self, policy: Policy, requests: Sequence[Request]) -> list[Response]:
        """Sample one response per request.

        The same policy and the same list of requests give the same responses.

        Args:
            policy: The policy whose iterates answer.
            requests: What to sample.

        Returns:
            Responses in the order of the requests.
        """

    @property
    def deviations(self) -> Mapping[str, Any]:
        """What is now done otherwise than the settings say, by name; the manifest tells."""
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
