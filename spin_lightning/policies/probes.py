"""Probes of single kernels: each computes a small case, and its error against a plain one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from spin_lightning import frozen_linear
from spin_lightning.errors import first_line
from spin_lightning.policies.varlen import has_varlen

_HEAD_SIZE = 64


@dataclass(frozen=True)
class Finding:
    """One line of an examination.

    Attributes:
        name: What was examined.
        text: What was found.
        fix: The change to make; None where all is well.
    """

    name: str
    text: str
    fix: str | None = None


@dataclass(frozen=True)
class Probe:
    """A check of one kernel.

    Attributes:
        name: The kernel.
        applies: Whether a device is to have it.
        error: Computes a small case there; the relative error.
        allowed: The largest error that rounding explains.
        fix: The change to make if it fails.
    """

    name: str
    applies: Callable[[torch.device], bool]
    error: Callable[[torch.device], float]
    allowed: float
    fix: str

    def run(self, device: torch.device) -> Finding:
        """Probe a device."""
        try:
            error = self.error(device)
        # Kernels that do not support a device raise errors of many classes.
        except Exception as problem:
            return Finding(self.name, f"fails ({first_line(problem)})", self.fix)
        if not error <= self.allowed:
            text = f"wrong: relative error {error:.1e}, allowed {self.allowed:.0e}"
            return Finding(self.name, text, self.fix)
        return Finding(self.name, f"relative error {error:.1e}")


def probe_kernels(device: torch.device) -> list[Finding]:
    """Probe every kernel that applies to a device."""
    return [probe.run(device) for probe in PROBES if probe.applies(device)]


def _unequal_lengths(device: torch.device) -> float:
    """Causal attention over sequences of 5 and 11 tokens, forward and backward."""
    lengths, total = (5, 11), 16
    inputs = [_normal(total, heads, _HEAD_SIZE) for heads in (4, 2, 2)]
    upstream = _normal(total, 4, _HEAD_SIZE)
    starts = torch.tensor([0, 5, total], dtype=torch.int32, device=device)
    q, k, v = (x.to(device, torch.bfloat16).requires_grad_() for x in inputs)
    found: Any = varlen_attn(
        q, k, v, starts, starts, max(lengths), max(lengths), window_size=(-1, 0), enable_gqa=True
    )
    found.backward(upstream.to(found))
    # The same rounded inputs.
    plain = [x.detach().cpu().float().requires_grad_() for x in (q, k, v)]
    pieces = zip(*(torch.split(x, list(lengths)) for x in plain), strict=True)
    wanted = torch.cat([_causal(*piece) for piece in pieces])
    wanted.backward(upstream)
    pairs = zip((q, k, v), plain, strict=True)
    errors = [_relative(on_device.grad, on_cpu.grad) for on_device, on_cpu in pairs]
    return max(_relative(found, wanted), *errors)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention within one sequence; shapes [tokens, heads, head size]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    attended: Tensor = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return attended[0].transpose(0, 1)


def _four_bits(device: torch.device) -> float:
    """A layer in NF4 against its own de-quantized weight."""
    import bitsandbytes  # importing it takes seconds

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = bitsandbytes.nn.Linear4bit(
        128, 64, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=True
    )
    layer.weight.data.copy_(_normal(64, 128))
    layer = layer.to(device)
    x = _normal(8, 128).to(device, dtype)
    with torch.no_grad():
        held: Any = layer.weight
        dense = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
        return _relative(layer(x), x.cpu().double() @ dense.cpu().double().t())


def _summed_in_float32(device: torch.device) -> float:
    left, right = (_normal(*shape).to(device, torch.bfloat16) for shape in ((64, 512), (512, 32)))
    found = torch.mm(left, right, out_dtype=torch.float32)
    return _relative(found, left.cpu().double() @ right.cpu().double())


def _graph(device: torch.device) -> float:
    """A product that is captured and replayed with another input."""
    x = torch.ones(64, 64, device=device)
    torch.mm(x, x)  # cuBLAS allocates its workspace outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.mm(x, x)
    x.fill_(2.0)
    graph.replay()
    return _relative(y, torch.full((64, 64), 256.0))


def _onednn(device: torch.device) -> float:
    x, weight = _normal(64, 128), _normal(32, 128)
    found = frozen_linear.product(x.to(device), weight.to(device))
    return _relative(found, x.double() @ weight.double().t())


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _has_varlen(device: torch.device) -> bool:
    return has_varlen(device, torch.bfloat16, _HEAD_SIZE)


def _normal(*shape: int) -> Tensor:
    """Fixed normal numbers of a shape, float32, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _relative(found: Tensor | None, wanted: Tensor | None) -> float:
    """Norm of the difference over the norm of what is wanted; without a gradient infinite."""
    if found is None or wanted is None:
        return float("inf")
    exact = wanted.detach().cpu().double()
    return float((found.detach().cpu().double() - exact).norm() / exact.norm())


PROBES = (
    Probe(
        "attention over unequal lengths",
        _has_varlen,
        _unequal_lengths,
        allowed=2e-2,
        fix="set model.packing: padded, or install another version of torch",
    ),
    Probe(
        "product in 4 bits",
        lambda _: True,
        _four_bits,
        allowed=2e-2,
        fix="set model.quantization: none, or install a bitsandbytes that fits this torch",
    ),
    Probe(
        "bfloat16 product in float32",
        _is_gpu,
        _summed_in_float32,
        allowed=1e-4,
        fix="set model.fused_lora: false, or install another version of torch",
    ),
    Probe(
        "CUDA graph",
        _is_gpu,
        _graph,
        allowed=1e-3,
        fix="update the GPU's driver, or install the torch that fits it",
    ),
    Probe(
        "float32 product",
        lambda device: device.type == "cpu",
        _onednn,
        allowed=1e-5,
        fix="install another version of torch",
    ),
)
