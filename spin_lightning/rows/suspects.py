"""Rows with non-finite log-probs or losses, written to a file for inspection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spin_lightning.errors import SpinError
from spin_lightning.run.files import write_json
from spin_lightning.types import PairBatch, PairLogps, PromptBatch, Row

# Rows named in a message; the file lists them all.
_MOST_NAMED = 8
_ADVICE = (
    "inspect these rows, or the model if most rows are affected (a lower learning_rate, gradient "
    "clipping or compute_dtype: float32 help)"
)


class NonFiniteError(SpinError):
    """A loss, a log-prob or a weight is NaN or infinite."""


@dataclass(frozen=True)
class Suspect:
    """A row that is written for inspection, most often for a non-finite log-prob.

    Attributes:
        example_id: The example that it was made from.
        sample: Index of the sample among those of the example.
        ids: Token ids of the prompt, the real and the generated response.
        logps: Log-probs in nats, by name.
    """

    example_id: int
    sample: int
    ids: Mapping[str, Sequence[int]]
    logps: Mapping[str, float]

    @property
    def name(self) -> str:
        """The row's name in messages."""
        return f"example {self.example_id} sample {self.sample}"


def suspects_of_batch(batch: PairBatch, logps: PairLogps) -> list[Suspect]:
    """The pairs of a batch with a non-finite log-prob; all pairs if there is none.

    Args:
        batch: n pairs.
        logps: Their log-probs.
    """
    sides = _sides(logps)
    table = torch.stack(list(sides.values()), dim=-1).cpu()
    suspect = ~table.isfinite().all(dim=-1)
    if not suspect.any():
        suspect = torch.ones_like(suspect)
    names = batch.row_ids or [(-1, -1)] * len(batch)
    return [
        Suspect(*names[i], ids, dict(zip(sides, table[i].tolist(), strict=True)))
        for i, ids in enumerate(_ids(batch.pairs))
        if suspect[i]
    ]


def all_finite(logps: PairLogps, loss: Tensor) -> bool:
    """Whether a loss and all log-probs that it depends on are finite."""
    # The sum is finite only if every term is; one sum means one synchronization with the GPU.
    total = loss.detach().double() + torch.stack(list(_sides(logps).values())).sum()
    return bool(total.isfinite())


def check_rows(rows: Sequence[Row], path: Path, what: str) -> None:
    """Check that all log-probs of rows are finite, before the rows are written.

    Args:
        rows: The rows of a work unit.
        path: Where to write the suspect rows for inspection.
        what: What was being done, for the message.

    Raises:
        NonFiniteError: Some log-probs are NaN or infinite.
    """
    suspects = []
    for row in rows:
        logps = {
            **_by_member("log p{} of the real response", row.members, row.member_real_logps),
            **_by_member("log p{} of the generated", row.members, row.member_generated_logps),
            **_by_member("log g{} of the real response", row.token_members, row.token_real_logps),
            **_by_member("log g{} of the generated", row.token_members, row.token_generated_logps),
        }
        if not all(math.isfinite(logp) for logp in logps.values()):
            ids = {n: getattr(row, f"{n}_ids") for n in ("prompt", "real", "generated")}
            suspects.append(Suspect(row.example_id, row.sample, ids, logps))
    if suspects:
        write_suspects(path, suspects, what=what)
        raise NonFiniteError(
            f"{what}: the log-probs of {_names_of(suspects)} are NaN or infinite; no row of this "
            f"work unit was kept, and the affected rows are written to {path}",
            fix=f"{_ADVICE}, then run the same command again: all other work units are complete",
        )


def write_suspects(
    path: Path,
    suspects: Sequence[Suspect],
    decode: Callable[[Sequence[int]], str] | None = None,
    **about: Any,
) -> None:
    """Write rows to a JSON file for inspection.

    Args:
        path: The file.
        suspects: The rows.
        decode: Converts ids to text; without it the file holds ids only.
        about: Further fields of the file.
    """
    rows = [
        {
            "example_id": suspect.example_id,
            "sample": suspect.sample,
            "logps": {name: _to_json(value) for name, value in suspect.logps.items()},
            **{f"{name}_ids": list(ids) for name, ids in suspect.ids.items()},
            **({} if decode is None else {n: decode(ids) for n, ids in suspect.ids.items()}),
        }
        for suspect in suspects
    ]
    write_json(path, {**{name: _to_json(value) for name, value in about.items()}, "rows": rows})


def listed(names: Sequence[str]) -> str:
    """The first few names and the number of the others, such as `a, b and 3 more`."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def too_many_skipped(problem: str) -> NonFiniteError:
    """The error for a non-finite batch beyond `max_skipped_batches`."""
    return NonFiniteError(
        problem,
        fix=f"{_ADVICE}; to skip such batches, set model.max_skipped_batches to the largest number "
        "that may be skipped, and run the same command again",
    )


def _sides(logps: PairLogps) -> dict[str, Tensor]:
    """The log-probs that a loss depends on, by name, float64, without gradient."""
    sides = {"policy_real": logps.policy_real}
    if logps.policy_generated is not None and logps.reference_generated is not None:
        sides |= {
            "policy_generated": logps.policy_generated,
            "reference_real": logps.reference_real,
            "reference_generated": logps.reference_generated,
        }
    if logps.policy_first is not None:
        sides["policy_first"] = logps.policy_first
    return {name: side.detach().double() for name, side in sides.items()}


def _ids(batch: PromptBatch) -> Iterator[dict[str, list[int]]]:
    """Ids of the prompt and of each response of each pair."""
    ids, position = batch.input_ids.tolist(), 0
    for prompt, responses in zip(batch.prompt_lengths, batch.response_lengths, strict=True):
        parts = {}
        names = ("prompt", "real", "generated", "first")
        for name, length in zip(names, (prompt, *responses), strict=False):
            parts[name] = ids[position : position + length]
            position += length
        yield parts


def _names_of(suspects: Sequence[Suspect]) -> str:
    return listed([suspect.name for suspect in suspects])


def _by_member(name: str, members: Sequence[int], logps: Sequence[float]) -> dict[str, float]:
    return {name.format(i): logp for i, logp in zip(members, logps, strict=True)}


def _to_json(value: Any) -> Any:
    """The value, with NaN and infinities as strings since JSON has neither."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
