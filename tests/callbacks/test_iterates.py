"""What happens to an iterate: kept with a record, measured once, announced to listeners."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spin_lightning import SelfPlay
from spin_lightning.callbacks.interfaces import IterateEvaluator, IterateListener
from spin_lightning.callbacks.iterates import keep_iterate
from spin_lightning.callbacks.session import Session
from spin_lightning.run.folder import RunFolder
from tests.toys.runs import play, write_examples


class Counts(IterateEvaluator):
    """Counts the iterates that it measures."""

    def __init__(self) -> None:
        self.measured: list[int] = []

    def evaluate_iterate(self, module, t):
        self.measured.append(t)
        return {"my/index": float(t)}


class Remembers(IterateListener):
    """Remembers, at each call, which iterates have which metric and whose rows are measured."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[float], list[int]]] = []

    def on_iterate_measured(self, trainer, run, records):
        indices = [record.metrics["my/index"] for record in records]
        self.calls.append((indices, [r.index for r in records if r.rows is not None]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl", count=40)


@pytest.fixture(scope="module")
def played(tiny_model_dir, data, tmp_path_factory):
    root, counts, remembers = tmp_path_factory.mktemp("played"), Counts(), Remembers()
    play(root, tiny_model_dir, data, callbacks=[SelfPlay(), remembers, counts])
    return RunFolder(root), counts, remembers


def test_listeners_get_the_records_before_the_rows_of_the_next_iterate_are_made(played):
    _, counts, remembers = played
    assert counts.measured == [0, 1, 2]
    assert remembers.calls == [([0.0], []), ([0.0, 1.0], [0]), ([0.0, 1.0, 2.0], [0, 1])]


def test_finished_run_measures_nothing_again_and_notifies_listeners_once(
    played, tiny_model_dir, data
):
    run, counts, remembers = played[0], Counts(), Remembers()
    callbacks = [remembers, counts]
    play(run.root, tiny_model_dir, data, callbacks=callbacks, ckpt_path=run.last_checkpoint)
    assert counts.measured == []
    assert remembers.calls == [([0.0, 1.0, 2.0], [0, 1])]


def test_record_of_an_iterate_has_the_fields_that_readers_know(played):
    run, _, _ = played
    first, last = (
        json.loads((run.iterate(t) / "iterate.json").read_text(encoding="utf-8")) for t in (0, 2)
    )
    known = {"base", "files", "fingerprint", "fingerprint_fields", "index", "metrics", "parent"}
    assert first.keys() == known | {"cues", "rows", "step", "tokenizer_files", "training"}
    assert (first["parent"], first["files"], first["training"], first["step"]) == (
        None,
        {},
        None,
        0,
    )
    assert last.keys() == known | {"step", "training"}
    assert (last["parent"], last["step"]) == (1, 4)
    # `phase_peaks` is there where a phase raised the peak memory of the process.
    assert last["training"].keys() - {"phase_peaks"} == {
        *("opponent", "reference", "rows", "loss", "margin", "accuracy"),
        *("seconds", "speed", "peak_memory"),
    }


def test_another_iterate_of_the_same_index_discards_its_descendants(tiny_model_dir, data, tmp_path):
    module, _, trainer = play(tmp_path, tiny_model_dir, data)
    session = Session.of(trainer, module, RunFolder(tmp_path))
    files = session.run.record(1).files
    # The policy is that of iterate 2.
    keep_iterate(session, 1, step=4, training=None)
    assert session.run.known_iterates() == [0, 1]
    assert session.run.record(1).files != files
    assert not session.run.rows(1).exists()
    assert session.run.rows(0).exists()
