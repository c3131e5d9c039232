"""Many iterates in one batch: their adapters are concatenated, and each row uses its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spin_lightning.frozen_linear import add_product
from spin_lightning.policies.base import Slots
from spin_lightning.policies.token_mixture import meeting
from spin_lightning.types import PolicyId

# From this many tokens per adapter on, adapters are applied one by one; below, one product with all
# of them costs less than many small products.
_TOKENS_OF_ONE = 64

# Adapters of a layer and their ranks, in the order of its hidden units.
Layout = tuple[tuple[str, int], ...]


class AdapterRouting:
    """Which adapter each row of a batch uses, and which rows are mixed with the base.

    Each row has a slot in the model's batch and cache. A row mixed with the base has a second slot,
    computed with the base's adapter. Slots are sorted by adapter; those of the bare base come
    first.

    Args:
        adapters: Name of each iterate's adapter, None for the bare base. Iterate 0 is among them
            where rows are mixed with it.
        device: Where the model is.

    Attributes:
        names: Names of all adapters, sorted.
        spans: The adapters in use, each with the slice of its slots.
        adapted: Slice of the slots that use an adapter.
    """

    def __init__(self, adapters: Mapping[int, str | None], device: torch.device) -> None:
        """Start without rows."""
        self._adapters = dict(adapters)
        self._device = device
        self.names = sorted(name for name in self._adapters.values() if name is not None)
        self.assign([])

    def assign(self, ids: Sequence[PolicyId]) -> Slots:
        """Set the policy of each row of the forward passes that follow; return the slots."""
        mixed = [row for row, policy_id in enumerate(ids) if policy_id.mixes_base]
        names = [self._adapters[i] for i, _ in ids] + [self._adapters[0] for _ in mixed]
        numbers = torch.tensor([-1 if n is None else self.names.index(n) for n in names]).long()
        order = numbers.argsort(stable=True)
        rows = torch.tensor([*range(len(ids)), *mixed]).long()
        self._adapter = numbers[order]
        self._slots = Slots(rows[order].to(self._device), (order >= len(ids)).to(self._device))
        self._alpha = torch.tensor([alpha for _, alpha in ids], device=self._device)
        self._index()
        return self._slots

    def keep(self, staying: Tensor) -> Tensor:
        """Drop the rows that are not `staying`; return the old slot of each new slot.

        Freed slots are filled from the end, so that few slots move.
        """
        rows, is_base = self._slots
        stays = staying[rows].cpu()
        adapter = self._adapter[stays]
        count = len(adapter)
        in_place = stays[:count] & (self._adapter[:count] == adapter)
        order = torch.arange(count)
        # Both are sorted by adapter, so that each freed slot gets a row of the right one.
        stays[:count] &= ~in_place
        order[~in_place] = stays.nonzero().squeeze(-1)
        self._adapter = adapter
        order = order.to(self._device)
        self._slots = Slots((staying.cumsum(0) - 1)[rows[order]], is_base[order])
        self._alpha = self._alpha[staying]
        self._index()
        return order

    def _index(self) -> None:
        """Derive from the slots what each forward pass needs."""
        rows, is_base = self._slots
        base, own = is_base.nonzero().squeeze(-1), (~is_base).nonzero().squeeze(-1)
        self._own = torch.empty_like(own)  # slot of each row
        self._own[rows[own]] = own
        self._base, self._mixed = base, rows[base]  # slots of base copies, and their rows
        self._is_plain = len(base) == 0 and bool((own == self._own).all())
        self._masks: dict[Layout, Tensor] = {}
        numbers, counts = self._adapter.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        spans = zip(numbers.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
        self.spans = [(self.names[n], slice(start, end)) for n, start, end in spans if n >= 0]
        bare = int((self._adapter < 0).sum())
        self.adapted, self._adapted = slice(bare, None), self._adapter[bare:]

    @property
    def is_assigned(self) -> bool:
        """Whether there are rows."""
        return len(self._adapter) > 0

    def mask(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        """1 where an adapted slot uses a hidden unit of a layer, shape [slots, 1, units]."""
        if layout not in self._masks:
            owners = [self.names.index(name) for name, rank in layout for _ in range(rank)]
            uses = self._adapted[:, None] == torch.tensor(owners)
            self._masks[layout] = uses[:, None].to(self._device, dtype)
        return self._masks[layout]

    def spread(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the slots, from those of the rows."""
        if self._is_plain:
            return inputs
        return {
            name: value.index_select(0, self._slots.rows) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def meet(self, values: Tensor) -> Tensor:
        """Hidden states or logits of the rows, from those of the slots."""
        if self._is_plain:
            # A slice of the last columns, which a product would process row by row.
            return values.contiguous()
        own = values.index_select(0, self._own)
        if not len(self._base):
            return own
        alpha = self._alpha[self._mixed].to(values.dtype).view(-1, *[1] * (values.dim() - 1))
        met = torch.lerp(own[self._mixed], values[self._base], alpha)
        return own.index_copy(0, self._mixed, met)


@contextmanager
def many_adapters(
    model: nn.Module, adapters: Mapping[int, str | None], everywhere: PolicyId | None = None
) -> Iterator[AdapterRouting]:
    """Let every row of a batch use the adapter of its own iterate inside the block.

    Every layer starts with W x of all rows. With many tokens, as in prompts, adapters are added one
    by one. With few, as in decoding, they are concatenated:
    [s_1 B_1 … s_h B_h] (m * [A_1; …; A_h] x), with a mask m per row that is 1 on the units of the
    row's own adapter. That is two products, whatever the number of adapters. Leaving the block
    restores the forward of each layer.

    Args:
        model: A PEFT model in eval mode, of which `are_plain` holds for these adapters.
        adapters: Name of each iterate's adapter, None for the bare base.
        everywhere: Policy of all rows of every batch; by default `assign` sets the policies.

    Yields:
        The routing of rows to adapters.
    """
    routing = AdapterRouting(adapters, next(model.parameters()).device)

    def spread(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if everywhere is not None:
            routing.assign([everywhere] * len(kwargs["input_ids"]))
        return args, routing.spread(kwargs)

    with ExitStack() as undo:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                undo.callback(_replace_forward(layer, _routed_forward(layer, routing)))
        undo.callback(model.register_forward_pre_hook(spread, with_kwargs=True).remove)
        undo.enter_context(meeting(model, routing.meet))
        yield routing


def are_plain(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether adapters are sums of plain low-rank products on linear layers, and nothing else."""
    for module in model.modules():
        if isinstance(
            module, AuxiliaryTrainingWrapper
        ):  # with whole layers or token embeddings of its own
            return False
        if isinstance(module, BaseTunerLayer) and not _is_plain(module, names):
            return False
    return True


def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether every layer with adapters receives the batch row by row, tried on one batch.

    Mixture-of-experts layers, for example, receive the tokens of all rows together.
    """
    shape, received = (3, 5), []

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        received.append(args[0].shape[:-1])

    with ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                assert isinstance(layer, nn.Module)
                hooks.callback(layer.register_forward_pre_hook(look).remove)
        ids = torch.zeros(shape, dtype=torch.long, device=next(model.parameters()).device)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return all(seen == shape for seen in received)


def _is_plain(layer: BaseTunerLayer, names: Sequence[str]) -> bool:
    if not isinstance(layer, LoraLayer) or layer.merged:
        return False
    here = [n for n in names if n in layer.lora_A or n in layer.lora_embedding_A]
    return not here or (
        # (The classes of quantized layers derive from nn.Linear.)
        isinstance(layer.base_layer, nn.Linear | Conv1D)
        and not isinstance(layer, ParamWrapper)
        and not any(n in layer.lora_variant or layer.lora_bias[n] for n in here)
    )


def _routed_forward(layer: Any, routing: AdapterRouting) -> Callable[..., Tensor]:
    """A forward of a layer that applies each adapter to its own slots."""
    # A bound method: torch would register the module itself as a child of the layer.
    base: Callable[..., Tensor] = layer.base_layer.__call__
    names = [name for name in routing.names if name in layer.lora_A]
    if not names:
        return base
    downs = [layer.lora_A[name].weight.t() for name in names]
    ups = [layer.lora_B[name].weight.t() * layer.scaling[name] for name in names]
    layout = tuple((name, len(up)) for name, up in zip(names, ups, strict=True))
    halves = dict(zip(names, zip(downs, ups, strict=True), strict=True))
    down, up = torch.cat(downs, dim=1), torch.cat(ups)

    def forward(x: Tensor) -> Tensor:
        if not routing.is_assigned:
            raise RuntimeError(
                "no rows are routed to adapters: call the policy's model itself, not an inner "
                "module or `generate`"
            )
        y = base(x).contiguous()
        spans = [(halves[name], slots) for name, slots in routing.spans if name in halves]
        if x.shape[:-1].numel() >= _TOKENS_OF_ONE * len(routing.spans):
            for (own_down, own_up), slots in spans:
                add_product(y[slots], x[slots].to(own_down.dtype) @ own_down, own_up)
        elif spans:
            hidden = x[routing.adapted].to(down.dtype) @ down
            add_product(y[routing.adapted], hidden * routing.mask(layout, down.dtype), up)
        return y

    return forward


def _replace_forward(layer: Any, forward: Callable[..., Tensor]) -> Callable[[], None]:
    """Set another forward on a layer; return a function that restores the previous one."""
    before = layer.__dict__.get("forward")
    layer.forward = forward

    def undo() -> None:
        if before is None:
            del layer.forward
        else:
            layer.forward = before

    return undo
