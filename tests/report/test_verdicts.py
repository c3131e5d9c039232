"""Known states of a run, from records made by hand."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from spin_lightning.callbacks.console import show_verdicts
from spin_lightning.report.verdicts import LIMITS, STATES, find_verdicts
from spin_lightning.run.records import BestRecord, IterateRecord, TrainingRecord

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
NLL, CUE = "val/real_nll_per_token", "rows/tells/accuracy/"

# A run in which all is well: NLL falls, lengths and ends stay, margins grow, the loss falls.
HEALTHY = {
    NLL: 1.0,
    "val/generated_tokens": 100.0,
    "val/real_tokens": 110.0,
    "val/finished": 0.95,
    "val/real_finished": 1.0,
    "val/kl_base_per_token": 0.0,
}
ROWS = {f"{CUE}first_token": 0.7, f"{CUE}length": 0.6, "rows/tells/best": 0.7}
TRAINING = TrainingRecord(
    loss=0.5, margin=0.8, accuracy=0.8, early={"accuracy": 0.6, "loss": 0.68, "pairs": 64}
)


def history(*changes: dict[str, float]) -> list[IterateRecord]:
    """Iterates whose metrics are those of the healthy run but for `changes`, one each."""
    return [
        IterateRecord(
            t,
            training=TRAINING if t else None,
            metrics={**HEALTHY, "val/kl_base_per_token": 0.05 * t, NLL: 1.0 - 0.05 * t, **changed},
            rows=ROWS,
            cues={"first_token": '"Sure" starts real responses'},
        )
        for t, changed in enumerate(changes)
    ]


def trained(records: list[IterateRecord], t: int, **fields) -> list[IterateRecord]:
    changed = replace(records[t], training=replace(records[t].training, **fields))
    return [*records[:t], changed, *records[t + 1 :]]


def found(records, best=None) -> dict[str, tuple[int, ...]]:
    return {v.name: v.iterates for v in find_verdicts(records, best)}


def test_healthy_run_is_in_no_known_state():
    assert found(history({}, {}, {})) == {}
    assert found(history({})) == {}


def test_run_without_held_out_rows_or_of_an_older_version_is_in_no_known_state():
    bare = [IterateRecord(t, training=TrainingRecord() if t else None) for t in range(3)]
    assert found(bare) == {}
    nans = dict.fromkeys(HEALTHY, math.nan)
    assert found(history(nans, nans)) == {}


@pytest.mark.parametrize(
    ("accuracy", "pairs", "expected"),
    [(0.99, 32, True), (1.0, 31, False), (0.98, 64, False)],
)
def test_pairs_won_in_the_first_tenth(accuracy, pairs, expected):
    early = {"accuracy": accuracy, "loss": 0.1, "pairs": pairs}
    records = trained(history({}, {}), 1, early=early)
    assert found(records) == ({"separable-pairs": (0,)} if expected else {})


def test_pairs_won_in_the_first_tenth_name_the_best_cue_and_its_rule():
    early = {"accuracy": 1.0, "loss": 0.1, "pairs": 64}
    (verdict,) = find_verdicts(trained(history({}, {}), 1, early=early))
    assert verdict.measured == (
        "reward accuracy 1.00 in the first tenth of training p1; best single cue: first token, "
        '0.70 ("Sure" starts real responses)'
    )
    assert verdict.where == "p0"
    assert verdict.entry == "docs/troubleshooting.md#separable-pairs"


def test_pairs_won_in_the_first_tenth_for_no_single_reason():
    early = {"accuracy": 1.0, "loss": 0.1, "pairs": 64}
    records = trained(history({}, {}), 1, early=early)
    (verdict,) = find_verdicts([replace(records[0], cues={}), records[1]])
    assert verdict.measured.endswith("first token, 0.70, which does not explain it")
    (verdict,) = find_verdicts([replace(records[0], rows={}, cues={}), records[1]])
    assert verdict.measured == "reward accuracy 1.00 in the first tenth of training p1"


@pytest.mark.parametrize(("accuracy", "expected"), [(0.98, True), (0.97, False)])
def test_single_cue_separates_the_rows_of_the_newest_iterate(accuracy, expected):
    records = history({}, {})
    records[1] = replace(records[1], rows={**ROWS, f"{CUE}length": accuracy}, cues=None)
    assert found(records) == ({"separable-pairs": (1,)} if expected else {})


def test_real_log_probs_that_fall_while_margins_grow_are_a_note():
    # From 1.0 to 1.021 is more than two percent, to 1.019 less.
    records = history({NLL: 1.0}, {NLL: 1.021})
    verdicts = {v.name: v for v in find_verdicts(records)}
    assert verdicts["real-log-probs-fall"].level == "note"
    assert "1.000 → 1.021" in verdicts["real-log-probs-fall"].measured
    assert found(history({NLL: 1.0}, {NLL: 1.019})) == {}
    assert "real-log-probs-fall" not in found(trained(records, 1, margin=-0.1))
    assert "real-log-probs-fall" not in found(trained(records, 1, margin=None))


@pytest.mark.parametrize(
    ("first", "now", "real", "expected"),
    [
        (100.0, 49.0, 110.0, True),  # Collapsed.
        (100.0, 51.0, 110.0, False),
        (100.0, 230.0, 110.0, True),  # Runs on.
        (100.0, 210.0, 110.0, False),  # Not twice the real length.
        (1000.0, 110.0, 100.0, False),  # The base rambled.
        (1000.0, 300.0, 100.0, False),  # On its way from there.
        (1000.0, 45.0, 100.0, True),  # And past it.
        (10.0, 300.0, 100.0, True),
        (300.0, 400.0, 100.0, False),  # Hardly worse than the base.
    ],
)
def test_length(first, now, real, expected):
    tokens = "val/generated_tokens"
    lengths = {"val/real_tokens": real}
    records = history({**lengths, tokens: first}, {**lengths, tokens: now})
    assert found(records) == ({"length": (1,)} if expected else {})


@pytest.mark.parametrize(
    ("first", "now", "real", "expected"),
    [(0.95, 0.74, 1.0, True), (0.95, 0.76, 1.0, False), (0.3, 0.2, 1.0, False), (1, 0.5, 0.6, 0)],
)
def test_finished(first, now, real, expected):
    ends = {"val/real_finished": real}
    records = history({**ends, "val/finished": first}, {**ends, "val/finished": now})
    assert found(records) == ({"unfinished": (1,)} if expected else {})


def test_kl_to_the_base_over_the_bound():
    kl = "val/kl_base_per_token"
    assert found(history({}, {kl: 0.49}, {kl: 0.51}, {kl: 0.6})) == {"far-from-base": (2, 3)}


@pytest.mark.parametrize(
    ("t", "fields", "expected"),
    [
        (1, {"loss": 0.69, "margin": 0.01}, True),
        (1, {"loss": 0.69, "margin": -0.01}, True),
        (1, {"loss": 0.68, "margin": 0.01}, False),
        (1, {"loss": 0.69, "margin": 0.06}, False),
        (1, {"loss": 0.69, "margin": None}, False),
        (2, {"loss": 0.69, "margin": 0.01}, False),
    ],
)
def test_loss_that_is_flat_from_the_start(t, fields, expected):
    early = {"accuracy": 0.5, "loss": 0.693, "pairs": 64}
    records = trained(history({}, {}, {}), t, early=early, **fields)
    assert found(records) == ({"flat-loss": (1,)} if expected else {})


@pytest.mark.parametrize(
    ("nlls", "expected"),
    [
        ((1.0, 1.3, 1.01), None),  # p1 may overshoot
        ((1.0, 1.3, 1.021), (2,)),
        ((1.0, 0.9, 1.03, 1.04), (3,)),
        ((1.0, 0.9, 1.03, 0.95), None),
    ],
)
def test_real_responses_less_likely_than_under_the_base(nlls, expected):
    records = history(*({NLL: nll} for nll in nlls))
    assert "overshoot" not in found(records), "supervised fine-tuning has no opponent"
    played = trained(records, len(records) - 1, opponent="p1")
    assert found(played).get("overshoot") == expected


def test_newest_iterate_that_is_worse_than_the_best():
    # 0.92 is two percent more than 0.9 and a bit.
    assert found(history({}, {NLL: 0.9}, {NLL: 0.919}))["worse-than-best"] == (2,)
    assert found(history({}, {NLL: 0.9}, {NLL: 0.917})) == {}
    # It was worse at iterate 1 and is the best again.
    assert "worse-than-best" not in found(history({NLL: 0.9}, {NLL: 1.0}, {NLL: 0.89}))


def test_ranking_of_the_run_decides_which_iterate_is_the_best():
    records = history({"my/score": 0.5}, {"my/score": 0.8}, {"my/score": 0.7})
    best = BestRecord(1, "my/score", 0.8)
    assert found(records, best) == {"worse-than-best": (2,)}
    (verdict,) = find_verdicts(records, best)
    assert verdict.measured == "my/score 0.7; p1 had 0.8"
    assert found(records, BestRecord(2, "my/score", 0.7)) == {}


def test_warning_is_printed_with_value_cause_advice_and_entry(capsys):
    verdicts = find_verdicts(history({}, {"val/kl_base_per_token": 0.75}))
    show_verdicts(verdicts)
    printed = " ".join(capsys.readouterr().out.split())
    (verdict,) = verdicts
    assert printed.startswith("WARNING: The policy is far from the base (p1). Measured: KL to the")
    for part in ("0.75 nats per token", verdict.cause, verdict.advice, verdict.entry):
        assert part in printed


def entries() -> dict[str, str]:
    """Sections of the page by their title."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", STATES)
def test_every_state_has_an_entry_in_the_documentation(name):
    text = entries()[name]
    for part in ("**Measured.**", "**Cause.**", "**What to do.**"):
        assert part in text


@pytest.mark.parametrize("name", LIMITS)
def test_every_threshold_is_documented_with_its_reason(name):
    limit = LIMITS[name]
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    assert row == f"| `{name}` | {limit.value:g} | {limit.reason} |"
