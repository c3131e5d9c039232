"""Every opponent's rows are samples of its density: chi-square against an enumeration.

The densities are computed here with transformers and peft alone, from the adapters' folders, over
every response of the testbed's language; what is not of the language is one cell per prompt.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoTokenizer

from spin_lightning import SPIN, AlphaSPIN, FictitiousSPIN, MixtureSPIN, SelfPlayModule
from spin_lightning.data.rows import RowTable, read_rows
from spin_lightning.drawing import NO_ROWS, EarlierRows, RowPlan
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.mixtures import Coupling, Mixture
from spin_lightning.policies.lora import LoraPolicy, LoraSettings
from spin_lightning.policies.pretrained import BaseModel, load_config
from spin_lightning.sampling import GenerationSettings
from spin_lightning.synthesis import Synthesis, Timing, finish
from spin_lightning.testbed import Language, TestbedPaths
from spin_lightning.types import Example
from tests.testbed.chi_square import chi_square
from tests.toy_adapters import plain_model, write_adapter

LAST = 3  # Iterates 0 to 3 are there, 0 the base.
DRAWS = 20_000
CAP = 6


class DecayingSPIN(SelfPlayModule):
    """As a user writes one: every iterate, each with half the weight of the one after it."""

    def opponent(self, t: int) -> Mixture:
        return Mixture.normalized({i: 0.5 ** (t - i) for i in range(t + 1)})

    def reference(self, t: int) -> Mixture:
        return self.opponent(t)


@dataclass(frozen=True)
class Opponent:
    """A module, and by hand what its opponent at iterate 3 is."""

    variant: type[SelfPlayModule]
    weights: Mapping[int, float]
    token_alpha: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def module(self, base: BaseModel) -> SelfPlayModule:
        return self.variant(model=base.name, **self.settings)


def pulled(history: int) -> dict[str, Any]:
    return {"alpha": 0.5, "mixture": "token", "history": history}


LATEST = Opponent(SPIN, {3: 1.0})
WINDOW = Opponent(MixtureSPIN, {1: 1 / 3, 2: 1 / 3, 3: 1 / 3}, settings={"history": 3})
ALL = Opponent(FictitiousSPIN, {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25})
DECAYING = Opponent(DecayingSPIN, {0: 1 / 15, 1: 2 / 15, 2: 4 / 15, 3: 8 / 15})
TOKEN = Opponent(AlphaSPIN, {3: 1.0}, 0.5, pulled(history=1))
TOKEN_WINDOW = Opponent(AlphaSPIN, {2: 0.5, 3: 0.5}, 0.5, pulled(history=2))
OPPONENTS = {
    "spin": LATEST,
    "window": WINDOW,
    "fictitious": ALL,
    "decaying": DECAYING,
    "token": TOKEN,
    "token-window": TOKEN_WINDOW,
}


# ------------------------------------------------------------------------ by transformers and peft


class Enumeration:
    """log p(y|x) of every response of the language to two prompts, under any iterate."""

    def __init__(self, paths: TestbedPaths, adapters: Mapping[int, Path]) -> None:
        language = Language.load(paths.language)
        tokenizer = AutoTokenizer.from_pretrained(paths.model)
        stop = tokenizer.eos_token_id

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        # One prompt of six words and one of five, so that rows are padded.
        self.prompts = [tuple(tokenizer(language.prompts[x])["input_ids"]) for x in (0, 5)]
        self.responses = [(*ids(text), stop) for text in language.responses]
        self._place = {response: y for y, response in enumerate(self.responses)}
        self._tokens = torch.nested.nested_tensor(
            [torch.tensor(response) for response in self.responses]
        ).to_padded_tensor(-1)
        self._models = {t: plain_model(paths.model, adapters.get(t)) for t in range(LAST + 1)}

    @functools.cache  # noqa: B019
    def _next_token_logps(self, t: int) -> Tensor:
        """log p_t(. | x, y_<s), shape [prompts, responses, positions, vocabulary]."""
        count, longest = self._tokens.shape
        tables = []
        for prompt in self.prompts:
            before = torch.tensor(prompt).expand(count, -1)
            with torch.no_grad():
                # What follows the stop id is never read.
                logits = self._models[t](torch.cat([before, self._tokens.clamp_min(0)], 1)).logits
            tables.append(logits[:, len(prompt) - 1 : -1].double().log_softmax(-1))
        assert tables[0].shape[1] == longest
        return torch.stack(tables)

    def member(self, t: int, token_alpha: float = 0.0) -> Tensor:
        """log p_t or log g_t, nats, shape [prompts, responses]."""
        table = self._next_token_logps(t)
        if token_alpha:
            mixed = (1 - token_alpha) * table + token_alpha * self._next_token_logps(0)
            table = mixed - mixed.logsumexp(-1, keepdim=True)
        index = self._tokens.clamp_min(0).expand(len(self.prompts), -1, -1)
        chosen = table.gather(-1, index[..., None]).squeeze(-1)
        return torch.where(self._tokens >= 0, chosen, 0.0).sum(-1)

    def density(self, weights: Mapping[int, float], token_alpha: float = 0.0) -> Tensor:
        """log of the mixture, nats, shape [prompts, responses]."""
        each = [self.member(t, token_alpha) + math.log(w) for t, w in weights.items()]
        return torch.stack(each).logsumexp(0)

    def of(self, opponent: Opponent) -> Tensor:
        """log of the opponent's density, likewise."""
        return self.density(opponent.weights, opponent.token_alpha)

    def counts(self, table: RowTable, opponent: int | None = None) -> tuple[Tensor, Tensor]:
        """How often each response was drawn, and anything else; of one opponent or of all."""
        inside = torch.zeros(len(self.prompts), len(self.responses))
        outside = torch.zeros(len(self.prompts))
        for row in range(len(table)):
            if opponent is None or table.opponent[row] == opponent:
                x = int(table.example_id[row])
                y = self._place.get(tuple(table.generated_ids[row].tolist()))
                if y is None:
                    outside[x] += 1
                else:
                    inside[x, y] += 1
        return inside, outside

    def in_language(self, table: RowTable) -> list[tuple[int, int, int]]:
        """Row, prompt and response of each row whose response is of the language."""
        places = (self._place.get(tuple(ids.tolist())) for ids in map(
            table.generated_ids.__getitem__, range(len(table))
        ))
        return [(n, int(table.example_id[n]), y) for n, y in enumerate(places) if y is not None]


@pytest.fixture(scope="module")
def adapters(testbed_seed_0, tmp_path_factory) -> dict[int, Path]:
    """Iterates 1 to 3: random, 0.1 to 0.5 nats from each other."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        t: write_adapter(testbed_seed_0.model, root / str(t), seed=t) for t in range(1, LAST + 1)
    }


@pytest.fixture(scope="module")
def exact(testbed_seed_0, adapters) -> Enumeration:
    return Enumeration(testbed_seed_0, adapters)
