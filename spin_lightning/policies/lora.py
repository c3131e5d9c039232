"""A policy that is a frozen base plus a LoRA adapter; past iterates are adapter snapshots."""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from spin_lightning.errors import RunFolderError, first_line
from spin_lightning.logps import response_logps
from spin_lightning.policies import fused_lora, shared_prefix
from spin_lightning.policies.base import Policy, Seats
from spin_lightning.policies.loading import adapter_name, load_base
from spin_lightning.policies.lora_settings import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoraSettings
from spin_lightning.policies.many_adapters import are_plain, keeps_rows_apart, many_adapters
from spin_lightning.policies.pretrained import (
    FrozenBase,
)
from spin_lightning.policies.shared_prefix import Packing, recomputing_alike
from spin_lightning.policies.token_mixture import BARE, pulled_to_base
from spin_lightning.run.files import write_json, writing
from spin_lightning.run.fingerprint import file_hash
from spin_lightning.types import PolicyId, PromptBatch, SequenceBatch

_TRAINED = "policy"
# Most iterates in one batch: their adapters are in memory twice while they act.
_TEAM = 16


class LoraPolicy(Policy):
    """Frozen base with the trained adapter and a bank of frozen iterates.

    Iterate 0 is the base itself, without any adapter, unless the run started from an adapter.

    Args:
        base: The frozen base.
        lora: Shape of a fresh adapter.
        initial_adapter: Folder of a LoRA adapter to start from; then iterate 0 is this adapter and
            `lora` is not looked at.
        activation_checkpointing: Recompute activations in the backward pass to save memory.
        device: Where to load the base.
        seed: Seed of a fresh adapter's random half.
        packing: Whether a prompt is computed once for all its responses.
        fused: Whether LoRA layers take the fused pass.
        compiled: Compile the layers with torch.compile, for training; iterates act uncompiled.
    """

    model: peft.PeftModel

    def __init__(
        self,
        base: FrozenBase,
        lora: LoraSettings,
        initial_adapter: str | None = None,
        activation_checkpointing: bool = False,
        device: torch.device | str = "cpu",
        seed: int = 0,
        packing: Packing = "auto",
        fused: bool = True,
        compiled: bool = False,
    ) -> None:
        """Load the base and put the trained adapter on it."""
        super().__init__()
        self.base = base
        self._shares_prefixes = shared_prefix.shares_prefixes(base, packing)
        self._bank: dict[int, Path] = {}
        self._acting: str | None = None
        self._mixed = False
        self._rows_stay_apart: bool | None = None
        model = load_base(base, device)
        if activation_checkpointing:
            model.activation_checkpointing_enable(
                {"use_reentrant": False, "context_fn": recomputing_alike(model.config)}
            )
        # The adapter's start depends on the seed alone, not on what was drawn before.
        with _drawing_apart(torch.device(device)):
            torch.manual_seed(seed)
            self.model = (
                peft.get_peft_model(model, lora.peft_config(base), adapter_name=_TRAINED)
                if initial_adapter is None
                else peft.PeftModel.from_pretrained(
                    model, initial_adapter, adapter_name=_TRAINED, is_trainable=True
                )
            )
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(f".{_TRAINED}." in name)
        if fused:
            fused_lora.fuse(self.model, in_4_bits=base.quantization == "nf4")
        self._compiled = compiled
        if compiled:
            for module in self.model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.compile(dynamic=True)
        # Dropout of the base is off in its config, so this is about LoRA's dropout alone (and
        # checkpointing, which works in training mode only).
        self.train()

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return next(self.model.parameters()).device

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the trained adapter."""
        return ((n, p) for n, p in self.named_parameters() if f".{_TRAINED}." in n)

    def logps(self, batch: SequenceBatch) -> Tensor:
        """log p(y|x) of each sequence under whoever acts now, nats, float64, shape [n]."""
        return response_logps(self.model, batch.to(self.device))

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt is computed once for all its responses by whoever acts now."""
        # A token-level mixture doubles its batch on the way in and meets before the head.
        return self._shares_prefixes and not self._mixed

    def prompt_logps(self, batch: PromptBatch) -> Tensor:
        """log p(y|x) of each response under whoever acts now, nats, float64, shape [responses]."""
        if not self.shares_prompts:
            return super().prompt_logps(batch)
        # The adapter is part of the layers: PEFT's wrapper only adds what a mixed batch needs.
        return shared_prefix.prompt_logps(self.model.get_base_model(), batch.to(self.device))

    def snapshot(self, folder: Path) -> dict[str, str]:
        """Write the trained adapter as PEFT reads it; return the SHA-256 of each file."""
        weights = get_peft_model_state_dict(
            self.model, adapter_name=_TRAINED, save_embedding_layers=False
        )
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        with writing(folder / ADAPTER_WEIGHTS):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            except SafetensorError as error:
                # It tells what the disk said in words alone.
                raise OSError(_os_errno(error), first_line(error)) from error
        write_json(folder / ADAPTER_CONFIG, _plain(self.model.peft_config[_TRAINED]))
        return {name: file_hash(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}

    def use_iterates(self, folders: Mapping[int, Path]) -> None:
        """Say where the iterates lie; one without adapter weights is the bare base."""
        self._bank = dict(folders)

    def evict(self, keep: Collection[int] = ()) -> None:
        """Free the memory of every loaded iterate but `keep`."""
        for name in [n for n in self.model.peft_config if n != _TRAINED]:
            if name not in {adapter_name(iterate) for iterate in keep}:
                self.model.delete_adapter(name)

    @contextmanager
    def at(self, iterate: int, token_alpha: float = 0.0) -> Iterator[None]:
        """Act as a frozen iterate, or its token-level mixture with the base, inside the block.

        Everything is put back on leaving it.
        """
        with self._frozen(str(iterate)):
            adapter = self._load(iterate)
            # Iterate 0 is the base, whatever it is mixed with the base by.
            self._mixed = token_alpha > 0 and iterate != 0
            base_adapter = (self._load(0) or BARE) if self._mixed else None
            self.eval()
            if adapter is not None:
                self.model.set_adapter(adapter)
            with self._acting_as(adapter, base_adapter, token_alpha):
                yield

    def teams(self, actors: Collection[PolicyId]) -> list[list[PolicyId]]:
        """Split actors into teams: all together if their adapters are plain LoRA, else alone."""
        ordered = sorted(set(actors))
        if not self._can_share_rows(ordered):
            return super().teams(ordered)
        return [ordered[i : i + _TEAM] for i in range(0, len(ordered), _TEAM)]

    @contextmanager
    def at_rows(self, team: Collection[PolicyId]) -> Iterator[Seats]:
        """Act as a team inside the block, each row as whoever takes its seat; else like `at`."""
        if not self._can_share_rows(team):
            with super().at_rows(team) as alone:
                yield alone
            return
        with self._frozen(str(sorted(team))):
            adapters = self._load_team(team)
            self.eval()
            with many_adapters(self.model, adapters) as seats:
                yield seats

    def _can_share_rows(self, actors: Collection[PolicyId]) -> bool:
        with self._frozen(str(sorted(actors))):
            adapters = self._load_team(actors)
            self.eval()
            if self._rows_stay_apart is None:
                self._rows_stay_apart = keeps_rows_apart(self.model)
            names = [name for name in adapters.values() if name is not None]
            return self._rows_stay_apart and are_plain(self.model, names)

    def _load_team(self, team: Collection[PolicyId]) -> dict[int, str | None]:
        """Bring a team's iterates into memory, and the base where it is mixed in."""
        base = {0 for _, alpha in team if alpha > 0}
        return {i: self._load(i) for i in sorted({i for i, _ in team} | base)}

    @contextmanager
    def _frozen(self, acting: str) -> Iterator[None]:
        """Put modes, gradients and the active adapter back after the block; no gradients in it."""
        if self._acting is not None:
            raise RuntimeError(f"already acting as iterate {self._acting}; leave that block first")
        # Before loading: PEFT puts the whole model into eval mode when it loads an adapter.
        modes = [(module, module.training) for module in self.modules()]
        grads = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        self._acting = acting
        # Every adapter and every shape of a cache would be compiled anew.
        stance = torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()
        try:
            with torch.no_grad(), stance:
                yield
        finally:
            self._acting, self._mixed = None, False
            self.model.set_adapter(_TRAINED)
            for parameter, requires_grad in grads:
                parameter.requires_grad_(requires_grad)
            for module, training in modes:
                module.training = training

    def _acting_as(
        self, adapter: str | None, base_adapter: str | None, token_alpha: float
    ) -> AbstractContextManager[Any]:
        if adapter is None:
            # Never get_base_model(): the adapter stays active in it.
            disabled: AbstractContextManager[Any] = self.model.disable_adapter()
            return disabled
        if base_adapter is not None:
            return pulled_to_base(self.model, adapter, base_adapter, token_alpha)
        return nullcontext()

    def _load(self, iterate: int) -> str | None:
        """Bring an iterate into memory; return its adapter name, None for the bare base."""
        folder = self._bank.get(iterate)
        if folder is None or not folder.is_dir():
            raise RunFolderError(
                f"iterate {iterate} is not there (looked in {folder})",
                fix="restore its folder from a copy, or start a new run",
            )
        if not (folder / ADAPTER_CONFIG).exists():
            return None
        name = adapter_name(iterate)
        if name not in self.model.peft_config:
            # PEFT fills an adapter with random numbers before it reads it.
            with _drawing_apart(self.device):
                self.model.load_adapter(
                    str(folder), adapter_name=name, torch_device=str(self.device)
                )
        return name


def _drawing_apart(device: torch.device) -> AbstractContextManager[None]:
    """Put torch's random state back after the block."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _plain(config: peft.PeftConfig) -> dict[str, Any]:
    """The adapter's config as PEFT's save_pretrained writes it, with sets in a fixed order."""
    fields = {**config.to_dict(), "inference_mode": True}
    return {n: sorted(v) if isinstance(v, set | frozenset) else v for n, v in fields.items()}


def _os_errno(error: Exception) -> int:
    """The number in `… (os error 28)`."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else errno.EIO
