"""This library's side of every comparison, by the calls that a run makes."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.setup import Setup
from benchmarks.workload import PAD, PAIRS_PER_STEP, STOP
from spin_lightning import SPIN, SelfPlayDataModule
from spin_lightning.data.collate import collate
from spin_lightning.data.dataset import Pair
from spin_lightning.generation.base import Generator, Request, Response
from spin_lightning.mixtures import window
from spin_lightning.modules import pass_by_pass
from spin_lightning.policies.base import Policy
from spin_lightning.policies.optimizers import make_optimizer
from spin_lightning.rows.making import Synthesis, Timing, finish
from spin_lightning.rows.plan import Coupling, EarlierRows, RowPlan
from spin_lightning.rows.store import read_rows
from spin_lightning.types import Example

ADAPTERS = 4
LEARNING_RATE = 1e-5
BETA = 0.1


def make_module(
    setup: Setup, quantization: str = "none", adapter: Path | None = None, **settings: Any
) -> SPIN:
    """A SPIN module whose policy starts from the given adapter or a fresh one."""
    return SPIN(
        str(setup.base),
        quantization=quantization,
        initial_adapter=None if adapter is None else str(adapter),
        compute_dtype=setup.dtype_name,
        learning_rate=LEARNING_RATE,
        beta=BETA,
        **settings,
    )


def make_trainer(setup: Setup, **settings: Any) -> L.Trainer:
    """A trainer without output, logs or checkpoints."""
    return L.Trainer(
        accelerator=setup.device,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def load_module(setup: Setup, quantization: str = "none", adapter: Path | None = None) -> SPIN:
    """A SPIN module with its policy loaded, on the device."""
    module = make_module(setup, quantization, adapter)
    module.trainer = make_trainer(setup)
    module.configure_model()
    return module


def write_adapters(setup: Setup) -> list[Path]:
    """Four adapters far from the base, made from a seed, for both sides."""
    folders = [setup.out / "adapters" / setup.size / str(t) for t in range(1, ADAPTERS + 1)]
    if all((folder / "adapter_model.safetensors").exists() for folder in folders):
        return folders
    policy = load_module(setup).policy
    source = torch.Generator().manual_seed(1)
    for folder in folders:
        for _, parameter in policy.trainable():
            noise = torch.randn(parameter.shape, generator=source) * 0.02
            parameter.data.copy_(noise)
        policy.snapshot(folder)
    return folders


def use_iterates(policy: Policy, setup: Setup) -> None:
    """Give a policy the base as iterate 0 and the adapters as iterates 1 to 4."""
    bare = setup.out / "adapters" / setup.size / "base"
    bare.mkdir(parents=True, exist_ok=True)
    policy.use_iterates(dict(enumerate([bare, *write_adapters(setup)])))


class Step:
    """A training step: collate, forward, loss, backward, optimizer."""

    def __init__(self, setup: Setup, quantization: str = "none") -> None:
        """Load the policy and its optimizer."""
        self.device = setup.device
        self.module = load_module(setup, quantization, write_adapters(setup)[0])
        parameters = [parameter for _, parameter in self.module.policy.trainable()]
        self.optimizer = make_optimizer("adamw", parameters, LEARNING_RATE, 0.0)

    def loss(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """The loss of a batch, with its graph."""
        batch = collate(pairs).to(self.device)
        return pass_by_pass.score(self.module, batch)[1]

    def __call__(self, pairs: Sequence[Pair]) -> None:
        """Take one step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(pairs).backward()
        self.optimizer.step()


@dataclass
class KnownAnswers(Generator):
    """Answers each prompt with a given response: generation without its cost.

    Attributes:
        responses: Response to each prompt.
        asked: Number of requests so far.
    """

    responses: dict[tuple[int, ...], tuple[int, ...]]
    asked: int = 0

    def generate(self, policy: Policy, requests: Sequence[Request]) -> list[Response]:
        """Return the given responses."""
        del policy
        self.asked += len(requests)
        return [Response(self.responses[r.prompt_ids], finished=True) for r in requests]


@dataclass
class Scoring:
    """Scores and writes rows of fictitious play with given responses, iterate by iterate.

    Attributes:
        synthesis: Makes the rows, as in a run.
        examples: The examples to answer.
        samples: Responses per example.
        unit_size: Rows of a work unit.
    """

    synthesis: Synthesis
    examples: list[Example]
    samples: int = 1
    unit_size: int = 64

    def make(self, t: int, folder: Path, before: Path | None, *, reservoir: bool = True) -> Path:
        """Make the rows of iterate t: reference log-probs under iterates 0 to t."""
        opponent = window(t, None)
        plan = RowPlan(
            iterate=t,
            opponent=opponent,
            members=opponent.members,
            seed=0,
            samples=self.samples,
            unit_size=self.unit_size,
            cap=256,
            context=2048,
        )
        earlier = EarlierRows()
        if before is not None:
            earlier = EarlierRows(read_rows(before))
            if reservoir:
                plan = replace(plan, coupling=Coupling.between(window(t - 1, None), opponent))
        list(self.synthesis.make(plan, self.examples, folder, Timing(), earlier=earlier))
        finish(plan, self.examples, folder, {})
        return folder


def synthesis_of(setup: Setup, policy: Policy, generator: Generator) -> Synthesis:
    """Makes rows as a run does."""
    return Synthesis(policy, generator, setup.vocabulary)


def decoder(module: SPIN) -> Generator:
    """The generation engine of a run."""
    return module.make_generator((STOP,), PAD, module.generation)


def play_iterate(
    setup: Setup, data: Path, cap: int, epochs: int, quantization: str = "none"
) -> None:
    """Play one iterate as a user does: generate, score, train, save the adapter.

    Args:
        setup: Device and sizes.
        data: Prompts and responses, jsonl.
        cap: Maximum number of response tokens.
        epochs: Passes over the rows.
        quantization: Of the base.
    """
    adapter = write_adapters(setup)[0]
    module = make_module(setup, quantization, adapter, epochs_per_iterate=epochs)
    examples = SelfPlayDataModule(
        str(data), max_response_tokens=cap, batch_size=PAIRS_PER_STEP, val_fraction=0.0
    )
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        trainer = make_trainer(setup, max_epochs=epochs, default_root_dir=folder)
        trainer.fit(module, examples)
