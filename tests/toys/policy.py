"""A policy that is a table of next-token probabilities over a language small enough to enumerate.

Two prompts; responses of at most three tokens out of two words and a stop id: 7 finished ones and
the 8 of full length that do not stop. All in float64, all exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from spin_lightning import SelfPlayModule
from spin_lightning.data.collate import collate
from spin_lightning.data.dataset import PairDataset
from spin_lightning.generation.base import Generator, Request, Response
from spin_lightning.packing import pad_prompts
from spin_lightning.policies.base import Policy
from spin_lightning.rows.making import Synthesis, Timing, finish
from spin_lightning.rows.plan import RowPlan
from spin_lightning.rows.store import RowTable, read_rows
from spin_lightning.types import Example, PairBatch, SequenceBatch

STOP, WORDS, CAP = 2, (3, 4), 3
TOKENS = (STOP, *WORDS)
PROMPTS = ((1, 5), (1, 6, 7))
PREFIXES = [p for length in range(CAP) for p in itertools.product(WORDS, repeat=length)]
RESPONSES = [*((*p, STOP) for p in PREFIXES), *itertools.product(WORDS, repeat=CAP)]
# Every finished response to every prompt, once for each response that is generated against it.
EXAMPLES = [
    Example(i, prompt, real, True)
    for i, (prompt, real, _) in enumerate(
        itertools.product(PROMPTS, RESPONSES[: len(PREFIXES)], RESPONSES)
    )
]


def some_table(seed: int) -> Tensor:
    """log p(token | prompt, prefix), nats, shape [prompts, prefixes, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(PROMPTS), len(PREFIXES), len(TOKENS))
    return torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)


def language(table: Tensor) -> Tensor:
    """log p(y|x) of every response to every prompt, shape [prompts, responses]."""
    return torch.stack(
        [
            sum(
                table[:, PREFIXES.index(response[:s]), TOKENS.index(token)]
                for s, token in enumerate(response)
            )
            for response in RESPONSES
        ],
        dim=-1,
    )


def table_of(log_density: Tensor) -> Tensor:
    """The next-token table of any distribution over the responses, by the chain rule.

    Args:
        log_density: log p(y|x), shape [prompts, responses], normalized or not.
    """

    def mass(prefix: tuple[int, ...]) -> Tensor:
        inside = [i for i, y in enumerate(RESPONSES) if y[: len(prefix)] == prefix]
        return log_density[:, inside].logsumexp(-1)

    rows = [torch.stack([mass((*p, token)) for token in TOKENS], dim=-1) for p in PREFIXES]
    return torch.stack(rows, dim=1).log_softmax(-1)


class ToyPolicy(Policy):
    """Trainable logits of a table, and frozen tables as iterates.

    Args:
        logits: The trained policy's, shape [prompts, prefixes, tokens].
        iterates: The table of each iterate.
    """

    def __init__(self, logits: Tensor, iterates: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self._iterates = dict(iterates)
        self._acting: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def logps(self, batch: SequenceBatch) -> Tensor:
        """Look up every sequence."""
        table = self.logits if self._acting is None else self._acting
        whole = language(table.log_softmax(-1))
        places = [_place(*ids) for ids in sequences(batch)]
        return torch.stack([whole[place] for place in places])

    @contextmanager
    def at(self, iterate: int, token_alpha: float = 0.0) -> Iterator[None]:
        mixed = (1 - token_alpha) * self._iterates[iterate] + token_alpha * self._iterates[0]
        self._acting = mixed.log_softmax(-1)
        try:
            with torch.no_grad():
                yield
        finally:
            self._acting = None

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "logits", self.logits

    def snapshot(self, folder: Path) -> dict[str, str]:
        raise NotImplementedError

    def use_iterates(self, folders: Mapping[int, Path]) -> None:
        raise NotImplementedError

    def iterate_folder(self, iterate: int) -> Path | None:
        raise NotImplementedError

    def evict(self, keep: Collection[int] = ()) -> None:
        raise NotImplementedError


class EveryResponse(Generator):
    """Answers with every response in turn, for any policy."""

    def generate(self, policy: Policy, requests: Sequence[Request]) -> list[Response]:
        turns = itertools.cycle(RESPONSES)
        return [Response(y, y[-1] == STOP) for _, y in zip(requests, turns, strict=False)]


def sequences(batch: SequenceBatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and response of each sequence of a batch, without the padding."""
    found = []
    for ids, mask, length in zip(
        batch.input_ids, batch.attention_mask, batch.response_lengths.tolist(), strict=True
    ):
        tokens = tuple(ids[mask.bool()].tolist())
        found.append((tokens[:-length], tokens[-length:]))
    return found


def make_rows(module: SelfPlayModule, folder: Path) -> RowTable:
    """The rows that train the module's next iterate."""
    opponent, reference = module.opponent(module.iterate), module.reference(module.iterate)
    plan = RowPlan(
        iterate=module.iterate,
        opponent=opponent,
        members=tuple(range(module.iterate + 1)),
        seed=0,
        samples=1,
        unit_size=len(EXAMPLES),
        cap=CAP,
        context=64,
        token_alpha=reference.token_alpha,
        token_members=reference.token_members,
    )
    synthesis = Synthesis(module.policy, EveryResponse(), vocabulary=len(TOKENS))
    list(synthesis.make(plan, EXAMPLES, folder, Timing()))
    finish(plan, EXAMPLES, folder, {})
    return read_rows(folder)


def make_batch(module: SelfPlayModule, folder: Path) -> PairBatch:
    """All those rows as one batch with the module's references."""
    t = module.iterate
    further = module.further_references(t)
    pairs = PairDataset(make_rows(module, folder), module.reference(t), further)
    return collate([pairs[i] for i in range(len(pairs))])


def over_language(values: Tensor, batch: PairBatch, side: int) -> Tensor:
    """Spread values of a batch's real (0) or generated (1) responses over the language.

    Args:
        values: One per pair, shape [n].
        batch: The pairs.
        side: 0 for real, 1 for generated.

    Returns:
        Values by prompt and response, shape [prompts, responses]; NaN where the batch has none.
    """
    whole = torch.full((len(PROMPTS), len(RESPONSES)), torch.nan, dtype=torch.float64)
    for ids, value in zip(sequences(pad_prompts(batch.pairs))[side::2], values, strict=True):
        whole[_place(*ids)] = value
    return whole


def _place(prompt: tuple[int, ...], response: tuple[int, ...]) -> tuple[int, int]:
    return PROMPTS.index(prompt), RESPONSES.index(response)
