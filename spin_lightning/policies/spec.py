"""A trainable policy as settings: checked, fingerprinted and built from one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist

from spin_lightning.errors import SettingError
from spin_lightning.policies import pretrained
from spin_lightning.policies.lora_settings import (
    LoraSettings,
    check_adapter,
    check_mixes_with_base,
)
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.policies.shared_prefix import Packing, shares_prefixes
from spin_lightning.run.fingerprint import folder_hashes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spin_lightning.policies.lora import LoraPolicy


@dataclass(frozen=True)
class PolicySpec:
    """The base, the adapter and the way both are computed.

    Attributes:
        base: The frozen base.
        lora: Shape of a fresh adapter.
        initial_adapter: Folder of a LoRA adapter to start from, instead of a fresh one.
        activation_checkpointing: Recompute activations in the backward pass to save memory.
        packing: Whether a prompt is computed once for all its responses.
        fused_lora: Whether LoRA layers use the fused pass.
        torch_compile: Whether layers are compiled for training.
        shard_base: Whether each process of the run holds a part of the base alone.
    """

    # Settings excluded from the fingerprint. The model is compared by content; the others change
    # results by rounding alone.
    not_compared: ClassVar[frozenset[str]] = frozenset(
        {
            "model",
            "revision",
            "activation_checkpointing",
            "packing",
            "fused_lora",
            "torch_compile",
            "shard_base",
        }
    )

    base: FrozenBase
    lora: LoraSettings
    initial_adapter: str | None = None
    activation_checkpointing: bool = False
    packing: Packing = "auto"
    fused_lora: bool = True
    torch_compile: bool = False
    shard_base: bool = False

    def __post_init__(self) -> None:
        """Expand a `~` in the adapter's path."""
        if isinstance(self.initial_adapter, str) and self.initial_adapter.startswith("~"):
            expanded = str(Path(self.initial_adapter).expanduser())
            object.__setattr__(self, "initial_adapter", expanded)

    def on(self, device: torch.device) -> PolicySpec:
        """The same policy, what depends on the device decided."""
        base = self.base.on(device)
        return self if base is self.base else replace(self, base=base)

    def check(self) -> None:
        """Check all that can be checked before weights are read.

        Raises:
            SettingError: There is no such model, it cannot be quantized or sharded, `packing` does
                not support its architecture, or the adapter does not fit.
        """
        self._check_shardable()
        pretrained.check_playable(self.base)
        pretrained.check_quantizable(self.base)
        shares_prefixes(self.base, self.packing)
        check_adapter(self.base, self.lora, self.initial_adapter)

    def _check_shardable(self) -> None:
        others = {
            "quantization: int8": self.base.quantization == "int8",
            "torch_compile: true": self.torch_compile,
        }
        refused = [name for name, is_set in others.items() if is_set]
        if self.shard_base and refused:
            raise SettingError(
                "shard_base",
                True,
                f"it does not work with {' and '.join(refused)}",
                fix=f"set model.shard_base: false, or give up {' and '.join(refused)}",
            )

    def check_processes(self, count: int) -> None:
        """Refuse to shard the base over one process.

        Raises:
            SettingError: `shard_base` is set, and there are no other processes.
        """
        if self.shard_base and count == 1:
            raise SettingError(
                "shard_base",
                True,
                "there is one process, which would hold the whole base",
                fix="run fit in several, such as --trainer.devices 2 --trainer.strategy ddp, or "
                "set model.shard_base: false",
            )

    def check_mixes_with_base(self) -> None:
        """Check that iterates can be mixed with the base at every token.

        Raises:
            SettingError: The initial adapter does not fit, or has layers that PEFT cannot mix.
        """
        if self.initial_adapter is not None:
            check_adapter(self.base, self.lora, self.initial_adapter)
            check_mixes_with_base(self.base, self.initial_adapter)

    def build(self, device: torch.device | str, seed: int) -> LoraPolicy:
        """Load the base onto `device` and add the trained adapter.

        Args:
            device: Where the policy runs.
            seed: Seed of a fresh adapter's random half.

        Raises:
            SettingError: There is one process to shard the base over.
        """
        if not self.shard_base:
            return self._build(device, seed)
        has_others = dist.is_available() and dist.is_initialized()
        self.check_processes(dist.get_world_size() if has_others else 1)
        # FSDP takes a second to import.
        from spin_lightning.policies.sharded_base import Processes, turn_to_load

        device = torch.device(device)
        # Before any process waits for its turn: all of them have to call it.
        processes = Processes.connect(device)
        with turn_to_load():
            policy = self._build("cpu", seed)
            policy.shard(processes, device)
        return policy

    def _build(self, device: torch.device | str, seed: int) -> LoraPolicy:
        from spin_lightning.policies.lora import LoraPolicy  # imports peft, see `lora_settings`

        return LoraPolicy(
            self.base,
            self.lora,
            self.initial_adapter,
            self.activation_checkpointing,
            device=device,
            seed=seed,
            packing=self.packing,
            fused=self.fused_lora,
            compiled=self.torch_compile,
        )

    def fingerprint_fields(self) -> dict[str, Any]:
        """What identifies the weights that a run starts from, and the precision they compute in."""
        return {
            "compute_dtype": str(self.base.dtype).removeprefix("torch."),
            "base_files": pretrained.content_hashes(self.base),
            "initial_adapter": self.initial_adapter
            and folder_hashes(Path(self.initial_adapter), (".safetensors", ".json")),
        }

    @property
    def packing_in_use(self) -> str:
        """The packing that `packing` stands for with this architecture, with its reason."""
        model_type = pretrained.load_config(self.base).model_type
        shared = shares_prefixes(self.base, self.packing)
        return f"{'shared' if shared else 'padded'} ({model_type!r}, packing={self.packing})"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; the same object at each access, even if its files change."""
        return pretrained.load_tokenizer(self.base)

    @property
    def vocabulary(self) -> int:
        """Number of ids that the model has embeddings for."""
        return int(pretrained.load_config(self.base).get_text_config().vocab_size)

    @property
    def context_length(self) -> int:
        """Longest sequence that the model supports, in tokens."""
        return pretrained.context_length(self.base)

    @property
    def generation_stop_ids(self) -> int | list[int] | None:
        """The stop ids in the model's generation config."""
        return pretrained.generation_stop_ids(self.base)
