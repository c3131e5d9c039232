"""Settings in the forms that modules compute with."""

from __future__ import annotations

from typing import Any

from spin_lightning.errors import SettingError
from spin_lightning.policies.lora import LoraSettings


def at_iterate(value: float | list[float], t: int) -> float:
    """The value for training p_{t+1}; a finished run may ask for one more than there are."""
    return value[min(t, len(value) - 1)] if isinstance(value, list) else value


def lora_settings(
    r: int | None,
    alpha: int | None,
    dropout: float | None,
    target_modules: str | list[str] | None,
    initial_adapter: str | None,
) -> LoraSettings:
    """Shape of a fresh adapter; what was not given keeps its default.

    Raises:
        SettingError: A value is out of range, or one is given together with `initial_adapter`.
    """
    targets = tuple(target_modules) if isinstance(target_modules, list) else target_modules
    settings: dict[str, Any] = {
        "r": r,
        "alpha": alpha,
        "dropout": dropout,
        "target_modules": targets,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if given and initial_adapter is not None:
        raise SettingError(
            "initial_adapter",
            initial_adapter,
            f"its own config says what {', '.join(f'lora_{name}' for name in given)} would",
            fix="leave the lora_* settings out, or start without initial_adapter",
        )
    lora = LoraSettings(**given)
    if lora.r < 1 or lora.alpha <= 0 or not 0 <= lora.dropout < 1:
        raise SettingError(
            "lora_*", given, "out of range", fix="give r >= 1, alpha > 0 and dropout in [0, 1)"
        )
    return lora
