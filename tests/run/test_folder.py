"""Paths of a run's files, and the records and hashes of its iterates."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from spin_lightning.errors import RunFolderError
from spin_lightning.run.files import write_json
from spin_lightning.run.folder import ITERATE_FILE, RunFolder
from spin_lightning.run.records import IterateRecord


@pytest.fixture
def run(tmp_path):
    """A run with iterates 0 to 3 and the rows that made them."""
    run = RunFolder(tmp_path / "run")
    for t in range(4):
        run.write_record(IterateRecord(t))
        run.val_rows(t).mkdir(parents=True)
    return run


# ------------------------------------------------------------------------------------------- paths


def test_paths_are_those_of_the_documented_layout():
    run = RunFolder(Path("r"))
    assert [
        run.iterate(0),
        run.iterate(12),
        run.rows(3),
        run.val_rows(3),
        run.tokenizer,
        run.last_checkpoint,
        run.report,
    ] == [
        Path("r/iterates/iterate_000"),
        Path("r/iterates/iterate_012"),
        Path("r/rows/iterate_003"),
        Path("r/rows/iterate_003/__held_out__"),
        Path("r/tokenizer"),
        Path("r/checkpoints/last.ckpt"),
        Path("r/report"),
    ]


# ---------------------------------------------------------------------------------------- iterates


def test_known_iterates_are_the_finished_ones_in_order_of_number(tmp_path):
    run = RunFolder(tmp_path)
    assert run.known_iterates() == []
    for t in (1000, 2, 999):
        run.write_record(IterateRecord(t))
    run.iterate(5).mkdir()
    write_json(run.staged_iterate(7) / "iterate.json", {})
    assert run.known_iterates() == [2, 999, 1000]
    assert run.iterate_folders() == {t: run.iterate(t) for t in (2, 999, 1000)}


def test_record_that_is_written_is_read_back(run):
    record = IterateRecord(2, parent=1, step=8, metrics={"val/loss": 0.6931471805599453})
    run.write_record(record)
    assert run.record(2) == record
    assert run.records() == [IterateRecord(0), IterateRecord(1), record, IterateRecord(3)]


def test_record_of_an_iterate_that_is_not_there_lists_those_that_are(run, tmp_path):
    with pytest.raises(RunFolderError, match=r"run has no iterate 9; it has \[0, 1, 2, 3\].*Fix: "):
        run.record(9)
    with pytest.raises(RunFolderError, match="no iterate 0; it has none"):
        RunFolder(tmp_path / "empty").record(0)


def test_staged_iterate_is_empty_again_after_a_crash(run):
    (run.staged_iterate(4) / "half").write_text("an adapter")
    assert list(run.staged_iterate(4).iterdir()) == []


@pytest.mark.parametrize("t", [0, 2, 3])
def test_discard_after_keeps_iterates_to_t_and_the_rows_that_made_them(run, t):
    run.discard_after(t)
    assert run.known_iterates() == list(range(t + 1))
    assert sorted(run.root.glob("rows/*")) == [run.rows(s) for s in range(t)]


def test_discard_after_in_a_folder_without_rows_does_nothing(tmp_path):
    RunFolder(tmp_path).discard_after(0)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ hashes


@pytest.mark.parametrize(
    ("damage", "problem"),
    [("edited", "has changed since it was written"), ("missing", "is missing")],
)
def test_check_iterate_with_a_changed_or_missing_file_names_it(damage, problem, run):
    folder = run.iterate(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    record = IterateRecord(1, files={"adapter_model.safetensors": digest})
    run.write_record(record)
    assert run.check_iterate(1) == record
    if damage == "edited":
        (folder / "adapter_model.safetensors").write_bytes(b"weightz")
    else:
        (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(
        RunFolderError, match=rf"adapter_model.safetensors {problem}.*Fix: restore it"
    ):
        run.check_iterate(1)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [("edited", "has changed since the run wrote it"), ("missing", "is missing")],
)
def test_check_tokenizer_with_a_changed_or_missing_file_names_it(damage, problem, run):
    run.tokenizer.mkdir()
    (run.tokenizer / "tokenizer.json").write_text("{}")
    run.check_tokenizer()  # older versions recorded no hashes
    run.write_record(IterateRecord(0, tokenizer_files=run.tokenizer_hashes()))
    run.check_tokenizer()
    if damage == "edited":
        (run.tokenizer / "tokenizer.json").write_text("[]")
    else:
        (run.tokenizer / "tokenizer.json").unlink()
    with pytest.raises(RunFolderError, match=rf"tokenizer.json {problem}.*Fix: restore it"):
        run.check_tokenizer()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_record_that_is_damaged_is_one_clear_error(content, run):
    (run.iterate(1) / ITERATE_FILE).write_bytes(content)
    with pytest.raises(RunFolderError, match=r"iterate.json is damaged.*Fix: restore it"):
        run.record(1)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"index": 1}'])
def test_best_record_that_is_damaged_is_one_clear_error(content, run):
    (run.iterates / "best.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"best.json is damaged.*Fix: delete it"):
        run.best()


def test_best_iterate_of_a_run_that_ranked_none_is_refused(run):
    message = r"has no best.json, and none of its iterates .* has val/real_nll.*Fix: name the"
    with pytest.raises(RunFolderError, match=message):
        run.best()
    for t, nll in ((1, 0.5), (2, 0.75)):
        run.write_record(replace(run.record(t), metrics={"val/real_nll_per_token": nll}))
    assert run.best() == 1, "without a callback that ranks"
    run.write_best(2, "exact/kl", 0.5)
    assert run.best() == 2
