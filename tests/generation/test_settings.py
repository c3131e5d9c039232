"""Settings of the sampler: their ranges, and when samples are the iterates' own."""

from math import nan

import pytest

from spin_lightning.errors import SettingError
from spin_lightning.generation.settings import GenerationSettings


def test_generation_settings_by_default_sample_the_iterates_themselves():
    settings = GenerationSettings()
    assert (settings.temperature, settings.top_p, settings.top_k) == (1.0, 1.0, 0)
    assert settings.is_exact


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"top_p": 0.95}, {"top_k": 50}])
def test_generation_settings_that_change_the_distribution_are_not_exact(change):
    assert not GenerationSettings.of(change).is_exact


def test_generation_settings_that_only_change_the_cost_are_exact():
    assert GenerationSettings(batch_tokens=1, unit_size=1).is_exact


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("batch_tokens", 0, "give a whole number > 0, or null"),
        ("unit_size", 0, "give a whole number of rows > 0, or null"),
        ("temperature", 0.0, "give a number >= 1e-06"),
        ("temperature", -1.0, "give a number >= 1e-06"),
        ("temperature", nan, "give a number >= 1e-06"),
        ("top_p", 0.0, r"give a number in \(0, 1\]"),
        ("top_p", 1.5, r"give a number in \(0, 1\]"),
        ("top_k", -1, "give a whole number >= 0"),
    ],
)
def test_generation_settings_out_of_range_name_field_value_and_fix(name, value, fix):
    message = rf"^generation\.{name}={value}: out of range\. Fix: {fix}"
    with pytest.raises(SettingError, match=message):
        GenerationSettings.of({name: value})


def test_generation_settings_of_an_unknown_name_list_the_known_ones():
    known = "choose from batch_tokens, unit_size, temperature, .*, engine, servers, .*"
    with pytest.raises(SettingError, match=rf"^generation\.topp=0\.9: .*Fix: {known}\.$"):
        GenerationSettings.of({"topp": 0.9})
