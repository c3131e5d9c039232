"""What an iterate's held-out rows say about it."""

from __future__ import annotations

import torch

from spin_lightning.data.rows import RowTable
from spin_lightning.metrics import sampled_kl


def measure_iterate(table: RowTable, t: int) -> dict[str, float]:
    """Metrics of iterate t from held-out rows that it answered.

    Args:
        table: The held-out rows, y' ~ p_t, scored under iterates t, t - 1 and 0.
        t: Index of the iterate.

    Returns:
        Negative log-likelihood of the real responses in nats per token, lengths in tokens, the
        share of responses that ended by themselves, and KL(p_t || p_0) and KL(p_t || p_{t-1}) in
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
    for name, other in (("base", 0), ("previous", max(t - 1, 0))):
        estimate = sampled_kl(table.generated_logps, t, other, lengths)
        metrics |= {f"val/kl_{name}{part}": value for part, value in estimate.items()}
    return metrics
