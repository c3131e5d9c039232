"""LoRA layers with one product by the frozen weight in their backward pass.

PEFT's layer leaves the backward pass to autograd. Here the base is known to be frozen: only the
gradient of the input is needed of its weight, and the adapter's part is added in place.

The trained weights and their gradients are float32, since small updates would vanish in a narrower
type. Their products are in the type that the base computes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from spin_lightning.frozen_linear import add_product, is_linear, product, product_in


def fuse(model: nn.Module, *, in_4_bits: bool = False) -> None:
    """Install the fused pass in the LoRA layers of a PEFT model, where it equals PEFT's.

    Once is enough: it also serves adapters loaded later.

    Args:
        model: A PEFT model.
        in_4_bits: Whether the base is quantized to 4 bits.
    """
    kinds: dict[type, type] = {lora.Linear: FusedLinear}
    if in_4_bits:
        kinds |= _kinds_in_4_bits()
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]


def keep_copies(model: Any, adapter: str, dtype: torch.dtype) -> None:
    """Give the fused layers copies of an adapter in the compute dtype; nothing if it has that type.

    They are refreshed at the start of every forward pass with that adapter, all layers in one call.
    (Layers that are recomputed in a backward pass use the copies of its forward pass.)

    A layer that is called by itself after a change of its weights would use the copies of before.

    Args:
        model: A causal language model of PEFT, after `fuse`.
        adapter: Name of the trained adapter.
        dtype: Type that the base computes in.
    """
    layers = [layer for layer in _fused_layers(model) if layer.is_plain(adapter)]
    if any(half.dtype != dtype for layer in layers for half in layer.halves(adapter)):
        copies = _Copies(layers, adapter, dtype)
        copies.refresh()
        # All passes go through it, those of `generate`, of PEFT's wrapper and of shared prefixes.
        model.get_base_model().base_model.register_forward_pre_hook(copies.refresh)


class _Copies:
    """Copies of an adapter's weights, held by its layers. Copied along with them by `deepcopy`."""

    def __init__(self, layers: list[Any], adapter: str, dtype: torch.dtype) -> None:
        self.layers, self.adapter, self.dtype = layers, adapter, dtype

    def refresh(self, *_: Any) -> None:
        """Bring the copies up to date, unless another adapter or several are in use."""
        first = self.layers[0]
        is_fused = isinstance(first, _Fused) and "forward" not in first.__dict__  # not routed
        if not is_fused or first.disable_adapters or first.active_adapters != [self.adapter]:
            return
        masters = [half.detach() for layer in self.layers for half in layer.halves(self.adapter)]
        if first.copies is None or first.copies[self.adapter][0].device != masters[0].device:
            pairs = iter([master.to(self.dtype, copy=True) for master in masters])
            for layer, down in zip(self.layers, pairs, strict=False):
                layer.copies = {self.adapter: (down, next(pairs))}
        else:
            copies = [half for layer in self.layers for half in layer.copies[self.adapter]]
            torch._foreach_copy_(copies, masters)


def narrow(model: nn.Module, adapter: str, dtype: torch.dtype) -> None:
    """Cast a frozen adapter to the compute dtype in the layers that the fused pass serves."""
    for layer in _fused_layers(model):
        if layer.is_plain(adapter):
            layer.lora_A[adapter].to(dtype)
            layer.lora_B[adapter].to(dtype)


def _fused_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, _Fused)]


