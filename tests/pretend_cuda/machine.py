"""A machine with the pretend device, where bases are loaded to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from peft.utils import save_and_load
from safetensors.torch import load_file
from transformers import PreTrainedModel

from spin_lightning.generation import step_graph
from spin_lightning.policies import lora
from spin_lightning.policies.loading import load_base
from spin_lightning.policies.pretrained import FrozenBase
from tests.pretend_cuda.counts import Counts
from tests.pretend_cuda.device import DEVICE, move, pretending


@contextmanager
def machine(**answers: Any) -> Iterator[Counts]:
    """The pretend device inside the block, see `pretending`; bases loaded to it claim it."""
    with (
        mock.patch.object(lora, "load_base", _load),
        # PEFT has adapters read straight to the device.
        mock.patch.object(save_and_load, "safe_load_file", lambda file, **_: load_file(file)),
        # A graph repeats the work with what lies at the same addresses then.
        mock.patch.object(step_graph, "capture", lambda work: work),
        pretending(**answers) as counts,
    ):
        yield counts


def _load(base: FrozenBase, device: torch.device | str = "cpu") -> PreTrainedModel:
    model = load_base(base, "cpu")
    if torch.device(device) == DEVICE:
        move(model)
    return model
