"""Settings of the benchmarks: their ranges, and modules that a help text can import quickly."""

import subprocess
import sys
from pathlib import Path

import pytest

from spin_lightning.errors import SettingError
from spin_lightning.evaluation.settings import JudgeSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concurrency": 0}, "judge.concurrency=0.*1 or more"),
        ({"requests_per_minute": 0}, "judge.requests_per_minute=0.*number > 0"),
    ],
)
def test_judge_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        JudgeSettings(**settings)


ALONE = """
import sys, types
package = types.ModuleType("spin_lightning")
package.__path__ = [sys.argv[1]]
sys.modules["spin_lightning"] = package
import spin_lightning.evaluation.settings, spin_lightning.report.study_plan
known = set(sys.stdlib_module_names) | {"spin_lightning"}
print(*sorted({name.partition(".")[0] for name in sys.modules} - known))
"""


def test_settings_and_the_plan_of_a_study_import_the_standard_library_alone():
    package = Path(__file__).parents[2] / "spin_lightning"
    arguments = [sys.executable, "-S", "-c", ALONE, str(package)]
    answer = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert answer.stdout.split() in ([], ["__main__"])
