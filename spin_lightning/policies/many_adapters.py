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

from spin_lightning.frozen_linear import add_product
from spin_lightning.policies.base import Lanes
from spin_lightning.policies.token_mixture import meeting
from spin_lightning.types import PolicyId

# With this many tokens for each, adapters go one by one; with fewer, a product with all of them at
# once costs less than many small ones.
_TOKENS_OF_ONE = 64

# Adapter and rank of a layer's hidden units, in their order.
Layout = tuple[tuple[str, int], ...]


class AdapterSeats:
    """Which adapter each row of a batch sees, and which rows meet the base's before the head.

    Rows lie in lanes of the model's batch and cache: a row has its own, and if it is mixed with the
    base a second one, in which the base's adapter acts. Lanes of one adapter lie together, those of
    the bare base before all others.

    Args:
        adapters: Name of each iterate's adapter, None for the bare base. Iterate 0 is among them
            where rows are mixed with it.
        device: Where the model is.

    Attributes:
        names: Names of all adapters.
        spans: The adapters that act, and the lanes of each.
        adapted: Lanes in which an adapter acts.
    """

    def __init__(self, adapters: Mapping[int, str | None], device: torch.device) -> None:
        """Seat nobody yet."""
        self._adapters = dict(adapters)
        self._device = device
        self.names = sorted(name for name in self._adapters.values() if name is not None)
        self.take([])

    def take(self, actors: Sequence[PolicyId]) -> Lanes:
        """Say who acts in each row from now on; return the lanes."""
        mixed = [row for row, actor in enumerate(actors) if actor.mixes_base]
        names = [self._adapters[i] for i, _ in actors] + [self._adapters[0] for _ in mixed]
        numbers = torch.tensor([-1 if n is None else self.names.index(n) for n in names]).long()
        order = numbers.argsort(stable=True)
        rows = torch.tensor([*range(len(actors)), *mixed]).long()
        self._adapter = numbers[order]
        self._lanes = Lanes(rows[order].to(self._device), (order >= len(actors)).to(self._device))
        self._alpha = torch.tensor([alpha for _, alpha in actors], device=self._device)
        self._look_up()
        return self._lanes

    def keep(self, staying: Tensor) -> Tensor:
        """Go on with some rows; return the lane that is to become each lane.

        Lanes that become free are filled from further back, so that few of them move.
        """
        rows, seconds = self._lanes
        stays = staying[rows].cpu()
        adapter = self._adapter[stays]
        count = len(adapter)
        in_place = stays[:count] & (self._adapter[:count] == adapter)
        order = torch.arange(count)
        # Both ascend by adapter, so that each finds one of its own.
        stays[:count] &= ~in_place
        order[~in_place] = stays.nonzero().squeeze(-1)
        self._adapter = adapter
        order = order.to(self._device)
        self._lanes = Lanes((staying.cumsum(0) - 1)[rows[order]], seconds[order])
        self._alpha = self._alpha[staying]
        self._look_up()
        return order

    def _look_up(self) -> None:
        rows, seconds = self._lanes
        second, own = seconds.nonzero().squeeze(-1), (~seconds).nonzero().squeeze(-1)
        self._own = torch.empty_like(own)  # lane of each row
        self._own[rows[own]] = own
        self._second, self._mixed = second, rows[second]  # lanes and their rows
        self._is_plain = len(second) == 0 and bool((own == self._own).all())
        self._masks: dict[Layout, Tensor] = {}
        numbers, counts = self._adapter.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        spans = zip(numbers.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
        self.spans = [(self.names[n], slice(start, end)) for n, start, end in spans if n >= 0]
        bare = int((self._adapter < 0).sum())
        self.adapted, self._adapted = slice(bare, None), self._adapter[bare:]

    def mask(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        """1 where an adapted lane sees a hidden unit of a layer, shape [lanes, 1, units]."""
        if layout not in self._masks:
            owners = [self.names.index(name) for name, rank in layout for _ in range(rank)]
            sees = self._adapted[:, None] == torch.tensor(owners)
            self._masks[layout] = sees[:, None].to(self._device, dtype)
        return self._masks[layout]

    def spread(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the lanes, from those of the rows."""
        if self._is_plain:
            return inputs
        return {
            name: value.index_select(0, self._lanes.rows) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def meet(self, values: Tensor) -> Tensor:
        """Hidden states or logits of the rows, from those of the lanes."""
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

    Every layer starts with W x of all rows. Where there are many tokens, as in prompts, adapters
    are added one by one. Where there are few, as in decoding, they are one,
    [s_1 B_1 … s_h B_h] (m * [A_1; …; A_h] x), with a mask m per row that is 1 on the units of the
    row's own adapter: two products however many adapters there are. Layers get back on leaving
    whatever forward they had.

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
                undo.callback(_replace_forward(layer, _acting(layer, seats)))
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
        # Quantized layers are linear ones by their classes, too.
        isinstance(layer.base_layer, nn.Linear | Conv1D)
        and not isinstance(layer, ParamWrapper)
        and not any(n in layer.lora_variant or layer.lora_bias[n] for n in here)
    )


def _acting(layer: Any, seats: AdapterSeats) -> Callable[..., Tensor]:
    """The forward of a layer in which each adapter acts in its own lanes."""
    # Not the module itself, which would become a child of the layer.
    base: Callable[..., Tensor] = layer.base_layer.__call__
    names = [name for name in seats.names if name in layer.lora_A]
    if not names:
        return base
    downs = [layer.lora_A[name].weight.t() for name in names]
    ups = [layer.lora_B[name].weight.t() * layer.scaling[name] for name in names]
    layout = tuple((name, len(up)) for name, up in zip(names, ups, strict=True))
    halves = dict(zip(names, zip(downs, ups, strict=True), strict=True))
    down, up = torch.cat(downs, dim=1), torch.cat(ups)

    def forward(x: Tensor) -> Tensor:
        y = base(x).contiguous()
        spans = [(halves[name], lanes) for name, lanes in seats.spans if name in halves]
        if x.shape[:-1].numel() >= _TOKENS_OF_ONE * len(seats.spans):
            for (own_down, own_up), lanes in spans:
                add_product(y[lanes], x[lanes].to(own_down.dtype) @ own_down, own_up)
        elif spans:
            hidden = x[seats.adapted].to(down.dtype) @ down
            add_product(y[seats.adapted], hidden * seats.mask(layout, down.dtype), up)
        return y

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
