"""What a user reads when something is wrong."""

import pytest

from spin_lightning.errors import DataError, RunFolderError, SettingError, SpinError


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
