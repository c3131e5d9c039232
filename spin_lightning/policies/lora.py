"""A policy that is a frozen base plus a LoRA adapter; past iterates are adapter snapshots."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from spin_lightning.errors import RunFolderError
from spin_lightning.logps import response_logps
from spin_lightning.policies import flex_trial, fused_lora, shared_prefix
from spin_lightning.policies.adapter_check import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from spin_lightning.policies.base import Policy, RowRouting
from spin_lightning.policies.fused_norm import fuse_norms
from spin_lightning.policies.loading import adapter_name, load_base, quiet_peft
from spin_lightning.policies.lora_settings import (
    LoraSettings,
    adapter_base,
    check_embeddings,
)
from spin_lightning.policies.many_adapters import (
    AdapterRouting,
    are_plain,
    keeps_rows_apart,
    many_adapters,
)
from spin_lightning.policies.pass_size import training_tokens
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.policies.self_check import check_passes
from spin_lightning.policies.shared_prefix import Packing, recomputing_alike
from spin_lightning.policies.tensor_files import write_tensors
from spin_lightning.policies.token_mixture import BARE, pulled_to_base, token_mixture_logps
from spin_lightning.run.files import write_json
from spin_lightning.run.fingerprint import file_hash
from spin_lightning.types import PolicyId, PromptBatch, SequenceBatch

if TYPE_CHECKING:
    from spin_lightning.policies.sharded_base import Processes, ShardedBase

_TRAINED = "policy"
# Most policies in one batch: inside `at_rows` their adapters are in memory twice.
_GROUP = 16


class LoraPolicy(Policy):
    """Frozen base with the trained adapter and the adapters of its frozen iterates.

    Iterate 0 is the bare base unless the run started from an adapter.

    Args:
        base: The frozen base.
        lora: Shape of a fresh adapter.
        initial_adapter: Folder of a LoRA adapter to start from; it is iterate 0, and `lora` is
            ignored.
        activation_checkpointing: Recompute activations in the backward pass to save memory.
        device: Device to load the base on.
        seed: Seed of the random half of a fresh adapter.
        packing: shared: compute a prompt once for all its responses; padded: each response is a
            padded sequence of its own; auto: shared where the architecture allows it.
        fused: Whether LoRA layers use the fused pass of `fused_lora`.
        compiled: Whether to train with layers compiled by torch.compile; frozen iterates always run
            uncompiled.
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
        self.shares_prefixes = shared_prefix.shares_prefixes(base, packing)
        self._folders: dict[int, Path] = {}
        self._active: str | None = None  # what `at` or `at_rows` has switched to
        self._mixes_base = False
        # Inside `at`, of a token-level mixture whose rows are routed.
        self._routing: tuple[AdapterRouting, PolicyId] | None = None
        self._rows_stay_apart: bool | None = None
        self._sharded: ShardedBase | None = None
        # Why the self-check has switched the fast passes off.
        self.plain_because: str | None = None
        self.is_checkpointed = activation_checkpointing
        model = load_base(base, device)
        if activation_checkpointing:
            model.activation_checkpointing_enable(
                {"use_reentrant": False, "context_fn": recomputing_alike(model.config)}
            )
        if initial_adapter is not None:
            check_embeddings(model, base, initial_adapter)
        # The initial weights depend on the seed alone, not on earlier random draws.
        with _isolated_random_state(torch.device(device)), quiet_peft():
            torch.manual_seed(seed)
            self.model = (
                peft.get_peft_model(model, lora.peft_config(base), adapter_name=_TRAINED)
                if initial_adapter is None
                else peft.PeftModel.from_pretrained(
                    model, initial_adapter, adapter_name=_TRAINED, is_trainable=True
                )
            )
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(_is_trained(name))
        if fused:
            fuse_norms(self.model)
            fused_lora.fuse(self.model, in_4_bits=base.quantization == "nf4")
            fused_lora.keep_copies(self.model, _TRAINED, base.dtype)
        self.is_compiled = compiled
        if compiled:
            for module in self.model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.compile(dynamic=True)
        # For LoRA's dropout, and for checkpointing, which needs training mode; the base's own
        # dropout is switched off in its config.
        self.train()

    def shard(self, processes: Processes, device: torch.device) -> None:
        """Keep a part of the base alone, and move to a device, see `sharded_base`.

        Args:
            processes: Those that hold the parts.
            device: Where the policy is to run.

        Raises:
            SettingError: The model has no layers that can be sharded.
        """
        from spin_lightning.policies.sharded_base import ShardedBase  # see `spec`

        self._sharded = ShardedBase(self, processes, device)
        self.scoring_limit.retries = self.training_limit.retries = False

    @property
    def is_sharded(self) -> bool:
        """See `Policy.is_sharded`."""
        return self._sharded is not None

    def sharded_names(self) -> list[str]:
        """See `Policy.sharded_names`."""
        return [] if self._sharded is None else self._sharded.names

    def serve_others(self) -> None:
        """See `Policy.serve_others`."""
        if self._sharded is not None:
            self._sharded.serve_others()

    @property
    def device(self) -> torch.device:
        """Device of the base."""
        return next(self.model.parameters()).device

    @property
    def deviations(self) -> dict[str, str]:
        """See `Policy.deviations`."""
        if self.plain_because is not None:
            return {"passes": f"plain: {self.plain_because}"}
        return flex_trial.deviations()

    @property
    def training_tokens(self) -> int:
        """See `Policy.training_tokens`."""
        return training_tokens(
            self.model.config, self.base.dtype, self.device, self.is_checkpointed
        )

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the trained adapter."""
        return ((n, p) for n, p in self.named_parameters() if _is_trained(n))

    def logps(self, batch: SequenceBatch) -> Tensor:
        """log p(y|x) of each sequence under the active policy, nats, float64, shape [n]."""
        return response_logps(self.model, batch.to(self.device))

    @property
    def shares_prompts(self) -> bool:
        """Whether the active policy computes a prompt once for all its responses."""
        # Otherwise a token-level mixture uses PEFT's mixed batches, which need padding.
        return self.shares_prefixes and (not self._mixes_base or self._routing is not None)

    @property
    def largest_bias(self) -> float:
        """See `Policy.largest_bias`; int8 rounds activations by what else is in their batch."""
        return 0.1 if self.base.quantization == "int8" else super().largest_bias

    def prompt_logps(self, batch: PromptBatch) -> Tensor:
        """log p(y|x) of each response under the active policy, nats, float64, [responses]."""
        if not self.shares_prompts:
            return super().prompt_logps(batch)
        # Adapters are part of the layers: PEFT's wrapper only adds support for mixed batches.
        model, batch = self.model.get_base_model(), batch.to(self.device)
        if self._routing is None:
            return shared_prefix.prompt_logps(model, batch)
        routing, policy_id = self._routing
        return token_mixture_logps(
            model,
            batch,
            policy_id.token_alpha,
            lambda: routing.assign([PolicyId(policy_id.iterate)]),
            lambda: routing.assign([PolicyId(0)]),
        )

    def check_passes(self, batch: PromptBatch) -> None:
        """Compare the fast passes with plain ones, see `self_check`."""
        check_passes(self, batch)

    def snapshot(self, folder: Path) -> dict[str, str]:
        """Write the trained adapter in PEFT's format; return the SHA-256 of each file by name."""
        with quiet_peft():
            weights = get_peft_model_state_dict(
                self.model, adapter_name=_TRAINED, save_embedding_layers=False
            )
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        write_tensors(folder / ADAPTER_WEIGHTS, tensors)
        write_json(
            folder / ADAPTER_CONFIG,
            {**_plain(self.model.peft_config[_TRAINED]), **adapter_base(self.base)},
        )
        return {name: file_hash(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}

    def use_iterates(self, folders: Mapping[int, Path]) -> None:
        """Set the folder of each frozen iterate; one without an adapter is the bare base."""
        self._folders = dict(folders)

    def iterate_folder(self, iterate: int) -> Path | None:
        """PEFT adapter folder of a frozen iterate, None for the bare base.

        Raises:
            RunFolderError: Its folder is missing.
        """
        folder = self._folders.get(iterate)
        if folder is None or not folder.is_dir():
            raise RunFolderError(
                f"iterate {iterate} is missing (looked in {folder})",
                fix="restore its folder from a copy, or start a new run",
            )
        return folder if (folder / ADAPTER_CONFIG).exists() else None

    def evict(self, keep: Collection[int] = ()) -> None:
        """Free the memory of every loaded iterate but `keep`."""
        for name in [n for n in self.model.peft_config if n != _TRAINED]:
            if name not in {adapter_name(iterate) for iterate in keep}:
                self.model.delete_adapter(name)

    @contextmanager
    def at(self, iterate: int, token_alpha: float = 0.0) -> Iterator[None]:
        """Act as a frozen iterate, or its token-level mixture with the base, inside the block.

        Leaving the block restores everything, see `Policy.at`.
        """
        policy_id = PolicyId(iterate, token_alpha)
        can_share = policy_id.mixes_base and self._can_share_batch([policy_id])
        with self._frozen(str(iterate)):
            adapters = self._load_group([policy_id])
            self._mixes_base = policy_id.mixes_base
            self.eval()
            adapter = adapters[iterate]
            if adapter is not None:
                self.model.set_adapter(adapter)
            if can_share:
                with many_adapters(self.model, adapters, everywhere=policy_id) as routing:
                    self._routing = (routing, policy_id)
                    yield
            else:
                with self._switched_to(adapter, adapters.get(0) or BARE, token_alpha):
                    yield

    def batch_groups(self, ids: Collection[PolicyId]) -> list[list[PolicyId]]:
        """Split policies into groups that share a batch: up to 16 if all adapters are plain LoRA.

        Otherwise each policy is a group of its own.
        """
        ordered = sorted(set(ids))
        if not self._can_share_batch(ordered):
            return super().batch_groups(ordered)
        # Rows that are mixed with the base take two lanes of the model's batch.
        alike = [[i for i in ordered if i.mixes_base == mixed] for mixed in (False, True)]
        return [part[i : i + _GROUP] for part in alike for i in range(0, len(part), _GROUP)]

    @contextmanager
    def at_rows(self, group: Collection[PolicyId]) -> Iterator[RowRouting]:
        """Act as a group of policies inside the block, row by row; otherwise like `at`."""
        if not self._can_share_batch(group):
            with super().at_rows(group) as single:
                yield single
            return
        with self._frozen(str(sorted(group))):
            adapters = self._load_group(group)
            self.eval()
            with many_adapters(self.model, adapters) as routing:
                yield routing

    def _can_share_batch(self, ids: Collection[PolicyId]) -> bool:
        with self._frozen(str(sorted(ids))):
            adapters = self._load_group(ids)
            self.eval()
            if self._rows_stay_apart is None:
                self._rows_stay_apart = keeps_rows_apart(self.model)
            names = [name for name in adapters.values() if name is not None]
            return self._rows_stay_apart and are_plain(self.model, names)

    def _load_group(self, group: Collection[PolicyId]) -> dict[int, str | None]:
        """Load a group's iterates, and iterate 0 where it is mixed in; return adapter names."""
        base = {0 for _, alpha in group if alpha > 0}
        return {i: self._load(i) for i in sorted({i for i, _ in group} | base)}

    @contextmanager
    def _frozen(self, active: str) -> Iterator[None]:
        """Run the block without gradients, then restore modes, `requires_grad` and the adapter."""
        if self._active is not None:
            raise RuntimeError(f"already acting as iterate {self._active}; leave that block first")
        # Recorded before loading: loading an adapter puts the whole model into eval mode.
        modes = [(module, module.training) for module in self.modules()]
        grads = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        self._active = active
        try:
            # Each adapter and each cache shape would trigger a recompilation.
            with torch.no_grad(), self.uncompiled():
                yield
        finally:
            self._active, self._mixes_base, self._routing = None, False, None
            self.model.set_adapter(_TRAINED)
            for parameter, requires_grad in grads:
                parameter.requires_grad_(requires_grad)
            for module, training in modes:
                module.training = training

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Run compiled layers as they are written inside the block."""
        # (Without compiled layers torch._dynamo, which takes a second to import, is not needed.)
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()

    def _switched_to(
        self, adapter: str | None, base_adapter: str, token_alpha: float
    ) -> AbstractContextManager[Any]:
        if adapter is None:
            # Not get_base_model(): the adapter stays active in it.
            disabled: AbstractContextManager[Any] = self.model.disable_adapter()
            return disabled
        if self._mixes_base:
            return pulled_to_base(self.model, adapter, base_adapter, token_alpha)
        return nullcontext()

    def _load(self, iterate: int) -> str | None:
        """Load an iterate's adapter if needed; return its name, None for the bare base."""
        folder = self.iterate_folder(iterate)
        if folder is None:
            return None
        name = adapter_name(iterate)
        if name not in self.model.peft_config:
            # PEFT initializes an adapter at random before it reads the weights.
            try:
                with _isolated_random_state(self.device), quiet_peft():
                    self.model.load_adapter(
                        str(folder), adapter_name=name, torch_device=str(self.device)
                    )
                fused_lora.narrow(self.model, name, self.base.dtype)
            except BaseException:
                # Half loaded, it has random or zero weights, and the next call would find it.
                if name in self.model.peft_config:
                    self.model.delete_adapter(name)
                raise
        return name


def _is_trained(name: str) -> bool:
    """Whether a parameter belongs to the trained adapter; PEFT puts the adapter into its name.

    LoRA's weights are modules, `lora_A.policy.weight`; those of embeddings and of single tokens are
    parameters, `lora_embedding_A.policy`.
    """
    return _TRAINED in name.split(".")


def _isolated_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Restore torch's random state after the block."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _plain(config: peft.PeftConfig) -> dict[str, Any]:
    """The adapter's config as PEFT's save_pretrained writes it, with sets sorted."""
    fields = {**config.to_dict(), "inference_mode": True}
    return {n: sorted(v) if isinstance(v, set | frozenset) else v for n, v in fields.items()}
