"""Probes of the GPU's kernels, on their emulations."""

import pytest

from spin_lightning.policies.probes import PROBES
from tests.pretend_cuda.device import DEVICE

EMULATED = [one for one in PROBES if one.name.startswith(("attention", "bfloat16"))]


@pytest.mark.parametrize("probe", EMULATED, ids=lambda probe: probe.name)
def test_a_probe_finds_nothing_but_rounding(machine, probe):
    with machine():
        assert probe.applies(DEVICE)
        found = probe.run(DEVICE)
    assert found.fix is None, found.text


@pytest.mark.parametrize(("capability", "applies"), [((7, 5), False), ((8, 0), True)])
def test_attention_over_unequal_lengths_is_for_ampere(machine, capability, applies):
    with machine(get_device_capability=capability):
        assert PROBES[0].applies(DEVICE) == applies
