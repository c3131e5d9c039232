"""Thresholds in beta against the recursions of docs/variants.md, iterated."""

import pytest

from spin_lightning.report.thresholds import best_response_threshold


def shrinks(beta: float, history: int, alpha: float, *, token: bool, previous: bool) -> bool:
    """Whether u = log p - log p_data dies out over 600 iterates, with the base on the data."""
    c, past = 1 - 1 / beta, [1.0] * history
    for _ in range(600):
        mean = sum(past[-history:]) / history
        if previous:
            nxt = past[-1] - mean / beta
        elif token:
            nxt = c * (1 - alpha) * mean
        else:
            nxt = (1 - alpha) * past[-1] - mean / beta if alpha else c * mean
        past.append(nxt)
        if abs(nxt) > 1e9:
            return False
    return max(map(abs, past[-history:])) < 1e-3


@pytest.mark.parametrize(
    ("model", "settings", "history", "alpha", "expected"),
    [
        ("SPIN", {}, 1, 0.0, 1 / 2),
        ("MixtureSPIN", {}, 2, 0.0, 1 / 3),
        ("MixtureSPIN", {"history": 4}, 4, 0.0, 1 / 5),
        ("MixtureSPIN", {"history": 2, "reference": "previous"}, 2, 0.0, 1 / 2),
        ("AlphaSPIN", {"alpha": 0.3}, 1, 0.3, 1 / 1.7),
        ("AlphaSPIN", {"alpha": 0.3, "mixture": "token"}, 1, 0.3, 0.7 / 1.7),
    ],
)
def test_recursion_converges_above_the_threshold_alone(model, settings, history, alpha, expected):
    found = best_response_threshold(model, settings)
    assert found == pytest.approx(expected)
    kind = {
        "token": settings.get("mixture") == "token",
        "previous": settings.get("reference") == "previous",
    }
    assert shrinks(1.1 * expected, history, alpha, **kind)
    assert not shrinks(0.9 * expected, history, alpha, **kind)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("FictitiousSPIN", {}),
        ("FictitiousSPIN", {"reference": "previous"}),
        ("MixtureSPIN", {"history": None}),
        ("SPIN", {"loss": "ipo"}),
        ("AlphaSPIN", {"alpha": [0.1, 0.2]}),
        ("AlphaSPIN", {"alpha": 0.3, "history": 2}),
        ("SFT", {}),
    ],
)
def test_there_is_none_where_all_converge_or_nothing_is_known(model, settings):
    assert best_response_threshold(model, settings) is None
