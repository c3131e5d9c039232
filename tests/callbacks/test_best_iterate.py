"""BestIterate: which iterate is the best, and when a run stops."""

import json
from types import SimpleNamespace

import pytest

from spin_lightning import BestIterate, load_iterate
from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import IterateRecord
from tests.toys.runs import play, write_examples

NLL = "val/real_nll_per_token"


def measured(*values: float) -> list[IterateRecord]:
    return [IterateRecord(t, metrics={NLL: value}) for t, value in enumerate(values)]


def stops_after(guard: BestIterate, run: RunFolder, *values: float) -> bool:
    """Whether the guard stops the run once the iterates have these values."""
    trainer = SimpleNamespace(is_global_zero=True, should_stop=False)
    guard.on_iterate_measured(trainer, run, measured(*values))
    return trainer.should_stop


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [("min", (3.0, 1.0, 2.0), 1), ("max", (3.0, 1.0, 2.0), 0), ("min", (1.0, 1.0, 2.0), 0)],
)
def test_best_is_the_first_of_the_best(mode, values, best, tmp_path):
    run = RunFolder(tmp_path)
    stops_after(BestIterate(mode=mode), run, *values)
    assert json.loads((run.iterates / "best.json").read_text()) == {
        "index": best,
        "metric": NLL,
        "value": values[best],
    }
    assert run.best() == best


@pytest.mark.parametrize(
    ("patience", "values", "stops"),
    [
        (None, (1.0, 2.0, 3.0, 4.0), False),
        (2, (1.0, 2.0), False),
        (2, (1.0, 2.0, 3.0), True),
        (2, (1.0, 2.0, 0.5, 3.0), False),
        (1, (1.0, 0.9), False),
    ],
)
def test_patience_counts_iterates_since_the_best(patience, values, stops, tmp_path):
    assert stops_after(BestIterate(patience=patience), RunFolder(tmp_path), *values) == stops


def test_metric_that_iterates_do_not_have_is_refused_with_those_they_have(tmp_path):
    with pytest.raises(SettingError, match=rf"metric='val/nll'.*Fix: choose from {NLL}"):
        stops_after(BestIterate("val/nll"), RunFolder(tmp_path), 1.0)


def test_nothing_held_out_leaves_no_best(tmp_path):
    run = RunFolder(tmp_path)
    BestIterate().on_iterate_measured(SimpleNamespace(), run, [IterateRecord(0, metrics={})])
    with pytest.raises(RunFolderError, match=r"no best\.json.*Fix: name the iterate"):
        run.best()


def test_patience_below_one_is_refused():
    with pytest.raises(SettingError, match="patience=0"):
        BestIterate(patience=0)


def test_run_that_gets_worse_stops_and_stays_stopped(tiny_model_dir, tmp_path):
    """The likelihood of real responses rises, which `max` of its negative calls worse."""
    data, root = write_examples(tmp_path / "data.jsonl"), tmp_path / "run"
    for _ in range(2):
        run = RunFolder(root)
        play(
            root,
            tiny_model_dir,
            data,
            epochs=4,
            callbacks=[BestIterate(NLL, mode="max", patience=1)],
            ckpt_path=run.last_checkpoint if run.last_checkpoint.exists() else None,
        )
        assert run.known_iterates() == [0, 1]
        assert run.best() == 0
        assert not (run.rows(1) / "__about__/manifest.json").exists()
    model, _ = load_iterate(root, "best")
    assert not hasattr(model, "peft_config")
