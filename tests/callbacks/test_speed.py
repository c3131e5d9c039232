"""Tokens per second, shares and utilization, computed by hand."""

import pytest
import torch

from spin_lightning.callbacks import speed
from spin_lightning.callbacks.speed import Trained, measure_speed, speed_line, training_flops
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.rows.making import Timing

MADE = Timing(rows=10, generating=2.0, scoring=1.0, generated_tokens=300, scored_tokens=800)
TRAINED = Trained(seconds=5.0, rows=20.0, prompt_tokens=6.0, response_tokens=4.0)
CPU = torch.device("cpu")
# The tiny model's products: per layer q 32x32, k and v 16x32, o 32x32, three of the MLP 32x64.
BODY = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64)
HEAD = 24 * 32


def test_speed_counts_tokens_and_shares_by_hand(tiny_base):
    assert measure_speed(MADE, TRAINED, tiny_base, CPU) == pytest.approx(
        {
            "speed/generated_tokens_per_second": 150.0,
            "speed/scored_tokens_per_second": 800.0,
            "speed/trained_tokens_per_second": 40.0,  # 20 rows of 10 tokens in 5 s
            "speed/share_generating": 2 / 8,
            "speed/share_scoring": 1 / 8,
            "speed/share_training": 5 / 8,
        }
    )


def test_speed_leaves_out_a_stage_without_tokens(tiny_base):
    metrics = measure_speed(Timing(), TRAINED, tiny_base, CPU)
    assert metrics.keys() == {"speed/trained_tokens_per_second", "speed/share_training"}


def test_speed_utilization_is_against_the_peak_of_a_known_device(tiny_model_dir, monkeypatch):
    base = FrozenBase(str(tiny_model_dir), compute_dtype="bfloat16")
    needed = 4 * 20 * (BODY * 10 + HEAD * 4)
    assert training_flops(base, TRAINED) == needed
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    metrics = measure_speed(MADE, TRAINED, base, torch.device("cuda"))
    assert metrics["speed/mfu"] == pytest.approx(needed / 5.0 / 312e12)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("a GPU of next year", None),
    ],
)
def test_peak_is_that_of_the_device_by_name(name, peak, tiny_model_dir, monkeypatch):
    base = FrozenBase(str(tiny_model_dir), compute_dtype="bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert speed.peak_flops(base, torch.device("cuda")) == peak


def test_peak_is_unknown_in_float32_and_on_a_cpu(tiny_base, tiny_model_dir):
    assert speed.peak_flops(tiny_base, torch.device("cuda")) is None
    half = FrozenBase(str(tiny_model_dir), compute_dtype="bfloat16")
    assert speed.peak_flops(half, CPU) is None


def test_speed_line_reads_in_the_order_of_the_loop(tiny_base):
    metrics = measure_speed(MADE, TRAINED, tiny_base, CPU)
    assert speed_line(metrics | {"speed/mfu": 0.41}) == (
        "generated 150 tokens/s (25% of the time), scored 800 tokens/s (12% of the time), "
        "trained 40 tokens/s (62% of the time), 41% of the device's peak while training"
    )
    assert speed_line({}) == ""
