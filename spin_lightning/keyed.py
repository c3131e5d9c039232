"""Random numbers that depend on a key alone, not on earlier draws.

The key of a row comes from (seed, iterate of the draw, example, sample), so any process draws the
same row, in any order and after any crash.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
from numpy.typing import NDArray

# Streams of one key, independent of each other.
_POSITIONS, _OPPONENT, _ORDER, _SUBSET, _KEEP = range(5)


def global_seed() -> int:
    """The seed set by Lightning's `seed_everything`; default 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def row_key(seed: int, iterate: int, example_id: int, sample: int, source: str = "") -> int:
    """The key of a row, a signed 64-bit integer as stored in parquet.

    Args:
        seed: Seed of the run.
        iterate: The iterate at which the row is drawn.
        example_id: Position of its example in the source.
        sample: Number of the sample among those of the example.
        source: Name of the source, unless it is the training data.
    """
    name = f"{seed}/{iterate}/{example_id}/{sample}"
    text = (f"{name}/{source}" if source else name).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


def position_uniforms(key: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for response positions 0 … count - 1, shape [count]."""
    return _stream(key, _POSITIONS).random(count)


def opponent_uniform(key: int) -> float:
    """The uniform number in [0, 1) that picks a row's opponent; independent of its positions."""
    return float(_stream(key, _OPPONENT).random())


def keep_uniform(key: int) -> float:
    """The uniform number in [0, 1) that decides whether an earlier row is kept."""
    return float(_stream(key, _KEEP).random())


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of `count` rows in an epoch, shape [count]."""
    return _stream(row_key(seed, epoch, 0, 0), _ORDER).permutation(count)


def subset(seed: int, draw: int, population: int, count: int) -> NDArray[np.int64]:
    """`count` out of `population` indices without replacement, ascending, shape [count]."""
    chosen = _stream(row_key(seed, draw, 0, 0), _SUBSET).permutation(population)[:count]
    return np.sort(chosen)


def _stream(key: int, stream: int) -> np.random.Generator:
    words = np.array([key & 0xFFFF_FFFF_FFFF_FFFF, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words))
