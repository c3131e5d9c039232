"""Counts of a training step on the pretend device, whose hooks have to be loaded before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import ours, peer
from benchmarks.setup import Setup, quiet
from benchmarks.workload import SIZES, batches_of
from spin_lightning.data.collate import collate
from spin_lightning.data.dataset import Pair
from spin_lightning.modules import pass_by_pass
from tests.pretend_cuda.counts import Counts
from tests.pretend_cuda.device import DEVICE, move
from tests.pretend_cuda.machine import machine

# What a layer costs is the difference between two depths, over their difference.
_DEPTHS = (2, 4)


@dataclass(frozen=True)
class Cost:
    """What a step asks of the device.

    Attributes:
        kernels: Launches per layer: forward pass, recomputation and backward pass.
        casts: Those of them that copy into another type or layout.
        float32_products: Those of them that multiply float32 matrices.
        syncs: Points per layer where the host waits for the device.
        syncs_of_step: Those of a whole step.
    """

    kernels: float
    casts: float
    float32_products: float
    syncs: float
    syncs_of_step: int

    @classmethod
    def between(cls, shallow: Counts, deep: Counts) -> Cost:
        """The cost from the counts of `_DEPTHS`."""
        return cls(
            *(
                (of_deep - of_shallow) / (_DEPTHS[1] - _DEPTHS[0])
                for of_shallow, of_deep in zip(_totals(shallow), _totals(deep), strict=True)
            ),
            syncs_of_step=deep.syncs.total(),
        )


def _totals(counts: Counts) -> tuple[int, int, int, int]:
    products = counts.float32_products.total()
    return counts.kernels.total(), counts.casts, products, counts.syncs.total()


def table(out: Path) -> str:
    """Costs of every side as a table in Markdown; models are made in a folder of `out`."""
    sides: dict[str, Callable[[Setup, Sequence[Pair]], Counts]] = {
        "ours": lambda setup, pairs: _our_counts(setup, pairs),
        "ours, `packing: padded`, `fused_lora: false`: the layers of PEFT and transformers": (
            lambda setup, pairs: _our_counts(setup, pairs, packing="padded", fused_lora=False)
        ),
    }
    if peer.is_there():
        sides["TRL's DPOTrainer"] = _their_counts
    header = "| per layer | launches | casts | float32 products | host waits | waits per step |"
    lines = [header, "|---|---|---|---|---|---|"]
    with quiet():
        for name, side in sides.items():
            cost = Cost.between(*(_at_depth(layers, out, side) for layers in _DEPTHS))
            lines.append(
                f"| {name} | {cost.kernels:g} | {cost.casts:g} | {cost.float32_products:g} "
                f"| {cost.syncs:g} | {cost.syncs_of_step} |"
            )
    notes = [] if peer.is_there() else ["", peer.MISSING]
    return "\n".join([*lines, *notes])


def _at_depth(layers: int, out: Path, count: Callable[[Setup, Sequence[Pair]], Counts]) -> Counts:
    """Counts of a step of a tiny model with some number of layers."""
    with mock.patch.dict(SIZES["tiny"], num_hidden_layers=layers):
        # Models and adapters are made on the CPU.
        setup = Setup("tiny", "cpu", "bfloat16", out / "launches" / str(layers), tiny=True)
        (pairs,) = batches_of(setup.workload("A"), 1, setup.vocabulary)
        return count(setup, pairs)


def _our_counts(setup: Setup, pairs: Sequence[Pair], **settings: Any) -> Counts:
    adapter = ours.write_adapters(setup)[0]
    module = ours.make_module(setup, "nf4", adapter, activation_checkpointing=True, **settings)
    with machine() as counts:
        module.policy = module.policy_spec.on(DEVICE).build(DEVICE, 0)
        batch = collate(pairs).to(DEVICE)
        return _of_a_warm_step(
            counts, lambda: pass_by_pass.score(module, batch)[1], module.policy.model
        )


def _their_counts(setup: Setup, pairs: Sequence[Pair]) -> Counts:
    """TRL's step, moved to the device once it is built, since accelerate looks for a real one."""
    step = peer.Step(setup, "nf4")
    trainer, model = step.trainer, step.trainer.model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    features = trainer.data_collator(step.features(pairs))
    with machine() as counts:
        move(model)
        inputs = {
            name: value.to(DEVICE) if isinstance(value, Tensor) else value
            for name, value in features.items()
        }

        def loss() -> Tensor:
            with peer.head_on_responses_only(), torch.autocast("cuda", setup.dtype):
                value: Tensor = trainer.compute_loss(model, inputs)
            return value

        return _of_a_warm_step(counts, loss, model)


def _of_a_warm_step(counts: Counts, loss: Callable[[], Tensor], model: Any) -> Counts:
    """Counts of the second step: the first one sets up what is kept."""
    for _ in range(2):
        counts.reset()
        loss().backward()
        model.zero_grad(set_to_none=True)
    return counts.copy()
