"""RMS normalization by torch's own kernel on a GPU, in place of eight small ones."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


def fuse_norms(model: nn.Module) -> None:
    """Let the RMS norms of a model use the fused kernel on a GPU, in place."""
    for module in model.modules():
        plain: Any = type(module)
        if plain.__name__ in _KINDS:
            fused: Any = _fused(plain)
            module.__class__ = fused
            fused.prepare(module)


class _Fused:
    """The fused pass of weight * x / sqrt(mean(x²) + eps), a mix-in to put before a class.

    It rounds once, where transformers rounds before and after the product with the weight.
    """

    def prepare(self: Any) -> None:
        """Set up a module that has just got the class."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not x.is_cuda or self.weight.dtype != x.dtype:
            plain: Tensor = super().forward(x)  # type: ignore[misc]
            return plain
        return functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class _FusedOneAndWeight(_Fused):
    """The same for (1 + weight) * x / sqrt(mean(x²) + eps), in float32 as in transformers.

    The factor is kept: in a narrower type than float32, 1 + weight loses most of the weight.
    """

    def prepare(self: Any) -> None:
        self.register_buffer("factor", 1.0 + self.weight.detach().float(), persistent=False)

    def forward(self: Any, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return super().forward(x)
        return functional.rms_norm(x.float(), self.factor.shape, self.factor, self.eps).to(x.dtype)


# Classes of transformers, which compute in float32.
_KINDS: dict[str, type[_Fused]] = {
    **dict.fromkeys(("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"), _Fused),
    **dict.fromkeys(("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"), _FusedOneAndWeight),
}


@cache
def _fused(plain: type) -> type:
    return type(plain.__name__, (_KINDS[plain.__name__], plain), {})
