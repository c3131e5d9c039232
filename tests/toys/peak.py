"""The peak of live tensors, counted in fake tensors: real sizes, no memory, no GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from spin_lightning.frozen_linear import freeze_linear
from spin_lightning.packing import pack_prompts
from spin_lightning.policies import lora
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase, load_config

# Random numbers of a GPU need one.
_RANDOM = ("kaiming_uniform_", "uniform_", "normal_")


def _as_it_is(changed: Any, *_: object, **__: object) -> Any:
    return changed


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations allocate inside the block.

    Attributes:
        live: Bytes that are alive.
        peak: The most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, policy: LoraPolicy) -> None:
        """Leave out the weights of a policy, and the copies of its adapter."""
        copies = [getattr(module, "copies", None) or {} for module in policy.model.modules()]
        pairs = [pair for by_name in copies for pair in by_name.values()]
        weights = [*policy.parameters(), *policy.buffers(), *chain.from_iterable(pairs)]
        self._known |= {weight.untyped_storage()._cdata for weight in weights}

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.live += size
                    weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.live)
        return output


@contextmanager
def faking() -> Iterator[None]:
    """Fake tensors inside the block; a GPU is an Ampere card."""
    replaced = {
        (torch.cuda, "_lazy_init"): None,
        (torch.cuda, "get_device_capability"): (8, 0),
        (torch.cuda, "get_rng_state"): torch.zeros(1),
        (torch.cuda, "set_rng_state"): None,
        (torch.cuda, "manual_seed_all"): None,
        (PreTrainedModel, "initialize_weights"): None,
    }
    unchanged = [*((nn.init, name) for name in _RANDOM), (Tensor, "uniform_"), (Tensor, "normal_")]
    with ExitStack() as stack:
        for (owner, name), value in replaced.items():
            stack.enter_context(mock.patch.object(owner, name, return_value=value))
        for owner, name in [*unchanged, (nn.Module, "to")]:
            stack.enter_context(mock.patch.object(owner, name, _as_it_is))
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def fake_policy(
    base: FrozenBase, settings: LoraSettings, device: torch.device, **kwargs: Any
) -> LoraPolicy:
    """A policy of fake tensors; to be called inside `faking`."""

    def load(base: FrozenBase, _device: object):  # type: ignore[no-untyped-def]
        torch.set_default_dtype(base.dtype)
        try:
            with device:
                model = AutoModelForCausalLM.from_config(load_config(base), dtype=base.dtype)
        finally:
            torch.set_default_dtype(torch.float32)
        model.requires_grad_(False)
        freeze_linear(model)
        return model.eval()

    with mock.patch.object(lora, "load_base", load), device:
        return LoraPolicy(base, settings, device=device, **kwargs)


class Peaks(NamedTuple):
    """What passes over the same batch take.

    Attributes:
        training: Peak of a forward and backward pass, bytes.
        scoring: Peak of a forward pass without gradients, bytes.
        weights: The base's weights, bytes.
        trained: Number of trained weights.
    """

    training: int
    scoring: int
    weights: int
    trained: int


def measure(
    config: PretrainedConfig,
    folder: Path,
    base_settings: dict[str, Any],
    lora_settings: LoraSettings,
    device: torch.device,
    groups: Sequence[tuple[int, Sequence[int]]],
    *,
    checkpointed: bool,
) -> Peaks:
    """The real passes of a policy on one pass of prompts with their responses, in fake tensors."""
    config.save_pretrained(folder)
    base = FrozenBase(str(folder), **base_settings)
    with faking():
        policy = fake_policy(base, lora_settings, device, activation_checkpointing=checkpointed)
        batch = pack_prompts(
            [[3] * prompt for prompt, _ in groups],
            [[[4] * n for n in lengths] for _, lengths in groups],
        )
        batch = replace(batch.to(device), is_one_pass=True)
        trained = [parameter for _, parameter in policy.trainable()]
        peaks = []
        for with_gradients in (True, False):
            live = LiveBytes()
            live.ignore(policy)
            with live, torch.set_grad_enabled(with_gradients):
                logps = policy.prompt_logps(batch)
                if with_gradients:
                    held = torch.autograd.grad(logps.sum(), trained)
            peaks.append(live.peak)
            policy.eval()
        assert len(held) == len(trained)
        frozen = [p for name, p in policy.named_parameters() if "lora_" not in name]
        return Peaks(
            *peaks,
            weights=sum(p.numel() * p.element_size() for p in frozen),
            trained=sum(p.numel() for p in trained),
        )
