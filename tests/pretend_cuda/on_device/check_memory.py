"""Predicted memory against peaks on a GPU, counted in fake tensors."""

import pytest
import torch

from spin_lightning.policies.memory import Adapter, Memory, ModelShape, PassSize
from tests.policies.test_memory import CONFIGS, EQUAL, LORA, QV, UNEQUAL, assert_predicts
from tests.pretend_cuda.device import DEVICE
from tests.toys.peak import measure

# A torch that was built without CUDA has no kernel for these, and would take them apart.
_FUSED = ("silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward")
CASES = [
    ("mistral 7B", LORA, EQUAL),
    ("mistral 7B", QV, EQUAL),
    ("mistral 7B", LORA, UNEQUAL),
    ("qwen2.5 7B", LORA, EQUAL),
    ("qwen3 1.7B", LORA, UNEQUAL),
    ("smollm2", LORA, EQUAL),
]


@pytest.fixture(scope="module")
def fused():
    library = torch.library.Library("aten", "IMPL")
    for name in _FUSED:
        library.impl(name, lambda *_: None, "CUDA")  # never called: shapes come from elsewhere
    yield
    library._destroy()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("name", "lora", "groups"), CASES)
def test_peaks_on_a_gpu_are_predicted(fused, name, lora, groups, checkpointed, tmp_path):
    config, base = CONFIGS[name], {"compute_dtype": "bfloat16"}
    found = measure(config, tmp_path, base, lora, DEVICE, groups, checkpointed=checkpointed)
    shape = ModelShape.of(config)
    adapter = Adapter.of(lora, shape)
    memory = Memory(shape, adapter, torch.bfloat16, DEVICE, checkpointed=checkpointed)
    assert_predicts(memory, PassSize.of(groups), found)
