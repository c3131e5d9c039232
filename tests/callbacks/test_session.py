"""The session: refuses other classes, and holds what makes a run the same run."""

from types import SimpleNamespace

import lightning as L
import pytest

from spin_lightning import SPIN, SelfPlayDataModule
from spin_lightning.callbacks.session import Session
from spin_lightning.errors import SettingError
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import play, write_examples


@pytest.mark.parametrize("wrong", ["module", "data"])
def test_session_of_other_classes_is_refused(wrong, tmp_path):
    module = L.LightningModule() if wrong == "module" else SPIN(model="m")
    data = L.LightningDataModule() if wrong == "data" else SelfPlayDataModule("d")
    trainer = SimpleNamespace(datamodule=data)
    with pytest.raises(SettingError, match=r"callbacks=.*it got a .*Fix: train a SelfPlayModule"):
        Session.of(trainer, module, RunFolder(tmp_path))


def test_session_without_a_data_module_is_refused(tmp_path):
    with pytest.raises(SettingError, match="it got a SPIN and a NoneType"):
        Session.of(SimpleNamespace(), SPIN(model="m"), RunFolder(tmp_path))


def test_session_fingerprint_counts_the_batch_of_an_optimizer_step(tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "examples.jsonl", count=40)
    module, datamodule, trainer = play(
        tmp_path / "run",
        tiny_model_dir,
        data,
        epochs=1,
        data_settings={"batch_size": 4},
        trainer_settings={"accumulate_grad_batches": 3},
    )
    session = Session.of(trainer, module, RunFolder(tmp_path / "run"))
    assert session.data is datamodule
    fields = session.fingerprint_fields(1)
    assert fields["batch_size"] == 12
    assert fields["seed"] == 1
    assert fields == session.run.record(1).fingerprint_fields
