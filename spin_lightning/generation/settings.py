"""Settings of sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from spin_lightning.errors import SettingError, check_names, check_settings, is_number, is_whole

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
        engine: local: generate in the training processes; vllm: on vLLM servers (docs/vllm.md).
        servers: URLs of the vLLM servers, such as http://localhost:8000.
        concurrency: Requests that each process has in flight at one server.
        request_timeout: Seconds to wait for an answer before a request is sent again.
        patience: Seconds to wait for a server that does not answer any more.
        largest_gap: Largest difference between a server's log-probs and ours under the base, mean
            over tokens, nats, that is accepted before the first rows.
        sleep: Wake servers up for the rows, and put them to sleep afterwards, when all of the card
            is needed for training (docs/vllm.md).
    """

    batch_tokens: int | None = None
    unit_size: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    cuda_graphs: bool = True
    engine: Literal["local", "vllm"] = "local"
    servers: list[str] = field(default_factory=list)
    concurrency: int = 256
    request_timeout: float = 600.0
    patience: float = 600.0
    largest_gap: float = 0.1
    sleep: bool = False

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
                "engine": (self.engine in ("local", "vllm"), "local or vllm"),
                "servers": (
                    isinstance(self.servers, list) and all(map(_is_address, self.servers)),
                    "a list of URLs such as http://localhost:8000",
                ),
                "concurrency": (is_whole(self.concurrency, 1), "a whole number > 0"),
                "request_timeout": (
                    is_number(self.request_timeout) and self.request_timeout > 0,
                    "a number of seconds > 0",
                ),
                "patience": (
                    is_number(self.patience) and self.patience >= 0,
                    "a number of seconds >= 0",
                ),
                "largest_gap": (
                    is_number(self.largest_gap) and self.largest_gap > 0,
                    "a number of nats per token > 0",
                ),
                "sleep": (isinstance(self.sleep, bool), "true or false"),
            },
            prefix="generation.",
        )
        if (self.engine == "vllm") != bool(self.servers):
            raise SettingError(
                "generation.servers",
                self.servers,
                f"engine is {self.engine}",
                fix="name the URLs of the vLLM servers together with generation.engine: vllm, or "
                "neither; spin-lightning serve prints the command that starts one",
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


def _is_address(url: object) -> bool:
    """Whether it is an URL with a host."""
    scheme, _, rest = url.partition("://") if isinstance(url, str) else ("", "", "")
    return scheme in ("http", "https") and rest.strip("/") != "" and " " not in rest
