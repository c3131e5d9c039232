"""What docs/study.md claims, against the results that it links to."""

import itertools
from pathlib import Path
from statistics import fmean, median

import pytest

from spin_lightning.report.study import first_late, paired_interval
from spin_lightning.report.study_results import Line, read_results

DOCS = Path(__file__).parents[1] / "docs"
KL = "exact/kl"
LOSSES_THAT_SETTLE = (
    "SPIN(loss='ipo', beta=0.3)",
    "SPIN(loss='sppo', beta=1.0)",
    "AlphaSPIN(alpha=0.1, loss='ipo', beta=0.3)",
    "TPAW(beta=0.3)",
    "SPACE",
)
TOKEN = "AlphaSPIN(alpha=0.3, mixture='token')"
PARTS = {
    part: {line.label: line for line in lines}
    for part, lines in read_results(DOCS / "runs" / "study" / "study.parquet").items()
}


def threshold(variant: str, beta: float) -> Line:
    return PARTS["threshold"][f"{variant}, beta={beta}"]


def settled(line: Line) -> int:
    starts = [points[0] for points in line.points(KL)]
    return sum(late < start for late, start in zip(line.late(KL), starts, strict=True))


def late_by_seed(line: Line) -> dict[int, float]:
    return {
        seed: fmean(at[KL] for at in run[first_late(len(run)) :]) for seed, run in line.runs.items()
    }


def difference(line: Line, other: Line, *, at_best: bool = False) -> tuple[float, float]:
    """The 95 % interval of the mean paired difference in KL."""
    own, theirs = (one.at_best(KL) if at_best else late_by_seed(one) for one in (line, other))
    low, _, high = paired_interval([own[s] for s in sorted(own)], [theirs[s] for s in sorted(own)])
    return low, high


def is_below(line: Line, other: Line) -> bool:
    """Whether the ranges of the late KL do not overlap."""
    return max(line.late(KL)) < min(other.late(KL))


def test_every_line_has_five_seeds_of_ten_iterates():
    for part, lines in PARTS.items():
        for line in lines.values():
            assert sorted(line.runs) == [0, 1, 2, 3, 4], (part, line.label)
            expected = 21 if part == "equal_tokens" else 11
            assert {len(run) for run in line.runs.values()} == {expected}, (part, line.label)


@pytest.mark.parametrize(
    ("variant", "unsettled", "settles"),
    [
        ("SPIN", 0.3, 0.5),
        ("MixtureSPIN(history=2)", 0.2, 0.3),
        ("MixtureSPIN(history=4)", 0.2, 0.3),
        ("FictitiousSPIN", 0.1, 0.3),
    ],
)
def test_settles_from_a_beta_on(variant, unsettled, settles):
    for beta in (0.1, 0.2, 0.3, 0.5, 1.0, 2.0):
        if beta >= settles:
            assert settled(threshold(variant, beta)) == 5
    assert settled(threshold(variant, unsettled)) < 5


def test_history_helps_below_the_threshold_of_spin():
    for variant in ("MixtureSPIN(history=2)", "MixtureSPIN(history=4)", "FictitiousSPIN"):
        assert is_below(threshold(variant, 0.3), threshold("SPIN", 0.3))
    assert settled(threshold("SPIN", 0.3)) == 0


def test_history_changes_nothing_above_the_threshold():
    for beta in (1.0, 2.0):
        lines = [
            threshold(variant, beta)
            for variant in ("SPIN", "MixtureSPIN(history=2)", "FictitiousSPIN")
        ]
        assert not any(is_below(a, b) for a, b in itertools.permutations(lines, 2))


def test_mixture_policy_is_steadier_below_the_threshold():
    line = threshold("SPIN", 0.3)
    assert max(line.late("exact/mixture_kl")) < min(line.late(KL))


def test_previous_as_the_reference_loses_the_gain():
    part = PARTS["previous"]
    for variant in ("MixtureSPIN(history=2", "FictitiousSPIN("):
        exact = next(v for k, v in part.items() if k == variant.rstrip("(") or k == f"{variant})")
        (previous,) = (v for k, v in part.items() if k.startswith(variant) and "previous" in k)
        assert is_below(exact, previous)


def test_alpha_makes_unstable_runs_worse_and_the_token_level_mixture_less_so():
    part = PARTS["alpha"]
    assert difference(part["AlphaSPIN(alpha=0.3)"], part["SPIN"])[0] > 0
    assert difference(part[TOKEN], part["AlphaSPIN(alpha=0.3)"])[1] < 0
    assert settled(part["AlphaSPIN(alpha=0.3)"]) == 0
    low, high = difference(part["AlphaSPIN(alpha=0.3, history=None)"], part["FictitiousSPIN"])
    assert low < 0 < high


