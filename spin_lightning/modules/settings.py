"""Settings in the forms that modules compute with."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from spin_lightning.errors import SettingError, is_number, is_whole
from spin_lightning.policies.lora_settings import LoraSettings


def at_iterate(value: float | list[float], t: int) -> float:
    """The value for training p_{t+1}; a finished run may ask for one more than there are."""
    return value[min(t, len(value) - 1)] if isinstance(value, list) else value


def check_choices(module: Any) -> None:
    """Refuse values that are none of those a setting may have, also in a notebook.

    Args:
        module: A module that has kept its hyper-parameters; the annotations of its class and of
            those above it are the schema.

    Raises:
        SettingError: Such a value.
    """
    for kind in type(module).__mro__:
        for name, hint in _hints(kind).items():
            value, choices = module.hparams.get(name), _choices(hint)
            if (
                name in module.hparams
                and choices
                and not any(value is c or value == c for c in choices)
            ):
                told = ", ".join("null" if c is None else str(c) for c in choices)
                raise SettingError(
                    name, value, "there is no such choice", fix=f"choose from {told}"
                )


def _hints(kind: type) -> dict[str, Any]:
    if "__init__" not in vars(kind):
        return {}
    try:
        return get_type_hints(vars(kind)["__init__"])
    except NameError:  # names that a user's class imports for type checkers alone
        return {}


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal (and None), or of a bool; empty where they are not listed."""
    if hint is bool:
        return (True, False)
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = [_choices(part) for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) in (Union, UnionType) and all(parts):
        return (*(value for part in parts for value in part), None)
    return ()


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
    checks = {
        "r": (is_whole(lora.r, 1), "a whole number >= 1"),
        "alpha": (is_whole(lora.alpha, 1), "a whole number >= 1"),
        "dropout": (is_number(lora.dropout) and 0 <= lora.dropout < 1, "a share in [0, 1)"),
        "target_modules": (
            isinstance(targets, str | None) or bool(targets and all(map(_is_name, targets))),
            "names of layers, or all-linear",
        ),
    }
    for name, (valid, fix) in checks.items():
        if not valid:
            raise SettingError(f"lora_{name}", given[name], "out of range", fix=f"give {fix}")
    return lora


def _is_name(target: object) -> bool:
    return isinstance(target, str) and bool(target)
