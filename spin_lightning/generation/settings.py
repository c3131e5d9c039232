"""Settings of sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from spin_lightning.errors import check_names, check_settings, is_number, is_whole

# Below this the logits overflow a float32.
_COLDEST = 1e-6


@dataclass(frozen=True)
class GenerationSettings:
    """How opponents' responses are sampled.

    The theory of self-play holds for temperature 1 without truncation. Other settings sample from
    a different distribution than the loss assumes, and a note is logged.

    Attributes:
        batch_tokens: Maximum number of padded tokens decoded at once; default None derives it from
            the model's size, and on a GPU from the card's memory.
        unit_size: Rows of a work unit. They are decoded and written together: more of them are
            faster, but a crash loses one unit. Default None is an eighth of an iterate's rows,
            rounded down to a power of two, at least 64 and at most 512.
        temperature: Divides the logits, > 0.
        top_p: Keep the most likely tokens up to this total probability; 1 keeps all.
        top_k: Keep this many of the most likely tokens; 0 keeps all.
        cuda_graphs: On a GPU, let a decoding step become a CUDA graph where that is possible.
    """

    batch_tokens: int | None = None
    unit_size: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_settings(
            self,
            {
                "batch_tokens": (
                    self.batch_tokens is None or is_whole(self.batch_tokens, 1),
                    "a whole number > 0, or null",
                ),
                "unit_size": (
                    self.unit_size is None or is_whole(self.unit_size, 1),
                    "a whole number of rows > 0, or null",
                ),
                "temperature": (
                    is_number(self.temperature) and self.temperature >= _COLDEST,
                    f"a number >= {_COLDEST}; 1 is what self-play assumes, top_k: 1 is greedy",
                ),
                "top_p": (
                    is_number(self.top_p) and 0 < self.top_p <= 1,
                    "a number in (0, 1]; 1 is what self-play assumes",
                ),
                "top_k": (is_whole(self.top_k, 0), "a whole number >= 0; 0 keeps every token"),
                "cuda_graphs": (isinstance(self.cuda_graphs, bool), "true or false"),
            },
            prefix="generation.",
        )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GenerationSettings:
        """Build settings from plain values.

        Raises:
            SettingError: A setting does not exist, or a value is out of range.
        """
        check_names("generation", values, [field.name for field in fields(cls)])
        return cls(**values)

    def fingerprint_fields(self) -> dict[str, Any]:
        """The settings that all iterates of a run have in common."""
        compared = ("unit_size", "temperature", "top_p", "top_k")
        return {name: getattr(self, name) for name in compared}

    @property
    def is_exact(self) -> bool:
        """Whether responses are samples from the iterates themselves."""
        return self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == 0
