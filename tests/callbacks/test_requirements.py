"""Checks that are made before weights are read or rows are made."""

import pytest

from spin_lightning import SFT, SPACE, SPIN, AlphaSPIN
from spin_lightning.callbacks.requirements import check_objective, how_to_continue
from spin_lightning.errors import SettingError
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import play, write_examples


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_check_interval": 1000}, "an epoch has only 4 batches. Fix: give 1 to 4 batches"),
        ({"val_check_interval": 3, "limit_train_batches": 2}, "an epoch has only 2 batches"),
    ],
)
def test_interval_of_validation_beyond_an_epoch_is_refused_before_rows(
    settings, message, tiny_model_dir, tmp_path
):
    data = write_examples(tmp_path / "examples.jsonl")
    with pytest.raises(SettingError, match=f"trainer.val_check_interval=.*{message}"):
        play(tmp_path / "run", tiny_model_dir, data, trainer_settings=settings)
    assert not (tmp_path / "run").exists()


def test_interrupted_run_says_where_it_continues(tmp_path):
    run = RunFolder(tmp_path)
    assert "continues from the rows in" in how_to_continue(run)
    run.last_checkpoint.parent.mkdir()
    run.last_checkpoint.touch()
    assert how_to_continue(run).startswith(
        f"The same command continues from {run.last_checkpoint} (in Python: Trainer.fit("
    )


class Vector(SPIN):
    """An objective without its mean."""

    def objective(self, logps):
        return logps.margin


class Number(SPIN):
    """An objective without a gradient."""

    def objective(self, logps):
        return 0.5


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (Vector, r"Vector.objective='shape \[2\]': .*Fix: return the mean"),
        (Number, "Number.objective='0.5'"),
    ],
)
def test_objective_that_is_not_one_number_is_refused_before_rows(
    variant, message, tiny_model_dir, tmp_path
):
    data = write_examples(tmp_path / "examples.jsonl")
    with pytest.raises(SettingError, match=message):
        play(tmp_path / "run", tiny_model_dir, data, variant=variant)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variant", [SPIN, SFT, SPACE, AlphaSPIN])
def test_objectives_of_the_variants_are_one_number(variant, tiny_model_dir):
    settings = {"alpha": 0.3} if variant is AlphaSPIN else {}
    check_objective(variant(model=str(tiny_model_dir), **settings))
