"""What generation takes and gives, whoever does it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from spin_lightning.policies.base import Policy


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


@dataclass(frozen=True, slots=True)
class Response:
    """A sampled response: ids up to and including the stop id, or the first `cap` ids."""

    ids: tuple[int, ...]
    finished: bool


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
