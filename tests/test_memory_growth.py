"""Memory of making rows does not grow with their number."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.mixtures import Mixture
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.rows.making import Synthesis, Timing, finish
from spin_lightning.rows.plan import EarlierRows, RowPlan
from spin_lightning.rows.store import read_rows
from spin_lightning.types import Example
from tests.toys.adapters import write_adapter

ROWS, TOKENS, UNIT = 10_000, 64, 64


def resident_mb() -> float:
    """Resident memory of this process."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_rows(testbed_seed_0, tmp_path):
    """10,000 rows of 64 new tokens: generated, scored and written, twice, the second time kept."""
    base = FrozenBase(str(testbed_seed_0.model), compute_dtype="float32")
    policy = LoraPolicy(base, LoraSettings(r=2))
    (tmp_path / "0").mkdir()
    adapter = write_adapter(testbed_seed_0.model, tmp_path / "1", seed=1)
    policy.use_iterates({0: tmp_path / "0", 1: adapter})
    # No stop ids: every response has all 64 tokens.
    generator = LocalGenerator((), 0, GenerationSettings())
    synthesis = Synthesis(policy, generator, vocabulary=38)
    prompts = [tuple(1 + (7 * i + j) % 30 for j in range(4 + i % 5)) for i in range(100)]
    examples = [Example(i, prompts[i % 100], (5, 6, 2), True) for i in range(ROWS)]
    plan = RowPlan(
        iterate=1,
        opponent=Mixture({0: 0.5, 1: 0.5}),
        members=(0, 1),
        seed=0,
        samples=1,
        unit_size=UNIT,
        cap=TOKENS,
        context=128,
    )
    measured = {}
    for unit in synthesis.make(plan, examples, tmp_path / "rows", Timing()):
        rows = (unit + 1) * UNIT
        if rows in (2_496, 4_992, 9_984):
            measured[rows] = resident_mb()
    finish(plan, examples, tmp_path / "rows", {})
    print(measured)
    table = read_rows(tmp_path / "rows")
    assert len(table) == ROWS
    assert set(table.generated_ids.lengths.tolist()) == {TOKENS}
    # 7,500 rows more would be 10 MB of ids and log-probs at the least, as Python objects 50.
    assert measured[9_984] - measured[2_496] < 5
    assert measured[9_984] - measured[4_992] < 5
    # Those rows are read again where some are kept; what comes on top must not grow either.
    earlier = EarlierRows(table)
    again = synthesis.make(plan, examples, tmp_path / "again", Timing(), earlier=earlier)
    after = {
        unit: resident_mb() for unit, _ in zip(again, range(60), strict=False) if unit % 20 == 19
    }
    assert after[59] - after[19] < 5
