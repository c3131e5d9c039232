"""The runs of a study: a command line and a folder for each variant and seed."""

from pathlib import Path

import pytest

from spin_lightning.errors import SettingError
from spin_lightning.report.study_plan import STABILITY_VARIANTS, Play


@pytest.mark.parametrize(
    ("variant", "model", "settings"),
    [
        ("SPIN", "SPIN", {}),
        ("MixtureSPIN(history=2)", "MixtureSPIN", {"history": 2}),
        ("AlphaSPIN(alpha=[0.5, 0.1], mixture='token')", "AlphaSPIN", None),
        ("my_variants.DecayingSPIN(decay=0.25)", "my_variants.DecayingSPIN", {"decay": 0.25}),
    ],
)
def test_variant_with_settings_becomes_arguments_of_fit(variant, model, settings):
    play = Play.of(variant, 3)
    wanted = {"alpha": [0.5, 0.1], "mixture": "token"} if settings is None else settings
    assert (play.model, play.settings, play.seed) == (model, wanted, 3)
    arguments = play.arguments("some.yaml", Path("out"))
    assert arguments[:5] == ["fit", "--config", "some.yaml", "--model", model]
    assert [f"--model.{name}={value}" for name, value in wanted.items()] == [
        argument for argument in arguments if argument.startswith("--model.")
    ]
    assert "--seed_everything=3" in arguments


def test_values_of_python_become_those_of_the_command_line():
    play = Play.of("AlphaSPIN(alpha=1e-05, history=None, fused_lora=False)", 0)
    arguments = play.arguments("some.yaml", Path("out"))
    wanted = {"--model.alpha=1e-05", "--model.history=null", "--model.fused_lora=false"}
    assert wanted <= set(arguments)


def test_runs_of_a_study_have_folders_of_their_own():
    plays = [Play.of(variant, seed) for variant in STABILITY_VARIANTS for seed in range(3)]
    folders = {play.folder(Path("out")) for play in plays}
    assert len(folders) == len(plays)
    assert Path("out/MixtureSPIN_history=2-seed1") in folders


@pytest.mark.parametrize("variant", ["", "2", "SPIN(0.1)", "SPIN(beta=f(x))", "SPIN(", "a + b"])
def test_variant_that_names_no_class_is_refused(variant):
    with pytest.raises(SettingError, match=r"variants=.*Fix: write a name such as FictitiousSPIN"):
        Play.of(variant, 0)
