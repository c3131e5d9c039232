"""Two real processes through the command line, compared with one."""

import csv
import subprocess
import time

import pytest
from safetensors.torch import load_file

from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import RunFolder
from tests.faults.points import BROKEN, RANK, VARIABLE, Point
from tests.faults.processes import environment, fit, fit_command, kill_once_there
from tests.toys.runs import contents, write_examples

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
    assert len(list(two.glob("rows/*/__about__/manifest.json"))) == 2
    one, other = (
        load_file(RunFolder(root).iterate(1) / "adapter_model.safetensors")
        for root in (tmp_path, two)
    )
    apart = max(float((one[name] - other[name]).abs().max()) for name in one)
    print(f"largest difference of a weight: {apart:.2g}")
    assert apart < 1e-5
    losses = [RunFolder(r).record(2).metrics["val/real_nll_per_token"] for r in (tmp_path, two)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_two_processes_with_several_passes_per_batch_train_the_adapter_of_one(
    tiny_model_dir, data, tmp_path
):
    """Batches of 48 pairs of up to 60 tokens: more than one pass of 1024 on every rank."""
    long = (*ROWS, "--data.max_response_tokens", "40", "--trainer.max_epochs", "1")
    fit(tmp_path / "one", tiny_model_dir, data, *long, "--data.batch_size", "96")
    fit(tmp_path / "two", tiny_model_dir, data, *TWO, *long, "--data.batch_size", "48")
    assert rows_of_iterate_zero(tmp_path / "one") == rows_of_iterate_zero(tmp_path / "two")
    rows = read_rows(RunFolder(tmp_path / "two").rows(0))
    tokens = rows.prompt_ids.lengths + rows.real_ids.lengths + rows.generated_ids.lengths
    assert 48 * tokens.mean() > 1.2 * 1024
    one, two = (
        load_file(RunFolder(tmp_path / name).iterate(1) / "adapter_model.safetensors")
        for name in ("one", "two")
    )
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def test_four_processes_make_the_rows_of_two(two, tiny_model_dir, data, tmp_path):
    four = ("--trainer.devices", "4", "--data.batch_size", "16", "--trainer.max_epochs", "1")
    fit(tmp_path, tiny_model_dir, data, *TWO, *four)
    assert rows_of_iterate_zero(tmp_path) == rows_of_iterate_zero(two)


@pytest.mark.parametrize(
    "wait_for",
    ["rows/iterate_000/part-00001.parquet", "checkpoints/last.ckpt", "iterates/iterate_001"],
)
def test_two_processes_killed_and_started_again_end_with_the_same_bytes(
    wait_for, two, tiny_model_dir, data, tmp_path
):
    # (The first last.ckpt is that of the first of two steps.)
    command = fit_command(tmp_path, tiny_model_dir, data, *TWO, "--checkpoint_steps", "1")
    kill_once_there(command, tmp_path / wait_for)
    fit(tmp_path, tiny_model_dir, data, *TWO)
    assert contents(tmp_path) == contents(two)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_two_processes_stopped_within_an_epoch_continue_with_the_same_bytes(
    accumulated, tiny_model_dir, data, tmp_path
):
    """After one of two batches, with accumulation inside a step, which cannot be stored."""
    settings = (*TWO, "--trainer.accumulate_grad_batches", str(accumulated))
    fit(tmp_path / "whole", tiny_model_dir, data, *settings)
    root = tmp_path / "parts"
    stop = (
        "--trainer.callbacks+",
        "tests.toys.stopping.StopAfter",
        "--trainer.callbacks.batches",
        "1",
    )
    done = fit(root, tiny_model_dir, data, *settings, *stop)
    assert "Stopped after 1 of 2 batches of an epoch of iterate 1" in done.stdout + done.stderr
    assert RunFolder(root).known_iterates() == [0]
    assert RunFolder(root).last_checkpoint.exists() == (accumulated == 1)
    fit(root, tiny_model_dir, data, *settings)
    assert contents(root) == contents(tmp_path / "whole")


_GENERATE = "spin_lightning.generation.local:LocalGenerator.generate"
_STEP = "spin_lightning.modules.base:SelfPlayModule.training_step"


@pytest.mark.parametrize(
    ("target", "call", "rank"), [(_GENERATE, 2, 1), (_STEP, 2, 1), (_STEP, 2, 0)]
)
def test_failure_on_one_rank_ends_all_with_its_message_and_the_next_start_continues(
    target, call, rank, two, tiny_model_dir, data, tmp_path
):
    harm = {VARIABLE: Point("", target, "raises", call).value, RANK: str(rank)}
    start = time.monotonic()
    done = subprocess.run(
        fit_command(tmp_path, tiny_model_dir, data, *TWO),
        env=environment(**harm),
        capture_output=True,
        text=True,
        timeout=120,
    )
    print(f"exit code {done.returncode} after {time.monotonic() - start:.0f} s\n{done.stderr}")
    assert done.returncode not in (0, 143)
    assert f"RuntimeError: {BROKEN}" in done.stderr
    # That of the rank that failed; another rank prints one line, if it has the time.
    assert done.stderr.count("Traceback (most recent call last)") == 1
    fit(tmp_path, tiny_model_dir, data, *TWO)
    assert contents(tmp_path) == contents(two)


@pytest.mark.parametrize(
    ("target", "call", "rank"),
    [(_GENERATE, 2, 1), ("spin_lightning.callbacks.iterates:measure_iterate", 1, 0)],
)
def test_wait_longer_than_the_process_group_allows_is_not_the_end(
    target, call, rank, two, tiny_model_dir, data, tmp_path
):
    """Collectives of torch give up after 12 seconds here, and one rank takes 25 longer."""
    harm = {VARIABLE: Point("", target, "slow", call).value, RANK: str(rank)}
    strategy = "--trainer.strategy"
    more = (strategy, "lightning.pytorch.strategies.DDPStrategy", f"{strategy}.timeout", "0:00:12")
    start = time.monotonic()
    done = subprocess.run(
        fit_command(tmp_path, tiny_model_dir, data, *TWO, *more),
        env=environment(**harm),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start > 25
    assert contents(tmp_path) == contents(two)


def test_held_out_row_without_a_partner_is_counted_once(tiny_model_dir, data, tmp_path):
    """33 held-out rows, 32 in a global batch: the second rank has none of the last one."""
    measured = []
    for name, size, more in (("one", 32, ROWS), ("two", 16, TWO)):
        held_out = ("--data.val_examples", "33", "--data.batch_size", size)
        settings = (*more, *held_out, "--trainer.max_epochs", "1")
        fit(tmp_path / name, tiny_model_dir, data, *map(str, settings))
        with (tmp_path / name / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["val/logps/real"]]
        measured.append({n: float(v) for n, v in rows[0].items() if n.startswith("val/") and v})
    one, other = measured
    assert one.keys() == other.keys()
    assert {"val/loss", "val/logps/real", "val/logps/generated"} <= one.keys()
    assert other == pytest.approx(one, rel=1e-6, abs=1e-6)
