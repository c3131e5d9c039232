"""Log-probs and losses that are no numbers: whose rows they are, kept for inspection."""

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

# Rows that a message names; the file has them all.
_MOST_NAMED = 8
_CAUSES = (
    "look at these rows, and at the model where it is most of them (a lower learning_rate, "
    "gradient clipping or compute_dtype: float32 help)"
)


class NotFiniteError(SpinError):
    """A loss, a log-prob or a weight is nan or infinite."""


@dataclass(frozen=True)
class Suspect:
    """A row with a log-prob that is no number.

    Attributes:
        example_id: The example it was made from.
        sample: Which of its samples.
        ids: Token ids of the prompt, the real and the generated response.
        logps: Log-probs in nats, by name.
    """

    example_id: int
    sample: int
    ids: Mapping[str, Sequence[int]]
    logps: Mapping[str, float]

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"example {self.example_id} sample {self.sample}"


def suspects_of_batch(batch: PairBatch, logps: PairLogps) -> list[Suspect]:
    """The pairs of a batch that have a log-prob which is no number; all pairs where none has.

    Args:
        batch: n pairs.
        logps: Their log-probs.
    """
    sides = _sides(logps)
    table = torch.stack(list(sides.values()), dim=-1).cpu()
    at_fault = ~table.isfinite().all(dim=-1)
    if not at_fault.any():
        at_fault = torch.ones_like(at_fault)
    names = batch.row_ids or [(-1, -1)] * len(batch)
    return [
        Suspect(*names[i], ids, dict(zip(sides, table[i].tolist(), strict=True)))
        for i, ids in enumerate(_ids(batch.pairs))
        if at_fault[i]
    ]


def all_finite(logps: PairLogps, loss: Tensor) -> bool:
    """Whether a loss and all log-probs behind it are numbers."""
    # One sum, so that a GPU is waited for once: it is finite only where every term is.
    total = loss.detach().double() + torch.stack(list(_sides(logps).values())).sum()
    return bool(total.isfinite())


def check_rows(rows: Sequence[Row], path: Path, what: str) -> None:
    """Refuse rows with log-probs that are no numbers, before anything of them is written.

    Args:
        rows: The rows of a work unit.
        path: Where they go for inspection if they are refused.
        what: What was being done.

    Raises:
        NotFiniteError: Some of the log-probs are nan or infinite.
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
        raise NotFiniteError(
            f"{what}: the log-probs of {names_of(suspects)} are nan or infinite; no row of this "
            f"work unit was kept, and these are written to {path}",
            fix=f"{_CAUSES}, and start the same command again: all other rows are whole",
        )


def write_suspects(
    path: Path,
    suspects: Sequence[Suspect],
    decode: Callable[[Sequence[int]], str] | None = None,
    **about: Any,
) -> None:
    """Write rows down for inspection.

    Args:
        path: The file, JSON.
        suspects: The rows.
        decode: Turns ids into text, where a tokenizer is at hand.
        about: What else to say of them.
    """
    rows = [
        {
            "example_id": suspect.example_id,
            "sample": suspect.sample,
            "logps": {name: _plain(value) for name, value in suspect.logps.items()},
            **{f"{name}_ids": list(ids) for name, ids in suspect.ids.items()},
            **({} if decode is None else {n: decode(ids) for n, ids in suspect.ids.items()}),
        }
        for suspect in suspects
    ]
    write_json(path, {**{name: _plain(value) for name, value in about.items()}, "rows": rows})


def names_of(suspects: Sequence[Suspect]) -> str:
    """The rows of a message: example 5 sample 0, example 9 sample 0 and 3 more."""
    return listed([suspect.name for suspect in suspects])


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def stop_at(problem: str) -> NotFiniteError:
    """The error that ends a run whose numbers are none."""
    return NotFiniteError(
        problem,
        fix=f"{_CAUSES}; to go on without such batches, set model.max_skipped_batches to how many "
        "may be left out, and start the same command again",
    )


def _sides(logps: PairLogps) -> dict[str, Tensor]:
    """The log-probs that a loss is made of, by name, float64, without gradient."""
    sides = {"policy_real": logps.policy_real}
    if logps.policy_generated is not None and logps.reference_generated is not None:
        sides |= {
            "policy_generated": logps.policy_generated,
            "reference_real": logps.reference_real,
            "reference_generated": logps.reference_generated,
        }
    return {name: side.detach().double() for name, side in sides.items()}


def _ids(batch: PromptBatch) -> Iterator[dict[str, list[int]]]:
    """Ids of the prompt, the real and the generated response of each pair."""
    ids, position = batch.input_ids.tolist(), 0
    for prompt, responses in zip(batch.prompt_lengths, batch.response_lengths, strict=True):
        parts = {}
        names = ("prompt", "real", "generated")
        for name, length in zip(names, (prompt, *responses), strict=False):
            parts[name] = ids[position : position + length]
            position += length
        yield parts


def _by_member(name: str, members: Sequence[int], logps: Sequence[float]) -> dict[str, float]:
    return {name.format(i): logp for i, logp in zip(members, logps, strict=True)}


def _plain(value: Any) -> Any:
    """JSON has no nan and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
