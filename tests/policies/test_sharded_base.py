"""A base that is sharded over two processes, compared with a whole one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spin_lightning import SPIN
from spin_lightning.errors import SettingError
from spin_lightning.policies.sharded_base import held_bytes
from tests.faults.processes import environment
from tests.toys.models import family_config, write_model
from tests.toys.runs import play, write_examples
from tests.toys.sharded_passes import batch, gradient, make_policy


def in_two_processes(model: Path, quantization: str, *, shard_base: bool = True) -> list[Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.toys.sharded_passes"]
    done = subprocess.run(
        [*command, str(model), quantization, str(shard_base).lower()],
        # Otherwise glibc keeps gathered layers that were freed.
        env=environment(MALLOC_MMAP_THRESHOLD_="65536"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Width 64, which 4-bit layers need on a CPU."""
    config = family_config("llama", 24, intermediate_size=128, tie_word_embeddings=True)
    return write_model(config, tmp_path_factory.mktemp("model"))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_passes_of_unequal_number_are_those_of_a_whole_base(quantization, model):
    whole = make_policy(str(model), quantization, shard_base=False)
    outcomes = in_two_processes(model, quantization)
    for rank, outcome in enumerate(outcomes):
        numbers = [*range(1 + 2 * rank), 7]
        for number, found in zip(numbers, outcome["gradients"], strict=True):
            assert found == pytest.approx(gradient(whole, number), rel=1e-6)
        for number, found in zip(range(3 - 2 * rank), outcome["scores"], strict=True):
            assert found == pytest.approx(whole.score(batch(number)).tolist(), abs=1e-5)
        # Embeddings, norms and the adapter are whole: 24 * 64, 5 * 64 and 14 layers of rank 4.
        replicated = 24 * 64 + 5 * 64 + 2 * 4 * (4 * 128 + 3 * 192)
        in_layers = held_bytes(whole) - 4 * replicated
        assert outcome["held"] == 4 * replicated + in_layers / 2


@pytest.mark.slow
def test_a_process_holds_half_of_the_memory_of_a_whole_base(tmp_path):
    config = family_config("llama", 24, hidden_size=1024, intermediate_size=2816)
    config.num_hidden_layers = 8
    model = write_model(config, tmp_path)
    grew = {
        shard: [o["grew"] for o in in_two_processes(model, "none", shard_base=shard)]
        for shard in (False, True)
    }
    print({shard: [round(n / 1e6) for n in sizes] for shard, sizes in grew.items()}, "MB")
    assert max(grew[True]) < 0.6 * min(grew[False])


def test_one_process_is_refused_before_weights_are_read(tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "examples.jsonl")
    with pytest.raises(SettingError, match="shard_base=True: there is one process"):
        play(tmp_path / "run", tiny_model_dir, data, settings={"shard_base": True})
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"quantization": "int8"}, "quantization: int8"), ({"torch_compile": True}, "torch_compile")],
)
def test_what_cannot_be_sharded_is_refused(settings, name, tiny_model_dir):
    module = SPIN(str(tiny_model_dir), shard_base=True, **settings)
    with pytest.raises(SettingError, match=f"does not work with {name}"):
        module.check_model()
