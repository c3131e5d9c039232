"""Example ids: which row of the source an example comes from, and which of its answers it is."""

from __future__ import annotations

_ROWS = 2**32


def example_id(row: int, answers_after: int = 0) -> int:
    """Number an example.

    The last answer of a row has the row's own number, whether or not the answers before it are
    examples, too. So both settings of `turns` give it the same id, and with it the same draws.

    Args:
        row: Row of the source, from 0.
        answers_after: Answers of the same row that are examples and come later.
    """
    return row + _ROWS * answers_after


def place(example_id: int) -> str:
    """Name an example to the user.

    >>> place(5), place(example_id(5, answers_after=1))
    ('5', '5, answer 2 from the end')
    """
    answers_after, row = divmod(example_id, _ROWS)
    return f"{row}, answer {answers_after + 1} from the end" if answers_after else str(row)
