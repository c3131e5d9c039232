"""Pearson's chi-square test for samples of responses."""

from scipy import stats
from torch import Tensor


def chi_square(
    counts: Tensor, outside: Tensor, log_probs: Tensor, min_expected: float = 10.0
) -> float:
    """Test samples against exact probabilities, all prompts together.

    Args:
        counts: How often each response was drawn, [prompts, responses].
        outside: How often something other than these responses was drawn, [prompts].
        log_probs: log p(y|x), nats, [prompts, responses]; the mass missing to 1 lies outside.
        min_expected: Cells are pooled, the rarest first, until each expects as many draws.

    Returns:
        The p-value: uniform on [0, 1] if the samples come from the distribution.
    """
    statistic, freedom = 0.0, 0
    for observed, other, log_p in zip(counts.double(), outside.double(), log_probs, strict=True):
        n = observed.sum() + other
        missing = (1 - log_p.double().exp().sum()).clamp_min(0.0)
        cells = _pooled(observed, n * log_p.double().exp(), min_expected)
        if other > 0 and missing < 1e-6:
            return 0.0
        if n * missing >= min_expected:
            cells.append((float(other), float(n * missing)))
        else:  # too rare for its own cell: pooled with the rarest responses
            cells[0] = (cells[0][0] + float(other), cells[0][1] + float(n * missing))
        statistic += sum((seen - expected) ** 2 / expected for seen, expected in cells)
        freedom += len(cells) - 1
    return float(stats.chi2.sf(statistic, freedom))


def _pooled(observed: Tensor, expected: Tensor, least: float) -> list[tuple[float, float]]:
    """Cells (seen, expected), rarest first; the remainder joins the last one."""
    cells: list[tuple[float, float]] = []
    seen = total = 0.0
    for i in expected.argsort().tolist():
        seen, total = seen + float(observed[i]), total + float(expected[i])
        if total >= least:
            cells.append((seen, total))
            seen = total = 0.0
    if not cells:
        return [(seen, total)]
    cells[-1] = (cells[-1][0] + seen, cells[-1][1] + total)
    return cells
