"""A model whose next tokens follow an iterate mixed with the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spin_lightning.frozen_linear import is_linear
from spin_lightning.logps import soft_capped
from spin_lightning.packing import split_for
from spin_lightning.policies.shared_prefix import logps_of_states, predicting_states
from spin_lightning.types import PromptBatch

# PEFT's name, in a mixed batch, for the model without any adapter.
BARE = "__base__"
# Switches a model to one of the two policies that are mixed.
Act = Callable[[], object]


@contextmanager
def pulled_to_base(
    model: nn.Module, adapter: str, base_adapter: str, alpha: float
) -> Iterator[None]:
    """Turn a model's next tokens into softmax((1 - alpha) log p_i + alpha log p_0) in the block.

    The batch is doubled on its way in: p_i computes one half, p_0 the other. If the head is one
    frozen linear map for both, the halves are combined before it, since
    W((1 - alpha) h_i + alpha h_0) costs one product instead of two; else at the logits. Caches hold
    both halves.

    Args:
        model: A PEFT model in eval mode, with both adapters loaded.
        adapter: Adapter of iterate i.
        base_adapter: Adapter of iterate 0, or `BARE`.
        alpha: Weight of the base.
    """

    def double(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = len(kwargs["input_ids"])
        doubled = {
            name: torch.cat([value, value]) if isinstance(value, Tensor) else value
            for name, value in kwargs.items()
        }
        return args, {**doubled, "adapter_names": [adapter] * rows + [base_adapter] * rows}

    def meet(halves: Tensor) -> Tensor:
        own, base = halves.chunk(2)
        return (1 - alpha) * own + alpha * base

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(double, with_kwargs=True).remove)
        hooks.enter_context(meeting(model, meet))
        yield


def token_mixture_logps(
    model: Any, batch: PromptBatch, alpha: float, act_as_iterate: Act, act_as_base: Act
) -> Tensor:
    """log g(y|x) of every response under the mixture, each prompt computed once by each policy.

    Args:
        model: A causal language model that shares prefixes, in a block without gradients.
        batch: Prompts and responses on the model's device.
        alpha: Weight of the base.
        act_as_iterate: Switches the model to p_i.
        act_as_base: Switches it to p_0.

    Returns:
        Nats, float64, in the order of the responses.
    """
    softcap = getattr(model.config, "final_logit_softcapping", None)
    head = model.get_output_embeddings()
    mixed_logits = _MixedLogits(head, softcap, alpha, act_as_iterate, act_as_base)

    def logps(one: PromptBatch) -> Tensor:
        act_as_iterate()
        own = predicting_states(model, one)
        act_as_base()
        base = predicting_states(model, one)
        if (linear := _linear_head(model)) is not None:
            return logps_of_states(linear, torch.lerp(own, base, alpha), one, None)
        return logps_of_states(mixed_logits, torch.cat([own, base], dim=-1), one, None)

    return torch.cat([logps(one) for one in split_for(batch.input_ids.device, batch)])


class _MixedLogits(nn.Module):
    """Mixed logits from the hidden states of both policies, side by side."""

    def __init__(
        self,
        head: nn.Module,
        softcap: float | None,
        alpha: float,
        act_as_iterate: Act,
        act_as_base: Act,
    ) -> None:
        super().__init__()
        self.head, self.softcap, self.alpha = head, softcap, alpha
        self.act_as_iterate, self.act_as_base = act_as_iterate, act_as_base

    def forward(self, states: Tensor) -> Tensor:
        own, base = states.chunk(2, dim=-1)
        self.act_as_iterate()
        own_logits = self._logits(own)
        self.act_as_base()
        return torch.lerp(own_logits, self._logits(base), self.alpha)

    def _logits(self, states: Tensor) -> Tensor:
        # An adapter on the head is routed by rows: all states are one row.
        return soft_capped(self.head(states[None])[0], self.softcap)


@contextmanager
def meeting(model: nn.Module, meet: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Combine rows of a batch before the head if it is linear, else at the logits.

    Args:
        model: A causal language model, with or without adapters.
        meet: Maps hidden states or logits of all rows to those of the combined rows.
    """

    def before_head(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (meet(args[0]), *args[1:])

    def at_logits(_: nn.Module, __: Any, output: Any) -> Any:
        output.logits = meet(output.logits)
        return output

    head = _linear_head(model)
    hook = (
        model.register_forward_hook(at_logits)
        if head is None
        else head.register_forward_pre_hook(before_head)
    )
    try:
        yield
    finally:
        hook.remove()


def _linear_head(model: Any) -> nn.Linear | None:
    """The head, if logits are an affine function of hidden states and no adapter is on it."""
    capped = any(
        value and "soft" in name and "cap" in name and "attn" not in name
        for name, value in model.config.get_text_config().to_dict().items()
    )
    head = model.get_output_embeddings()
    return head if is_linear(head) and not capped else None