def test_fictitious_play_hurts_in_few_short_steps():
    part = PARTS["few_steps"]
    assert difference(part["FictitiousSPIN"], part["SPIN"])[0] > 0
    low, high = difference(part["AlphaSPIN(alpha=0.3)"], part["SPIN"])
    assert low < 0 < high


def test_losses_that_settle():
    part = PARTS["losses"]
    for label in LOSSES_THAT_SETTLE:
        assert settled(part[label]) == 5
        assert is_below(part[label], threshold("SPIN", 0.3))
    for label in ("SPIN(loss='hinge', beta=0.3)", "TSPIN(beta=1.0)"):
        assert settled(part[label]) == 0


def test_kept_rows_and_four_bits_change_nothing():
    part = PARTS["reservoir"]
    low, high = difference(part["FictitiousSPIN(refresh='reservoir')"], part["FictitiousSPIN"])
    assert low < 0 < high
    four_bits = PARTS["nf4"]
    assert settled(four_bits["SPIN(beta=0.3)"]) == 0
    assert is_below(four_bits["FictitiousSPIN(beta=0.3)"], four_bits["SPIN(beta=0.3)"])


@pytest.mark.parametrize("part", ["equal_tokens", "little_data", "low_rank", "noisy", "after_sft"])
def test_nothing_beats_supervised_fine_tuning_at_its_best_point(part):
    control = PARTS["control" if part == "equal_tokens" else part]["SFT"]
    others = [line for line in PARTS[part].values() if line is not control]
    if part == "equal_tokens":
        others += [PARTS["losses"][label] for label in LOSSES_THAT_SETTLE]
        others += [threshold(variant, 1.0) for variant in ("SPIN", "FictitiousSPIN")]
    for line in others:
        assert difference(line, control, at_best=True)[1] > 0, line.label


def test_spin_and_fictitious_play_stay_behind_with_1600_examples():
    for variant in ("SPIN", "FictitiousSPIN"):
        low, _ = difference(threshold(variant, 1.0), PARTS["control"]["SFT"], at_best=True)
        assert low > 0


def test_self_play_from_the_best_point_on_loses_less_than_supervised_fine_tuning():
    part = PARTS["after_sft"]
    for label in ("SPIN(loss='sppo', beta=1.0)", "TPAW(beta=0.3)"):
        assert difference(part[label], part["SFT"])[1] < 0
    assert difference(part["SPIN(beta=1.0)"], part["SFT"])[0] > 0


def test_small_adapter_of_self_play_writes_less_outside_the_language():
    part = PARTS["low_rank"]
    own, theirs = (part[label].at_best("exact/outside_mass") for label in ("TPAW(beta=0.3)", "SFT"))
    _, _, high = paired_interval([own[s] for s in sorted(own)], [theirs[s] for s in sorted(own)])
    assert high < 0
    assert difference(part["TPAW(beta=0.3)"], part["SFT"], at_best=True)[0] > 0


@pytest.mark.parametrize(
    ("part", "label", "metric", "where"),
    [
        *(
            ("threshold", f"{variant}, beta={beta}", KL, "late")
            for variant in ("SPIN", "MixtureSPIN(history=2)", "FictitiousSPIN")
            for beta in (0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
        ),
        *(("losses", label, KL, "late") for label in LOSSES_THAT_SETTLE),
        *(("few_steps", variant, KL, "late") for variant in ("SPIN", "FictitiousSPIN")),
        ("alpha", "AlphaSPIN(alpha=0.3)", KL, "late"),
        ("alpha", TOKEN, KL, "late"),
        ("little_data", "SFT", KL, "best"),
        ("little_data", "SFT(learning_rate=3e-4)", KL, "best"),
        ("little_data", "TPAW(beta=0.3)", KL, "best"),
        ("little_data", "SPIN(loss='sppo', beta=1.0)", KL, "best"),
        ("low_rank", "SFT", "exact/outside_mass", "best"),
        ("low_rank", "TPAW(beta=0.3)", "exact/outside_mass", "best"),
        ("noisy", "SFT", KL, "best"),
        ("low_rank", "SFT", KL, "best"),
        ("after_sft", "SPIN(beta=1.0)", KL, "late"),
    ],
)
def test_numbers_on_the_page_are_those_of_the_file(part, label, metric, where):
    line = PARTS[part][label]
    values = line.late(metric) if where == "late" else list(line.at_best(metric).values())
    digits = 3 if metric == "exact/outside_mass" else 2
    middle, low, high = (f"{f(values):.{digits}f}" for f in (median, min, max))
    text = f"{middle} ({low}–{high})"
    assert text in (DOCS / "study.md").read_text(encoding="utf-8")
