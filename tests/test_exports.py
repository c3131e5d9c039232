"""Exports of the package: imported when used, and otherwise as if they had been imported."""

import pickle
import subprocess
import sys

import pytest

import spin_lightning


def test_every_export_resolves_and_is_listed():
    for name in spin_lightning.__all__:
        assert getattr(spin_lightning, name) is not None
    assert {*spin_lightning.__all__, "__version__"} <= set(dir(spin_lightning))


def test_star_import_gives_every_export():
    names: dict[str, object] = {}
    exec("from spin_lightning import *", names)
    assert set(spin_lightning.__all__) <= names.keys()


def test_unknown_name_is_an_attribute_error_and_an_import_error():
    with pytest.raises(AttributeError, match="has no attribute 'SPINN'"):
        _ = spin_lightning.SPINN
    with pytest.raises(ImportError, match="cannot import name 'SPINN'"):
        from spin_lightning import SPINN  # noqa: F401


def test_exports_are_the_objects_of_their_modules():
    from spin_lightning.mixtures import Mixture
    from spin_lightning.modules.spin import SPIN

    assert spin_lightning.SPIN is SPIN
    assert pickle.loads(pickle.dumps(spin_lightning.SPIN)) is SPIN
    mixture = spin_lightning.latest(3)
    assert isinstance(mixture, Mixture)
    assert pickle.loads(pickle.dumps(mixture)) == mixture


def test_import_of_the_package_loads_nothing_heavy_and_modules_are_attributes():
    code = """
import sys
import spin_lightning
assert not {"torch", "lightning", "transformers"} & sys.modules.keys()
assert spin_lightning.losses.logistic.__module__ == "spin_lightning.losses"
assert "torch" in sys.modules and "lightning" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
