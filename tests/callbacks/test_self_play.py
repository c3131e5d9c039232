"""The loop as a whole, on a tiny model: lineage, identities, resume, refusals."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spin_lightning import SFT, SPIN, SelfPlay, SelfPlayDataModule, load_iterate
from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.policies import shared_prefix
from spin_lightning.report.report import write_report
from spin_lightning.report.run_view import read_runs
from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import contents, play, write_examples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl")


class KeepCheckpoints(Callback):
    """Saves a checkpoint at every hook at which users have Lightning save one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save(self, trainer: L.Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / f"{name}.ckpt", weights_only=False)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._save(trainer, f"batch-{trainer.current_epoch}-{batch_idx}")

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, f"validation-{trainer.current_epoch}-{trainer.global_step}")

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._save(trainer, f"epoch-{trainer.current_epoch}")


class LearningRates(Callback):
    """Remembers the learning rate of every step."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.by_step[trainer.global_step] = optimizer.param_groups[0]["lr"]


class StopHere(Exception):
    """A crash."""


class CrashAt(Callback):
    def __init__(self, hook: str, count: int = 1) -> None:
        self._left = count
        setattr(self, hook, self._crash)

    def _crash(self, *args) -> None:
        self._left -= 1
        if self._left == 0:
            raise StopHere


@pytest.fixture(scope="module")
def finished(tiny_model_dir, data, tmp_path_factory) -> Path:
    """A finished run of three iterates with a checkpoint of every kind."""
    root = tmp_path_factory.mktemp("finished")
    keep = KeepCheckpoints(root / "kept")
    play(root, tiny_model_dir, data, epochs=3, callbacks=[keep])
    return root


def test_run_folder_finished_holds_what_the_architecture_says(finished):
    run = RunFolder(finished)
    assert run.known_iterates() == [0, 1, 2, 3]
    assert sorted(p.name for p in run.iterate(0).iterdir()) == ["iterate.json"]
    for t in (1, 2, 3):
        names = {p.name for p in run.iterate(t).iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "iterate.json"}
    for t in (0, 1, 2):
        manifest = json.loads((run.rows(t) / "__about__/manifest.json").read_text())
        assert manifest["opponent"] == {str(t): 1.0}
        assert manifest["members"] == [t]
    assert not (run.rows(3) / "__about__/manifest.json").exists(), (
        "nothing is trained on rows of the last"
    )
    assert (run.val_rows(3) / "__about__/manifest.json").exists(), "but its held-out rows are made"
    assert run.last_checkpoint.exists()
    assert (run.report / "iterates.png").stat().st_size > 10_000
    assert not list(finished.rglob("*.tmp"))


def test_records_hold_the_speed_of_each_iterate(finished):
    run = RunFolder(finished)
    assert run.record(0).training is None
    for t in (1, 2, 3):
        training, table = run.record(t).training, read_rows(run.rows(t - 1))
        speed, seconds = training.speed, training.seconds
        generated = int(table.generated_ids.lengths.sum())
        distinct = generated + int(table.prompt_ids.lengths.sum() + table.real_ids.lengths.sum())
        assert speed["speed/generated_tokens_per_second"] == pytest.approx(
            generated / seconds["generating"]
        )
        assert speed["speed/trained_tokens_per_second"] == pytest.approx(
            distinct / seconds["training"]
        )
        shares = [speed[f"speed/share_{stage}"] for stage in seconds]
        assert sum(shares) == pytest.approx(1.0)


def test_rows_of_every_iterate_recompute_with_transformers_and_peft_alone(finished):
    run = RunFolder(finished)
    base_dir = run.record(0).base["name"]
    for t in (0, 1, 2):
        model = AutoModelForCausalLM.from_pretrained(base_dir)
        if t:
            model = PeftModel.from_pretrained(model, run.iterate(t))
        model.eval()
        for folder in (run.rows(t), run.val_rows(t)):
            rows = [r for f in sorted(folder.glob("part-*")) for r in pq.read_table(f).to_pylist()]
            for row in rows[:25]:
                place = row["members"].index(t)
                for side in ("real", "generated"):
                    ids = row["prompt_ids"] + row[f"{side}_ids"]
                    with torch.no_grad():
                        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                    start = len(row["prompt_ids"])
                    by_hand = sum(float(logps[s - 1, ids[s]]) for s in range(start, len(ids)))
                    assert row[f"member_{side}_logps"][place] == pytest.approx(by_hand, abs=1e-3)
                stops = json.loads((folder / "__about__/manifest.json").read_text())
                eos = stops["fingerprint_fields"]["stop_ids"]
                hits = [s for s, token in enumerate(row["generated_ids"]) if token in eos]
                assert hits == ([len(row["generated_ids"]) - 1] if row["finished"] else [])
                assert len(row["generated_ids"]) <= 8


def test_first_margin_of_every_spin_iterate_is_zero_and_loss_log_two(
    tiny_model_dir, data, tmp_path
):
    losses: list[float] = []

    class FirstLoss(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx == 0:
                losses.append(float(outputs["loss"]))

    play(
        tmp_path,
        tiny_model_dir,
        data,
        epochs=3,
        callbacks=[FirstLoss()],
        settings={"beta": 1.0},
    )
    assert losses == pytest.approx([math.log(2)] * 3, abs=1e-5)


def test_load_iterate_any_equals_transformers_and_peft_by_hand(finished):
    run = RunFolder(finished)
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    base_dir = run.record(0).base["name"]
    for t in (0, 2):
        by_hand = AutoModelForCausalLM.from_pretrained(base_dir)
        if t:
            by_hand = PeftModel.from_pretrained(by_hand, run.iterate(t))
        model, tokenizer = load_iterate(finished, t)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, by_hand.eval()(ids).logits)
        assert tokenizer.eos_token_id == 2
    with pytest.raises(RunFolderError, match=r"has no iterate 9; it has \[0, 1, 2, 3\]"):
        load_iterate(finished, 9)


def test_same_config_twice_gives_the_same_bytes_of_rows_and_adapters(
    finished, tiny_model_dir, data, tmp_path
):
    play(tmp_path, tiny_model_dir, data, epochs=3)
    assert contents(tmp_path) == contents(finished)


def test_checkpoint_of_a_run_holds_no_base_weights(finished):
    checkpoint = torch.load(RunFolder(finished).last_checkpoint, weights_only=True)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])
    trained = sum(weight.nbytes for weight in checkpoint["state_dict"].values())
    # The adapter and AdamW's two moments.
    assert RunFolder(finished).last_checkpoint.stat().st_size < 2 * 3 * trained + 50_000


@pytest.mark.parametrize("epochs_per_iterate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_from_every_checkpoint_gives_the_same_rows_rates_and_weights(
    epochs_per_iterate, tiny_model_dir, data, tmp_path
):
    def run(root: Path, rates: LearningRates, *callbacks: Callback, ckpt: Path | None = None):
        play(
            root,
            tiny_model_dir,
            data,
            epochs=2 * epochs_per_iterate,
            ckpt_path=ckpt,
            callbacks=[rates, *callbacks],
            settings={"epochs_per_iterate": epochs_per_iterate},
        )

    whole, kept, all_rates = tmp_path / "whole", tmp_path / "kept", LearningRates()
    run(whole, all_rates, KeepCheckpoints(kept))
    expected = contents(whole)
    checkpoints = sorted(kept.glob("*.ckpt"))
    assert len(checkpoints) >= 2 * epochs_per_iterate * 6
    for checkpoint in checkpoints:
        again, rates = tmp_path / "again", LearningRates()
        shutil.copytree(whole, again)
        t = torch.load(checkpoint, weights_only=True)["self_play"]["iterate"]
        # Everything after the checkpoint is made again from scratch.
        RunFolder(again).discard_after(t)
        run(again, rates, ckpt=checkpoint)
        assert contents(again) == expected, checkpoint.name
        assert rates.by_step.items() <= all_rates.by_step.items(), checkpoint.name
        shutil.rmtree(again)


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_end", "on_validation_end"])
def test_crash_then_resume_from_last_gives_the_same_bytes(
    hook, finished, tiny_model_dir, data, tmp_path
):
    with pytest.raises(StopHere):
        play(
            tmp_path,
            tiny_model_dir,
            data,
            epochs=3,
            callbacks=[CrashAt(hook, count=3)]
            if hook == "on_validation_end"
            else [CrashAt(hook, count=1 if hook == "on_train_start" else 6)],
        )
    last = RunFolder(tmp_path).last_checkpoint
    play(tmp_path, tiny_model_dir, data, epochs=3, ckpt_path=last if last.exists() else None)
    assert contents(tmp_path) == contents(finished)


def test_finished_run_with_more_epochs_continues_as_if_never_stopped(
    finished, tiny_model_dir, data, tmp_path
):
    play(tmp_path, tiny_model_dir, data, epochs=1)
    last = RunFolder(tmp_path).last_checkpoint
    play(tmp_path, tiny_model_dir, data, epochs=3, ckpt_path=last)
    assert contents(tmp_path) == contents(finished)
    # A finished run has nothing left to do.
    play(tmp_path, tiny_model_dir, data, epochs=3, ckpt_path=last)
    assert contents(tmp_path) == contents(finished)


def test_lists_per_iterate_extended_on_resume_are_used_and_a_changed_past_is_refused(
    tiny_model_dir, data, tmp_path
):
    play(tmp_path, tiny_model_dir, data, epochs=1, settings={"beta": [0.5]})
    last, rates = RunFolder(tmp_path).last_checkpoint, LearningRates()
    with pytest.raises(RunFolderError, match=r"beta: run has \[0.5\], you gave \[0.25\]"):
        play(tmp_path, tiny_model_dir, data, ckpt_path=last, settings={"beta": [0.25, 1.0]})
    module, _, _ = play(
        tmp_path,
        tiny_model_dir,
        data,
        ckpt_path=last,
        callbacks=[rates],
        settings={"beta": [0.5, 2.0]},
    )
    assert module.beta == [0.5, 2.0]
    assert RunFolder(tmp_path).record(2).fingerprint_fields["beta"] == [0.5, 2.0]


def test_start_from_scratch_in_a_finished_folder_is_refused(finished, tiny_model_dir, data):
    before = contents(finished)
    with pytest.raises(RunFolderError, match="already holds iterates 0 to 3"):
        play(finished, tiny_model_dir, data, epochs=3)
    with pytest.raises(RunFolderError, match="seed: run has 1, you gave 2"):
        play(finished, tiny_model_dir, data, epochs=3, seed=2)
    assert contents(finished) == before


def test_sft_trains_on_real_responses_alone_and_still_measures_generated_ones(
    tiny_model_dir, data, tmp_path
):
    play(tmp_path, tiny_model_dir, data, variant=SFT)
    run = RunFolder(tmp_path)
    rows = pq.read_table(next(run.rows(0).glob("part-*"))).to_pylist()
    assert all(row["generated_ids"] == [] and row["opponent"] is None for row in rows)
    history = [run.record(t).metrics for t in (0, 1, 2)]
    nll = [metrics["val/real_nll_per_token"] for metrics in history]
    assert nll[2] < nll[0]
    assert history[1]["val/kl_base"] != 0.0


def test_initial_adapter_of_an_sft_run_is_iterate_zero(finished, tiny_model_dir, data, tmp_path):
    start = RunFolder(finished).iterate(3)
    play(tmp_path, tiny_model_dir, data, settings={"initial_adapter": str(start)}, epochs=1)
    kept = RunFolder(tmp_path).iterate(0) / "adapter_model.safetensors"
    assert kept.read_bytes() == (start / "adapter_model.safetensors").read_bytes()


def test_passes_that_disagree_are_given_up_before_the_first_rows(
    tiny_model_dir, data, tmp_path, monkeypatch, recwarn
):
    right = shared_prefix.prompt_logps
    monkeypatch.setattr(shared_prefix, "prompt_logps", lambda *args: right(*args) + 1.0)
    module, _, _ = play(tmp_path / "run", tiny_model_dir, data, epochs=1)
    assert [w for w in recwarn if "Self-check: the fast passes disagree" in str(w.message)]
    assert not module.policy.shares_prompts
    monkeypatch.undo()
    plain = {"packing": "padded", "fused_lora": False}
    play(tmp_path / "plain", tiny_model_dir, data, epochs=1, settings=plain)
    found, wanted = (
        pq.read_table(tmp_path / name / "rows/iterate_000/part-00000.parquet").to_pylist()
        for name in ("run", "plain")
    )
    for row, other in zip(found, wanted, strict=True):
        assert row["generated_ids"] == other["generated_ids"]
        for column in ("member_real_logps", "member_generated_logps"):
            assert row[column] == pytest.approx(other[column], abs=1e-5)
    (view,) = read_runs([RunFolder(tmp_path / "run")])
    (deviation,) = view.deviations
    assert deviation.startswith("passes: plain: the fast passes disagree")
    assert deviation.endswith("(rows of p0, p1)")
    assert "<dt>other than set</dt><dd>passes: plain" in write_report([view], tmp_path).read_text()
    (view,) = read_runs([RunFolder(tmp_path / "plain")])
    assert view.deviations == []


def test_iterate_zero_is_validated_in_full_and_logged_at_step_zero(tiny_model_dir, data, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="log", flush_logs_every_n_steps=1)
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        max_epochs=1,
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = SPIN(model=str(tiny_model_dir), beta=1.0, learning_rate=3e-3)
    trainer.fit(module, SelfPlayDataModule(str(data), batch_size=32, max_response_tokens=8))
    import csv

    with (tmp_path / "log" / "metrics.csv").open() as file:
        at_zero = [row for row in csv.DictReader(file) if row["step"] == "0"]
    merged = {name: value for row in at_zero for name, value in row.items() if value}
    record = RunFolder(tmp_path).record(0).metrics
    assert float(merged["val/loss"]) == pytest.approx(math.log(2), abs=1e-5)
    assert float(merged["val/real_nll_per_token"]) == pytest.approx(
        record["val/real_nll_per_token"], rel=1e-5
    )
    assert abs(float(merged["train/first_margin_abs_per_token"])) < 1e-6
    assert record["val/kl_base"] == 0.0


class PlainSteps(SPIN):
    """Plain gradient steps: Adam would amplify rounding errors of tiny gradients."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for _, p in self.policy.trainable()], lr=1.0)


