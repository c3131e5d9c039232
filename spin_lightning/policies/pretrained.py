"""Reading a base model: configuration, tokenizer, and checks that need no weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from spin_lightning.errors import SettingError, first_line
from spin_lightning.policies.adapter_check import check_no_adapter
from spin_lightning.policies.gguf import converted_from, model_folder
from spin_lightning.run.fingerprint import folder_hashes

Quantization = Literal["nf4", "int8", "none"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]

_UNKNOWN_CONTEXT = 2048
# Weights that share a scale in NF4.
_NF4_BLOCK = 64


@dataclass(frozen=True)
class FrozenBase:
    """The frozen base of a policy.

    Attributes:
        name: Hub id or folder of a causal language model. `smollm2` and a GGUF file are replaced
            by the folder that they are converted into.
        revision: Branch, tag or commit of a hub id.
        quantization: How the frozen weights are stored.
        compute_dtype: Type of the computation; auto is bfloat16 on GPUs from Ampere on, else
            float32.
        trust_remote_code: Whether code shipped with the model may run.
    """

    name: str
    revision: str | None = None
    quantization: Quantization = "none"
    compute_dtype: ComputeDtype = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Expand a `~` in the folder's name; convert a GGUF file."""
        if isinstance(self.name, str):
            name = str(Path(self.name).expanduser()) if self.name.startswith("~") else self.name
            object.__setattr__(self, "name", model_folder(name))

    @property
    def dtype(self) -> torch.dtype:
        """`compute_dtype` as a torch type."""
        if self.compute_dtype == "auto":
            return torch.bfloat16 if _has_bfloat16() else torch.float32
        dtype: torch.dtype = getattr(torch, self.compute_dtype)
        return dtype

    def on(self, device: torch.device) -> FrozenBase:
        """The same base, `auto` decided for a device: float32 on a CPU beside an idle GPU."""
        if self.compute_dtype != "auto" or device.type == "cuda" or not _has_bfloat16():
            return self
        return replace(self, compute_dtype="float32")

    @property
    def absolute(self) -> FrozenBase:
        """The same base, a folder by its absolute path."""
        folder = Path(self.name)
        return replace(self, name=str(folder.resolve())) if folder.is_dir() else self

    @property
    def source(self) -> dict[str, Any]:
        """Keyword arguments for every `from_pretrained` call."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def _has_bfloat16() -> bool:
    """Whether there is a GPU that multiplies in bfloat16 and does not just emulate it."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


# The files of a base that are read without its weights, and are read again when one has changed.
_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".py")
# Name, size and time of change of each.
Files = tuple[tuple[str, int, int], ...]


def _files(base: FrozenBase) -> Files:
    """The state of a folder's small files; empty for a hub id, whose revisions don't change."""
    folder = Path(base.name)
    if not folder.is_dir():
        return ()
    found = sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")])
    found = [path for path in found if path.name.endswith(_SMALL_FILES)]
    states = ((str(path.relative_to(folder)), path.stat()) for path in found if path.is_file())
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


def load_config(base: FrozenBase) -> PretrainedConfig:
    """Read the model's configuration, with every dropout of the base switched off.

    Raises:
        SettingError: The model cannot be read, or it holds an adapter.
    """
    return _load_config(base, _files(base))


@cache
def _load_config(base: FrozenBase, _files_read: Files) -> PretrainedConfig:
    check_no_adapter(base)
    try:
        config = AutoConfig.from_pretrained(base.name, **base.source)
    # A config class may raise anything at unexpected values.
    except Exception as error:
        raise SettingError(
            "model",
            base.name,
            f"no causal language model can be read there ({_reading_problem(base, error)})",
            fix="give a folder with a config.json, or a hub id that this machine can reach",
        ) from error
    # With dropout, scores would come from another distribution than the one sampled from.
    for name, value in config.to_dict().items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_tokenizer(base: FrozenBase) -> PreTrainedTokenizerBase:
    """Read the model's tokenizer; the same object until one of its files changes.

    Raises:
        SettingError: The tokenizer is missing or damaged.
    """
    return _load_tokenizer(base, _files(base))


@cache
def _load_tokenizer(base: FrozenBase, _files_read: Files) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(base.name, **base.source)
    except Exception as error:
        raise SettingError(
            "model",
            base.name,
            f"its tokenizer cannot be read ({first_line(error)})",
            fix="save the tokenizer into the model folder with tokenizer.save_pretrained",
        ) from error


def context_length(base: FrozenBase) -> int:
    """Longest sequence that the model supports, in tokens."""
    return context_length_of(load_config(base))


def context_length_of(config: PretrainedConfig) -> int:
    """Longest sequence that a model with this configuration supports, in tokens."""
    config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or getattr(
        config, "n_positions", None
    )
    return int(length or _UNKNOWN_CONTEXT)


