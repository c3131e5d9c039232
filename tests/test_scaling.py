"""Times and memory on paper, against sums by hand, and the page against the script."""

from pathlib import Path

import pytest

from benchmarks import sizes
from benchmarks.costs import (
    Base,
    Card,
    Efficiency,
    Row,
    Time,
    decoding_step,
    forward_flops,
    reading_pass,
    training_flops,
    training_pass,
)
from benchmarks.published import A100, H100, RTX_4090, RUNS, requests_per_second
from benchmarks.scaling import (
    PAGE,
    Iterate,
    Layout,
    fits,
    generation,
    scoring,
    sizes_of,
    training,
)
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.memory import Adapter, ModelShape

# 2 layers of 576 weights, 1,152 in all; a head of 32 x 8 = 256; adapters of 2 x 2 x 128 = 512.
SHAPE = ModelShape(layers=2, width=8, inner=16, queries=8, keys=4, heads=2, vocabulary=32)
BASE = Base(SHAPE, Adapter.of(LoraSettings(r=2), SHAPE))
CARD = Card("card", 1 << 30, bandwidth=2000.0, flops=10_000.0, link=100.0)
HALF = Efficiency(flops=0.5, bandwidth=0.5, link=0.5, launch=0.01, replay=0.001, nf4=4.0)
# 8 tokens. The prompt's see 4 x 4 / 2, a response's 2 x (4 + 1): 8 + 10 + 10 = 28 pairs.
ROW = Row(4, (2, 2))
ATTENTION = 4 * 2 * 8 * 28  # two products of 2 operations, 2 layers, 8 numbers of queries


def test_forward_operations_by_hand():
    products = 2 * (1152 + 512) * 8 + 2 * 256 * 4
    assert forward_flops(BASE, [ROW], scored=4) == products + ATTENTION == 30_464


def test_training_operations_by_hand():
    again = 3 * 2 * 1152 * 8 + 4 * 2 * 512 * 8 + 2 * 2 * 256 * 4 + 4.5 * ATTENTION
    assert training_flops(BASE, [ROW], scored=4) == again == 100_224
    once = 2 * 2 * 1152 * 8 + 3 * 2 * 512 * 8 + 2 * 2 * 256 * 4 + 3.5 * ATTENTION
    assert training_flops(BASE, [ROW], scored=4, recomputed=False) == once


def test_pass_of_a_sharded_base_is_gathered_and_read_by_hand():
    """Weights: 1,152 linear, 2 x 256 for embeddings and head, 5 norms of 8: 1,704, 2 bytes each."""
    sharded = Base(SHAPE, BASE.adapter, shards=4)
    time = reading_pass(sharded, CARD, HALF, [ROW], scored=4)
    gathered = 3408 * 3 / 4
    assert time == Time(166 * 2 * 0.01, 3408 / 1000, 30_464 / 5000, network=gathered / 50)
    step = training_pass(sharded, CARD, HALF, ROW, pairs=1, cards=4)
    assert step.products == 100_224 / 5000
    assert step.weights == pytest.approx(3 * 3408 / 1000)
    assert step.network == pytest.approx((2 * gathered + 2 * 3 / 4 * 512 * 4) / 50)


def test_decoding_step_by_hand():
    """5 rows that see 6 tokens under 2 adapters, whose products all rows take."""
    time = decoding_step(BASE, CARD, HALF, slots=5, context=6, adapters=2)
    assert time.launches == pytest.approx(1590 * 2 / 32 * 0.001)
    assert time.weights == 2 * (1152 + 256 + 1024) / 1000
    assert time.products == 5 * (2 * (1152 + 256 + 1024) + 4 * 2 * 8 * 6) / 5000
    assert time.keys == 2 * 2 * 4 * 2 * 30 / 1000
    assert time.network == 0
    assert time.seconds == time.products + time.keys
    nf4 = decoding_step(Base(SHAPE, BASE.adapter, "nf4"), CARD, HALF, 5, 6, 1)
    assert nf4.weights == (4 * 1152 + 2 * (256 + 512)) / 1000
    assert nf4.launches == pytest.approx(1366 * 2 / 32 * 0.001)


