"""Shape of the trained adapter, and checks that it, or an initial adapter, fits the base."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from spin_lightning.errors import (
    SettingError,
    check_settings,
    first_line,
    is_number,
    is_whole,
)
from spin_lightning.policies.adapter_check import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from spin_lightning.policies.pretrained import FrozenBase, skeleton

# Importing peft takes more than a second, which a help text should not have to wait for.
if TYPE_CHECKING:
    import peft

# Initializations that subtract the adapter's start from the base's weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraSettings:
    """Shape of the trained adapter, in PEFT's terms."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"

    @classmethod
    def of(
        cls,
        r: int | None,
        alpha: int | None,
        dropout: float | None,
        target_modules: str | list[str] | None,
        initial_adapter: str | None,
    ) -> LoraSettings:
        """Build the shape of a fresh adapter; None means the default.

        Raises:
            SettingError: A value is out of range, or one is given together with `initial_adapter`.
        """
        targets = tuple(target_modules) if isinstance(target_modules, list) else target_modules
        values: dict[str, Any] = {
            "r": r,
            "alpha": alpha,
            "dropout": dropout,
            "target_modules": targets,
        }
        given = {name: value for name, value in values.items() if value is not None}
        if given and initial_adapter is not None:
            raise SettingError(
                "initial_adapter",
                initial_adapter,
                f"its own config determines {', '.join(f'lora_{name}' for name in given)}",
                fix="leave the lora_* settings out, or start without initial_adapter",
            )
        lora = cls(**given)
        lora._check()
        return lora

    def _check(self) -> None:
        targets: object = self.target_modules
        names = targets if isinstance(targets, tuple) else ()
        check_settings(
            self,
            {
                "r": (is_whole(self.r, 1), "a whole number >= 1"),
                "alpha": (is_whole(self.alpha, 1), "a whole number >= 1"),
                "dropout": (
                    is_number(self.dropout) and 0 <= self.dropout < 1,
                    "a number in [0, 1)",
                ),
                "target_modules": (
                    isinstance(targets, str)
                    or (bool(names) and all(isinstance(name, str) and name for name in names)),
                    "names of layers, or all-linear",
                ),
            },
            prefix="lora_",
        )

    def peft_config(self, base: FrozenBase) -> peft.LoraConfig:
        """The settings as a PEFT config."""
        import peft

        targets = self.target_modules
        turned = any(isinstance(module, Conv1D) for module in skeleton(base).modules())
        return peft.LoraConfig(
            r=self.r,
            fan_in_fan_out=turned,  # PEFT would set it by itself, with a warning
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base.name,  # as the loaded model's, or PEFT warns
            revision=base.revision,
        )


def adapter_base(base: FrozenBase) -> dict[str, str | None]:
    """The fields with which PEFT finds an adapter's base again, from any working directory."""
    return {"base_model_name_or_path": base.absolute.name, "revision": base.revision}


def check_adapter(base: FrozenBase, lora: LoraSettings, initial_adapter: str | None) -> None:
    """Refuse an adapter that does not fit the base, before any weights of the base are read.

    Raises:
        SettingError: A target module matches no layer, or the initial adapter is missing, not a
            LoRA adapter, damaged, or made for another model.
    """
    import peft
    from peft.utils import get_peft_model_state_dict

    from spin_lightning.policies.loading import quiet_peft

    model = copy.deepcopy(skeleton(base))
    if initial_adapter is None:
        _check_targets(base, model, lora)
        return

    def refusal(problem: str) -> SettingError:
        return SettingError(
            "initial_adapter",
            initial_adapter,
            problem,
            fix="give the folder of a PEFT LoRA adapter of this model, as PEFT saves it",
        )

    folder = Path(initial_adapter)
    try:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / name).is_file():
                raise refusal(f"it has no {name}")
        config = peft.PeftConfig.from_pretrained(initial_adapter)
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SettingError:
        raise
    # PEFT passes the fields of the file to a class unchecked, which may raise anything.
    except Exception as error:
        raise refusal(f"it cannot be read ({first_line(error)})") from error
    if not isinstance(config, peft.LoraConfig):
        raise refusal(f"it is a {config.peft_type} adapter")
    _check_base_stays(initial_adapter, config)
    try:
        with quiet_peft():
            adapted = peft.get_peft_model(model, config)
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except Exception as error:
        raise refusal(f"it does not fit {base.name} ({first_line(error)})") from error
    if any(not t.is_floating_point() or not t.isfinite().all() for t in tensors.values()):
        raise refusal("it has non-finite weights")
    given = {name: weight.shape for name, weight in tensors.items()}
    # `check_embeddings` compares the base's own once they are loaded.
    copies = {n: w.shape for n, w in skeleton(base).state_dict(prefix=_PREFIX).items()}
    given = {n: s for n, s in given.items() if n in wanted or copies.get(_plain_name(n)) != s}
    if given != {name: weight.shape for name, weight in wanted.items()}:
        raise refusal(f"its weights do not have the shapes of {base.name}")


