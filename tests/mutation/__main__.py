"""Mutation testing of the pure layer: `make mutation`, or `python -m tests.mutation --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.mutation.forked import judge, warm_up
from tests.mutation.mutants import sample
from tests.mutation.page import Outcome, write_page

SUITES = {
    module: (f"tests/test_{module}.py",) for module in ("losses", "mixtures", "logps", "packing")
}
GOAL = 0.9


def main() -> None:
    """Make the mutants, run each one's suite on it, and write the page; fail below the goal."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="mutants that are drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=Path("docs/runs/mutation.md"))
    given = parser.parse_args()
    mutants, places = sample(tuple(SUITES), given.count, given.seed)
    warm_up([path for suite in SUITES.values() for path in suite])
    outcomes = []
    for mutant, verdict, seconds in judge(mutants, SUITES, given.workers):
        outcomes.append(Outcome(mutant, verdict, seconds))
        if verdict == "survived":
            print(f"survived: {mutant.module}:{mutant.line}: {mutant.after}", flush=True)
    share = write_page(outcomes, places, given.seed, given.out)
    print(f"{share:.1%} of {len(outcomes)} mutants were killed; {given.out}")
    sys.exit(share < GOAL)


if __name__ == "__main__":
    main()
