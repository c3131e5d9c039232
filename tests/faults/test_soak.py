"""Fifty iterates through the command line: memory, open files and disk usage do not grow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_fit import fit_arguments
from tests.faults.processes import environment
from tests.toys.runs import write_examples

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")

KIB, MIB = 1 << 10, 1 << 20
# By then everything that is built once exists.
SETTLED = 5
# An adapter of a megabyte, so that a leak of one per iterate would show.
SETTINGS = (
    *("--model.lora_r", "256"),
    *("--data.val_examples", "6"),
    *("--data.batch_size", "20"),
    *("--model.generation.unit_size", "20"),
)
# oneDNN compiles a kernel of half a megabyte for each new size of product
# (`frozen_linear._rounded_up`): most in the first iterates, a few later.
KERNELS = 32 * MIB
# Python objects around an iterate's weights in memory, whatever the size of the weights.
LAYERS = 400 * KIB
MIXTURE = ("--model", "MixtureSPIN", "--model.history", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl", count=46)


def soak(root: Path, model: Path, data: Path, iterates: int, *variant: str) -> list[dict[str, int]]:
    """Play a run in a separate process; returns the measurements of each iterate."""
    measured = root.with_suffix(".jsonl")
    arguments = fit_arguments(
        root,
        model,
        data,
        *variant,
        *SETTINGS,
        *("--trainer.max_epochs", iterates),
        *("--trainer.callbacks", "tests.faults.meter.Meter"),
        *("--trainer.callbacks.path", measured),
    )
    done = subprocess.run(
        [sys.executable, "-m", "spin_lightning", *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in measured.read_text().splitlines()]


def show(variant: tuple[str, ...], at: list[dict[str, int]]) -> None:
    print(f"\n{' '.join(variant)}")
    for t in sorted({0, 1, SETTLED, *range(10, len(at), 10), len(at) - 1}):
        line = at[t]
        logs = line["disk"] - at[t - 1]["disk"] - line["rows"] - line["adapter"] if t else 0
        print(
            f"  iterate {t:2d}: resident {line['resident'] / MIB:.2f} MiB "
            f"(peak {line['peak'] / MIB:.2f}), {line['files']} open files, "
            f"last.ckpt {line['checkpoint']:,} bytes, on disk {line['disk'] / KIB:,.0f} KiB "
            f"(new: rows {line['rows']:,}, adapter {line['adapter']:,}, logs {logs:,} bytes)"
        )


@pytest.mark.parametrize(
    ("variant", "iterates"),
    [
        pytest.param(
            ("--model", "FictitiousSPIN"), 9, id="FictitiousSPIN-9", marks=pytest.mark.slow
        ),
        *(
            pytest.param(
                variant,
                50,
                id=f"{variant[1]}-50",
                marks=[pytest.mark.slow, pytest.mark.timeout(900)],
            )
            for variant in [("--model", "SPIN"), MIXTURE, ("--model", "FictitiousSPIN")]
        ),
    ],
)
def test_resources_do_not_grow_over_the_iterates(variant, iterates, tiny_model_dir, data, tmp_path):
    at = soak(tmp_path / "run", tiny_model_dir, data, iterates, *variant)
    show(variant, at)
    assert [line["iterate"] for line in at] == list(range(iterates + 1))
    early, last, passed = at[SETTLED], at[-1], iterates - SETTLED
    more = {name: last[name] - early[name] for name in early}
    print(
        f"  from iterate {SETTLED} to {iterates}: resident "
        f"{more['resident'] / KIB / passed:+.1f} KiB an iterate "
        f"({more['resident'] / early['resident']:+.2%}), "
        f"peak {more['peak'] / KIB / passed:+.1f} KiB, open files {more['files']:+d}, "
        f"last.ckpt {more['checkpoint']:+d} bytes"
    )
    assert more["files"] <= 0
    assert more["checkpoint"] == 0
    assert {line["adapter"] for line in at[1:]} == {early["adapter"]}
    for before, now in zip(at[SETTLED:], at[SETTLED + 1 :], strict=False):
        logs = now["disk"] - before["disk"] - now["rows"] - now["adapter"]
        # Logs and the record of the iterate; at the last iterate also the picture.
        assert logs < 32 * KIB
    if "FictitiousSPIN" in variant:
        # All iterates generate and score, 16 of them in one batch, with all adapters in memory.
        # Over 45 iterates the adapters outweigh the kernels, over four they do not.
        kernels = KERNELS if passed < 10 else 0
        assert more["resident"] < passed * early["adapter"] + kernels
        assert more["peak"] < (passed + 16) * (early["adapter"] + LAYERS) + KERNELS
    else:
        assert more["resident"] < KERNELS
        assert last["resident"] < 1.05 * early["resident"]
