"""A language small enough to enumerate, so that every distribution over it is known exactly."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from spin_lightning.errors import DataError

PROMPTS: Final = (
    "tell me about the farm",
    "tell me about the harbour",
    "tell me about the school",
    "tell me about the market",
    "what happens in the morning",
    "what happens at noon",
    "what happens in the evening",
    "what happens at night",
)
# One word of each slot in turn; the empty word makes a slot optional, so that lengths differ.
SLOTS: Final = (
    ("farmers", "sailors", "teachers", "bakers", "painters"),
    ("", "always", "often", "rarely", "never"),
    ("work", "sing", "wait", "dance", "walk"),
    ("", "slowly", "together", "outside", "alone"),
)
# Standard deviation of the log-weights, and how many sets of transitions the prompts share. Chosen
# so that a good base is 0.5 to 0.6 nats from the data and one iterate of SPIN removes most of it.
_SPREAD = 1.3
_KINDS = 2


@dataclass(frozen=True, eq=False)
class Language:
    """Two known distributions over the same sentences: the data's, and a dialect to start from.

    A response is a walk through `SLOTS`, "sailors rarely dance together". Its first word is drawn
    given the prompt, each later word given the one before it.

    Attributes:
        prompts: X prompts, equally likely.
        responses: Y responses, the same for every prompt.
        log_probs: log p_data(y|x), nats, float64, shape [X, Y].
        dialect_log_probs: log of half p_data, half another weighting of the same grammar, likewise.
    """

    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    log_probs: Tensor
    dialect_log_probs: Tensor

    @classmethod
    def make(cls, seed: int = 0) -> Language:
        """Draw the weights of a language.

        Args:
            seed: The same seed gives the same language.

        Returns:
            8 prompts, 625 responses of two to four words.

        >>> language = Language.make(seed=0)
        >>> language.prompts[0], language.responses[444]
        ('tell me about the farm', 'bakers often dance alone')
        >>> bool(torch.allclose(language.log_probs.exp().sum(dim=1), torch.ones(8).double()))
        True
        """
        generator = torch.Generator().manual_seed(seed)
        data, other = _random_weighting(generator), _random_weighting(generator)
        return cls(
            prompts=PROMPTS,
            responses=tuple(" ".join(filter(None, words)) for words in itertools.product(*SLOTS)),
            log_probs=data,
            dialect_log_probs=torch.logaddexp(data, other) - math.log(2),
        )

    def save(self, path: Path) -> None:
        """Write the language as JSON; floats are exact."""
        content = {
            "prompts": self.prompts,
            "responses": self.responses,
            "log_probs": self.log_probs.tolist(),
            "dialect_log_probs": self.dialect_log_probs.tolist(),
        }
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Language:
        """Read what `save` wrote.

        Raises:
            DataError: The file is missing or does not hold a language.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                prompts=tuple(content["prompts"]),
                responses=tuple(content["responses"]),
                log_probs=torch.tensor(content["log_probs"], dtype=torch.float64),
                dialect_log_probs=torch.tensor(content["dialect_log_probs"], dtype=torch.float64),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} does not hold a testbed language ({error})",
                fix="give the language.json that lies beside the testbed's data.jsonl",
            ) from error


def sample(log_probs: Tensor, n: int, seed: int) -> list[tuple[int, int]]:
    """Draw pairs: a prompt uniformly, then a response from its distribution.

    Args:
        log_probs: log p(y|x), nats, shape [X, Y].
        n: Number of pairs.
        seed: Seed of a separate generator; the global random state does not change.

    Returns:
        n pairs (index of the prompt, index of the response).
    """
    generator = torch.Generator().manual_seed(seed)
    cells = torch.multinomial(
        log_probs.exp().flatten(), n, replacement=True, generator=generator
    ).tolist()
    return [divmod(cell, log_probs.shape[1]) for cell in cells]


def _random_weighting(generator: torch.Generator) -> Tensor:
    """log p(y|x) of the grammar under normal log-weights, float64, shape [X, Y]."""
    words = len(SLOTS[0])

    def draw(*shape: int) -> Tensor:
        weights = torch.randn(*shape, words, generator=generator, dtype=torch.float64)
        return (_SPREAD * weights).log_softmax(dim=-1)

    first = draw(len(PROMPTS))
    # Shared between every second prompt: what is learned on one prompt helps on another.
    steps = draw(_KINDS, len(SLOTS) - 1, words).repeat(len(PROMPTS) // _KINDS, 1, 1, 1)
    path = torch.cartesian_prod(*[torch.arange(words)] * len(SLOTS))
    log_probs = first[:, path[:, 0]]
    for slot in range(1, len(SLOTS)):
        log_probs = log_probs + steps[:, slot - 1, path[:, slot - 1], path[:, slot]]
    return log_probs
