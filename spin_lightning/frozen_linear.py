"""Products with frozen weights, by the fastest kernel in torch.

For float32 on a CPU, torch uses MKL, which is limited to AVX2 on processors not made by Intel.
oneDNN, which also ships with torch, uses AVX-512 on any processor that has it: more than twice as
fast there, with the same rounding error (docs/performance.md). `torch.backends.mkldnn.enabled`
switches it off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# With fewer rows than this, MKL is at least as fast.
_FEWEST_ROWS = 4
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


class FrozenLinear(nn.Linear):
    """A linear layer with a frozen weight, whose backward pass is one product."""

    def forward(self, x: Tensor) -> Tensor:
        """W x + b, shape [..., outputs], of x of shape [..., inputs]."""
        if self.weight.requires_grad or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return frozen_linear(x, self.weight, self.bias)


def freeze_linear(model: nn.Module) -> None:
    """Turn the plain linear layers of a frozen model into `FrozenLinear`, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear


def is_linear(module: nn.Module) -> bool:
    """Whether a module is just an affine map: without an adapter, and not quantized."""
    return type(module) in (nn.Linear, FrozenLinear)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b, with a gradient for x only.

    Args:
        x: Shape [..., inputs].
        weight: Shape [outputs, inputs].
        bias: Shape [outputs].

    Returns:
        Shape [..., outputs].
    """
    if not (torch.is_grad_enabled() and _is_for_onednn(x, weight)):
        return product(x, weight, bias)
    output: Tensor = _FrozenLinear.apply(x, weight, bias)
    return output


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b without gradient, by the faster kernel; shapes as in `frozen_linear`."""
    if not _is_for_onednn(x, weight):
        return functional.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    count = len(flat)
    if (padded := _rounded_up(count)) > count:
        flat = functional.pad(flat, (0, 0, 0, padded - count))
    # The kernel that torch.compile uses for linear layers; it has no public name.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    return result[:count].view(*x.shape[:-1], -1)


def add_product(y: Tensor, hidden: Tensor, up: Tensor, scaling: float = 1.0) -> None:
    """Add `scaling * hidden @ up` to y in place; summed in the type of `up`, rounded once.

    Args:
        y: Contiguous, shape [..., outputs].
        hidden: Shape [..., units], in the type of `up`.
        up: Shape [units, outputs].
        scaling: Factor of the product.
    """
    flat, hidden = y.view(-1, y.shape[-1]), hidden.flatten(0, -2)
    if y.dtype == up.dtype:
        flat.addmm_(hidden, up, alpha=scaling)
    else:
        flat.copy_(torch.addmm(flat.to(up.dtype), hidden, up, alpha=scaling))


def product_in(dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices of one type, summed and returned in a type at least as wide."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _rounded_up(rows: int) -> int:
    """Round a number of rows up to one of eight values between powers of two.

    oneDNN compiles and keeps a kernel of half a megabyte for each number of rows.
    """
    step = max(8, (1 << rows.bit_length()) // 16)
    return -(-rows // step) * step


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _HAS_AVX512
        and bool(torch.backends.mkldnn.enabled)
        and not torch.compiler.is_compiling()  # the compiler chooses its own kernels
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= _FEWEST_ROWS * x.shape[-1]
    )


class _FrozenLinear(torch.autograd.Function):
    """The product, and the product that gives the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return product(upstream, ctx.weight.t()), None, None
