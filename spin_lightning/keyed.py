"""Random numbers that depend on a key alone, not on what was drawn before them.

A row's numbers come from (seed, iterate of the draw, example, sample), so the same row is drawn in
any process, in any order and after any crash.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
from numpy.typing import NDArray

# Streams of one key: they never share a number.
_POSITIONS, _OPPONENT, _ORDER, _SUBSET, _KEEP = range(5)


def global_seed() -> int:
    """The seed that Lightning's `seed_everything` announced; 0 when nobody called it."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def row_key(seed: int, iterate: int, example_id: int, sample: int) -> int:
    """The key of a row, a signed 64-bit integer as parquet stores it."""
    text = f"{seed}/{iterate}/{example_id}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


def position_uniforms(key: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for response positions 0 … count - 1, shape [count]."""
    return _stream(key, _POSITIONS).random(count)


def opponent_uniform(key: int) -> float:
    """The uniform number in [0, 1) that picks a row's opponent; independent of its positions."""
    return float(_stream(key, _OPPONENT).random())


def keep_uniform(key: int) -> float:
    """The uniform number in [0, 1) that decides whether an earlier row stays in its place."""
    return float(_stream(key, _KEEP).random())


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order in which an epoch visits `count` rows, shape [count]."""
    return _stream(row_key(seed, epoch, 0, 0), _ORDER).permutation(count)


def subset(seed: int, draw: int, population: int, count: int) -> NDArray[np.int64]:
    """`count` of `population` indices without repeats, ascending, shape [count]."""
    chosen = _stream(row_key(seed, draw, 0, 0), _SUBSET).permutation(population)[:count]
    return np.sort(chosen)


def _stream(key: int, stream: int) -> np.random.Generator:
    words = np.array([key & 0xFFFF_FFFF_FFFF_FFFF, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words))
