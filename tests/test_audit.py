"""The audit of the pinned versions, with a stand-in for pip-audit."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[1] / "tools" / "audit.py"
VULN = {"id": "PYSEC-1", "fix_versions": ["2.1"]}
SAFE = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [VULN]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "errors", "code", "said"),
    [
        ([SAFE, UNKNOWN], "", 0, "0 findings in 1 of 2 pinned versions"),
        ([SAFE, BAD], "Found 1 known vulnerability", 1, "b 2: PYSEC-1 (fixed in: 2.1)"),
        ([UNKNOWN], "", 0, "nothing was checked"),
        (None, "requests.exceptions.ConnectionError: Max retries exceeded", 0, "no network"),
        (None, "ERROR: invalid requirement", 1, "pip-audit failed: ERROR: invalid requirement"),
        (None, "", 1, "pip-audit failed"),
    ],
)
def test_audit_fails_on_findings_and_passes_without_a_network(
    packages, errors, code, said, tmp_path
):
    program = tmp_path / "pip-audit"
    answer = "" if packages is None else json.dumps({"dependencies": packages, "fixes": []})
    program.write_text(
        f"#!{sys.executable}\nimport sys\nprint({answer!r})\nprint({errors!r}, file=sys.stderr)\n"
        f"sys.exit({int(bool(errors))})\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        [sys.executable, str(AUDIT), str(program)], capture_output=True, text=True
    )
    assert done.returncode == code
    assert said in done.stdout
