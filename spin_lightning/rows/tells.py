"""What tells real responses from generated ones: tokens, token pairs, and single cues."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from spin_lightning.rows.cues import CUES, Cue, Responses, Sides, measure_cue
from spin_lightning.rows.store import Ragged, RowTable

# Chance of showing any token or pair where real and generated responses have the same distribution.
_FALSE_ALARM: Final = 0.05
_SHOWN: Final = 10


@dataclass(frozen=True)
class Tell:
    """A token or a pair of tokens that one side has in more of its responses.

    Attributes:
        ids: One or two token ids.
        counts: Real and generated responses that contain it.
        log_odds: Log of the odds ratio of real over generated, 1/2 added to each count; nats.
        z: Signed square root of Pearson's chi-square, which is the score test of a log-odds of 0.
    """

    ids: tuple[int, ...]
    counts: Sides[int]
    log_odds: float
    z: float


@dataclass(frozen=True)
class Tells:
    """What tells real responses from generated ones.

    Attributes:
        responses: Number of real and of generated responses.
        cues: The single cues, in the order of `CUES`.
        tokens: Tokens with the largest z, at most ten a side, real ones first.
        pairs: Pairs of neighboring tokens, likewise.
    """

    responses: Sides[int]
    cues: tuple[Cue, ...]
    tokens: tuple[Tell, ...]
    pairs: tuple[Tell, ...]

    @property
    def best(self) -> Cue:
        """The cue with the largest accuracy."""
        return max(self.cues, key=lambda cue: cue.accuracy)

    def metrics(self) -> dict[str, float]:
        """Accuracy of each cue and of the best one, by metric name."""
        accuracies = {f"rows/tells/accuracy/{cue.name}": cue.accuracy for cue in self.cues}
        return {**accuracies, "rows/tells/best": self.best.accuracy}


def find_tells(table: RowTable, special_ids: Collection[int] = ()) -> Tells | None:
    """Find what tells the real responses of a table from the generated ones.

    The real response of an example counts once, however many rows it has.

    Args:
        table: The rows.
        special_ids: Tokens of the template and the tokenizer that no text should contain.

    Returns:
        The tells; None without generated responses.
    """
    if not len(table) or table.opponent[0] < 0:
        return None
    _, first, example = np.unique(table.example_id, return_index=True, return_inverse=True)
    special, real_ids = frozenset(special_ids), _taken(table.real_ids, first)
    # The halves differ in examples: no rule is tested on an answer that it was learned from.
    half = example % 2
    responses = Sides(
        Responses(real_ids, table.real_finished[first], half[first], special),
        Responses(table.generated_ids, table.finished, half, special),
    )
    ids = Sides(responses.real.ids, responses.generated.ids)
    return Tells(
        responses=Sides(len(ids.real), len(ids.generated)),
        cues=tuple(measure_cue(name, responses) for name in CUES),
        tokens=_tells(ids, 1),
        pairs=_tells(ids, 2),
    )


def _tells(sides: Sides[Ragged], size: int) -> tuple[Tell, ...]:
    """The n-grams with the largest z, real ones first, without those that chance explains.

    Responses that contain an n-gram count, not its occurrences: one long response says no more
    than a short one. Wald's z, the log-odds over its error, would put a token that all real
    responses have and no generated one below a token that 90 and 10 percent have, since the error
    grows with the estimate. The score test takes its error where the log-odds are 0.
    """
    vocabulary = 1 + max(int(side.values.max(initial=0)) for side in sides)
    grams, (real, generated) = _aligned(*(_presence(side, size, vocabulary) for side in sides))
    n = Sides(len(sides.real), len(sides.generated))
    pooled = (real + generated) / (n.real + n.generated)
    variance = pooled * (1 - pooled) * (1 / n.real + 1 / n.generated)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.nan_to_num((real / n.real - generated / n.generated) / np.sqrt(variance))
    threshold = NormalDist().inv_cdf(1 - _FALSE_ALARM / 2 / max(len(grams), 1))
    clear = np.flatnonzero(np.abs(z) > threshold)
    order = clear[np.argsort(-z[clear], kind="stable")]
    real_ones = [i for i in order[:_SHOWN] if z[i] > 0]
    generated_ones = [i for i in order[::-1][:_SHOWN] if z[i] < 0]
    return tuple(
        Tell(
            _ids_of(int(grams[i]), size, vocabulary),
            Sides(int(real[i]), int(generated[i])),
            log_odds(Sides(int(real[i]), int(generated[i])), n),
            float(z[i]),
        )
        for i in real_ones + generated_ones
    )


def log_odds(counts: Sides[int], responses: Sides[int]) -> float:
    """Log of the odds ratio of real over generated responses, 1/2 added to each count; nats."""
    real, generated = (
        math.log((k + 0.5) / (n - k + 0.5)) for k, n in zip(counts, responses, strict=True)
    )
    return real - generated


def _presence(side: Ragged, size: int, vocabulary: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Each n-gram, encoded as one number, and how many responses contain it."""
    rows = np.repeat(np.arange(len(side)), np.maximum(side.lengths - size + 1, 0))
    # Place of each n-gram: its place among all, and the ends of earlier rows that have none.
    skipped = np.minimum(side.lengths, size - 1)
    start = np.arange(len(rows)) + (np.cumsum(skipped) - skipped)[rows]
    keys = np.zeros(len(rows), dtype=np.int64)
    for place in range(size):
        keys = keys * vocabulary + side.values[start + place]
    # One sort for both: the n-gram first, so that the rows of each lie together.
    keys *= len(side)
    keys += rows
    grams = _distinct(keys) // max(len(side), 1)
    first = np.flatnonzero(_differs_from_last(grams))
    return grams[first], np.diff(first, append=len(grams))


def _distinct(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each key once, ascending; the argument is sorted."""
    # Sorting is several times faster than the hash table of np.unique.
    keys.sort()
    return keys[_differs_from_last(keys)]


def _differs_from_last(keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    differs = np.ones(len(keys), dtype=bool)
    np.not_equal(keys[1:], keys[:-1], out=differs[1:])
    return differs


def _aligned(
    real: tuple[NDArray[Any], NDArray[Any]], generated: tuple[NDArray[Any], NDArray[Any]]
) -> tuple[NDArray[Any], Sides[NDArray[np.int64]]]:
    """The n-grams of both sides, and their counts on either."""
    grams = _distinct(np.concatenate([real[0], generated[0]]))
    counts = []
    for keys, count in (real, generated):
        aligned = np.zeros(len(grams), dtype=np.int64)
        aligned[np.searchsorted(grams, keys)] = count
        counts.append(aligned)
    return grams, Sides(*counts)


def _ids_of(gram: int, size: int, vocabulary: int) -> tuple[int, ...]:
    ids = []
    for _ in range(size):
        gram, token = divmod(gram, vocabulary)
        ids.append(token)
    return tuple(reversed(ids))


def _taken(ids: Ragged, rows: NDArray[np.integer]) -> Ragged:
    """Some rows of a column."""
    lengths = ids.lengths[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    places = np.arange(offsets[-1]) + np.repeat(ids.offsets[rows] - offsets[:-1], lengths)
    return Ragged(ids.values[places], offsets)
