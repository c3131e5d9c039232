"""Slots on a GPU: a step has the same kernels, shapes and addresses whatever is in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from spin_lightning.generation.base import Request
from spin_lightning.generation.lanes import Lanes
from spin_lightning.generation.lanes_trial import Kernel, works
from spin_lightning.generation.model import RoutedModel
from spin_lightning.generation.prompts import read_prompts
from spin_lightning.generation.slots import Slots, lanes_of
from spin_lightning.policies.heads import Heads
from spin_lightning.policies.shared_prefix import ARCHITECTURES, attending
from spin_lightning.policies.varlen import has_varlen

_NAME = "spin_lightning_slots"


def fits(model: Any) -> bool:
    """Whether a model's steps run on torch's kernel for sequences of unequal length.

    Warns:
        UserWarning: They should, and the kernel does not work.
    """
    config = model.config.get_text_config()
    weights: Tensor = model.get_input_embeddings().weight
    kernel = Kernel(weights.device, weights.dtype, Heads.of(config))
    return (
        config.model_type in ARCHITECTURES
        and not getattr(config, "attn_logit_softcapping", None)
        and has_varlen(kernel.device, kernel.dtype, kernel.heads.size)
        and works(kernel)
    )


class VarlenSlots(Slots):
    """Slots with room for the longest request each, read up to the length of their row.

    Args:
        model: A model that `fits`.
        queue: Requests that will fill the slots.
        count: Number of slots.
    """

    shrink_share = 2
    has_fixed_addresses = True

    def __init__(self, model: RoutedModel, queue: Sequence[Request], count: int) -> None:
        """Start with empty slots."""
        self._model = model
        self._policies = [queue[0].policy] * count
        columns = self.columns_of(queue, refilled=True)
        self._lanes = Lanes.empty(count * queue[0].policy.lanes, columns, model.device)
        # With a mask of four dimensions, transformers does not build one.
        self._mask = torch.empty(1, 1, 1, 1, device=model.device)

    def fill(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """See `Slots.fill`."""
        for slot, request in zip(slots, requests, strict=True):
            self._policies[slot] = request.policy
        # Steps advance free slots, too.
        self.free(slots)
        for read in read_prompts(self._model, slots, requests, len(self._policies)):
            self._lanes.place(read)
        self._model.routing.assign(self._policies)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Slots.step`."""
        self._lanes.advance()
        positions = self._lanes.lengths[: len(tokens)] - 1
        with attending(self._model.config, _NAME):
            return self._model.logits(
                tokens[:, None], self._mask, positions[:, None], use_cache=False, lanes=self._lanes
            )

    @property
    def state(self) -> Sequence[Tensor]:
        """See `Slots.state`."""
        return [self._lanes.lengths, self._lanes.ends]

    def free(self, slots: Sequence[int]) -> None:
        """See `Slots.free`."""
        if slots:
            self._lanes.lengths[lanes_of(slots, self._policies, self._model.device)] = 0

    def keep(self, slots: Sequence[int]) -> None:
        """See `Slots.keep`."""
        self._lanes = self._lanes.select(lanes_of(slots, self._policies, self._model.device))
        self._policies = [self._policies[slot] for slot in slots]
        self._model.routing.assign(self._policies)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    lanes: Lanes,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of the new token of each lane over its lane.

    Args:
        module: The layer.
        query: Shape [lanes, heads, 1, head size].
        key: Shape [lanes, key heads, 1, head size].
        value: Likewise.
        lanes: The lanes.
        scaling: Factor of the attention scores.
        sliding_window: Number of positions that a query sees, including its own.

    Returns:
        Shape [lanes, 1, heads, head size], and None in place of attention weights.
    """
    layer: Any = module.layer_idx
    keys, values = lanes.of_layer(layer, key, value)
    keys.index_copy_(0, lanes.ends, key.squeeze(2))
    values.index_copy_(0, lanes.ends, value.squeeze(2))
    return lanes.attend(query.squeeze(2), keys, values, scaling, sliding_window)[:, None], None


AttentionInterface.register(_NAME, _attend)
