"""`doctor`: does this machine compute what a run needs, and what should change."""

from __future__ import annotations

import sys
from pathlib import Path

from spin_lightning.cli.parsing import command_parser


def doctor(args: list[str]) -> None:
    """Check this machine: its versions and kernels, the fast passes, the predicted memory.

    With a config the fast passes are those of its model, and memory is predicted for its settings;
    otherwise the model is a small one. The last line is OK, or the change to make (exit code 1).
    """
    parser = command_parser("doctor", doctor)
    parser.add_argument("--config", help="A config of `fit`; default: a small model.")
    given = parser.parse_args(args)

    from spin_lightning.callbacks.console import console, quiet_libraries
    from spin_lightning.cli.examination import examine

    quiet_libraries()
    fixes: list[str] = []
    for finding in examine(None if given.config is None else Path(given.config)):
        console.print(f"{finding.name:<32}{finding.text}", markup=False)
        if finding.fix is not None and finding.fix not in fixes:
            fixes.append(finding.fix)
    console.print(f"Change: {'; '.join(fixes)}." if fixes else "OK", markup=False)
    if fixes:
        sys.exit(1)
