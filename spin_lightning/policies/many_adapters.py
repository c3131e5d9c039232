"""Many iterates in one batch: their adapters as one, of which each row sees its own."""

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

from spin_lightning.policies.base import Actor
from spin_lightning.policies.token_mixture import meeting

# Adapter and rank of a layer's hidden units, in their order.
Layout = tuple[tuple[str, int], ...]


class AdapterSeats:
    """Which adapter each row of a batch sees, and which rows meet the base's before the head.

    Rows lie in slots of the model's batch and cache: a row has its own, and if it is mixed with the
    base a second one, in which the base's adapter acts.

    Args:
        adapters: Name of each iterate's adapter, None for the bare base. Iterate 0 is among them
            where rows are mixed with it.
        device: Where the model is.
    """

    def __init__(self, adapters: Mapping[int, str | None], device: torch.device) -> None:
        """Seat nobody yet."""
        self._adapters = dict(adapters)
        self._device = device
        names = sorted(name for name in self._adapters.values() if name is not None)
        self._numbers = {name: number for number, name in enumerate(names)}
        self.take([])

    @property
    def names(self) -> list[str]:
        """Names of all adapters."""
        return list(self._numbers)

    def take(self, actors: Sequence[Actor]) -> Tensor:
        """Say who acts in each row from now on; return the row of each slot."""
        mixed = [row for row, (i, alpha) in enumerate(actors) if alpha > 0 and i != 0]
        seated = [self._adapters[i] for i, _ in actors] + [self._adapters[0] for _ in mixed]
        numbers = [-1 if name is None else self._numbers[name] for name in seated]
        slots = torch.arange(len(seated), device=self._device)
        self._row = torch.tensor([*range(len(actors)), *mixed], device=self._device).long()
        self._adapter = torch.tensor(numbers, device=self._device)
        self._is_second = slots >= len(actors)
        self._alpha = torch.tensor([alpha for _, alpha in actors], device=self._device)
        self._look_up()
        return self._row

    def keep(self, staying: Tensor) -> Tensor:
        """Go on with some rows; return the slot that is to become each slot.

        Slots that become free are filled from the end, so that few of them move.
        """
        stays = staying[self._row]
        order = torch.arange(int(stays.sum()), device=self._device)
        order[~stays[: len(order)]] = stays[len(order) :].nonzero().squeeze(-1) + len(order)
        self._row = (staying.cumsum(0) - 1)[self._row[order]]
        self._adapter, self._is_second = self._adapter[order], self._is_second[order]
        self._alpha = self._alpha[staying]
        self._look_up()
        return order

    def _look_up(self) -> None:
        second, own = self._is_second.nonzero().squeeze(-1), (~self._is_second).nonzero()
        self._own = torch.empty_like(own).squeeze(-1)  # slot of each row
        self._own[self._row[~self._is_second]] = own.squeeze(-1)
        self._second, self._mixed = second, self._row[second]  # slots and their rows
        self._is_plain = len(second) == 0 and bool((own.squeeze(-1) == self._own).all())
        self._masks: dict[Layout, Tensor] = {}

    def mask(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        """1 where a slot sees a hidden unit of a layer, shape [slots, 1, units]."""
        if layout not in self._masks:
            owners = [self._numbers[name] for name, rank in layout for _ in range(rank)]
            units = torch.tensor(owners, device=self._device)
            self._masks[layout] = (self._adapter[:, None] == units)[:, None].to(dtype)
        return self._masks[layout]

    def spread(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the slots, from those of the rows."""
        if self._is_plain:
            return inputs
        return {
            name: value.index_select(0, self._row) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def meet(self, values: Tensor) -> Tensor:
        """Hidden states or logits of the rows, from those of the slots."""
        if self._is_plain:
            # A slice of the last columns, which a product would take row by row.
            return values.contiguous()
        own = values.index_select(0, self._own)
        if not len(self._second):
            return own
        alpha = self._alpha[self._mixed].to(values.dtype).view(-1, *[1] * (values.dim() - 1))
        met = torch.lerp(own[self._mixed], values[self._second], alpha)
        return own.index_copy(0, self._mixed, met)


@contextmanager
def many_adapters(model: nn.Module, adapters: Mapping[int, str | None]) -> Iterator[AdapterSeats]:
    """Make a model act as a different iterate in every row of a batch.

    The adapters of a layer become one, y = W x + [s_1 B_1 … s_h B_h] (m * [A_1; …; A_h] x), with a
    mask m per row that is 1 on the units of the row's own adapter: two products however many
    adapters there are. Layers get back on leaving whatever forward they had.

    Args:
        model: A PEFT model in eval mode, of which `are_plain` holds for these adapters.
        adapters: Name of each iterate's adapter, None for the bare base.

    Yields:
        The seats.
    """
    seats = AdapterSeats(adapters, next(model.parameters()).device)

    def spread(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, seats.spread(kwargs)

    with ExitStack() as undo:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                undo.callback(_replace_forward(layer, _concatenated(layer, seats)))
        undo.callback(model.register_forward_pre_hook(spread, with_kwargs=True).remove)
        undo.enter_context(meeting(model, seats.meet))
        yield seats


def are_plain(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether adapters are sums of plain low-rank products on linear layers, and nothing else."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # whole layers, or tokens, of their own
            return False
        if isinstance(module, BaseTunerLayer) and not _is_plain(module, names):
            return False
    return True


def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether every layer with adapters is given a row of the batch as a row, tried on one batch.

    Experts, for one, are given tokens of all rows together.
    """
    shape, given = (3, 5), []

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        given.append(args[0].shape[:-1])

    with ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                assert isinstance(layer, nn.Module)
                hooks.callback(layer.register_forward_pre_hook(look).remove)
        ids = torch.zeros(shape, dtype=torch.long, device=next(model.parameters()).device)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return all(seen == shape for seen in given)


def _is_plain(layer: BaseTunerLayer, names: Sequence[str]) -> bool:
    if not isinstance(layer, LoraLayer) or layer.merged:
        return False
    here = [n for n in names if n in layer.lora_A or n in layer.lora_embedding_A]
    return not here or (
        # Quantised layers are linear ones by their classes, too.
        isinstance(layer.base_layer, nn.Linear | Conv1D)
        and not isinstance(layer, ParamWrapper)
        and not any(n in layer.lora_variant or layer.lora_bias[n] for n in here)
    )


def _concatenated(layer: Any, seats: AdapterSeats) -> Callable[..., Tensor]:
    """The forward of a layer with all adapters at once."""
    # Not the module itself, which would become a child of the layer.
    base: Callable[..., Tensor] = layer.base_layer.__call__
    names = [name for name in seats.names if name in layer.lora_A]
    if not names:
        return base
    downs = [layer.lora_A[name].weight for name in names]
    ups = [layer.lora_B[name].weight * layer.scaling[name] for name in names]
    layout = tuple((name, len(down)) for name, down in zip(names, downs, strict=True))
    down, up = torch.cat(downs).t(), torch.cat(ups, dim=1).t()

    def forward(x: Tensor) -> Tensor:
        y = base(x)
        hidden = (x.to(down.dtype) @ down) * seats.mask(layout, down.dtype)
        if y.dtype == up.dtype:
            # Into the product with W, which nobody else has seen yet.
            flat = y.flatten(0, -2).addmm_(hidden.flatten(0, -2), up)
            return flat.view_as(y)
        return (y + hidden @ up).to(y.dtype)

    return forward


def _replace_forward(layer: Any, forward: Callable[..., Tensor]) -> Callable[[], None]:
    """Put another forward on a layer; return what puts back the one it had."""
    before = layer.__dict__.get("forward")
    layer.forward = forward

    def undo() -> None:
        if before is None:
            del layer.forward
        else:
            layer.forward = before

    return undo
