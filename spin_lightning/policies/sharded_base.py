"""A frozen base whose layers are sharded over the processes of a run, by FSDP2.

Each process holds a part of the matrices of the decoder layers; a layer is gathered for its pass
and freed after it. Embeddings, norms, biases, the head and the adapters are whole in each process.

To gather a layer takes all processes, while each has its own work units and batches. So every pass
is announced, and a process that has nothing to compute makes a pass over one token with the others.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from spin_lightning.errors import SettingError

if TYPE_CHECKING:
    from spin_lightning.policies.lora import LoraPolicy

# Other processes may measure an iterate on benchmarks for hours before their next pass.
_LONGEST_WAIT = timedelta(days=365)
# What a process does next, in the order of precedence.
_NOTHING, _FORWARD, _WITH_BACKWARD = 0, 1, 2


@dataclass(frozen=True)
class Processes:
    """The processes that share a base, and how they reach each other.

    Attributes:
        mesh: All of them, for weights.
        announcements: All of them, for announcing passes.
    """

    mesh: DeviceMesh
    announcements: Any

    @classmethod
    def connect(cls, device: torch.device) -> Processes:
        """Connect all processes of the run; every one of them has to call this.

        Args:
            device: Where the base is to run.
        """
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        return cls(mesh, dist.new_group(backend="gloo", timeout=_LONGEST_WAIT))


class ShardedBase:
    """Shards the layers of a model, and keeps the passes of all processes in step.

    Args:
        policy: A policy on the CPU, whose adapter is in the layers of the base. It is moved to the
            device, layer by layer.
        processes: Those that share the base. Every one of them has to build the same policy.
        device: Where the policy is to run.

    Attributes:
        names: Names of the policy's parameters of which this process holds a part.

    Raises:
        SettingError: The model has no layers that can be sharded.
    """

    def __init__(self, policy: LoraPolicy, processes: Processes, device: torch.device) -> None:
        """Shard the layers of a policy's base."""
        model: Any = policy.model.get_base_model()
        self._backbone: nn.Module = model.base_model
        self._trained = [parameter for _, parameter in policy.trainable()]
        self._group = processes.announcements
        self._device = device
        self._is_serving = False
        layers = [m for m in self._backbone.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise SettingError(
                "shard_base",
                True,
                f"a model of type {model.config.model_type!r} has no layers that can be sharded",
                fix="set model.shard_base: false",
            )
        for layer in layers:
            _keep_quant_states(layer, device)
            whole = {p for p in layer.parameters() if p.dim() < 2 or p.requires_grad}
            _shard(layer, whole, processes.mesh)
        # The root, which gathers the next layer while one computes. It has no weights of its own.
        _shard(self._backbone, set(self._backbone.parameters()), processes.mesh)
        policy.to(device)
        for parameter in policy.parameters():
            if not isinstance(parameter, DTensor):
                # Otherwise each one keeps the whole file of the weights in memory.
                parameter.data = parameter.data.clone()
        self.names = [name for name, p in policy.named_parameters() if isinstance(p, DTensor)]
        # accelerate would move the layers of a model that was loaded on the CPU.
        model.__dict__.pop("hf_device_map", None)
        self._backbone.register_forward_pre_hook(self._announce, prepend=True)

    def serve_others(self) -> None:
        """Take part in the passes of other processes until none of them makes any.

        Every process has to call this before it waits for the others in any other way.
        """
        self._is_serving = True
        try:
            while kind := self._agree(_NOTHING):
                self._pass(kind)
        finally:
            self._is_serving = False

    def _announce(self, *_: Any) -> None:
        if self._is_serving:
            return
        own = _WITH_BACKWARD if torch.is_grad_enabled() else _FORWARD
        if self._agree(own) != own:
            raise RuntimeError("one process trains while another one generates or scores")

    def _agree(self, own: int) -> int:
        """The kind of the next pass."""
        kind = torch.tensor(own)
        dist.all_reduce(kind, dist.ReduceOp.MAX, group=self._group)
        return int(kind)

    def _pass(self, kind: int) -> None:
        """A pass over one token, of which nothing is kept."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.set_grad_enabled(kind == _WITH_BACKWARD):
            one = torch.ones(1, 1, dtype=torch.long, device=self._device)
            states: Tensor = self._backbone(
                input_ids=one, attention_mask=one, use_cache=False
            ).last_hidden_state
            if kind == _WITH_BACKWARD:
                torch.autograd.grad(states.float().sum(), self._trained, allow_unused=True)


def _shard(module: nn.Module, whole: set[nn.Parameter], mesh: DeviceMesh) -> None:
    fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def _keep_quant_states(model: nn.Module, device: torch.device) -> None:
    """Let 4-bit layers find their scales again, which bitsandbytes keeps with the weight.

    FSDP puts plain parameters in the place of a weight.
    """

    def attach(layer: Any, _args: Any) -> None:
        layer.weight.quant_state = layer.quant_state

    for module in model.modules():
        layer: Any = module
        if getattr(layer, "quant_state", None) is not None:
            layer.quant_state.to(device)
            layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
            layer.register_forward_pre_hook(attach)


def held_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that this process holds, a sharded one's own part alone."""
    held = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in held)


@contextmanager
def turn_to_load() -> Iterator[None]:
    """One process of a machine at a time, so that its memory holds one whole base at a time."""
    path = Path(tempfile.gettempdir()) / f"spin-lightning-{os.getuid()}.loading"
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