class _Fused:
    """The fused pass of a LoRA layer, a mix-in to put before PEFT's class.

    y = W x + s B A x. All other cases fall back to PEFT's pass: no adapter or several, a mixed
    batch, dropout, a variant of LoRA, autocast, a base that is trained or computes in another type.

    Attributes:
        copies: A and B of the trained adapter in the compute dtype by its name, see `keep_copies`.
    """

    copies: Mapping[str, tuple[Tensor, Tensor]] | None = None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else self._single_adapter(x)
        if name is None:
            plain: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return plain
        output: Tensor = _LoraLinear.apply(
            x, *self.halves(name), self._in(name, x.dtype), self.scaling[name], self
        )
        return output

    def halves(self: Any, name: str) -> tuple[Tensor, Tensor]:
        """A, shape [rank, inputs], and B, shape [outputs, rank], of an adapter."""
        return self.lora_A[name].weight, self.lora_B[name].weight

    def _in(self: Any, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`halves` without gradients in a type, from the copies if the adapter has some."""
        halves = self.halves(name) if self.copies is None else self.copies.get(name)
        if halves is None or halves[0].dtype != dtype:
            halves = self.halves(name)
        down, up = halves
        return down.detach().to(dtype), up.detach().to(dtype)

    def _single_adapter(self: Any, x: Tensor) -> str | None:
        """Name of the active adapter, if it is the only one and plain LoRA on a frozen base."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name: str = self.active_adapters[0]
        is_served = (
            self.is_plain(name)
            and not (self.training and isinstance(self.lora_dropout[name], nn.Dropout))
            and not torch.is_autocast_enabled(x.device.type)
            and not self.base_layer.weight.requires_grad
            and self.computes_in() == x.dtype
        )
        return name if is_served else None

    def is_plain(self: Any, name: str) -> bool:
        """Whether the layer has this adapter, and it is a product of two matrices alone."""
        has_it = name in self.lora_A and name not in self.lora_variant
        return has_it and not self.lora_bias[name]

    def computes_in(self: Any) -> torch.dtype | None:
        """Type that the base layer computes in; None for a layer of an unsupported kind."""
        raise NotImplementedError

    def frozen_weight(self: Any) -> Tensor:
        """The base layer's weight, shape [outputs, inputs]."""
        raise NotImplementedError


class FusedLinear(_Fused, lora.Linear):
    """Fused LoRA on a layer that is not quantized."""

    def computes_in(self) -> torch.dtype | None:
        """Type of the weight."""
        base: Any = self.base_layer
        dtype: torch.dtype = base.weight.dtype
        return dtype if is_linear(base) or type(base) is Conv1D else None

    def frozen_weight(self) -> Tensor:
        """The weight; Conv1D holds it transposed."""
        base: Any = self.base_layer
        weight: Tensor = base.weight
        return weight.t() if isinstance(base, Conv1D) else weight


def _kinds_in_4_bits() -> dict[type, type]:
    """Classes of 4-bit layers, with and without adapters, and the fused class of each.

    A weight is de-quantized in the forward pass and again in the backward pass, and never kept.
    """
    import bitsandbytes  # importing it takes seconds and is rarely needed

    class FrozenLinear4bit(bitsandbytes.nn.Linear4bit):
        """Without gradients, it uses `frozen_linear.product` on the de-quantized weight."""

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() or x.is_cuda or self.compute_dtype != x.dtype:
                output: Tensor = super().forward(x)
                return output
            return product(x, self.dense(), self.bias)

        def dense(self) -> Tensor:
            """The weight, shape [outputs, inputs]."""
            held: Any = self.weight
            weight: Tensor = bitsandbytes.functional.dequantize_4bit(held, held.quant_state)
            return weight

    class FusedLinear4bit(_Fused, lora.Linear4bit):
        def computes_in(self) -> torch.dtype | None:
            is_supported = type(self.base_layer) is FrozenLinear4bit
            return self.base_layer.compute_dtype if is_supported else None

        def frozen_weight(self) -> Tensor:
            dense: Tensor = self.base_layer.dense()
            return dense

    return {
        bitsandbytes.nn.Linear4bit: FrozenLinear4bit,
        lora.Linear4bit: FusedLinear4bit,
    }


class _LoraLinear(torch.autograd.Function):
    """y = W x + s B A x with gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        _b: Tensor,
        halves: tuple[Tensor, Tensor],  # A and B in the type of x
        scaling: float,
        layer: Any,
    ) -> Tensor:
        y: Tensor = layer.base_layer(x)
        rows = x.flatten(0, -2)
        down, up = halves
        low = rows @ down.t()
        add_product(y, low, up.t(), scaling)
        ctx.save_for_backward(rows, low)
        # Not as saved tensors: later passes of a step refresh the copies, with equal values.
        ctx.halves, ctx.dtype = halves, a.dtype
        ctx.scaling, ctx.layer = scaling, layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, low = ctx.saved_tensors
        down, up = ctx.halves
        flat = upstream.flatten(0, -2)
        # One kernel; with `beta` 0 the values of `low`, which has the right shape, are ignored.
        inner = torch.addmm(low, flat, up, beta=0, alpha=ctx.scaling)
        grad_a = product_in(ctx.dtype, inner.t(), rows)
        grad_b = product_in(ctx.dtype, flat.t(), low).mul_(ctx.scaling)
        if not ctx.needs_input_grad[0]:
            return None, grad_a, grad_b, None, None, None
        grad_x = product(flat, ctx.layer.frozen_weight().to(flat.dtype).t())
        grad_x.addmm_(inner, down)
        return grad_x.view(*upstream.shape[:-1], -1), grad_a, grad_b, None, None, None
