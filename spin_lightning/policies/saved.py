"""Iterates of a finished or running run: load one, their mixture or all; write one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spin_lightning.errors import RunFolderError, SettingError, first_line, is_whole
from spin_lightning.mixtures import Mixture, uniform
from spin_lightning.policies.adapter_check import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from spin_lightning.policies.gguf import reconversion
from spin_lightning.policies.loading import load_with_adapter
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings, adapter_base
from spin_lightning.policies.merging import carry_stop_ids, write_merged
from spin_lightning.policies.mixture_model import MixtureModel
from spin_lightning.policies.pretrained import FrozenBase, generation_config
from spin_lightning.run.files import read_json, write_json
from spin_lightning.run.folder import ITERATE_FILE, RunFolder

_RESTORE = "restore it from a copy of the run"


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
        quantized as the run was, and the run's tokenizer. Its generation config has the run's stop
        ids.

    Raises:
        RunFolderError: The run has no iterate t.
        SettingError: There is no such name, or the base model is not where it was.
    """
    if t == "mixture":
        return load_mixture(run_dir, device=device)
    run = RunFolder(Path(run_dir))
    t = run.index_of(t)
    base, adapter = _parts(run, t)
    model = load_with_adapter(base, adapter, device)
    if stops := _stop_ids(run, t):
        carry_stop_ids(model, stops)
    return model, _tokenizer(run)


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


@dataclass(frozen=True)
class SavedIterate:
    """What a run keeps of an iterate.

    Attributes:
        index: Index t of the iterate.
        base: The frozen base, where it is now.
        adapter: Folder of the adapter; None for the bare base.
        tokenizer: The run's tokenizer, with the chat template as used.
        stop_ids: The ids that ended the run's responses; None if its version did not record them.
        commit: Commit of a base from the hub; None for a folder.
    """

    index: int
    base: FrozenBase
    adapter: Path | None
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int] | None
    commit: str | None


def saved_iterate(run: RunFolder, t: int) -> SavedIterate:
    """Read iterate t, without its weights.

    Raises:
        RunFolderError: The run has no iterate t, or a file of it is damaged.
        SettingError: The base model is not where it was.
    """
    base, adapter = _parts(run, t)
    known = run.record(t).fingerprint_fields.get("base_files")
    commit = known.get("commit") if isinstance(known, dict) else None
    commit = None if commit in (None, "None") else str(commit)
    return SavedIterate(t, base, adapter, _tokenizer(run), _stop_ids(run, t), commit)


def write_iterate(
    saved: SavedIterate, folder: Path, merge: bool, notify: Callable[[str], None]
) -> None:
    """Write an iterate into a folder, with its tokenizer and a generation config.

    A PEFT folder names its base by the absolute path, or by hub id and commit.

    Args:
        saved: The iterate; without `merge` it has an adapter.
        folder: The folder.
        merge: Whether to merge the adapter into the (de-quantized) base; the model is read back and
            compared with the iterate.
        notify: Receives what the user should know about a merged model.

    Raises:
        RunFolderError: The merged model is not the iterate.
    """
    base, adapter, stops = saved.base, saved.adapter, saved.stop_ids
    if merge:
        _merge_into(folder, base, adapter, stops, notify)
    else:
        assert adapter is not None
        shutil.copy2(adapter / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
        config = read_json(adapter / ADAPTER_CONFIG, _RESTORE, dict)
        pinned = replace(base, revision=saved.commit or base.revision)
        write_json(folder / ADAPTER_CONFIG, {**config, **adapter_base(pinned)})
        generation = generation_config(base)
        generation.eos_token_id = stops or generation.eos_token_id
        generation.save_pretrained(folder)
    saved.tokenizer.save_pretrained(folder)


def _merge_into(
    folder: Path,
    base: FrozenBase,
    adapter: Path | None,
    stops: list[int] | None,
    notify: Callable[[str], None],
) -> None:
    comparison, is_untied = write_merged(base, adapter, folder, stops)
    if is_untied:
        notify(
            "Embedding and head were tied in the base and differ after the merge: the exported "
            "model has both (tie_word_embeddings: false)."
        )
    notify(str(comparison))


def _stop_ids(run: RunFolder, t: int) -> list[int] | None:
    """The ids that ended the run's responses; None if its version did not record them."""
    stops = run.record(t).fingerprint_fields.get("stop_ids")
    is_known = isinstance(stops, list) and all(is_whole(stop, 0) for stop in stops)
    return list(stops) if is_known and stops else None


def _policy(run: RunFolder, base: FrozenBase, device: torch.device | str) -> LoraPolicy:
    policy = LoraPolicy(base, LoraSettings(r=1), device=device)
    if stops := _stop_ids(run, min(run.known_iterates())):
        carry_stop_ids(policy.model, stops)
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
            f"the base model of {run.root} is not in this folder any more",
            fix=f"if it was moved, link it there: ln -s <its new folder> {name}; or write its new "
            f"path as base.name into each {run.iterates / 'iterate_*' / ITERATE_FILE}"
            f"{reconversion(name)}",
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
