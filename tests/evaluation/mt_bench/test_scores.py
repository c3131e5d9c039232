"""Scores of matches by hand; ratings are in test_benchmark.py and in doctests."""

import pytest

from spin_lightning.evaluation.mt_bench.scores import match_scores


def test_matches_count_wins_losses_ties_and_positions():
    """Wins 1, losses 1, ties 2 of which one changed with the position; one pair has no choice."""
    pairs = [("A", "B"), ("B", "A"), ("tie", "tie"), ("A", "A"), ("A", None)]
    scores = match_scores([side for pair in pairs for side in pair])
    assert scores == {
        "win_rate": pytest.approx((1 + 2 / 2) / 4),
        "wins": 1,
        "losses": 1,
        "ties": 2,
        "inconsistent": 1,
        "unparsable": 1,
    }
