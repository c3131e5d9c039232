"""Runs all benchmarks one after the other, each in its own process."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.setup import parser
from benchmarks.table import read_results, verdict

BENCHMARKS = ("step", "scoring", "generation", "slots", "iterate", "growth")


def main(arguments: list[str]) -> int:
    """Run all benchmarks; return 1 if one of them failed."""
    out = parser(__doc__).parse_args(arguments).out
    started, failed = time.time(), []
    for name in BENCHMARKS:
        print(f"# {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        if subprocess.run(command).returncode:
            failed.append(name)
    minutes = (time.time() - started) / 60
    print(f"# {verdict(read_results(out))} {minutes:.0f} min, results in {out}")
    if failed:
        print(f"# failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
