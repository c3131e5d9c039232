"""Opponents and references that cannot be played are refused before rows are made."""

import lightning as L
import pytest

from spin_lightning import Geometric, Mixture, SelfPlayModule, base, latest, uniform
from spin_lightning.errors import SettingError
from spin_lightning.modules.checks import iterates_to_play
from tests.toys.runs import play, write_examples


class Answers(SelfPlayModule):
    """A user's variant with the opponents and references of a test."""

    opponents = staticmethod(latest)
    references = staticmethod(latest)

    def opponent(self, t):
        return self.opponents(t)

    def reference(self, t):
        return self.references(t)


UNPLAYABLE = {
    "weights that do not sum to 1": (
        lambda t: Mixture({t: 0.5}),
        latest,
        r"mixture weights=\{0: 0.5\}: they sum to 0.5, not to 1. Fix: divide them",
    ),
    "an opponent beyond t": (
        lambda t: latest(t + 1),
        latest,
        r"opponent\(0\)='p1': iterate 1 does not exist yet",
    ),
    "an opponent beyond t, later on": (
        lambda t: uniform([0, 3]) if t == 2 else latest(t),
        latest,
        r"opponent\(2\)='0.5·p0\+0.5·p3': iterate 3 does not exist yet",
    ),
    "a reference beyond t": (
        latest,
        lambda t: uniform(range(t + 2)),
        r"reference\(0\)='p0..p1': iterate 1 does not exist yet",
    ),
    "a geometric mixture as opponent": (
        lambda t: Geometric(latest(t), 0.5),
        latest,
        r"opponent\(0\)=.*cannot be sampled.* Fix: .*token_alpha",
    ),
    "an opponent that is not a mixture": (lambda t: t, latest, r"opponent\(0\)=0: .*Fix: return"),
    "no reference": (latest, lambda t: None, r"reference\(0\)=None: .*Fix: return"),
}


@pytest.mark.parametrize("case", UNPLAYABLE)
def test_unplayable_variant_is_refused_before_generation(
    case, tiny_model_dir, tmp_path, monkeypatch
):
    opponents, references, message = UNPLAYABLE[case]
    monkeypatch.setattr(Answers, "opponents", staticmethod(opponents))
    monkeypatch.setattr(Answers, "references", staticmethod(references))
    data = write_examples(tmp_path / "examples.jsonl")
    with pytest.raises(SettingError, match=message):
        play(tmp_path / "run", tiny_model_dir, data, variant=Answers, epochs=3)
    assert not (tmp_path / "run").exists()


def test_members_up_to_t_and_the_base_are_taken(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Answers, "opponents", staticmethod(lambda t: uniform(range(t + 1))))
    monkeypatch.setattr(Answers, "references", staticmethod(lambda t: base()))
    data = write_examples(tmp_path / "examples.jsonl", 40)
    play(tmp_path / "run", tiny_model_dir, data, variant=Answers)
    assert (tmp_path / "run" / "iterates" / "iterate_002").is_dir()


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-true", "bfloat16"),
        ("bf16-mixed", "bfloat16"),
        ("16-true", "float16"),
        ("64-true", "float32"),
    ],
)
def test_precision_of_the_trainer_is_refused_and_compute_dtype_named(precision, dtype):
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", precision=precision, logger=False, barebones=True
    )
    with pytest.raises(
        SettingError, match=rf"trainer.precision='{precision}'.*model.compute_dtype: {dtype}"
    ):
        iterates_to_play(trainer, 1)


def test_precision_of_the_trainer_is_refused_before_anything_is_read(tiny_model_dir, tmp_path):
    with pytest.raises(SettingError, match=r"trainer.precision='bf16-true'"):
        play(
            tmp_path / "run",
            tiny_model_dir,
            tmp_path / "missing.jsonl",
            trainer_settings={"precision": "bf16-true"},
        )
    assert not (tmp_path / "run" / "rows").exists()
