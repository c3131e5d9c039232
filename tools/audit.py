"""Check the pinned versions for known vulnerabilities; without a network, report that and pass.

python tools/audit.py .venv/audit/bin/pip-audit
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_WHAT = ("--requirement", "constraints.txt", "--no-deps", "--disable-pip")
_FORMAT = ("--progress-spinner", "off", "--format", "json")
# Words in pip-audit's last message when it has no network.
_NO_NETWORK = ("connection", "timed out", "timeout", "max retries", "resolve", "unreachable")


def main(pip_audit: str) -> int:
    """Run the audit; 0 if nothing was found or nothing could be checked."""
    done = subprocess.run(
        [pip_audit, *_WHAT, *_FORMAT], capture_output=True, text=True, check=False
    )
    try:
        packages: Sequence[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "it printed nothing")
        if any(word in done.stderr.lower() for word in _NO_NETWORK):
            print(f"audit: no network ({last}); nothing was checked.")
            return 0
        print(f"audit: pip-audit failed: {last}")
        return 1
    checked = [package for package in packages if "skip_reason" not in package]
    found = [(package, vuln) for package in checked for vuln in package["vulns"]]
    for package, vuln in found:
        fixed = ", ".join(vuln["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {vuln['id']} (fixed in: {fixed})")
    if not checked:
        print(f"audit: none of {len(packages)} versions is in the index; nothing was checked.")
        return 0
    print(f"audit: {len(found)} findings in {len(checked)} of {len(packages)} pinned versions.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
