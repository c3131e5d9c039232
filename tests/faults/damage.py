"""Ways to damage a file or a folder, each with its expected message."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

NOISE = random.Random(1).randbytes(300)
DEEP = b"[" * 10**5

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Damage:
    """Damage to a file or folder below some root, and the error that it leads to.

    Attributes:
        path: The file or folder.
        case: Name of the damage.
        change: Causes it.
        asked: What detects it: a command, or a function of the test.
        words: Parts of the one error message.
    """

    path: str
    case: str
    change: Change
    asked: str
    words: tuple[str, ...]


def bytes_(content: bytes) -> Change:
    return lambda path: path.write_bytes(content) and None


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def replaced_by_a_file(path: Path) -> None:
    gone(path)
    path.write_text("a file")


def replaced_by_a_folder(path: Path) -> None:
    gone(path)
    path.mkdir()


def edited(**changes: Any) -> Change:
    """JSON with other values; None removes a key."""

    def change(path: Path) -> None:
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    """A safetensors file with other tensors."""

    def rewrite(path: Path) -> None:
        weights = change({k: v.clone() for k, v in load_file(path).items()})
        save_file(weights, path, metadata={"format": "pt"})

    return rewrite


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (exec, ("raise AssertionError('a pickle was loaded')",))


def cases(path: str, asked: str, words: tuple[str, ...], **changes: Change) -> list[Damage]:
    return [Damage(path, name.replace("_", " "), c, asked, words) for name, c in changes.items()]


NO_JSON: dict[str, Change] = {
    "empty": bytes_(b""),
    "half": half,
    "noise": bytes_(NOISE),
    "a_list": bytes_(b"[]"),
    "null": bytes_(b"null"),
    "deep": bytes_(DEEP),
}
TRAVERSAL = {"../../../escaped": "0" * 64}
