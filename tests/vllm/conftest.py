"""Real vLLM servers, a base that they can serve, and iterates on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from tests.toys.adapters import write_adapter
from tests.toys.models import write_model
from tests.toys.vllm_process import VLLM, VllmProcess


@pytest.fixture(scope="session", autouse=True)
def _vllm() -> None:
    if not VLLM.exists():
        pytest.skip(f"needs vLLM at {VLLM}: make vllm-test installs it")


@pytest.fixture(scope="session")
def wide_head(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its tokenizer with heads of 64, the smallest of vLLM's CPU kernels."""
    return _write(tiny_model_dir, tmp_path_factory.mktemp("base"), seed=0)


@pytest.fixture(scope="session")
def other_base(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with other weights."""
    return _write(tiny_model_dir, tmp_path_factory.mktemp("other_base"), seed=7)


def _write(tiny: Path, folder: Path, seed: int) -> Path:
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.from_pretrained(tiny, intermediate_size=128, head_dim=64, **shape)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return write_model(config, folder, seed)


@pytest.fixture(scope="session")
def adapters(wide_head: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Iterates 1 and 2, random."""
    root = tmp_path_factory.mktemp("adapters")
    return {t: write_adapter(wide_head, root / str(t), seed=t) for t in (1, 2)}


@pytest.fixture(scope="session")
def policy(
    wide_head: Path, adapters: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> LoraPolicy:
    """Iterates 0, the base, to 2."""
    made = LoraPolicy(FrozenBase(str(wide_head), compute_dtype="float32"), LoraSettings(r=2))
    made.use_iterates({0: tmp_path_factory.mktemp("iterate_000"), **adapters})
    return made


@pytest.fixture(scope="session")
def servers(
    wide_head: Path, other_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, VllmProcess]]:
    """Three servers: two of the base, one of the other."""
    logs = tmp_path_factory.mktemp("logs")
    bases = {"first": wide_head, "second": wide_head, "other": other_base}
    started = {name: VllmProcess(base, logs / f"{name}.log") for name, base in bases.items()}
    try:
        for server in started.values():
            server.start()
        for server in started.values():
            server.wait()
        yield started
    finally:
        for server in started.values():
            server.kill()
