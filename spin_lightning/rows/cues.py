"""Single cues: how well one property of a response tells real from generated responses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from spin_lightning.rows.store import Ragged

# A cue has to be this many standard errors of a coin above 0.5. For five cues that is a chance of
# less than one in a hundred of naming one where there is none.
_CLEAR: Final = 3.0
# The first or last token of an empty response, or the special token of one without any.
_NOTHING: Final = -1

T = TypeVar("T")


class Sides(NamedTuple, Generic[T]):
    """The same thing of real and of generated responses."""

    real: T
    generated: T


@dataclass(frozen=True)
class Cue:
    """How well one property of a response tells which side it is from.

    Attributes:
        name: One of `CUES`.
        accuracy: Balanced accuracy of the best rule, learned on one half of the examples and tested
            on the other, both ways; 0.5 is a coin.
        clear: Whether the accuracy is above what chance explains.
        value: The token id, or the length, that says most over all rows; for `finished` 1.
        real: Whether real responses have that token, reach that length or end more often.
    """

    name: str
    accuracy: float
    clear: bool
    value: int
    real: bool


@dataclass(frozen=True)
class Responses:
    """Responses of one side.

    Attributes:
        ids: Their tokens.
        finished: Which of them ended with a stop token.
        half: The half of the examples, 0 or 1, that each is in.
        special_ids: Tokens of template and tokenizer that no text should contain.
    """

    ids: Ragged
    finished: NDArray[np.bool_]
    half: NDArray[np.integer]
    special_ids: frozenset[int]


def measure_cue(name: str, responses: Sides[Responses]) -> Cue:
    """Measure a cue of `CUES`: learn its rule on one half and test it on the other, both ways."""
    read, lean = _RULES[name]
    found = [read(side) for side in responses]
    values, codes = np.unique(np.concatenate(found), return_inverse=True)
    features = Sides(*np.split(codes, [len(found[0])]))
    right = Sides(*(np.zeros(len(side)) for side in features))
    for half in (0, 1):
        tested = Sides(*(side.half == half for side in responses))
        others = [f[~t] for f, t in zip(features, tested, strict=True)]
        leans = lean(_difference(Sides(*others), len(values)))
        right.real[tested.real] = (1 + leans[features.real[tested.real]]) / 2
        right.generated[tested.generated] = (1 - leans[features.generated[tested.generated]]) / 2
    accuracy = float((right.real.mean() + right.generated.mean()) / 2)
    coin = math.sqrt(sum(0.25 / len(side) for side in features)) / 2
    value, real = _named(name, values, _difference(features, len(values)))
    return Cue(name, accuracy, accuracy - 0.5 > _CLEAR * coin, value, real)


def _ends(side: Responses) -> NDArray[Any]:
    return side.finished.astype(np.int64)


def _first_special_tokens(side: Responses) -> NDArray[Any]:
    """The first special token of each response, apart from the token that ends it."""
    offsets, found = side.ids.offsets, np.full(len(side.ids), _NOTHING, dtype=np.int64)
    places = np.flatnonzero(np.isin(side.ids.values, list(side.special_ids)))
    rows = np.searchsorted(offsets, places, side="right") - 1
    inside = ~(side.finished[rows] & (places == offsets[rows + 1] - 1))
    rows, first = np.unique(rows[inside], return_index=True)
    found[rows] = side.ids.values[places[inside][first]]
    return found


def _first_tokens(side: Responses) -> NDArray[Any]:
    return _tokens_at(side.ids, side.ids.offsets[:-1])


def _last_tokens(side: Responses) -> NDArray[Any]:
    return _tokens_at(side.ids, side.ids.offsets[1:] - 1)


def _lengths(side: Responses) -> NDArray[Any]:
    return side.ids.lengths


def _tokens_at(ids: Ragged, places: NDArray[np.int64]) -> NDArray[np.int64]:
    tokens = np.full(len(ids), _NOTHING, dtype=np.int64)
    filled = ids.lengths > 0
    tokens[filled] = ids.values[places[filled]]
    return tokens


def _difference(features: Sides[NDArray[np.int64]], size: int) -> NDArray[np.float64]:
    """By value, its share in real responses minus that in generated ones; 0 without a side."""
    if not all(map(len, features)):
        return np.zeros(size)
    real, generated = (np.bincount(side, minlength=size) / len(side) for side in features)
    return np.asarray(real - generated)


def _majority(difference: NDArray[np.float64]) -> NDArray[np.float64]:
    """By value, 1 for real, -1 for generated: each leans to the side that has it more often."""
    return np.sign(difference)


def _threshold(difference: NDArray[np.float64]) -> NDArray[np.float64]:
    """By ascending value: those from the best threshold on lean to one side, the rest the other."""
    start = _threshold_start(difference)
    sign = np.sign(difference[:start].sum())
    return np.where(np.arange(len(difference)) < start, sign, -sign)


def _threshold_start(difference: NDArray[np.float64]) -> int:
    """Place of the first value at or above the best threshold."""
    return int(np.abs(np.cumsum(difference)).argmax()) + 1


def _named(name: str, values: NDArray[Any], difference: NDArray[np.float64]) -> tuple[int, bool]:
    """The value that says most, and whether it stands for real responses."""
    if name == "length":
        start = min(_threshold_start(difference), len(values) - 1)
        return int(values[start]), bool(difference[start:].sum() > 0)
    known = values != (0 if name == "finished" else _NOTHING)
    # Of values that say the same, the one of real responses: it is what the policy learns.
    best = int(np.lexsort((difference, np.where(known, np.abs(difference), -1)))[-1])
    return int(values[best]), bool(difference[best] > 0)


_RULES: Final[dict[str, tuple[Callable[..., NDArray[Any]], Callable[..., NDArray[np.float64]]]]] = {
    "finished": (_ends, _majority),
    "special_token": (_first_special_tokens, _majority),
    "first_token": (_first_tokens, _majority),
    "last_token": (_last_tokens, _majority),
    "length": (_lengths, _threshold),
}
# In the order in which equally good cues are preferred: the more specific one first.
CUES: Final = tuple(_RULES)
