"""What an export has to reproduce: ids and log-probs of eight rows, as the run itself has them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from transformers import PreTrainedTokenizerBase

from spin_lightning.data.numbering import place
from spin_lightning.data.samples import SampleConversation, read_samples
from spin_lightning.policies.exported import plain_logps
from spin_lightning.policies.loading import load_with_adapter
from spin_lightning.policies.merging import probe_ids
from spin_lightning.policies.pretrained import ComputeDtype, FrozenBase
from spin_lightning.policies.saved import SavedIterate
from spin_lightning.rows.manifest import read_manifest
from spin_lightning.rows.store import RowTable, read_rows
from spin_lightning.run.files import read_json
from spin_lightning.run.folder import RunFolder

MOST_ROWS = 8
_HELD_OUT, _TRAINED = "held-out", "training"


@dataclass(frozen=True)
class ExpectedRow:
    """A row whose log-prob the exported model has to give.

    Attributes:
        name: What it is called in messages.
        prompt_ids: Ids of its prompt.
        response_ids: Ids of its response.
        logp: log p_t(response | prompt) in the run, nats.
    """

    name: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logp: float

    @property
    def pair(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Both sequences."""
        return self.prompt_ids, self.response_ids


@dataclass(frozen=True)
class Expected:
    """What a run says about one of its iterates.

    Attributes:
        rows: Up to eight rows, held-out ones where the run has any.
        source: Where their log-probs come from, in words.
        samples: Conversations with the ids of their prompts; empty for runs of older versions.
        tokenizer: The run's tokenizer.
        date: The date that the chat template writes as today's; None for today.
        stop_ids: What ends a response; None if the run did not record them.
        base: The base, with the type in which the run computed.
    """

    rows: Sequence[ExpectedRow]
    source: str
    samples: Sequence[SampleConversation]
    tokenizer: PreTrainedTokenizerBase
    date: dt.date | None
    stop_ids: Sequence[int] | None
    base: FrozenBase


def expected_of(run: RunFolder, saved: SavedIterate) -> Expected:
    """Collect what the run knows, and compute what it has not stored.

    Raises:
        RunFolderError: A file of the run is damaged.
    """
    fix = "delete it: exports are then checked without conversations"
    kept = run.conversations.exists()
    samples = read_json(run.conversations, fix, read_samples) if kept else []
    base = replace(saved.base, compute_dtype=_computed_in(run, saved))
    rows, source = _rows(run, saved, {sample.example_id for sample in samples}, base)
    return Expected(rows, source, samples, saved.tokenizer, run.first_date(), saved.stop_ids, base)


def _rows(
    run: RunFolder, saved: SavedIterate, preferred: set[int], base: FrozenBase
) -> tuple[list[ExpectedRow], str]:
    t = saved.index
    for folder, kind in _folders(run, t):
        table = read_rows(folder)
        if not len(table):
            continue
        chosen = _spread(table, preferred)
        logps = table.real_logps.get(t)
        rows = [
            ExpectedRow(
                f"{kind} row {place(int(table.example_id[i]))}",
                tuple(table.prompt_ids[i].tolist()),
                tuple(table.real_ids[i].tolist()),
                0.0 if logps is None else float(logps[i]),
            )
            for i in chosen
        ]
        if logps is not None:
            return rows, f"{kind} rows, log-probs as the run stored them"
        return _computed(rows, saved, base), f"{kind} rows, log-probs computed by spin-lightning"
    ids = probe_ids(saved.base, saved.adapter).flatten().unflatten(0, (MOST_ROWS, -1)).tolist()
    middle = len(ids[0]) // 2
    made = [
        ExpectedRow(f"row {i} of made-up ids", tuple(row[:middle]), tuple(row[middle:]), 0.0)
        for i, row in enumerate(ids)
    ]
    return _computed(made, saved, base), "made-up ids, since the run has no rows"


def _folders(run: RunFolder, t: int) -> Iterator[tuple[Path, str]]:
    """Folders of finished rows, the iterate's own first."""
    others = [other for other in reversed(run.known_iterates()) if other != t]
    for other in (t, *others):
        for folder, kind in ((run.val_rows(other), _HELD_OUT), (run.rows(other), _TRAINED)):
            if read_manifest(folder) is not None:
                yield folder, kind


def _spread(table: RowTable, preferred: set[int]) -> list[int]:
    """Rows with different examples: preferred ones first, then others spread over the table."""
    first: dict[int, int] = {}
    for i, example in enumerate(table.example_id.tolist()):
        first.setdefault(example, i)
    own = [i for example, i in first.items() if example in preferred][:MOST_ROWS]
    rest = [i for i in first.values() if i not in own]
    missing = min(MOST_ROWS - len(own), len(rest))
    return sorted([*own, *(rest[k * len(rest) // missing] for k in range(missing))])


def _computed(
    rows: Sequence[ExpectedRow], saved: SavedIterate, base: FrozenBase
) -> list[ExpectedRow]:
    model = load_with_adapter(base, saved.adapter)
    logps = plain_logps(model, [row.pair for row in rows])
    return [replace(row, logp=logp) for row, logp in zip(rows, logps, strict=True)]


def _computed_in(run: RunFolder, saved: SavedIterate) -> ComputeDtype:
    """The type in which the run computed: `auto` depends on the machine."""
    known: Any = run.record(saved.index).fingerprint_fields.get("compute_dtype")
    is_type = known in get_args(ComputeDtype)
    return cast(ComputeDtype, known) if is_type else saved.base.compute_dtype
