"""Metrics from rows: held-out rows measure the iterate, training rows its opponent."""

from __future__ import annotations

import numpy as np
import torch

from spin_lightning.metrics import distinct, duplicate_rate, sampled_kl
from spin_lightning.rows.store import RowTable
from spin_lightning.rows.tells import Tells


def measure_iterate(table: RowTable, t: int, *, is_exact: bool = True) -> dict[str, float]:
    """Metrics of iterate t from held-out rows that it answered.

    Args:
        table: The held-out rows, scored under iterates t, t - 1 and 0.
        t: Index of the iterate.
        is_exact: Whether y' ~ p_t. Otherwise there is no KL: the mean log-ratio of responses from
            another distribution is none.

    Returns:
        Negative log-likelihood of the real responses in nats per token, lengths in tokens, the
        share of responses that ended with a stop id, and KL(p_t || p_0) and KL(p_t || p_{t-1}) in
        nats per response with standard errors, and per token.
    """
    real_lengths = torch.from_numpy(table.real_ids.lengths).double()
    lengths = torch.from_numpy(table.generated_ids.lengths).double()
    metrics = {
        "val/real_nll_per_token": float(-table.real_logps[t].sum() / real_lengths.sum()),
        "val/generated_tokens": float(lengths.mean()),
        "val/real_tokens": float(real_lengths.mean()),
        "val/finished": float(table.finished.mean()),
        "val/real_finished": float(table.real_finished.mean()),
    }
    if not is_exact:
        return metrics
    for name, other in (("base", 0), ("previous", max(t - 1, 0))):
        estimate = sampled_kl(table.generated_logps, t, other, lengths)
        metrics |= {f"val/kl_{name}{part}": value for part, value in estimate.items()}
    return metrics


def measure_rows(
    table: RowTable,
    regenerated: float,
    tells: Tells | None = None,
    sampler_gap: float | None = None,
) -> dict[str, float]:
    """Metrics of the rows that train the next iterate.

    Args:
        table: The rows, written by the opponent.
        regenerated: Share of rows that were generated at this iterate, not kept from earlier ones.
        tells: What tells their real from their generated responses.
        sampler_gap: Log-probs of a server that sampled them less ours, nats per token.

    Returns:
        Share of rows by opponent, log-prob of the real responses under each member in nats per
        response, diversity of the generated responses, mean lengths, and accuracies of the tells.
    """
    generated, rows = table.generated_ids, len(table)
    metrics = {
        f"rows/real_logps/p{i}": float(logps.mean()) for i, logps in table.real_logps.items()
    } | {
        "rows/prompt_tokens": float(table.prompt_ids.lengths.mean()),
        "rows/real_tokens": float(table.real_ids.lengths.mean()),
        "rows/generated_tokens": float(generated.lengths.mean()),
    }
    opponents, counts = np.unique(table.opponent, return_counts=True)
    if opponents[0] < 0:
        return metrics
    shares = zip(opponents.tolist(), counts.tolist(), strict=True)
    return metrics | {
        **{f"rows/opponent/p{i}": count / rows for i, count in shares},
        "rows/regenerated": regenerated,
        "rows/distinct_1": distinct(generated.values, generated.offsets, 1),
        "rows/distinct_2": distinct(generated.values, generated.offsets, 2),
        "rows/duplicates": duplicate_rate(generated[i] for i in range(rows)),
        **({} if tells is None else tells.metrics()),
        **({} if sampler_gap is None else {"rows/sampler_gap": sampler_gap}),
    }
