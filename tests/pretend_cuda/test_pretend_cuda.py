"""The GPU branches of the code, on a pretend device, each file in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretend_cuda.hooks import compile_hooks, compiler

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def hooks(tmp_path_factory) -> Path:
    if compiler() is None:
        pytest.skip("no C++ compiler to build the pretend device with")
    library = tmp_path_factory.mktemp("hooks") / "hooks.so"
    compile_hooks(library)
    return library


@pytest.mark.timeout(660)  # on a busy machine
@pytest.mark.parametrize("file", sorted(HERE.glob("on_device/check_*.py")), ids=lambda f: f.stem)
def test_on_the_pretend_device(file, hooks):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-p", "tests.pretend_cuda.plugin", str(file)),
        ],
        cwd=ROOT,
        env={**os.environ, "PRETEND_CUDA_HOOKS": str(hooks)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
