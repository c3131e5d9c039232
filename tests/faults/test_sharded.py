"""Runs of two processes whose base is sharded, compared with runs in which each holds all of it."""

from __future__ import annotations

import subprocess
import time

import pytest
from safetensors.torch import load_file

from spin_lightning.run.folder import RunFolder
from tests.faults.points import BROKEN, RANK, VARIABLE, Point
from tests.faults.processes import environment, fit, fit_command, kill_once_there
from tests.toys.models import family_config, write_model
from tests.toys.runs import contents, write_examples

# (On a busy machine, a start of two processes takes a minute.)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# 101 rows in units of 32: the second process has fewer units and, at the end, smaller batches.
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.max_examples", "107")
SHARDED = ("--model.shard_base", "true")
# Rank 0 alone answers for it.
ANSWERS = ("--trainer.callbacks+", "spin_lightning.AnswerMatch")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl")


@pytest.fixture(scope="module")
def model(tiny_model_dir, tmp_path_factory):
    """Width 64, which 4-bit layers need on a CPU, with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    for file in tiny_model_dir.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return write_model(family_config("llama", 24, intermediate_size=128), folder)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    fit(root, model, data, *TWO, *ANSWERS)
    return root


def assert_same(root, other):
    print("same bytes" if contents(root) == contents(other) else "other bytes")
    for t in (1, 2):
        one, two = (
            load_file(RunFolder(r).iterate(t) / "adapter_model.safetensors") for r in (root, other)
        )
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert contents(root) == contents(other)


def test_rows_and_adapters_are_those_of_a_whole_base(whole, model, data, tmp_path):
    fit(tmp_path, model, data, *TWO, *SHARDED, *ANSWERS)
    assert_same(tmp_path, whole)
    metrics = [RunFolder(root).record(2).metrics for root in (tmp_path, whole)]
    assert "answers/exact_match" in metrics[0]
    assert metrics[0] == metrics[1]


def test_in_4_bits_with_several_passes_per_batch(model, data, tmp_path):
    settings = ("--model.quantization", "nf4", "--model.activation_checkpointing", "true")
    settings += ("--data.max_response_tokens", "40", "--data.batch_size", "48")
    fit(tmp_path / "whole", model, data, *TWO, *settings)
    fit(tmp_path / "sharded", model, data, *TWO, *settings, *SHARDED)
    assert_same(tmp_path / "sharded", tmp_path / "whole")


@pytest.mark.parametrize(
    "wait_for", ["rows/iterate_000/part-00001.parquet", "checkpoints/last.ckpt"]
)
def test_killed_and_started_again_even_with_a_whole_base(wait_for, whole, model, data, tmp_path):
    settings = (*TWO, *ANSWERS, "--checkpoint_steps", "1")
    command = fit_command(tmp_path, model, data, *settings, *SHARDED)
    kill_once_there(command, tmp_path / wait_for)
    fit(tmp_path, model, data, *settings)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_failure_in_one_process_ends_the_other(rank, whole, model, data, tmp_path):
    target = "spin_lightning.generation.local:LocalGenerator.generate"
    harm = {VARIABLE: Point("", target, "raises", 2).value, RANK: str(rank)}
    start = time.monotonic()
    done = subprocess.run(
        fit_command(tmp_path, model, data, *TWO, *SHARDED, *ANSWERS),
        env=environment(**harm),
        capture_output=True,
        text=True,
        timeout=120,
    )
    print(f"exit code {done.returncode} after {time.monotonic() - start:.0f} s")
    assert done.returncode not in (0, 143)
    assert f"RuntimeError: {BROKEN}" in done.stderr
    fit(tmp_path, model, data, *TWO, *SHARDED, *ANSWERS)
    assert contents(tmp_path) == contents(whole)


def test_sigterm_stops_both_with_their_units_saved(whole, model, data, tmp_path):
    command = fit_command(tmp_path, model, data, *TWO, *SHARDED, *ANSWERS)
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "rows/iterate_000/part-00000.parquet").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    fit(tmp_path, model, data, *TWO, *SHARDED, *ANSWERS)
    assert contents(tmp_path) == contents(whole)
