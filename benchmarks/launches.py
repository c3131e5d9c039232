"""Launches, host synchronizations, casts and float32 products of a training step, without a GPU.

They are counted on the pretend device of the tests (`tests/pretend_cuda`), which needs a C++
compiler. Prints the table of docs/gpu.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.pretend_cuda.hooks import compile_hooks, compiler, load_hooks


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", choices=("pretend",), default="pretend")
    options.add_argument("--out", type=Path, default=Path("runs/bench"))
    out = options.parse_args(arguments).out
    if compiler() is None:
        sys.exit("There is no C++ compiler to build the pretend device with: install g++.")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "hooks.so"
        compile_hooks(library)
        load_hooks(library)
        # It imports torch, which looks for devices once.
        from benchmarks import counting

        print(counting.table(out))


if __name__ == "__main__":
    main(sys.argv[1:])