def _check_base_stays(initial_adapter: str, config: peft.LoraConfig) -> None:
    """Refuse an adapter that would train or replace weights of the base.

    The base is the same for all iterates, and iterates are adapters alone.
    """
    if config.bias != "none":
        raise SettingError(
            "initial_adapter",
            initial_adapter,
            f"it was trained with bias={config.bias!r}, which trains biases of the base itself",
            fix="merge it into the model (PEFT's merge_and_unload, then save_pretrained) and give "
            "that folder as model, or train it again with bias: none",
        )
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise SettingError(
            "initial_adapter",
            initial_adapter,
            f"its init_lora_weights is {start!r}, which changes the base's weights: it does not "
            "fit the model as it is",
            fix="save it as plain LoRA with PEFT's save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=<the adapter before training>), or merge it "
            "into its own base and give that folder as model",
        )
    if config.ensure_weight_tying and config.target_modules_to_tie:
        raise SettingError(
            "initial_adapter",
            initial_adapter,
            "its ensure_weight_tying ties LoRA of the embedding to LoRA of the head",
            fix="merge it into the model and give that folder as model",
        )


def check_mixes_with_base(base: FrozenBase, initial_adapter: str) -> None:
    """Refuse an adapter that PEFT cannot mix with the base row by row in one batch.

    Every iterate has the layers of the initial adapter, and token-level mixtures need both.

    Raises:
        SettingError: It is DoRA, or has whole layers other than embeddings and linear maps.
    """
    import peft

    config: Any = peft.PeftConfig.from_pretrained(initial_adapter)
    whole = [
        name
        for name, module in skeleton(base).named_modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
        and any(f".{name}".endswith(f".{saved}") for saved in config.modules_to_save or [])
    ]
    if config.use_dora or whole:
        raise SettingError(
            "initial_adapter",
            initial_adapter,
            f"it {'is a DoRA adapter' if config.use_dora else f'replaces {whole[0]}'}, which PEFT "
            "cannot mix with the base at every token",
            fix="give another adapter, or a variant without token-level mixtures (alpha: 0, or "
            "mixture: sequence)",
        )


def check_embeddings(model: nn.Module, base: FrozenBase, initial_adapter: str) -> None:
    """Refuse an adapter that comes with another embedding or head than the base's.

    PEFT saves them with an adapter that targets them, and would load them over the base's.

    Args:
        model: The loaded base, without adapters.
        base: What it was loaded from.
        initial_adapter: Folder of the adapter.

    Raises:
        SettingError: Weights of the base that are saved with the adapter differ from the model's.
    """
    own = model.state_dict(prefix=_PREFIX)
    with safe_open(Path(initial_adapter) / ADAPTER_WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if ".base_layer." not in name:
                continue
            given, weight = file.get_tensor(name), own[_plain_name(name)].cpu()
            if not torch.equal(given.to(base.dtype), weight.to(base.dtype)):
                raise SettingError(
                    "initial_adapter",
                    initial_adapter,
                    f"it was trained on another embedding or head than that of {base.name}: it "
                    f"comes with {name}, whose values differ",
                    fix="merge it into its own base and give that folder as model",
                )


def _plain_name(name: str) -> str:
    """Name of a weight of the base, from its name below an adapter."""
    return name.replace(".base_layer.", ".")


def _check_targets(base: FrozenBase, model: nn.Module, lora: LoraSettings) -> None:
    targets = lora.target_modules
    if targets == "all-linear":
        return
    kinds = nn.Linear | nn.Embedding | Conv1D
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if isinstance(targets, str):
        unmatched = [] if _matches_any(targets, names) else [targets]
    else:
        unmatched = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]
    if unmatched:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise SettingError(
            "lora_target_modules",
            unmatched[0],
            f"no layer of {base.name} has this name"
            + (": a single string is a pattern for full names" if isinstance(targets, str) else ""),
            fix=f"choose from {', '.join(leaves)}, or give all-linear",
        )


def _matches_any(pattern: str, names: list[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error:
        return False
