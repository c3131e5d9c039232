"""Many iterates in one batch: their adapters are concatenated, and each row uses its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spin_lightning.frozen_linear import add_product
from spin_lightning.policies.token_mixture import meeting
from spin_lightning.types import PolicyId

# From this many tokens per adapter on, adapters are applied one by one; below, one product with all
# of them costs less than many small products.
_TOKENS_OF_ONE = 64

# Adapters of a layer and their ranks, in the order of its hidden units.
Layout = tuple[tuple[str, int], ...]
# Lanes of one adapter: a slice if they lie side by side, else their indices.
Lanes = slice | Tensor


class AdapterRouting:
    """Which adapter each row of a batch uses, see `RowRouting`.

    Args:
        adapters: Name of each iterate's adapter, None for the bare base. Iterate 0 is among them
            where rows are mixed with it.
        device: Where the model is.

    Attributes:
        names: Names of all adapters, sorted.
        lanes: The adapters in use, each with its lanes.
        adapted: Slice of the lanes that can have an adapter.
        is_uniform: Whether these all have the same one.
    """

    def __init__(self, adapters: Mapping[int, str | None], device: torch.device) -> None:
        """Start without rows."""
        self._adapters = dict(adapters)
        self._device = device
        self.names = sorted(name for name in self._adapters.values() if name is not None)
        # By number of lanes. They keep their addresses, which a captured graph needs.
        self._masks: dict[tuple[int, Layout, torch.dtype], Tensor] = {}
        self._alphas: dict[int, Tensor] = {}
        self.assign([])

    def assign(self, ids: Sequence[PolicyId]) -> None:
        """See `RowRouting.assign`.

        Raises:
            ValueError: Some rows are mixed with the base, and some are not.
        """
        self.is_mixed = any(policy_id.mixes_base for policy_id in ids)
        if self.is_mixed and not all(policy_id.mixes_base for policy_id in ids):
            raise ValueError("rows that are mixed with the base need batches of their own")
        names = [self._adapters[i] for i, _ in ids]
        if self.is_mixed:
            names += [self._adapters[0]] * len(ids)
            alphas = torch.tensor([alpha for _, alpha in ids]).view(-1, 1, 1)
            _refresh(self._alphas, len(ids), alphas, self._device)
        is_bare = self.is_mixed and self._adapters[0] is None
        self.adapted = slice(0, len(ids) if is_bare else len(names))
        numbers = [-1 if name is None else self.names.index(name) for name in names]
        self._owners = torch.tensor(numbers, dtype=torch.long)
        self._count = len(ids)
        self.lanes = list(self._lanes_by_adapter())
        used = self._owners[self.adapted].unique().tolist()
        self.is_uniform = len(used) == 1 and used[0] >= 0
        self.form: Hashable = (self.is_mixed, *used) if self.is_uniform else (self.is_mixed,)
        for key in self._masks:
            if key[0] == len(names):
                _refresh(self._masks, key, self._mask(*key[1:]), self._device)

    @property
    def is_assigned(self) -> bool:
        """Whether there are rows."""
        return self._count > 0

    def mask(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        """1 where an adapted lane uses a hidden unit of a layer, shape [lanes, 1, units]."""
        key = len(self._owners), layout, dtype
        if key not in self._masks:
            _refresh(self._masks, key, self._mask(layout, dtype), self._device)
        return self._masks[key]

    def spread(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the lanes, from those of the rows."""
        if not self.is_mixed:
            return inputs
        return {
            name: torch.cat([value, value]) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def meet(self, values: Tensor) -> Tensor:
        """Hidden states or logits of the rows, from those of the lanes."""
        if not self.is_mixed:
            # A slice of the last columns, which a product would process row by row.
            return values.contiguous()
        own, base = values.chunk(2)
        return torch.lerp(own, base, self._alphas[self._count].to(values.dtype))

    def _mask(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        owners = [self.names.index(name) for name, rank in layout for _ in range(rank)]
        return (self._owners[self.adapted, None] == torch.tensor(owners))[:, None].to(dtype)

    def _lanes_by_adapter(self) -> Iterator[tuple[str, Lanes]]:
        for number, name in enumerate(self.names):
            lanes = (self._owners == number).nonzero().squeeze(-1)
            if not len(lanes):
                continue
            first, last = int(lanes[0]), int(lanes[-1])
            if last - first < len(lanes):
                yield name, slice(first, last + 1)
            else:
                yield name, lanes.to(self._device)


def _refresh(tensors: dict[Any, Tensor], key: Any, values: Tensor, device: torch.device) -> None:
    """Set a tensor to other values, at the same address if it exists."""
    if key in tensors:
        tensors[key].copy_(values)
    else:
        tensors[key] = values.to(device)


@contextmanager
def many_adapters(
    model: nn.Module, adapters: Mapping[int, str | None], everywhere: PolicyId | None = None
) -> Iterator[AdapterRouting]:
    """Let every row of a batch use the adapter of its own iterate inside the block.

    Every layer starts with W x of all lanes. With many tokens, as in prompts, adapters are added
    one by one. With few, as in decoding, they are concatenated:
    [s_1 B_1 … s_h B_h] (m * [A_1; …; A_h] x), with a mask m per lane that is 1 on the units of the
    lane's own adapter. That is two products, whatever the number of adapters; on a GPU a decoding
    step with several always takes them, so that its kernels stay the same while rows come and go.
    Leaving the block restores the forward of each layer.

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
        is_many = x.shape[:-1].numel() >= _TOKENS_OF_ONE * len(routing.lanes)
        if routing.is_uniform or (is_many and not (x.is_cuda and x.shape[1] == 1)):
            for name, lanes in routing.lanes:
                if name in halves:
                    _add_to_lanes(y, x, lanes, *halves[name])
        else:
            hidden = x[routing.adapted].to(down.dtype) @ down
            add_product(y[routing.adapted], hidden * routing.mask(layout, down.dtype), up)
        return y

    return forward


def _add_to_lanes(y: Tensor, x: Tensor, lanes: Lanes, down: Tensor, up: Tensor) -> None:
    """Add x @ down @ up to y in some lanes."""
    hidden = x[lanes].to(down.dtype) @ down
    if isinstance(lanes, slice):
        add_product(y[lanes], hidden, up)
    else:
        y.index_add_(0, lanes, (hidden @ up).to(y.dtype))


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
