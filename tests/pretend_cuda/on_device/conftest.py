"""The machine with the pretend device."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from peft.utils import save_and_load
from safetensors.torch import load_file

from spin_lightning.policies import lora
from spin_lightning.policies.loading import load_base
from spin_lightning.policies.pretrained import FrozenBase
from tests.pretend_cuda.device import DEVICE, Counts, move, pretending


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[Counts]]:
    """A context with the pretend device, see `pretending`; bases loaded to the device claim it."""

    def load(base: FrozenBase, device: torch.device | str = "cpu"):
        model = load_base(base, "cpu")
        if torch.device(device) == DEVICE:
            move(model)
        return model

    monkeypatch.setattr(lora, "load_base", load)
    # PEFT has adapters read straight to the device.
    monkeypatch.setattr(save_and_load, "safe_load_file", lambda file, **_: load_file(file))
    return pretending
