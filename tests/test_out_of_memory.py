"""Parts that memory does not suffice for are computed in halves."""

import gc
import logging
import weakref

import pytest
import torch

from spin_lightning.errors import SpinError
from spin_lightning.out_of_memory import TokenLimit, in_parts

ERROR = RuntimeError("CUDA error: out of memory\nmore lines")


class Machine:
    """Doubles lists of at most `room` numbers, and remembers what it was asked for."""

    def __init__(self, room: int, error: BaseException = ERROR) -> None:
        self.room, self.error = room, error
        self.asked: list[list[int]] = []

    def double(self, part: list[int]) -> list[int]:
        self.asked.append(part)
        if len(part) > self.room:
            raise self.error
        return [2 * number for number in part]


def halves(part: list[int]) -> list[list[int]]:
    middle = len(part) // 2
    return [part[:middle], part[middle:]] if middle else []


def run(machine: Machine, parts: list[list[int]], limit: TokenLimit) -> list[list[int]]:
    return list(in_parts(parts, machine.double, len, halves, limit, fix="buy more"))


def test_parts_that_fit_are_computed_as_they_are(caplog):
    machine, limit = Machine(room=4), TokenLimit("training")
    assert run(machine, [[1, 2], [3, 4, 5, 6]], limit) == [[2, 4], [6, 8, 10, 12]]
    assert machine.asked == [[1, 2], [3, 4, 5, 6]]
    assert limit.deviations == {}
    assert not caplog.text


def test_a_part_that_does_not_fit_is_halved_until_it_does_and_later_ones_at_once(caplog):
    """9 numbers, room for 2: 9 and its half of 4 fail, so that the limit is 4, then 2."""
    machine, limit = Machine(room=2), TokenLimit("training")
    with caplog.at_level(logging.INFO):
        found = run(machine, [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10, 11, 12]], limit)
    assert found == [[2, 4], [6, 8], [10, 12], [14], [16, 18], [20], [22, 24]]
    assert [len(part) for part in machine.asked] == [9, 4, 2, 2, 2, 1, 2, 1, 2]
    assert limit.deviations == {"training_tokens": 2}
    first, second = (record.getMessage() for record in caplog.records)
    assert "a training pass of 9 tokens" in first
    assert "at most 4" in first
    assert "a training pass of 4 tokens" in second
    assert "at most 2" in second


@pytest.mark.parametrize(
    "error", [ERROR, MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")]
)
def test_a_part_that_cannot_be_split_is_one_error_with_the_fix(error):
    with pytest.raises(SpinError, match=r"scoring pass of 1 tokens.*Fix: buy more") as raised:
        run(Machine(room=0, error=error), [[7, 8]], TokenLimit("scoring"))
    assert "more lines" not in str(raised.value)


def test_other_errors_are_not_mistaken_for_a_lack_of_memory():
    machine, limit = Machine(room=1, error=RuntimeError("shapes differ")), TokenLimit("training")
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(machine, [[1, 2]], limit)
    assert machine.asked == [[1, 2]]
    assert limit.deviations == {}


def test_what_a_failed_part_held_is_freed_before_the_next_one():
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def compute(part: list[int]) -> int:
        alive.append(sum(reference() is not None for reference in held))
        tensor = torch.zeros(len(part))
        ring = [tensor]
        ring.append(ring)  # type: ignore[arg-type]  # freed by the collector alone
        held.append(weakref.ref(tensor))
        if len(part) > 1:
            raise MemoryError
        return len(part)

    gc.disable()
    try:
        assert sum(in_parts([[1, 2, 3]], compute, len, halves, TokenLimit("x"), fix="y")) == 3
    finally:
        gc.enable()
    # The second call, after the failed one, finds nothing; later ones find rings of successes.
    assert alive[:2] == [0, 0]
