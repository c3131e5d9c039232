"""A training step that holds the activations of one forward pass at a time, not of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spin_lightning.out_of_memory import in_parts
from spin_lightning.packing import halve_prompts, split_for
from spin_lightning.types import PairBatch, PairLogps

if TYPE_CHECKING:
    from spin_lightning.modules.base import SelfPlayModule

# Largest difference between the derivatives of one pass and of the whole batch, relative to the
# largest one, that rounding in float64 explains.
_ROUNDING = 1e-9
# The policy's log-probs in `PairLogps`; where one is missing, so are those after it.
_SIDES = ("policy_real", "policy_generated", "policy_first")
_SMALLER_PAIRS = (
    "set a smaller data.max_prompt_tokens or data.max_response_tokens, "
    "model.activation_checkpointing: true, or model.quantization: nf4"
)
_SMALLER_BATCHES = f"set a smaller data.batch_size, {_SMALLER_PAIRS.removeprefix('set ')}"


def score(module: SelfPlayModule, batch: PairBatch) -> tuple[PairLogps, Tensor]:
    """Log-probs of a batch and its objective, whose backward pass gives the usual gradients.

    An objective is a mean over pairs, so its derivatives with respect to the log-probs of one pass
    are known once that pass is computed: it goes backward at once, and its activations are freed
    before the next one. The objective holds the summed gradients. An objective that is something
    else (its derivatives depend on other passes) gets one pass for the whole batch.

    A pass that memory does not suffice for is split between pairs, now and in later steps. Its
    gradients are added up only once it is complete.

    Args:
        module: The module in training.
        batch: n pairs.

    Returns:
        The log-probs, without a graph, and the objective, shape [].

    Raises:
        SpinError: Memory does not suffice for a single pair, or for the batch of an objective that
            needs all of it.
    """
    parameters = [parameter for _, parameter in module.policy.trainable()]
    gradients: list[Tensor | None] = [None] * len(parameters)
    scored: list[PairLogps] = []
    derivatives: list[Tensor] = []

    def compute(part: PairBatch) -> _Pass:
        logps = module.pair_logps(part)
        _, found = _objective(module, logps, len(part) / len(batch))
        partial = torch.autograd.grad(_sides(logps), parameters, found, allow_unused=True)
        return _Pass(_detached(logps), torch.stack(found), list(partial))

    # From last to first, the order in which autograd adds up the gradients of a whole batch.
    for done in in_parts(
        _passes(module, batch)[::-1],
        compute,
        lambda part: len(part.pairs.input_ids),
        lambda part: [] if module.needs_whole_batches else _halves(part)[::-1],
        module.policy.training_limit,
        fix=_SMALLER_BATCHES if module.needs_whole_batches else _SMALLER_PAIRS,
    ):
        _move(done.gradients, gradients)
        scored.insert(0, done.logps)
        derivatives.insert(0, done.derivatives)
    logps = _joined(scored)
    value, of_batch = _objective(module, logps)
    if len(scored) > 1 and not _equal(torch.cat(derivatives, dim=1), torch.stack(of_batch)):
        module.needs_whole_batches = True
        module.print(
            f"NOTE: the objective of {type(module).__name__} is not a mean over pairs, so a step "
            "holds the activations of its whole batch."
        )
        return score(module, batch)
    return logps, _WithGradients.apply(value, gradients, *parameters)


@dataclass(frozen=True)
class _Pass:
    """The outcome of one pass, without its graph.

    Attributes:
        logps: Log-probs of its pairs.
        derivatives: The batch's objective by them, shape [sides, pairs].
        gradients: Its part of the gradient of each trained weight; None where it has none.
    """

    logps: PairLogps
    derivatives: Tensor
    gradients: list[Tensor | None]


def _passes(module: SelfPlayModule, batch: PairBatch) -> list[PairBatch]:
    if module.needs_whole_batches:
        return [batch]
    policy = module.policy
    return batch.split(split_for(policy.device, batch.pairs, policy.training_tokens))


def _halves(part: PairBatch) -> list[PairBatch]:
    return part.split(halve_prompts(part.pairs))


def _sides(logps: PairLogps) -> list[Tensor]:
    """The policy's log-probs: of the real responses, and of the others that there are."""
    return [side for name in _SIDES if (side := getattr(logps, name)) is not None]


def _with_sides(logps: PairLogps, sides: Sequence[Tensor]) -> PairLogps:
    return replace(logps, **dict(zip(_SIDES, sides, strict=False)))


def _detached(logps: PairLogps) -> PairLogps:
    return _with_sides(logps, [side.detach() for side in _sides(logps)])


def _joined(parts: Sequence[PairLogps]) -> PairLogps:
    """The log-probs of consecutive parts of a batch as those of the batch."""
    columns: dict[str, Any] = {}
    for column in fields(PairLogps):
        values = [getattr(part, column.name) for part in parts]
        columns[column.name] = None if values[0] is None else torch.cat(values)
    return PairLogps(**columns)


def _objective(
    module: SelfPlayModule, logps: PairLogps, share: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """The objective, and `share` times its derivatives with respect to each side's log-probs."""
    leaves = [side.detach().requires_grad_() for side in _sides(logps)]
    objective = module.anchored_objective(_with_sides(logps, leaves))
    found = torch.autograd.grad(objective * share, leaves, allow_unused=True)
    return objective.detach(), [
        torch.zeros_like(leaf) if derivative is None else derivative
        for leaf, derivative in zip(leaves, found, strict=True)
    ]


def _equal(by_pass: Tensor, of_batch: Tensor) -> bool:
    """Whether derivatives agree within rounding; non-finite ones are left to the step's check."""
    if not bool(torch.isfinite(by_pass).all() and torch.isfinite(of_batch).all()):
        return True
    largest = float(of_batch.abs().max())
    return bool(((by_pass - of_batch).abs() <= _ROUNDING * largest).all())


def _move(gradients: list[Tensor | None], total: list[Tensor | None]) -> None:
    """Add gradients to a total and drop them, before the next pass needs the memory."""
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            known = total[i]
            total[i] = gradient if known is None else known.add_(gradient)
    gradients.clear()


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *_parameters: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = outer
        known = [gradient for gradient in ctx.gradients if gradient is not None]
        # One launch for all of them on a GPU. Not in place: a graph may be kept for another call.
        scaled = iter(torch._foreach_mul(known, factor.to(known[0].dtype)) if known else ())
        return (None, None, *(None if g is None else next(scaled) for g in ctx.gradients))
