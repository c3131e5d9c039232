"""Tensors that claim to lie on `cuda:0` and compute on the CPU.

Branches on `is_cuda` are taken, mixed devices raise, and launches and host synchronizations are
counted. It shows nothing of real kernels: their speed, their rounding, graphs, NCCL.

Import this after `hooks.load_hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from tests.pretend_cuda import dense, flex
from tests.pretend_cuda.counts import PRODUCTS, Counts
from tests.pretend_cuda.varlen import Sequences

DEVICE = torch.device("cuda", 0)

_ALLOCATE = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
_VIEWS = frozenset(
    f"aten::{name}" for name in ("alias", "detach", "lift_fresh", "_reshape_alias", "_unsafe_view")
)
# Operations whose result, or its shape, the host waits for.
_WAITED_FOR = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "_unique2",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "repeat_interleave",
        "unique_consecutive",
        "unique_dim",
    )
)
_TO_HOST = frozenset({"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"})
_INDEXED = frozenset(
    f"aten::{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_")
)
# Of those that CUDA has no deterministic kernel for, the ones that the code could meet.
_VARYING = frozenset({"aten::cumsum", "aten::cumsum_", "aten::put_", "aten::kthvalue"})
_QUANTIZED = "bitsandbytes::"


class DeviceMismatch(RuntimeError):
    """An operation got tensors of both devices."""


class PretendTensor(Tensor):
    """A tensor that claims to lie on `cuda:0`.

    Attributes:
        inner: The tensor on the CPU that it wraps.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        tensor: PretendTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        tensor.inner = inner
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({self.inner})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> PretendTensor:
        return PretendTensor(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


counts = Counts()


def to_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, without counting a synchronization."""
    return tensor.inner if isinstance(tensor, PretendTensor) else tensor


def _claim(value: Any) -> Any:
    is_plain = isinstance(value, Tensor) and not isinstance(value, PretendTensor)
    return PretendTensor(value) if is_plain else value


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU and count what a device would have done."""
    name = func._schema.name
    if name.startswith("torch_attn::"):
        return _varlen(name, args)
    if func in _WITHOUT_CPU:
        counts.kernels[name] += 1
        host_args, host_kwargs = tree_map(to_host_leaf, (args, kwargs))
        return tree_map(_claim, _WITHOUT_CPU[func](*host_args, **host_kwargs))
    wanted = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    if name == "aten::_to_copy":
        return _copied(func, args[0], kwargs, wanted)
    if name == "aten::copy_":
        return _copied_into(func, args, kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    is_here = bool(ours) or wanted == "cuda" or name == f"{_QUANTIZED}dequantize_4bit"
    if ours:
        _check_devices(func, name, args, tensors)
        _check_determinism(name, ours)
    if is_here:
        _count(func, name, args, ours)
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(to_host_leaf, args), **tree_map(to_host_leaf, kwargs))
    if name in _TO_HOST or not is_here:
        return result
    claimed = tree_map(_claim, result)
    return return_and_correct_aliasing(func, args, kwargs, claimed) if ours else claimed


def to_host_leaf(value: Any) -> Any:
    """`to_host` for any value."""
    return value.inner if isinstance(value, PretendTensor) else value


def _copied(func: Any, source: Tensor, kwargs: dict[str, Any], wanted: str | None) -> Tensor:
    is_ours = isinstance(source, PretendTensor)
    options = {name: value for name, value in kwargs.items() if name != "device"}
    result: Tensor = func(to_host(source), **options)
    if wanted == "cpu":
        counts.syncs["to the host"] += is_ours
        return result
    if wanted == "cuda" and not is_ours:
        counts.syncs["to the device"] += not kwargs.get("non_blocking")
        return PretendTensor(result)
    if is_ours:
        counts.kernels["aten::_to_copy"] += 1
        return PretendTensor(result)
    return result


def _copied_into(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    target, source, *others = args
    into, out = isinstance(target, PretendTensor), isinstance(source, PretendTensor)
    if into != out:
        counts.syncs["to the device" if into else "to the host"] += 1
    counts.kernels["aten::copy_"] += into or out
    func(to_host(target), to_host(source), *others, **kwargs)
    result: Tensor = target
    return result


def _check_devices(func: Any, name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Refuse what CUDA refuses: tensors of both devices, but for scalars and indices."""
    if name.startswith(_QUANTIZED):  # 4-bit weights stay on the CPU
        return
    foreign = [t for t in tensors if not isinstance(t, PretendTensor) and t.dim() > 0]
    if foreign and name in _INDEXED and isinstance(args[0], PretendTensor):
        counts.syncs["index to the device"] += 1
    elif foreign or (func._schema.is_mutable and not isinstance(tensors[0], PretendTensor)):
        shapes = [(str(tensor.device), tuple(tensor.shape)) for tensor in tensors]
        raise DeviceMismatch(f"{func} of {shapes}")


def _check_determinism(name: str, ours: list[PretendTensor]) -> None:
    """Refuse what CUDA refuses where only deterministic kernels are allowed."""
    if name in _VARYING and ours[0].is_floating_point():
        assert not torch.are_deterministic_algorithms_enabled(), f"{name} is not deterministic"


def _count(func: Any, name: str, args: tuple[Any, ...], ours: list[PretendTensor]) -> None:
    if name in _WAITED_FOR:
        counts.syncs[name] += 1
    if name in _INDEXED and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        for index in args[1] or []
    ):
        counts.syncs[f"{name} by a mask"] += 1
    if name in _TO_HOST or name in _ALLOCATE or _is_view(func, name):
        return
    counts.kernels[name] += 1
    if name in PRODUCTS and ours and ours[0].dtype == torch.float32:
        counts.float32_products[name] += 1


def _is_view(func: Any, name: str) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return name in _VIEWS or any(alias and not alias.is_write for alias in aliases)


def _varlen(name: str, args: tuple[Any, ...]) -> Any:
    """Attention over sequences of unequal length, forward or backward."""
    everything = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    if not all(isinstance(tensor, PretendTensor) for tensor in everything):
        raise DeviceMismatch(f"{name} with tensors on the CPU")
    counts.kernels[name] += 1
    inner = tree_map(to_host_leaf, args)
    if name == "torch_attn::_varlen_attn":
        query, key, value, *starts = inner[:5]
        most, is_causal, scale, window = inner[5:7], *inner[7:10]
        used = inner[11] if len(inner) > 11 else None
        call = Sequences.of((query, key, value), tuple(starts), scale, window, used)
        call.check(most, is_causal)
        lse = torch.zeros(query.shape[1], len(query))
        return tree_map(_claim, (call.forward(), lse, torch.zeros(2, dtype=torch.uint64)))
    assert name == "torch_attn::_varlen_attn_backward", name
    upstream, query, key, value, _out, _lse, *starts = inner[:8]
    assert upstream.stride(-1) == 1
    scale, window = inner[12:14]
    call = Sequences.of((query, key, value), tuple(starts), scale, window)
    return tree_map(_claim, call.backward(upstream))


def _wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    assert left.dtype == right.dtype != dtype
    return left.to(dtype) @ right.to(dtype)


def _wide_product_added(
    addend: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor
) -> Tensor:
    return out.copy_(addend + _wide_product(left, right, dtype))


def _rms_norm(x: Tensor, _shape: Any, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    assert x.dtype == weight.dtype
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (weight.float() * x.float() * scale).to(x.dtype), scale


def _rms_norm_backward(
    upstream: Tensor, x: Tensor, _shape: Any, scale: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, None]:
    assert wanted == [True, False]
    wide = x.float() * scale
    slope = upstream.float() * weight.float()
    gradient = scale * (slope - wide * (slope * wide).mean(-1, keepdim=True))
    return gradient.to(x.dtype), None


# Operations that torch has for CUDA and not for a CPU.
_WITHOUT_CPU: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.dtype: _wide_product,
    torch.ops.aten.addmm.dtype_out: _wide_product_added,
    torch.ops.aten._fused_rms_norm.default: _rms_norm,
    torch.ops.aten._fused_rms_norm_backward.default: _rms_norm_backward,
}
# A build without CUDA composes it of small operations unless there is a kernel for the device.
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("_fused_rms_norm", _rms_norm, "CUDA")


class _Operations(TorchDispatchMode):
    """Catches operations without a tensor argument, which create tensors."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Catches functions that never reach the dispatcher, or reach it as many operations."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _asks_for_cuda(kwargs):
            counts.syncs["to the device"] += 1
            return PretendTensor(func(*args, **{**kwargs, "device": "cpu"}))
        if args and isinstance(args[0], PretendTensor):
            if func is torch._C._nn.scaled_dot_product_attention:
                return _fused_attention(*args, **kwargs)
            if func is Tensor.tolist:
                counts.syncs["to the host"] += 1
                return args[0].inner.detach().tolist()
            if func is Tensor.new_tensor:
                counts.syncs["to the device"] += 1
                return PretendTensor(args[0].inner.new_tensor(*args[1:], **kwargs))
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                args = (args[0], _with_tensors(args[1]), *args[2:])
        return func(*args, **kwargs)


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    """A backward pass, in which activations are recomputed by the same functions as before.

    It is itself a function that `_Functions` catches, so that the mode is off inside it.
    """
    with _Functions():
        return torch.autograd.graph._engine_run_backward(*args, **kwargs)


def _asks_for_cuda(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"


def _with_tensors(index: Any) -> Any:
    """An index whose lists are copied to the device, as indexing a CUDA tensor by a list does."""
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, list) for part in parts):
        return index
    counts.syncs["index to the device"] += 1
    return tuple(PretendTensor(torch.tensor(p)) if isinstance(p, list) else p for p in parts)


class _Attention(torch.autograd.Function):
    """An attention kernel: its name, its launches forward and backward, and `dense.attention`."""

    @staticmethod
    def forward(ctx: Any, name: str, launches: tuple[int, int], *arguments: Any) -> Tensor:
        query, key, value, *rest = arguments
        ctx.save_for_backward(query, key, value)
        ctx.name, ctx.launches, ctx.rest = name, launches[1], rest
        counts.kernels[name] += launches[0]
        inputs = tuple(map(to_host, (query, key, value)))
        # Laid out as the query.
        return PretendTensor(torch.empty_like(inputs[0]).copy_(dense.attention(*inputs, *rest)))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        counts.kernels[f"{ctx.name}_backward"] += ctx.launches
        inputs = tuple(map(to_host, ctx.saved_tensors))
        found = dense.gradients(to_host(upstream), inputs, *ctx.rest)
        return (None, None, *map(PretendTensor, found), None, None, None)


def _fused_attention(
    query: PretendTensor,
    key: PretendTensor,
    value: PretendTensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """torch's fused attention; one operation forward, and one backward."""
    assert dropout_p == 0.0
    assert enable_gqa or query.shape[1] == key.shape[1]
    mask = None if attn_mask is None else to_host(attn_mask)
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    scoring = None
    if is_causal:
        seen = seen.tril()
    elif mask is not None and mask.dtype == torch.bool:
        seen = mask
    elif mask is not None:
        scoring = lambda scores, *_: scores + mask  # noqa: E731
    name = "scaled_dot_product_attention"
    return _Attention.apply(name, (1, 1), query, key, value, seen, scoring, scale)


def _compiled_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: dense.Scoring | None,
    block_mask: flex_attention.BlockMask,
    scale: float | None,
    enable_gqa: bool,
    kernel_options: dict[str, Any],
) -> Any:
    assert kernel_options["BACKEND"] == "TRITON"
    assert enable_gqa or query.shape[1] == key.shape[1]
    flex.check(query, key, value, block_mask)
    with uncounted():
        row = torch.arange(query.shape[2], device=DEVICE)
        visible = to_host(block_mask.mask_mod(row, row, row[:, None], row[None]))
    lists = [to_host(getattr(block_mask, n)) for n in flex_attention.BlockMask._TENSOR_ATTRS[:8]]
    seen = flex.seen_by(block_mask, lists, visible)
    launches = (flex.FORWARD, flex.BACKWARD)
    return _Attention.apply("flex_attention", launches, query, key, value, seen, score_mod, scale)


_COMPILED: dict[Callable[..., Any], Callable[..., Any]] = {
    flex_attention.flex_attention: _compiled_flex
}


def _compile(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    """What torch.compile makes of a function for the device."""
    return _COMPILED[function]


class _ClaimingParams4bit(Params4bit):
    """A 4-bit weight on the CPU that says it is on the device, where PEFT puts its adapter."""

    @property
    def device(self) -> torch.device:
        return DEVICE


@contextmanager
def uncounted() -> Iterator[None]:
    """Leave the counts as they are."""
    before = counts.copy()
    try:
        yield
    finally:
        counts.kernels, counts.syncs = before.kernels, before.syncs
        counts.float32_products = before.float32_products


# What torch tells of the devices it found.
_ANSWERS: dict[str, Callable[..., Any]] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "empty_cache": lambda: None,
    "get_device_capability": lambda _device=None: (8, 0),
    "get_device_properties": lambda _device=None: SimpleNamespace(total_memory=24 << 30, major=8),
    "get_rng_state": lambda _device=None: torch.zeros(1, dtype=torch.uint8),
    "set_rng_state": lambda _state, _device=None: None,
    "manual_seed": lambda _seed: None,
    "manual_seed_all": lambda _seed: None,
}


@contextmanager
def pretending(**answers: Any) -> Iterator[Counts]:
    """A machine with one GPU inside the block.

    Args:
        answers: Results of functions of `torch.cuda`, such as `get_device_capability=(7, 5)`.

    Yields:
        The counts.
    """
    functions = {**_ANSWERS, **{n: (lambda *_, _v=v: _v) for n, v in answers.items()}}
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as undo:
        for name, function in functions.items():
            undo.enter_context(mock.patch.object(torch.cuda, name, function))
        undo.enter_context(mock.patch.object(torch, "compile", _compile))
        undo.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", _run_backward))
        # So that `module.to(DEVICE)` replaces parameters and does not set their data.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        undo.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        undo.enter_context(_Operations())
        undo.enter_context(_Functions())
        counts.reset()
        yield counts


def move(module: nn.Module) -> None:
    """Let parameters and buffers of a module on the CPU claim the device.

    The bytes of 4-bit weights stay on the CPU, which the operations of bitsandbytes accept here.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if type(parameter) is Params4bit:
                parameter.__class__ = _ClaimingParams4bit
            elif type(parameter) is nn.Parameter:
                claimed = _claim(parameter.data)
                part._parameters[name] = nn.Parameter(claimed, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _claim(buffer)
