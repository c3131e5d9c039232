"""Settings of a module: values per iterate, and checks of choices and ranges."""

from __future__ import annotations

from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from spin_lightning.errors import SettingError, check_settings, is_number, is_whole

if TYPE_CHECKING:
    from spin_lightning.modules.base import SelfPlayModule


def at_iterate(value: float | list[float], t: int) -> float:
    """The value for training p_{t+1}. A finished run has one more iterate: the last value again."""
    return value[min(t, len(value) - 1)] if isinstance(value, list) else value


def values_before(value: float | list[float] | None, t: int) -> list[float] | None:
    """The values for training p_1 … p_t; None for a setting that the variant does not have."""
    return None if value is None else [at_iterate(value, i) for i in range(t)]


def all_values(value: float | list[float] | None) -> list[float]:
    """The values of a setting that may be a list with one value per iterate."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def check_choices(module: SelfPlayModule) -> None:
    """Check the settings that have a fixed set of values, which nothing else checks in a notebook.

    Args:
        module: A module that has saved its hyper-parameters. The annotations of its class and of
            the classes above it are the schema.

    Raises:
        SettingError: A value is not among the choices.
    """
    for kind in type(module).__mro__:
        for name, hint in _hints(kind).items():
            if name not in module.hparams:
                continue
            value, choices = module.hparams[name], _choices(hint)
            if choices and not any(value is c or value == c for c in choices):
                names = ", ".join("null" if c is None else str(c) for c in choices)
                raise SettingError(
                    name, value, "there is no such choice", fix=f"choose from {names}"
                )


def check_ranges(module: SelfPlayModule) -> None:
    """Check the ranges of the settings that all variants share.

    Raises:
        SettingError: A value is missing or out of range.
    """
    for name in ("beta", "loss"):
        if getattr(module, name) is None and name not in module.without:
            raise SettingError(
                name,
                None,
                f"{type(module).__name__} requires a value",
                fix="give a value, or leave it out for the default",
            )
    epochs, warmup = module.epochs_per_iterate, module.warmup_ratio
    decay, anchor = module.weight_decay, module.real_nll_weight
    check_settings(
        module,
        {
            "beta": (
                all(is_number(beta) and beta > 0 for beta in all_values(module.beta)),
                "values > 0; 0.1 is SPIN's",
            ),
            "learning_rate": (
                all(is_number(rate) and rate > 0 for rate in all_values(module.learning_rate)),
                "values > 0",
            ),
            "warmup_ratio": (is_number(warmup) and 0 <= warmup <= 1, "a number in [0, 1]"),
            "epochs_per_iterate": (is_whole(epochs, 1), "a whole number >= 1"),
            "schedule_epochs": (
                is_whole(module.schedule_epochs, epochs),
                f"at least epochs_per_iterate ({epochs})",
            ),
            "weight_decay": (is_number(decay) and decay >= 0, "a number >= 0"),
            "max_skipped_batches": (is_whole(module.max_skipped_batches, 0), "a whole number >= 0"),
            "real_nll_weight": (
                is_number(anchor) and anchor >= 0,
                "a number >= 0; 0 for no anchor",
            ),
        },
    )


def _hints(kind: type) -> dict[str, Any]:
    if "__init__" not in vars(kind):
        return {}
    try:
        return get_type_hints(vars(kind)["__init__"])
    except NameError:  # a name that a user's class imports for type checkers only
        return {}


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a bool or a Literal, perhaps with None; empty for any other type."""
    if hint is bool:
        return (True, False)
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = [_choices(part) for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) in (Union, UnionType) and all(parts):
        return (*(value for part in parts for value in part), None)
    return ()
