"""Shape of the trained adapter, and checks that it, or an initial adapter, fits the base."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from spin_lightning.policies.pretrained import FrozenBase, skeleton

# Importing peft takes more than a second, which a help text should not have to wait for.
if TYPE_CHECKING:
    import peft

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


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

        targets = self.target_modules
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
                    or (bool(targets) and all(isinstance(name, str) and name for name in targets)),
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
            base_model_name_or_path=base.name,
            revision=base.revision,
        )


def check_adapter(base: FrozenBase, lora: LoraSettings, initial_adapter: str | None) -> None:
    """Refuse an adapter that does not fit the base, before any weights of the base are read.

    Raises:
        SettingError: A target module matches no layer, or the initial adapter is missing, not a
            LoRA adapter, damaged, or made for another model.
    """
    import peft
    from peft.utils import get_peft_model_state_dict

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
    try:
        wanted = get_peft_model_state_dict(peft.get_peft_model(model, config))
    except Exception as error:
        raise refusal(f"it does not fit {base.name} ({first_line(error)})") from error
    if any(not t.is_floating_point() or not t.isfinite().all() for t in tensors.values()):
        raise refusal("it has non-finite weights")
    given = {name: weight.shape for name, weight in tensors.items()}
    if given != {name: weight.shape for name, weight in wanted.items()}:
        raise refusal(f"its weights do not have the shapes of {base.name}")


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
