"""The hash that identifies the examples of a run."""

from dataclasses import replace

import pytest

from spin_lightning.data.examples import content_hash
from spin_lightning.types import Example

EXAMPLE = Example(0, (1, 4, 5), (6, 2), real_finished=True)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param([replace(EXAMPLE, prompt_ids=(1, 4, 6))], id="prompt"),
        pytest.param([replace(EXAMPLE, real_ids=(7, 2))], id="response"),
        pytest.param([replace(EXAMPLE, example_id=1)], id="example"),
        pytest.param([Example(0, (1, 4), (5, 6, 2), real_finished=True)], id="boundary"),
        pytest.param([EXAMPLE, EXAMPLE], id="repeated"),
        pytest.param([], id="none"),
    ],
)
def test_content_hash_changes_with_any_id(other):
    assert content_hash(other) != content_hash([EXAMPLE])


def test_content_hash_depends_on_the_order_and_on_nothing_else():
    first = Example(0, (1, 4), (0, 2), real_finished=True)
    second = Example(1, (1, 5), (1, 2), real_finished=True)
    assert content_hash([first, second]) != content_hash([second, first])
    assert content_hash([first, second]) == content_hash([replace(first), replace(second)])
