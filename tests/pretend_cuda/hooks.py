"""Compiling and loading `hooks.cpp`, which has to happen before torch looks for a device."""

import ctypes
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("hooks.cpp")


def compiler() -> str | None:
    """Path of a C++ compiler, None if there is none."""
    return next(filter(None, map(shutil.which, ("g++", "clang++"))), None)


def compile_hooks(library: Path) -> None:
    """Compile the hooks against the installed torch."""
    torch = _torch_folder()
    include = torch / "include"
    folders = (include, include / "torch" / "csrc" / "api" / "include")
    subprocess.run(
        [
            *(str(compiler()), "-O1", "-shared", "-fPIC", "-std=c++20", str(SOURCE)),
            *(f"-I{folder}" for folder in folders),
            *(f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"),
            *("-o", str(library)),
        ],
        check=True,
        capture_output=True,
        text=True,
    )


def load_hooks(library: Path) -> None:
    """Register the pretend device with torch, in a process that has not imported torch yet."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _torch_folder() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
