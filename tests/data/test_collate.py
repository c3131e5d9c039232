import math

import numpy as np
import pytest
import torch

from spin_lightning.data.collate import collate
from spin_lightning.data.dataset import Pair


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


PAIRS = [
    Pair(ids(1, 4), ids(5, 2), ids(6, 7, 8, 2), -1.5, -2.5),
    Pair(ids(1, 4, 5, 6), ids(7, 8, 2), ids(2), -1500.0625, -0.125),
]
ALONE = [pair._replace(generated_ids=ids(), reference_generated=math.nan) for pair in PAIRS]


def test_collate_puts_prompt_real_and_generated_one_after_the_other():
    batch = collate(PAIRS)
    assert batch.pairs.input_ids.tolist() == [1, 4, 5, 2, 6, 7, 8, 2, 1, 4, 5, 6, 7, 8, 2, 2]
    assert batch.pairs.prompt_lengths == (2, 4)
    assert batch.pairs.response_lengths == ((2, 4), (3, 1))
    assert len(batch) == 2


def test_collate_keeps_reference_logps_in_float64():
    batch = collate(PAIRS)
    for column, values in [
        (batch.reference_real, [-1.5, -1500.0625]),
        (batch.reference_generated, [-2.5, -0.125]),
    ]:
        assert column.dtype == torch.float64
        assert column.tolist() == values


@pytest.mark.parametrize("pairs", [PAIRS, ALONE])
def test_collate_ids_are_int64_as_embeddings_take_them(pairs):
    assert collate(pairs).pairs.input_ids.dtype == torch.int64


def test_collate_without_generated_responses_has_no_generated_side():
    batch = collate(ALONE)
    assert batch.pairs.response_lengths == ((2,), (3,))
    assert batch.reference_generated is None
