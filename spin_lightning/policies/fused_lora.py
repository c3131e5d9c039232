"""LoRA layers with one product by the frozen weight in their backward pass.

PEFT's layer leaves the backward pass to autograd. Here the base is known to be frozen: only the
gradient of the input is needed of its weight, and the adapter's part is added in place.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from spin_lightning.frozen_linear import add_product, is_linear, product


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


class _Fused:
    """The fused pass of a LoRA layer, a mix-in to put before PEFT's class.

    y = W x + s B A x. All other cases fall back to PEFT's pass: no adapter or several, a mixed
    batch, dropout, a variant of LoRA, autocast, a base that is trained or computes in another type.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else self._single_adapter(x)
        if name is None:
            plain: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return plain
        output: Tensor = _LoraLinear.apply(
            x, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], self
        )
        return output

    def _single_adapter(self: Any, x: Tensor) -> str | None:
        """Name of the active adapter, if it is the only one and plain LoRA on a frozen base."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name: str = self.active_adapters[0]
        is_plain = (
            name in self.lora_A
            and name not in self.lora_variant
            and not self.lora_bias[name]
            and not (self.training and isinstance(self.lora_dropout[name], nn.Dropout))
            and not torch.is_autocast_enabled(x.device.type)
            and not self.base_layer.weight.requires_grad
            and self.computes_in() == x.dtype
        )
        return name if is_plain else None

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
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, layer: Any) -> Tensor:
        y: Tensor = layer.base_layer(x)
        rows = x.flatten(0, -2)
        low = rows.to(a.dtype) @ a.t()
        add_product(y, low, b.t(), scaling)
        ctx.save_for_backward(rows, low, a, b)
        ctx.scaling, ctx.layer = scaling, layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, a, b = ctx.saved_tensors
        flat = upstream.flatten(0, -2)
        outer = flat.to(b.dtype)
        inner = (outer @ b).mul_(ctx.scaling)
        grad_a = inner.t() @ rows.to(a.dtype)
        grad_b = (outer.t() @ low).mul_(ctx.scaling)
        if not ctx.needs_input_grad[0]:
            return None, grad_a, grad_b, None, None
        grad_x = product(flat, ctx.layer.frozen_weight().to(flat.dtype).t())
        if a.dtype == grad_x.dtype:
            grad_x.addmm_(inner, a)
        else:
            grad_x += (inner @ a).to(grad_x.dtype)
        return grad_x.view(*upstream.shape[:-1], -1), grad_a, grad_b, None, None
