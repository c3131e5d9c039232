"""Training with non-finite numbers: rows are named and written down, batches skipped or refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from spin_lightning import SPIN
from spin_lightning.rows.store import read_rows
from spin_lightning.rows.suspects import NonFiniteError
from spin_lightning.run.folder import RunFolder
from tests.faults.poisoned import PoisonedSPIN
from tests.toys.runs import play, write_examples


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl", count=40)


def poisoned(root, model, data, poison, epochs=1, **more):
    """A run of 40 examples in batches of 8, none held out."""
    settings = {"poison": poison, **more.pop("settings", {})}
    return play(
        root,
        model,
        data,
        variant=PoisonedSPIN,
        epochs=epochs,
        settings=settings,
        data_settings={"batch_size": 8, "val_fraction": 0.0},
        **more,
    )


def kept(root: Path, t: int = 0) -> list[dict]:
    files = sorted(RunFolder(root).rows(t).rglob("not_finite*.json"))
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize(("poison", "said"), [("11:nan", "nan"), ("11:inf", "inf")])
def test_training_stops_and_names_the_row_with_a_non_finite_log_prob(
    poison, said, tiny_model_dir, data, tmp_path
):
    with pytest.raises(NonFiniteError) as error:
        poisoned(tmp_path, tiny_model_dir, data, poison)
    message = str(error.value)
    assert "in the rows example 11 sample 0;" in message
    assert "training iterate 1, step " in message
    assert "model.max_skipped_batches" in message
    assert "example 12" not in message
    (found,) = kept(tmp_path)
    (row,) = found["rows"]
    assert (row["example_id"], row["sample"]) == (11, 0)
    assert row["logps"]["policy_real"] in ("nan", "-inf")
    assert math.isfinite(row["logps"]["reference_real"])
    table = read_rows(RunFolder(tmp_path).rows(0))
    place = table.example_id.tolist().index(11)
    for name, column in (
        ("prompt", table.prompt_ids),
        ("real", table.real_ids),
        ("generated", table.generated_ids),
    ):
        assert row[f"{name}_ids"] == column[place].tolist()
    assert row["prompt"].endswith(json.loads(data.read_text().splitlines()[11])["prompt"])
    assert RunFolder(tmp_path).known_iterates() == [0]


def test_training_names_all_suspect_rows_of_a_batch(tiny_model_dir, data, tmp_path):
    everyone = " ".join(f"{i}:nan" for i in range(40))
    with pytest.raises(NonFiniteError):
        poisoned(tmp_path, tiny_model_dir, data, everyone)
    assert len(kept(tmp_path)[0]["rows"]) == 8


def test_batches_are_skipped_and_counted_up_to_the_limit(tiny_model_dir, data, tmp_path, capsys):
    settings = {"settings": {"max_skipped_batches": 2}}
    module, _, trainer = poisoned(tmp_path, tiny_model_dir, data, "11:nan", 2, **settings)
    assert module.skipped_batches.count == 2
    assert float(trainer.callback_metrics["train/skipped_batches"]) in (1, 2)
    assert math.isfinite(float(trainer.callback_metrics["train/loss_epoch"]))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("WARNING: training iterate") == 2
    assert "skipped: 2 of at most 2 (max_skipped_batches)" in said
    assert [len(kept(tmp_path, t)) for t in (0, 1)] == [1, 1]
    weights = load_file(RunFolder(tmp_path).iterate(2) / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_skipped_batch_adds_no_gradient(tiny_model_dir, data, tmp_path):
    """With a single batch in all and no gradient, RMSprop leaves the adapter as it was."""
    module, _, _ = play(
        tmp_path,
        tiny_model_dir,
        data,
        variant=PoisonedSPIN,
        epochs=1,
        settings={"poison": "11:nan", "max_skipped_batches": 1, "optimizer": "rmsprop"},
        data_settings={"batch_size": 40, "val_fraction": 0.0},
    )
    after = {name: p.detach().clone() for name, p in module.policy.trainable()}
    module.policy = module.make_policy()
    assert after.keys() == dict(module.policy.trainable()).keys()
    assert all(torch.equal(after[name], p) for name, p in module.policy.trainable())


def test_count_of_skipped_batches_survives_a_resume(tiny_model_dir, data, tmp_path):
    def go_on(most: int, epochs: int):
        last = RunFolder(tmp_path).last_checkpoint
        return poisoned(
            tmp_path,
            tiny_model_dir,
            data,
            "11:nan",
            epochs,
            ckpt_path=last if last.exists() else None,
            settings={"max_skipped_batches": most},
        )

    module, _, _ = go_on(1, epochs=1)
    assert module.skipped_batches.count == 1
    with pytest.raises(NonFiniteError, match="training iterate 2"):
        go_on(1, epochs=2)
    # The limit may be raised within the run.
    module, _, _ = go_on(2, epochs=2)
    assert module.skipped_batches.count == 2


class Spoil(Callback):
    """Makes one weight of the adapter infinite after the last batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == 4 and pl_module.iterate == 1:
            _, weight = next(pl_module.policy.trainable())
            weight.data.view(-1)[0] = math.inf


def test_adapter_with_a_non_finite_weight_is_not_kept(tiny_model_dir, data, tmp_path):
    with pytest.raises(NonFiniteError, match="the adapter has weights that are NaN or infinite, 1"):
        poisoned(tmp_path, tiny_model_dir, data, "", epochs=2, callbacks=[Spoil()])
    run = RunFolder(tmp_path)
    assert run.known_iterates() == [0, 1]
    state = torch.load(run.last_checkpoint, weights_only=True)["state_dict"]
    assert all(weight.isfinite().all() for weight in state.values())


def test_overflows_of_the_exponential_loss_are_logged(tiny_model_dir, data, tmp_path):
    _, _, trainer = play(
        tmp_path,
        tiny_model_dir,
        data,
        variant=SPIN,
        epochs=1,
        settings={"loss": "exponential", "beta": 1e6},
        data_settings={"batch_size": 8, "val_fraction": 0.0},
    )
    assert float(trainer.callback_metrics["train/overflows"]) > 0
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))
