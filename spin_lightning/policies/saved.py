"""Iterates of a finished or running run: load one, their mixture or all; export one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spin_lightning.errors import RunFolderError, SettingError, first_line
from spin_lightning.mixtures import Mixture, uniform
from spin_lightning.policies.loading import load_with_adapter, merge_adapter
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoraSettings
from spin_lightning.policies.mixture_model import MixtureModel
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.run.folder import ITERATE_FILE, RunFolder


def load_iterate(
    run_dir: str | Path,
    t: int | Literal["best", "last", "mixture"],
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load iterate t of a run, ready to generate from.

    Args:
        run_dir: The run folder.
        t: Index of the iterate, 0 is the base; "best", the best one according to the run; "last";
            or "mixture", which is `load_mixture(run_dir)`.
        device: Device to load it on.

    Returns:
        The model in eval mode (a PEFT model, or the bare base for an iterate without adapter),
        quantized as the run was, and the run's tokenizer.

    Raises:
        RunFolderError: The run has no iterate t.
        SettingError: There is no such name, or the base model is not where it was.
    """
    if t == "mixture":
        return load_mixture(run_dir, device=device)
    run = RunFolder(Path(run_dir))
    base, adapter = _parts(run, run.index_of(t))
    return load_with_adapter(base, adapter, device), _tokenizer(run)


def load_mixture(
    run_dir: str | Path,
    weights: Mapping[int, float] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[MixtureModel, PreTrainedTokenizerBase]:
    """Load the mixture of a run's iterates, the average policy of fictitious play.

    Args:
        run_dir: The run folder.
        weights: Weight of each iterate, summing to 1; default equal weights for all iterates.
        device: Device to load it on.

    Returns:
        The mixture (`generate`, `response_logps`), quantized as the run was, and the tokenizer.

    Raises:
        RunFolderError: The run has no such iterate.
        SettingError: The weights do not sum to 1.
    """
    run = RunFolder(Path(run_dir))
    mixture = uniform(run.known_iterates() or [0]) if weights is None else Mixture(weights)
    bases = [_parts(run, t)[0] for t in mixture.members]
    return MixtureModel(mixture, _policy(run, bases[0], device)), _tokenizer(run)


def load_policy(run_dir: str | Path, device: torch.device | str = "cpu") -> LoraPolicy:
    """Load the base of a run once, to act as any of its iterates: `policy.at(t)`.

    Args:
        run_dir: The run folder.
        device: Device to load it on.

    Returns:
        The policy, quantized as the run was; its trained adapter is a fresh one.

    Raises:
        RunFolderError: The run has no iterates.
    """
    run = RunFolder(Path(run_dir))
    base, _ = _parts(run, 0)
    return _policy(run, base, device)


def load_tokenizer(run_dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template of a run."""
    return _tokenizer(RunFolder(Path(run_dir)))


def export_iterate(
    run_dir: str | Path,
    t: int | str,
    out: str | Path,
    merge: bool = False,
) -> Path:
    """Write iterate t as a folder that does not depend on the run.

    Args:
        run_dir: The run folder.
        t: Index of the iterate, "best" or "last".
        out: The folder to write; it must be empty or not exist.
        merge: Write a full model with the adapter merged into (de-quantized) base weights, instead
            of a PEFT adapter folder.

    Returns:
        The folder.

    Raises:
        SettingError: `out` is not empty, or iterate t has no adapter to write.
        RunFolderError: The run has no iterate t.
    """
    run, out = RunFolder(Path(run_dir)), Path(out)
    if t == "mixture":
        raise SettingError(
            "iterate",
            t,
            "the mixture has an adapter for each iterate and cannot be one model",
            fix="name one iterate, or use spin_lightning.load_mixture in Python",
        )
    t = run.index_of(t)
    if out.exists() and any(out.iterdir()):
        raise SettingError("out", str(out), "the folder is not empty", fix="name a new folder")
    base, adapter = _parts(run, t)
    if adapter is None and not merge:
        raise SettingError(
            "iterate",
            t,
            f"it is the base model {base.name} itself, without an adapter",
            fix="use the base model as it is, or export with --merge",
        )
    if merge:
        merge_adapter(base, adapter).save_pretrained(out)
    else:
        out.mkdir(parents=True, exist_ok=True)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copy2(run.iterate(t) / name, out / name)
    _tokenizer(run).save_pretrained(out)
    return out


def _policy(run: RunFolder, base: FrozenBase, device: torch.device | str) -> LoraPolicy:
    policy = LoraPolicy(base, LoraSettings(r=1), device=device)
    policy.use_iterates(run.iterate_folders())
    return policy


def _parts(run: RunFolder, t: int) -> tuple[FrozenBase, Path | None]:
    record = run.check_iterate(t)
    try:
        base = FrozenBase(**record.base)
    except TypeError as error:
        raise RunFolderError(
            f"the base model in the record of {run.iterate(t)} has other fields than this version "
            f"expects ({first_line(error)})",
            fix="restore its iterate.json from a copy of the run",
        ) from error
    hub = "commit" in record.fingerprint_fields.get("base_files", {"commit": ""})
    base = replace(base, name=_base_path(run, base.name, is_folder=not hub))
    has_adapter = (run.iterate(t) / ADAPTER_CONFIG).exists()
    return base, run.iterate(t) if has_adapter else None


def _base_path(run: RunFolder, name: str, *, is_folder: bool) -> str:
    """Where the base model is now; a hub id as it is.

    Older versions stored a relative path as it was given, from the folder where `fit` ran.

    Args:
        run: The run folder.
        name: Hub id or folder, as the iterate's record has it.
        is_folder: Whether the run has read it from a folder.

    Raises:
        SettingError: It was a folder, which is gone.
    """
    found = [path for path in (Path(name), run.root / name) if path.is_dir()]
    if found:
        return str(found[0].resolve())
    if is_folder or Path(name).is_absolute():
        raise SettingError(
            "model",
            name,
            f"the base model of {run.root} is not there",
            fix="if it was moved, put a link to it there, or change base.name in "
            f"{run.iterates / 'iterate_*' / ITERATE_FILE}",
        )
    return name


def _tokenizer(run: RunFolder) -> PreTrainedTokenizerBase:
    run.check_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(run.tokenizer)
    # (Several libraries read its files, each with its own error classes.)
    except Exception as error:
        raise RunFolderError(
            f"the tokenizer in {run.tokenizer} cannot be read ({first_line(error)})",
            fix="restore it from a copy of the run, or save the base model's tokenizer there with "
            "save_pretrained",
        ) from error
