"""Two processes, one of which meets a non-finite log-prob."""

import json
import subprocess

import pytest
from safetensors.torch import load_file

from spin_lightning.run.folder import RunFolder
from tests.faults.processes import environment, fit, fit_command
from tests.toys.runs import write_examples

pytestmark = pytest.mark.slow

TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
POISON = ("--model", "tests.faults.poisoned.PoisonedSPIN", "--model.poison", "11:nan")
ONE_ITERATE = ("--trainer.max_epochs", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl")


def test_both_processes_end_and_the_rows_of_one_are_reported(tiny_model_dir, data, tmp_path):
    command = fit_command(tmp_path, tiny_model_dir, data, *TWO, *POISON, *ONE_ITERATE)
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "in the rows example 11 sample 0;" in " ".join(done.stderr.split())
    (file,) = tmp_path.rglob("not_finite*.json")
    assert [row["example_id"] for row in json.loads(file.read_text())["rows"]] == [11]
    assert RunFolder(tmp_path).known_iterates() == [0]


def test_batch_skipped_by_one_process_is_skipped_by_both(tiny_model_dir, data, tmp_path):
    more = (*POISON, *ONE_ITERATE, "--model.max_skipped_batches", "1")
    fit(tmp_path / "two", tiny_model_dir, data, *TWO, *more)
    fit(tmp_path / "one", tiny_model_dir, data, *more, "--data.batch_size", "64")
    one, other = (
        load_file(RunFolder(tmp_path / name).iterate(1) / "adapter_model.safetensors")
        for name in ("one", "two")
    )
    apart = max(float((one[name] - other[name]).abs().max()) for name in one)
    assert apart < 1e-5
