"""The fast passes of a policy against the plain ones, on the machine and the data of the run.

Shared prefixes, fused LoRA layers and fused kernels are tested on a CPU. This module compares them
with the plain passes on the run's own device, on a few responses, before the first rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from spin_lightning.errors import first_line
from spin_lightning.out_of_memory import is_out_of_memory
from spin_lightning.types import PromptBatch

if TYPE_CHECKING:
    from spin_lightning.policies.lora import LoraPolicy


@dataclass(frozen=True)
class Tolerance:
    """How far both passes may be apart.

    Attributes:
        difference: See `SelfCheck`.
        cosine: Likewise.
    """

    difference: float
    cosine: float


_FLOAT32 = Tolerance(1e-3, 0.9999)
# bfloat16, float16 and TF32. Rounding alone was seen to put passes in bfloat16 0.14 apart.
_NARROW = Tolerance(0.2, 0.98)
# Activations are rounded by what else is in their batch.
_INT8 = Tolerance(0.3, 0.95)
# Standard deviation of B during the check: that of a fresh adapter is 0, which would hide A.
_B_IN_CHECK = 0.05


@dataclass(frozen=True)
class SelfCheck:
    """How far the fast passes are from the plain ones.

    Attributes:
        difference: Largest difference of a response's log-prob, nats, over the square root of its
            number of tokens.
        cosine: Cosine of the adapter's gradients of the summed log-probs; 1 if both are 0.
    """

    difference: float
    cosine: float

    def agrees(self, within: Tolerance) -> bool:
        """Whether the passes are the same but for rounding."""
        return self.difference <= within.difference and self.cosine >= within.cosine

    def __str__(self) -> str:
        """Both figures."""
        return (
            f"log-probs differ by at most {self.difference:.2g} nats per √token, "
            f"cosine of the gradients {self.cosine:.6f}"
        )


@dataclass(frozen=True)
class Verdict:
    """What a self-check says.

    Attributes:
        agrees: Whether the fast passes may be used.
        text: The finding with its numbers, in words.
    """

    agrees: bool
    text: str


def check_passes(policy: LoraPolicy, batch: PromptBatch) -> None:
    """Check a policy; if its fast passes fail or disagree, it takes the plain ones from now on.

    Args:
        policy: The policy, not inside `at`.
        batch: A few prompts and responses.
    """
    verdict = judge_passes(policy, batch)
    if verdict.agrees:
        rank_zero_info(f"Self-check: {verdict.text}.")
    else:
        _give_up(policy, verdict.text)


def judge_passes(policy: LoraPolicy, batch: PromptBatch) -> Verdict:
    """Compare the passes of a policy, which stays as it is; see `check_passes`."""
    try:
        found = self_check(policy, batch)
    except FastPassError as error:
        return Verdict(False, f"the fast passes fail on this machine ({error})")
    within = _tolerance(policy)
    if found.agrees(within):
        return Verdict(True, f"fast and plain passes agree ({found})")
    return Verdict(
        False,
        f"the fast passes disagree with the plain ones on this machine ({found}; allowed: "
        f"{within.difference:g} and {within.cosine:g})",
    )


def _tolerance(policy: LoraPolicy) -> Tolerance:
    if policy.base.quantization == "int8":
        return _INT8
    is_exact = torch.get_float32_matmul_precision() == "highest"
    return _FLOAT32 if policy.base.dtype == torch.float32 and is_exact else _NARROW


def _give_up(policy: LoraPolicy, problem: str) -> None:
    take_plain_passes(policy)
    policy.plain_because = problem
    warnings.warn(
        f"Self-check: {problem}. The run goes on with padded sequences and the layers of PEFT and "
        "transformers, which is slower.",
        stacklevel=2,
    )


class FastPassError(RuntimeError):
    """A fast pass raised an error, other than for a lack of memory."""


def self_check(policy: LoraPolicy, batch: PromptBatch) -> SelfCheck:
    """Compare both passes on a batch.

    Raises:
        FastPassError: The fast pass raises an error.
    """
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()  # without dropout
    try:
        # Compiled layers would be compiled again in eval mode.
        with policy.uncompiled(), _without_zeros(policy):
            fast = _fast_outcome(policy, batch)
            with plain_passes(policy):
                plain = _outcome(policy, batch)
    finally:
        for module, training in modes:
            module.training = training
    if not plain[0].isfinite().all():
        return SelfCheck(0.0, 1.0)  # scoring itself reports numbers that are not finite
    roots = torch.tensor(batch.flat_lengths).double().sqrt().to(fast[0].device)
    difference = ((fast[0] - plain[0]).abs() / roots).max()
    return SelfCheck(float(difference), _cosine(fast[1], plain[1]))


@contextmanager
def _without_zeros(policy: LoraPolicy) -> Iterator[None]:
    """Add small fixed numbers to the trained weights inside the block."""
    generator = torch.Generator().manual_seed(0)
    before = [(parameter, parameter.detach().clone()) for _, parameter in policy.trainable()]
    try:
        for parameter, kept in before:
            noise = torch.randn(kept.shape, generator=generator) * _B_IN_CHECK
            parameter.data.copy_(kept + noise.to(kept))
        yield
    finally:
        for parameter, kept in before:
            parameter.data.copy_(kept)


def _fast_outcome(policy: LoraPolicy, batch: PromptBatch) -> tuple[Tensor, Tensor]:
    try:
        return _outcome(policy, batch)
    # Kernels that do not support a device raise errors of many classes.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise FastPassError(first_line(error)) from error


@contextmanager
def plain_passes(policy: LoraPolicy) -> Iterator[None]:
    """Padded sequences through the layers of torch, transformers and PEFT inside the block."""
    before = [(module, type(module)) for module in policy.model.modules()]
    shares_prefixes = policy.shares_prefixes
    take_plain_passes(policy)
    try:
        yield
    finally:
        policy.shares_prefixes = shares_prefixes
        for module, kind in before:
            module.__class__ = kind


def take_plain_passes(policy: LoraPolicy) -> None:
    """Give a policy padded sequences and the layers of torch, transformers and PEFT for good."""
    policy.shares_prefixes = False
    for module in policy.model.modules():
        module.__class__ = _plain_class(type(module))


def _plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    return next(base for base in kind.__mro__ if not base.__module__.startswith("spin_lightning."))


def _outcome(policy: LoraPolicy, batch: PromptBatch) -> tuple[Tensor, Tensor]:
    """Log-probs of the responses, and the adapter's gradients of their sum."""
    parameters = [parameter for _, parameter in policy.trainable()]
    with torch.enable_grad():
        logps = policy.prompt_logps(batch)
        gradients = torch.autograd.grad(logps.sum(), parameters, allow_unused=True)
    flat = [gradient.flatten().double() for gradient in gradients if gradient is not None]
    return logps.detach().double(), torch.cat(flat)


def _cosine(one: Tensor, other: Tensor) -> float:
    norms = one.norm() * other.norm()
    return float(one @ other / norms) if norms != 0 else float(torch.equal(one, other))
