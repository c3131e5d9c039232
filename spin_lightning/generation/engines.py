"""The generation engines by name."""

from __future__ import annotations

from dataclasses import replace

from spin_lightning.generation.base import Generator
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.generation.vllm import VllmGenerator


def make_engine(
    stop_ids: tuple[int, ...],
    pad_id: int,
    sampling: GenerationSettings,
    chosen: GenerationSettings,
) -> Generator:
    """Build the engine of a run.

    Args:
        stop_ids: A response ends with the first of these.
        pad_id: Any valid id, for padded columns.
        sampling: How to sample, which benchmarks choose for themselves.
        chosen: The run's settings, which name the engine and its servers.
    """
    if chosen.engine == "local":
        return LocalGenerator(stop_ids, pad_id, sampling)
    how = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
    return VllmGenerator(stop_ids, replace(chosen, **how))
