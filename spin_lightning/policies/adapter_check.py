"""Models that hold an adapter, which transformers would load into them unasked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final, Protocol

from transformers import PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

from spin_lightning.errors import SettingError

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"


class Named(Protocol):
    """What identifies a base model."""

    @property
    def name(self) -> str:
        """Hub id or folder."""

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of a hub id."""


def check_no_adapter(base: Named) -> None:
    """Refuse a folder or a hub id with an adapter, before anything is loaded.

    Raises:
        SettingError: It has an adapter, beside a model or alone.
    """
    try:
        file = find_adapter_config_file(base.name, revision=base.revision)
    except (OSError, ValueError):  # no such model, which is reported where its config is read
        return
    if file is None:
        return
    is_folder = Path(base.name).is_dir()
    if _has_config(base):
        raise _model_with_adapter(base, is_folder=is_folder)
    own = _base_of(file) or "<its base model>"
    if is_folder:
        fix = f"give --model.model {own} --model.initial_adapter {base.name}"
    else:
        folder = base.name.rpartition("/")[2]
        fix = (
            f"download it with: {_download(base)} and give --model.model {own} "
            f"--model.initial_adapter {folder}"
        )
    raise SettingError("model", base.name, "it is an adapter, not a model", fix=fix)


def check_none_loaded(base: Named, model: PreTrainedModel) -> None:
    """Refuse a model into which transformers has loaded an adapter.

    A hub that could not be reached during `check_no_adapter` may be reachable again afterwards.

    Raises:
        SettingError: It has one.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _model_with_adapter(base, is_folder=Path(base.name).is_dir())


def _model_with_adapter(base: Named, *, is_folder: bool) -> SettingError:
    fix = (
        f"move {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} into a folder of their own and start from "
        "it with --model.initial_adapter <that folder>, or delete them"
    )
    if not is_folder:
        fix = f"download it with: {_download(base)} and give that folder as model; there, {fix}"
    return SettingError(
        "model",
        base.name,
        f"it holds a model and an adapter ({ADAPTER_CONFIG}), which transformers would load "
        "unasked: the run would not start from the model itself",
        fix=fix,
    )


def _download(base: Named) -> str:
    revision = f" --revision {base.revision}" if base.revision else ""
    return f"hf download {base.name}{revision} --local-dir {base.name.rpartition('/')[2]}"


def _has_config(base: Named) -> bool:
    found = cached_file(
        base.name,
        "config.json",
        revision=base.revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def _base_of(file: str | os.PathLike[str]) -> str | None:
    try:
        own = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):  # no JSON, or no object
        return None
    return str(own) if own else None
