"""What a user reads when something is wrong."""

from types import SimpleNamespace

import pytest

from spin_lightning.errors import (
    DataError,
    RunFolderError,
    SettingError,
    SpinError,
    check_settings,
)


def test_setting_error_names_field_value_problem_and_ends_with_the_fix():
    error = SettingError("beta", -1.0, "out of range", fix="give a number > 0")
    assert str(error) == "beta=-1.0: out of range. Fix: give a number > 0."
    assert (error.field, error.value, error.fix) == ("beta", -1.0, "give a number > 0")


def test_error_whose_parts_end_with_a_full_stop_does_not_double_it():
    assert str(SpinError("no rows.", fix="make some.")) == "no rows. Fix: make some."


@pytest.mark.parametrize("kind", [SettingError, DataError, RunFolderError])
def test_error_of_every_kind_is_caught_as_one_and_as_a_value_error(kind):
    assert issubclass(kind, SpinError)
    assert issubclass(SpinError, ValueError)


def test_check_settings_names_the_first_invalid_setting_with_its_value_and_fix():
    settings = SimpleNamespace(width=3, depth=0, height=-1)
    valid = {"width": (True, "a number")}
    check_settings(settings, valid)
    invalid = {**valid, "depth": (False, "1 or more"), "height": (False, "0 or more")}
    with pytest.raises(SettingError) as error:
        check_settings(settings, invalid, prefix="box.")
    assert str(error.value) == "box.depth=0: out of range. Fix: give 1 or more."
