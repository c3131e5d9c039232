"""Two real processes through the command line, against one."""

import signal
import subprocess
import time

import pytest
from safetensors.torch import load_file

from spin_lightning.run_folder import RunFolder
from tests.faults.processes import environment, fit, fit_command
from tests.toy_runs import contents, write_examples

pytestmark = pytest.mark.slow

# 101 rows: the last global batch of 64 has 37, which two ranks share unevenly.
ROWS = ("--data.max_examples", "107")
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp", *ROWS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl")


@pytest.fixture(scope="module")
def two(tiny_model_dir, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    done = fit(root, tiny_model_dir, data, *TWO)
    assert "sync_dist" not in done.stderr
    return root


def rows_of_iterate_zero(root):
    return {n: h for n, h in contents(root).items() if n.startswith("rows/iterate_000/")}


def test_two_processes_make_the_rows_and_the_adapter_of_one_with_the_doubled_batch(
    two, tiny_model_dir, data, tmp_path
):
    fit(tmp_path, tiny_model_dir, data, *ROWS, "--data.batch_size", "64")
    assert rows_of_iterate_zero(two) == rows_of_iterate_zero(tmp_path)
    assert len(list(two.glob("rows/*/manifest.json"))) == 2
    one, other = (
        load_file(RunFolder(root).iterate(1) / "adapter_model.safetensors")
        for root in (tmp_path, two)
    )
    apart = max(float((one[name] - other[name]).abs().max()) for name in one)
    print(f"largest difference of a weight: {apart:.2g}")
    assert apart < 1e-5
    losses = [
        RunFolder(r).read_iterate(2)["metrics"]["val/real_nll_per_token"] for r in (tmp_path, two)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(
    "wait_for", ["rows/iterate_000/part-00001.parquet", "iterates/iterate_001"]
)
def test_two_processes_killed_and_started_again_end_with_the_same_bytes(
    wait_for, two, tiny_model_dir, data, tmp_path
):
    command = fit_command(tmp_path, tiny_model_dir, data, *TWO)
    process = subprocess.Popen(command, env=environment(), start_new_session=True)
    while not (tmp_path / wait_for).exists():
        assert process.poll() is None
        time.sleep(0.02)
    # Rank 0 alone: what it started has to notice by itself.
    process.send_signal(signal.SIGKILL)
    process.wait()
    fit(tmp_path, tiny_model_dir, data, *TWO)
    assert contents(tmp_path) == contents(two)