def generation_config(base: FrozenBase) -> GenerationConfig:
    """The model's own generation config; without one, that of its configuration."""
    try:
        return GenerationConfig.from_pretrained(base.name, **base.source)
    except OSError:
        return GenerationConfig.from_model_config(load_config(base))


def generation_stop_ids(base: FrozenBase) -> int | list[int] | None:
    """Stop ids from the model's own generation config."""
    try:
        generation = GenerationConfig.from_pretrained(base.name, **base.source)
    except OSError:
        return load_config(base).eos_token_id
    return generation.eos_token_id


def content_hashes(base: FrozenBase) -> dict[str, str]:
    """Identity of the base: file hashes of a folder, or the commit of a hub id."""
    folder = Path(base.name)
    if folder.is_dir():
        read = (".safetensors", ".bin", "config.json", "tokenizer.json")
        return folder_hashes(folder, read) | converted_from(folder)
    return {"commit": str(getattr(load_config(base), "_commit_hash", None))}


def skeleton(base: FrozenBase) -> PreTrainedModel:
    """The model on the meta device, without weights, to check names and sizes before loading."""
    return _skeleton(base, _files(base))


@cache
def _skeleton(base: FrozenBase, _files_read: Files) -> PreTrainedModel:
    config = load_config(base)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about weights that are not initialized
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=base.trust_remote_code
            )
    except Exception as error:
        raise SettingError(
            "model",
            base.name,
            f"no model can be built from its config.json ({first_line(error)})",
            fix="copy the model folder again",
        ) from error
    return model


def check_playable(base: FrozenBase) -> None:
    """Refuse a model that self-play does not support, before its weights are read.

    Raises:
        SettingError: It is not a causal language model, or it has no attention, whose keys and
            values the decoder caches.
    """
    config = load_config(base)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not base.trust_remote_code:
        raise SettingError(
            "model",
            base.name,
            f"its type {config.model_type!r} is not a causal language model",
            fix="give a decoder-only model that AutoModelForCausalLM can load",
        )
    if not hasattr(config.get_text_config(), "num_attention_heads"):
        raise SettingError(
            "model",
            base.name,
            f"its type {config.model_type!r} has no attention, whose keys and values the decoder "
            "caches",
            fix="give a transformer",
        )


def check_quantizable(base: FrozenBase) -> None:
    """Refuse a base that bitsandbytes cannot quantize, before its weights are read.

    Raises:
        SettingError: The model is already quantized, most of its weights are outside linear layers,
            or, for NF4 on a CPU, a layer has an unsupported width.
    """
    if base.quantization == "none":
        return
    config = load_config(base)
    if getattr(config, "quantization_config", None) is not None:
        raise SettingError(
            "quantization",
            base.quantization,
            f"{base.name} is already quantized by its own config",
            fix="set quantization: none, or give the unquantized model",
        )
    model = skeleton(base)
    body = [m for m in model.modules() if not isinstance(m, nn.Embedding)]
    linear = sum(m.weight.numel() for m in body if isinstance(m, nn.Linear | Conv1D))
    total = sum(p.numel() for m in body for p in m.parameters(recurse=False))
    if linear < total / 2:
        raise SettingError(
            "quantization",
            base.quantization,
            f"bitsandbytes quantizes linear layers, and only {linear:,} of {total:,} weights of "
            f"model type {config.model_type!r} are in linear layers",
            fix="set quantization: none for this model",
        )
    # bitsandbytes 0.50 de-quantizes these layers wrongly on a CPU: 4 times the rounding error.
    odd = [
        name
        for name, m in model.named_modules()
        if m is not model.get_output_embeddings()  # which is not quantized
        and _input_width(m) % _NF4_BLOCK
    ]
    if odd and base.quantization == "nf4" and not torch.cuda.is_available():
        raise SettingError(
            "quantization",
            base.quantization,
            f"bitsandbytes' CPU kernels need input widths that are a multiple of {_NF4_BLOCK}, "
            f"and {len(odd)} layers have another width, such as {odd[0]}",
            fix="set quantization: none, or use a GPU",
        )


def _input_width(module: nn.Module) -> int:
    """Number of inputs of a linear layer, 0 for any other layer."""
    if isinstance(module, Conv1D):
        return int(module.nx)
    return module.in_features if isinstance(module, nn.Linear) else 0


def _reading_problem(base: FrozenBase, error: Exception) -> str:
    """Why reading failed; for a missing path the hub's own error is about invalid ids."""
    is_path = base.name.startswith((".", "/", "~")) or base.name.count("/") > 1
    return (
        "there is no such folder" if is_path and not Path(base.name).exists() else first_line(error)
    )