@pytest.mark.parametrize(
    ("time", "seconds", "bound"),
    [
        (Time(9, 1, 2, keys=3, network=4), 9, "launches"),
        (Time(1, 1, 2, keys=3, network=9), 9, "network"),
        (Time(1, 1, 4, keys=3), 7, "compute"),
        (Time(1, 4, 3, keys=1), 5, "memory bandwidth"),
        (Time(1, 1, 2, keys=3), 5, "memory bandwidth"),
    ],
)
def test_bound_is_the_longest_part(time, seconds, bound):
    assert (time.seconds, time.bound) == (seconds, bound)


def test_servers_answer_at_the_published_rates():
    """256 written of 768 tokens: 3,656.98 / 768 with an adapter, 2,693.62 / 256 without."""
    slow, fast = requests_per_second("7B", A100, 512, 256)
    assert (slow, fast) == pytest.approx((4.762, 10.522), abs=1e-3)
    # 4.78859 requests of 427.2 tokens, 0.66371 of that with an adapter; 213.9 are written.
    assert requests_per_second("70B", A100, 512, 256) == pytest.approx((1.7679, 4.0011), abs=1e-3)
    assert requests_per_second("7B", H100, 512, 256)[0] == pytest.approx(9.818, abs=1e-3)


def test_iterate_on_servers_by_hand():
    layout = Layout("7B", A100, 8, servers=4)
    made = generation(layout, 1, fast=False)
    assert made.hours == pytest.approx(50_000 / (4 * 4.7617) / 3600, rel=1e-3)
    # 6.979e9 linear weights, 167.8e6 of the adapter, 131e6 of the head; 512 of 1,024 tokens scored.
    # Pairs of tokens: 512 x 512 / 2 + 2 x 256 x 640. An A100 reaches 0.54 of 312e12.
    attention = 4.5 * 4 * 32 * 4096 * (512**2 / 2 + 2 * 256 * 640)
    pair = (6 * 6.979e9 + 8 * 167.77e6) * 1024 + 4 * 131.07e6 * 512 + attention
    hours = 50_000 * pair / (8 * 0.54 * 312e12) / 3600
    assert training(layout, fast=True).hours == pytest.approx(hours, rel=1e-3)
    assert training(layout, fast=True).bound == "compute"


def test_older_iterates_score_new_responses_alone():
    layout = Layout("7B", A100, 8)
    one, four = (scoring(layout, members, fast=True).hours for members in (1, 4))
    assert four / one == pytest.approx(1 + 3 * 768 / 1024, rel=0.01)


def test_memory_decides_what_fits():
    big = Layout("70B", RTX_4090, 1, "nf4")
    # 68.45e9 weights of 0.5159 bytes, and 2.1e9 for embeddings and head in bfloat16.
    assert sizes_of(big).weights == pytest.approx(68.45e9 * 0.5159 + 2 * 2.1013e9, rel=1e-3)
    assert not fits(big)
    small = Layout("7B", RTX_4090, 1, "nf4")
    assert fits(small)
    assert small.slots == 151  # as docs/gpu.md says


def test_iterate_is_the_sum_of_its_phases():
    iterate = Iterate.of(Layout("7B", H100, 8), 4, fast=True)
    assert iterate.hours == sum(hours for hours, _ in iterate)


def test_share_reached_by_a_published_run():
    """1,024 sequences of 2,048 tokens in 450 s on two cards of 165.2e12.

    Llama-2-7B: 6.476e9 linear weights, 159.9e6 of an adapter of rank 64, 131.1e6 of the head.
    """
    attention = 4.5 * 4 * 32 * 4096 * 1024  # half of 2,048 tokens are seen
    token = 6 * 6.476e9 + 8 * 159.9e6 + 4 * 131.1e6 + attention
    expected = token * 2048 * 1024 / (450 * 2 * 165.2e12)
    assert RUNS[0].reached == pytest.approx(expected, rel=1e-3)


def test_page_has_the_tables_of_the_script():
    page = (Path(__file__).parents[1] / PAGE.path).read_text(encoding="utf-8")
    assert PAGE.filled(page) == page


def test_page_of_model_sizes_holds_what_the_script_prints():
    page = sizes.PAGE.path.read_text(encoding="utf-8")
    assert sizes.PAGE.filled(page) == page


def test_model_that_needs_more_than_a_card_is_not_said_to_fit():
    # 36.8 GiB of weights in NF4 alone, and 131 GiB in bfloat16.
    assert [sizes.card_of("Llama-3-70B", card) for card in sizes.CARDS.values()] == [
        "no",
        "no",
        "NF4",
    ]