def test_gradient_accumulation_equals_the_full_batch(tiny_model_dir, data, tmp_path):
    settings = {"max_examples": 105, "val_examples": 9}  # 96 rows: three whole batches of 32
    accumulate = {"accumulate_grad_batches": 4, "gradient_clip_val": 100.0}
    for name, batch_size, trainer_settings in (("whole", 32, {}), ("parts", 8, accumulate)):
        play(
            tmp_path / name,
            tiny_model_dir,
            data,
            variant=PlainSteps,
            epochs=1,
            data_settings={**settings, "batch_size": batch_size},
            trainer_settings=trainer_settings,
        )
    whole, parts = (
        load_file(RunFolder(tmp_path / name).iterate(1) / "adapter_model.safetensors")
        for name in ("whole", "parts")
    )
    assert max(weight.abs().max() for name, weight in whole.items() if "lora_B" in name) > 1e-3
    for name, weight in whole.items():
        torch.testing.assert_close(weight, parts[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("trainer_settings", "message"),
    [
        ({"max_epochs": -1}, "trainer.max_epochs=-1"),
        ({"max_epochs": None}, "trainer.max_epochs=1000.*"),
        ({"max_epochs": 3}, "not a multiple of epochs_per_iterate .2.*set it to 4"),
        ({"max_steps": 7, "max_epochs": 2}, "trainer.max_steps=7"),
        ({"overfit_batches": 2, "max_epochs": 2}, "trainer.overfit_batches=2"),
        ({"fast_dev_run": True, "max_epochs": 2}, "trainer.(fast_dev_run|max_steps|max_epochs)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.max_epochs. was not set:UserWarning")
def test_trainer_without_what_self_play_needs_is_refused_before_weights_are_read(
    trainer_settings, message, tiny_model_dir, data, tmp_path, monkeypatch
):
    def no_weights(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("spin_lightning.policies.lora.load_base", no_weights)
    module = SPIN(model=str(tiny_model_dir), epochs_per_iterate=2)
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **trainer_settings,
    )
    with pytest.raises(SettingError, match=f"(?s){message}"):
        trainer.fit(module, SelfPlayDataModule(str(data)))


def test_list_of_another_length_than_iterates_is_refused(tiny_model_dir, data, tmp_path):
    with pytest.raises(SettingError, match=r"beta=\[0.1, 0.2, 0.3\]: it has 3 values for 2"):
        play(tmp_path, tiny_model_dir, data, settings={"beta": [0.1, 0.2, 0.3]})


def test_self_play_given_by_the_user_is_not_doubled(tiny_model_dir, data, tmp_path):
    class Mine(SelfPlay):
        """A user's own."""

    mine = Mine(pairs_shown=0)
    _, _, trainer = play(tmp_path, tiny_model_dir, data, epochs=1, callbacks=[mine])
    assert [c for c in trainer.callbacks if isinstance(c, SelfPlay)] == [mine]


def test_run_without_a_root_folder_gets_a_numbered_one(tiny_model_dir, data, tmp_path):
    script = f"""
import lightning as L
from spin_lightning import SPIN, SelfPlayDataModule
for _ in range(2):
    L.seed_everything(0, verbose=False)
    L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
              enable_progress_bar=False).fit(
        SPIN(model={str(tiny_model_dir)!r}),
        SelfPlayDataModule({str(data)!r}, max_examples=40, max_response_tokens=4))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["SPIN-0", "SPIN-1"]
    assert "Run folder: runs/SPIN-1" in done.stdout


def test_unit_size_changed_changes_ids_only_at_a_boundary_of_the_cumulative_distribution(
    finished, tiny_model_dir, data, tmp_path
):
    """Rows of iterate 0 under another unit size: each first difference is checked by hand."""
    L.seed_everything(1, verbose=False)
    play(tmp_path, tiny_model_dir, data, epochs=1, settings={"generation": {"unit_size": 7}})
    from spin_lightning.keyed import position_uniforms

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()

    def by_key(root: Path) -> dict[int, dict]:
        parts = sorted(RunFolder(root).rows(0).glob("part-*"))
        return {r["seed"]: r for part in parts for r in pq.read_table(part).to_pylist()}

    one, other = by_key(finished), by_key(tmp_path)
    assert one.keys() == other.keys()
    changed = [key for key in one if one[key]["generated_ids"] != other[key]["generated_ids"]]
    assert len(changed) <= 0.02 * len(one)
    for key in changed:
        a, b = one[key]["generated_ids"], other[key]["generated_ids"]
        place = next(i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1])
        ids = torch.tensor([one[key]["prompt_ids"] + a[:place]])
        with torch.no_grad():
            edges = model(ids).logits[0, -1].double().softmax(-1).cumsum(-1).numpy()
        uniform = position_uniforms(key, place + 1)[place]
        print(f"row {key}: first difference at {place}, uniform {uniform}")
        assert np.abs(edges - uniform).min() < 1e-5


def test_resume_with_an_edited_iterate_is_refused_and_nothing_is_lost(
    finished, tiny_model_dir, data, tmp_path
):
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    run = RunFolder(root)
    weights = run.iterate(2) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    before = contents(root)
    with pytest.raises(RunFolderError, match=r"iterate_002.*has changed since it was written"):
        play(root, tiny_model_dir, data, epochs=4, ckpt_path=run.last_checkpoint)
    assert contents(root) == before
    with pytest.raises(RunFolderError, match="has changed since it was written"):
        load_iterate(root, 2)
