"""`Trainer.validate` of finished iterates and of policies in training."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import numpy as np
import pytest

from spin_lightning import SPIN, FictitiousSPIN, SelfPlay, SelfPlayDataModule
from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import play, write_examples

BETAS = [0.4, 0.9]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl", count=60)


@pytest.fixture(scope="module")
def finished(tiny_model_dir, data, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    play(root, tiny_model_dir, data, settings={"beta": BETAS})
    return root


def validate(root: Path, module: L.LightningModule, data: Path, **checkpoint) -> dict[str, float]:
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    datamodule = SelfPlayDataModule(str(data), batch_size=32, max_response_tokens=8)
    (metrics,) = trainer.validate(module, datamodule, weights_only=True, **checkpoint)
    return metrics


def fresh(model: Path) -> SPIN:
    return SPIN(str(model), learning_rate=3e-3, beta=BETAS, generation={"unit_size": 32})


def mean_real_reward(root: Path, t: int, beta: float) -> float:
    """Mean of beta (log p_t - log p_{t-1}) of the real held-out responses, from the rows alone."""
    before, after = (read_rows(RunFolder(root).val_rows(i)) for i in (t - 1, t))
    assert list(before.example_id) == list(after.example_id)
    real = np.asarray(after.real_logps[t]) - np.asarray(before.real_logps[t - 1])
    return float(beta * real.mean())


def test_finished_run_is_validated_as_its_last_epoch_was(finished, tiny_model_dir, data, caplog):
    run = RunFolder(finished)
    with caplog.at_level("INFO"):
        found = validate(finished, fresh(tiny_model_dir), data, ckpt_path=run.last_checkpoint)
    training = run.record(2).training
    assert found["val/rewards/margins"] == pytest.approx(training.margin, abs=1e-6)
    assert found["val/rewards/accuracies"] == training.accuracy
    assert abs(found["val/loss"] - math.log(2)) > 1e-3
    expected = mean_real_reward(finished, 2, BETAS[1])
    assert found["val/rewards/real"] == pytest.approx(expected, abs=1e-5)
    (line,) = (message for message in caplog.messages if "is finished" in message)
    assert line == (
        "Iterate 2 is finished. It is validated as at the end of its training: on held-out pairs "
        "of iterate 1, against the reference p1."
    )


def test_module_in_memory_is_validated_likewise_and_stays_at_its_iterate(
    finished, tiny_model_dir, data
):
    module = fresh(tiny_model_dir)
    first = validate(finished, module, data, ckpt_path=RunFolder(finished).last_checkpoint)
    assert module.iterate == 2
    assert validate(finished, module, data) == first
    assert module.iterate == 2


def test_validation_that_fails_leaves_the_module_at_its_iterate(finished, tiny_model_dir, data):
    module = fresh(tiny_model_dir)
    validate(finished, module, data, ckpt_path=RunFolder(finished).last_checkpoint)

    def fail(*args):
        raise RuntimeError("no more")

    module.validation_step = fail
    with pytest.raises(RuntimeError, match="no more"):
        validate(finished, module, data)
    assert module.iterate == 2


def test_policy_in_training_is_validated_on_the_pairs_of_its_iterate(
    tiny_model_dir, data, tmp_path, caplog
):
    class Stop(L.Callback):
        """Stops two steps into iterate 2, right after a checkpoint."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        play(
            tmp_path,
            tiny_model_dir,
            data,
            settings={"beta": BETAS},
            callbacks=[SelfPlay(checkpoint_steps=1), Stop()],
        )
    last = RunFolder(tmp_path).last_checkpoint
    module = fresh(tiny_model_dir)
    with caplog.at_level("INFO"):
        found = validate(tmp_path, module, data, ckpt_path=last)
    assert not any("is finished" in message for message in caplog.messages)
    assert module.iterate == 1
    assert found["val/rewards/margins"] != 0.0


def test_iterate_zero_has_no_training_to_validate_as(tiny_model_dir, data, tmp_path):
    kept = tmp_path / "start.ckpt"

    class Keep(L.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.save_checkpoint(kept)

    play(tmp_path, tiny_model_dir, data, callbacks=[Keep()], settings={"beta": BETAS})
    found = validate(tmp_path, fresh(tiny_model_dir), data, ckpt_path=kept)
    assert found["val/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_mixture_of_all_iterates_is_the_one_that_trained_the_last(
    tiny_model_dir, data, tmp_path, caplog
):
    play(tmp_path, tiny_model_dir, data, variant=FictitiousSPIN, epochs=3)
    run = RunFolder(tmp_path)
    module = FictitiousSPIN(
        model=str(tiny_model_dir), learning_rate=3e-3, generation={"unit_size": 32}
    )
    with caplog.at_level("INFO"):
        found = validate(tmp_path, module, data, ckpt_path=run.last_checkpoint)
    training = run.record(3).training
    assert found["val/rewards/margins"] == pytest.approx(training.margin, abs=1e-6)
    assert f"against the reference {training.reference}." in caplog.text
